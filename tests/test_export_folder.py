"""A folder in, a folder out that the same tool loads; `tests/peers` load it with the tools themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import river_compile
from river_compile import RiverConfig
from river_compile.cli.export import main
from river_compile.cli.run import main as run
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.onnx.shared_weights import shared_tensors
from river_compile.passes.onnx.external_data import place_of
from river_compile.runtime import OnnxDecoder
from tests.conftest import Exported
from tests.words import save_word_model, save_word_tokenizer

PROMPT = [5, 9, 17, 33]


@pytest.fixture
def optimum(exported: Exported, tmp_path: Path) -> Path:
    folder = tmp_path / "optimum"
    folder.mkdir()
    for file in exported("llama").parent.iterdir():
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture
def genai(optimum: Path) -> Path:
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    decoder = {
        "filename": "model.onnx",
        "inputs": names,
        "session_options": {"provider_options": [{"cuda": {"enable_cuda_graph": "1", "device_id": "0"}}]},
    }
    config = {"model": {"type": "llama", "decoder": decoder}, "search": {"max_length": 64}}
    (optimum / "genai_config.json").write_text(json.dumps(config))
    save_word_tokenizer(optimum)
    return optimum.rename(optimum.with_name("genai"))


def _tokens(file: Path, **settings: object) -> list[list[int]]:
    return OnnxDecoder(file).generate([PROMPT], 6, **settings).tokens  # type: ignore[arg-type]


def _names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _places(model: onnx.ModelProto) -> set[str]:
    """The files that a model's weights lie in."""
    return {place_of(tensor).location for tensor in shared_tensors(model)}


def test_a_folder_of_optimum_keeps_its_names(optimum: Path, tmp_path: Path) -> None:
    report = river_compile.export(optimum, tmp_path / "out", RiverConfig(tau=0.8))
    made = ["README.md", "config.json", "generation_config.json", "model.onnx", "model.onnx.data"]
    assert _names(tmp_path / "out") == made
    assert (report.source, report.output) == (str(optimum), str(tmp_path / "out"))
    assert "optimum cannot set the threshold at run time: tau 0.8 is what it decides by" in report.notes
    assert _tokens(tmp_path / "out" / "model.onnx", tau=2.0) == _tokens(optimum / "model.onnx")
    outputs = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.output
    assert [dim.dim_value for dim in outputs[-1].type.tensor_type.shape.dim] == [1], "IO binding takes no scalar"


def test_the_onnx_folder_of_a_repository_stays_one(optimum: Path, tmp_path: Path) -> None:
    (optimum / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (optimum / name).rename(optimum / "onnx" / name)
    river_compile.export(optimum, tmp_path / "out")
    assert {"onnx/model.onnx", "onnx/model.onnx.data", "config.json"} <= set(_names(tmp_path / "out"))


def test_a_hugging_face_folder_becomes_one_of_optimum(tmp_path: Path) -> None:
    save_word_model(tmp_path / "hf")
    result = CliRunner().invoke(main, [str(tmp_path / "hf"), "-o", str(tmp_path / "out"), "--tau", "2"])
    assert result.exit_code == 0, result.output
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.onnx"} <= set(_names(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: onnx\n")
    for words in ("`hf` with an exit river", "rtn, 4.00 bits", "ORTModelForCausalLM", "agreement", "river run out "):
        assert words in card
    assert str(tmp_path) not in card
    told = CliRunner().invoke(run, [str(tmp_path / "out"), "--prompt", "w5 w9", "--max-new-tokens", "4", "--json"])
    assert len(json.loads(told.stdout)["tokens"][0]) == 4
    wrong = CliRunner().invoke(run, [str(tmp_path / "hf"), "--prompt", "w5 w9"])
    assert (wrong.exit_code, "no river model is in it; make one with 'river export" in wrong.output) == (2, True)


def test_without_an_output_the_river_lies_in_the_folder(optimum: Path) -> None:
    report = river_compile.export(optimum)
    assert report.output == str(optimum / "model.river.onnx")
    assert river_compile.plan(optimum).report.layers == report.layers


