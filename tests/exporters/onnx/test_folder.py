"""Folders of the public tools: recognized by what is in them, refused by name, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from river_compile.errors import InputError, RiverError
from river_compile.exporters.onnx.folder import ModelFolder, check_folder_target, staged_folder
from tests.contrib_model import ContribDecoder


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def _genai(folder: Path, **model: object) -> None:
    folder.mkdir(exist_ok=True)
    decoder = {"filename": "model.onnx", "inputs": {}, "outputs": {}}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"type": "llama", "decoder": decoder} | model}))


@pytest.mark.parametrize(
    ("names", "kind", "model"),
    (
        (("config.json", "model.safetensors"), "hf", "model.onnx"),
        (("config.json", "pytorch_model-00001-of-00002.bin"), "hf", "model.onnx"),
        (("config.json", "model.safetensors", "onnx/model.onnx"), "hf", "model.onnx"),
        (("config.json", "model.onnx"), "optimum", "model.onnx"),
        (("config.json", "onnx/model.onnx", "onnx/model_q4.onnx"), "optimum", "onnx/model.onnx"),
    ),
)
def test_what_is_in_a_folder_says_whose_it_is(tmp_path: Path, names: tuple[str, ...], kind: str, model: str) -> None:
    _write(tmp_path, *names)
    found = ModelFolder.of(tmp_path)
    assert found is not None
    assert (found.kind, found.model.as_posix()) == (kind, model)


def test_genais_config_names_the_decoder(tmp_path: Path) -> None:
    _write(tmp_path, "text.onnx", "config.json")
    _genai(tmp_path, decoder={"filename": "text.onnx"})
    assert ModelFolder.of(tmp_path) == ModelFolder(tmp_path, "genai", Path("text.onnx"))


def test_other_folders_are_none_of_these(tmp_path: Path) -> None:
    _write(tmp_path, "notes.txt", "model.onnx")
    assert ModelFolder.of(tmp_path) is None


@pytest.mark.parametrize(
    ("model", "message"),
    (
        ({"decoder": {"filename": "gone.onnx"}}, "names the decoder 'gone.onnx', which is not there"),
        ({"decoder": {"pipeline": [{"a": {}}]}}, "a pipeline of several models"),
        ({"encoder": {"filename": "encoder.onnx"}, "type": "whisper"}, r"an encoder-decoder model \(whisper\)"),
        ({"draft": {"filename": "small.onnx"}}, "has a drafter already"),
        ({"decoder": None}, r"no model.type and model.decoder, so it is of another GenAI than"),
    ),
)
def test_genai_folders_without_one_decoder_are_refused(tmp_path: Path, model: dict[str, object], message: str) -> None:
    _write(tmp_path, "model.onnx")
    _genai(tmp_path, **model)
    with pytest.raises(InputError, match=message):
        ModelFolder.of(tmp_path)


@pytest.mark.parametrize("text", ("not json", "[]"))
def test_a_broken_config_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(InputError, match=r"genai_config.json: (cannot be read|no JSON object)"):
        ModelFolder.of(tmp_path)


@pytest.mark.parametrize("name", ("decoder_model.onnx", "onnx/decoder_model_merged.onnx"))
def test_an_older_optimum_is_named(tmp_path: Path, name: str) -> None:
    _write(tmp_path, "config.json", name)
    with pytest.raises(InputError, match=rf"{name} is of an older optimum.*optimum-onnx 0.1 or later"):
        ModelFolder.of(tmp_path)


def test_what_tools_read_goes_along_and_weights_do_not(tmp_path: Path) -> None:
    taken = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "modeling_x.py",
        "LICENSE",
    )
    left = ("model.safetensors", "model.safetensors.index.json", "onnx/model.onnx", "README.md", "training_args.bin")
    source, target = tmp_path / "in", tmp_path / "out"
    _write(source, *taken, *left)
    found = ModelFolder.of(source)
    assert found is not None
    assert sorted(found.copy_side_files(target)) == sorted(taken)
    assert sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()) == sorted(taken)


def test_other_models_that_genai_loads_go_along_with_their_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    ContribDecoder().save(source / "model.onnx")
    ContribDecoder().save(source / "vision.onnx")
    onnx.save(onnx.load(source / "vision.onnx"), source / "vision.onnx", save_as_external_data=True, location="v.data")
    _write(source, "unnamed.onnx")
    _genai(source, vision={"filename": "vision.onnx"})
    found = ModelFolder.of(source)
    assert found is not None
    assert sorted(found.copy_side_files(target)) == ["genai_config.json", "v.data", "vision.onnx"]


def test_a_hub_names_files_come_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--org--name"
    _write(cache / "snapshots" / "abc", "config.json", "tokenizer.json")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = ModelFolder.on_the_hub("org/name")
    assert (found.path.name, found.kind) == ("abc", "hf")
    with pytest.raises(InputError, match=r"org/other: its config and tokenizer cannot be had"):
        ModelFolder.on_the_hub("org/other")


def test_a_folder_of_other_things_is_not_written_into(tmp_path: Path) -> None:
    source = ModelFolder(tmp_path / "in", "optimum", Path("model.onnx"))
    (tmp_path / "in").mkdir()
    _write(tmp_path / "full", "thesis.txt", "model.onnx")
    (tmp_path / "empty").mkdir()
    check_folder_target(tmp_path / "empty", source)
    check_folder_target(tmp_path / "new", source)
    with pytest.raises(InputError, match="nothing that river-export made"):
        check_folder_target(tmp_path / "full", source)
    with pytest.raises(InputError, match="are the same folder"):
        check_folder_target(tmp_path / "in", source)
    with pytest.raises(InputError, match="is a file"):
        check_folder_target(tmp_path / "full" / "thesis.txt", source)


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out") as stage:
        _write(stage, "config.json")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    _write(tmp_path / "out", "model.onnx", "mine.txt")
    with staged_folder(tmp_path / "out") as stage:
        (stage / "model.onnx").write_text("new")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["mine.txt", "model.onnx"]
    assert (tmp_path / "out" / "model.onnx").read_text() == "new"
    _write(tmp_path, "blocked")
    with pytest.raises(RiverError, match="cannot be written"), staged_folder(tmp_path / "blocked" / "out"):
        pass