def test_the_original_can_stand_beside_it_on_the_same_weights(optimum: Path, tmp_path: Path) -> None:
    river_compile.export(optimum, tmp_path / "out", keep_original=True)
    plain = tmp_path / "out" / "original.onnx"
    graph = onnx.load(plain, load_external_data=False)
    assert _places(graph) == {"model.onnx.data"}
    assert sum(len(tensor.raw_data) for tensor in graph.graph.initializer) < 4096
    ids = np.array([PROMPT])
    one, other = OnnxDecoder(plain), OnnxDecoder(optimum / "model.onnx")
    np.testing.assert_array_equal(one.forward(ids, one.start(1))[0], other.forward(ids, other.start(1))[0])


def test_genais_config_loses_cuda_graphs_and_nothing_else(genai: Path, tmp_path: Path) -> None:
    report = river_compile.export(genai, tmp_path / "out")
    before, after = (json.loads((folder / "genai_config.json").read_text()) for folder in (genai, tmp_path / "out"))
    options = after["model"]["decoder"]["session_options"]["provider_options"][0]["cuda"]
    assert options == {"enable_cuda_graph": "0", "device_id": "0"}
    options["enable_cuda_graph"] = "1"
    assert after == before
    assert any("CUDA graphs" in note for note in report.notes)
    assert any("GenAI cannot set the threshold at run time" in note for note in report.notes)
    assert "onnxruntime_genai" in (tmp_path / "out" / "README.md").read_text()


def test_exact_decoding_in_genai_is_a_pair_of_models_on_one_file_of_weights(genai: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    river_compile.export(genai, out, RiverConfig(exact=True, bits=8, head_bits=8))
    config = json.loads((out / "genai_config.json").read_text())
    decoder, draft = config["model"]["decoder"], config["model"]["draft"]
    assert (decoder["filename"], draft["filename"]) == ("model.onnx", "draft.onnx")
    assert decoder["inputs"] == draft["inputs"]
    assert config["speculative"] == {"max_draft_tokens": 4}
    shared = {weight["name"] for weight in draft["shared_initializers"]}
    assert shared and shared == {weight["name"] for weight in decoder["shared_initializers"]}
    for name in ("model.onnx", "draft.onnx", "river.onnx"):
        assert _places(onnx.load(out / name, load_external_data=False)) == {"river.onnx.data"}
    expected = _tokens(genai / "model.onnx")
    assert _tokens(out / "model.onnx") == expected
    assert _tokens(out / "river.onnx", exact=True) == expected
    assert _tokens(out / "draft.onnx") == _tokens(out / "river.onnx", exact=False, max_depth=0)


def test_on_a_cpu_no_shared_initializers_are_listed(genai: Path, tmp_path: Path) -> None:
    """GenAI 0.18 stops at them there."""
    config = json.loads((genai / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    (genai / "genai_config.json").write_text(json.dumps(config))
    river_compile.export(genai, tmp_path / "out", RiverConfig(exact=True, bits=8))
    assert (
        "shared_initializers" not in json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["draft"]
    )


def test_an_exact_river_that_no_tool_drafts_with_is_the_original(optimum: Path, tmp_path: Path) -> None:
    report = river_compile.export(optimum, tmp_path / "out", RiverConfig(exact=True, bits=8))
    assert _tokens(tmp_path / "out" / "model.onnx", exact=False) == _tokens(optimum / "model.onnx")
    assert any("optimum does not draft" in note for note in report.notes)


def test_what_river_export_made_may_be_made_anew(optimum: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    river_compile.export(optimum, out, RiverConfig(bits=4))
    (out / "mine.txt").write_text("kept")
    river_compile.export(optimum, out, RiverConfig(bits=8))
    assert "8.00 bits" in (out / "README.md").read_text()
    assert (out / "mine.txt").read_text() == "kept"
    with pytest.raises(InputError, match="already a river model"):
        river_compile.export(out, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_what_makes_no_folder_is_refused(optimum: Path, tmp_path: Path) -> None:
    (tmp_path / "strange").mkdir()
    with pytest.raises(InputError, match=r"no Hugging Face model: it has no config.json"):
        river_compile.export(tmp_path / "strange", tmp_path / "out")
    with pytest.raises(InputError, match=r"is there, and nothing that river-export made"):
        river_compile.export(optimum, tmp_path)
    with pytest.raises(ConfigError, match=r"^external_data: "):
        river_compile.export(optimum, tmp_path / "out", RiverConfig(external_data=False))
    with pytest.raises(ConfigError, match=r"^keep_original: is for a folder"):
        river_compile.export(optimum, tmp_path / "out.onnx", keep_original=True)
    assert _names(tmp_path / "strange") == []
    assert not (tmp_path / "out").exists()
