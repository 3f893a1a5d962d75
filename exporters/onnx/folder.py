"""Folders of models: whose they are, which file in them is the decoder, and what goes with it into a new one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import onnx

from river_compile.errors import InputError, MissingExtra
from river_compile.exporters.onnx.onnx_file import is_river, staging

__all__ = ["CARD", "GENAI_CONFIG", "ModelFolder", "check_folder_target", "genai_config", "river_in", "staged_folder"]

CARD = "README.md"
GENAI_CONFIG = "genai_config.json"
_CONFIG, _MODEL, _TOKENIZER = "config.json", "model.onnx", "tokenizer_config.json"
_WEIGHTS = ("*.safetensors", "*.bin")
_OLD_OPTIMUM = ("decoder_model.onnx", "decoder_with_past_model.onnx", "decoder_model_merged.onnx")
# What configs, tokenizers, chat templates, remote code and licences are called, whoever wrote them.
_SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.vocab", "*.bpe", "*.py", "*.yml", "*.yaml")
_SIDE_NAMES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
_OF_WEIGHTS = ("*.index.json", "*.onnx.json", "quantize_config.json")
_SIDE_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class ModelFolder:
    """A folder that one of the public tools made.

    Fields:
        path: the folder; of a hub name, its snapshot in the hub's cache.
        kind: "hf" (Hugging Face weights), "optimum" (an ONNX file under optimum's names beside a Hugging Face config),
            "genai" (ONNX Runtime GenAI).
        model: the decoder's ONNX file in it, relative; under "hf" the name that optimum would give it.
    """

    path: Path
    kind: Literal["hf", "optimum", "genai"]
    model: Path

    @classmethod
    def of(cls, path: Path) -> ModelFolder | None:
        """What a folder is; None if it is none of these.

        Raises:
            InputError: it is one, of a form that has no single decoder to take: of several models, of another
                architecture, or of an older release of the tool.
        """
        if (path / GENAI_CONFIG).is_file():
            return cls(path, "genai", Path(_genai_decoder(path)))
        if not (path / _CONFIG).is_file():
            return None
        if any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
            return cls(path, "hf", Path(_MODEL))
        for model in (Path(_MODEL), Path("onnx", _MODEL)):
            if (path / model).is_file():
                return cls(path, "optimum", model)
        for name in _OLD_OPTIMUM:
            if found := next(path.glob(f"**/{name}"), None):
                raise InputError(
                    f"{path}: {found.relative_to(path)} is of an older optimum, of two graphs or a merged one; "
                    "export the model anew with optimum-onnx 0.1 or later, or give the file of a decoder with past"
                )
        return None

    @classmethod
    def on_the_hub(cls, name: str) -> ModelFolder:
        """A hub name's files other than weights, fetched, or taken from the hub's cache.

        Raises:
            MissingExtra: transformers, whose hub client does that, is not installed.
            InputError: they cannot be had.
        """
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise MissingExtra("transformers", "hf", "reading a Hugging Face model") from error
        try:
            path = snapshot_download(name, allow_patterns=[*_SIDE_FILES, *_SIDE_NAMES])
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: its config and tokenizer cannot be had: {str(error).splitlines()[0]}") from error
        return cls(Path(path), "hf", Path(_MODEL))

    def copy_side_files(self, target: Path) -> list[str]:
        """All that a tool reads beside the decoder: config, tokenizer, chat template, remote code, licences, and for
        GenAI the other models that its config names. The model card is not among them.

        Returns:
            Names of the files copied, relative.
        """
        chosen = [file for file in sorted(self.path.iterdir()) if file.is_file() and _is_side_file(file.name)]
        for folder in _SIDE_FOLDERS:
            chosen += [file for file in sorted(self.path.glob(f"{folder}/*")) if file.is_file()]
        if self.kind == "genai":
            chosen += [file for file in _other_models(self.path, self.model) if file not in chosen]
        names = [str(file.relative_to(self.path)) for file in chosen]
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / name, target / name)
        if self.kind == "hf" and _TOKENIZER in names:
            _spell_tokenizer_class(target / _TOKENIZER)
        return names


def _spell_tokenizer_class(file: Path) -> None:
    """transformers 5 writes a name that optimum's transformers 4 does not know, for a class that both have."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_side_file(name: str) -> bool:
    def matches(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    return matches((*_SIDE_FILES, *_SIDE_NAMES)) and not matches(_OF_WEIGHTS)


def genai_config(folder: Path) -> dict[str, Any]:
    """
    Raises:
        InputError: it is no JSON object.
    """
    try:
        read = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / GENAI_CONFIG}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(read, dict):
        raise InputError(f"{folder / GENAI_CONFIG}: no JSON object")
    return read


def _genai_decoder(folder: Path) -> str:
    """The decoder's file, as a GenAI config names it."""
    file = folder / GENAI_CONFIG
    model = genai_config(folder).get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict) or "type" not in model:
        raise InputError(f"{file}: it has no model.type and model.decoder, so it is of another GenAI than 0.4 to 0.18")
    if decoder.get("pipeline"):
        raise InputError(f"{file}: a pipeline of several models, none of which is a whole decoder")
    if isinstance(model.get("encoder"), dict) and model["encoder"].get("filename"):
        raise InputError(f"{file}: an encoder-decoder model ({model['type']}); give its decoder's ONNX file")
    if isinstance(model.get("draft"), dict):
        raise InputError(f"{file}: the model has a drafter already; start from the folder without one")
    name = decoder.get("filename", _MODEL)
    if not (folder / name).is_file():
        raise InputError(f"{file}: names the decoder {name!r}, which is not there")
    return str(name)


def _other_models(folder: Path, decoder: Path) -> Iterator[Path]:
    """Other files that a GenAI config names, and their external data."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)

    for name in dict.fromkeys(strings(genai_config(folder))):
        file = folder / name
        if Path(name) == decoder or Path(name).name != name or not file.is_file() or _is_side_file(name):
            continue
        yield file
        if file.suffix == ".onnx":
            model = onnx.load(str(file), load_external_data=False)
            places = (entry.value for tensor in model.graph.initializer for entry in tensor.external_data)
            yield from (folder / place for place in sorted(set(places)) if (folder / place).is_file())


def check_folder_target(target: Path, source: ModelFolder) -> None:
    """A folder may be made there: it is not there yet, it is empty, or this package made it.

    Raises:
        InputError: it may not.
    """
    if target.is_file():
        raise InputError(f"{target}: is a file; name a folder, or an .onnx file")
    if not target.exists():
        return
    if target.resolve() == source.path.resolve():
        raise InputError(f"{target}: output and input are the same folder")
    if any(target.iterdir()) and not any(
        _is_river(file) for file in (*target.glob("*.onnx"), *target.glob("*/*.onnx"))
    ):
        raise InputError(f"{target}: is there, and nothing that river-export made; name a new folder")


def river_in(folder: Path) -> Path:
    """The river model's file in a folder that `river-export` made.

    Raises:
        InputError: there is none.
    """
    files = (*sorted(folder.glob("*.onnx")), *sorted(folder.glob("onnx/*.onnx")))
    found = next(filter(_is_river, files), None)
    if found is None:
        raise InputError(f"{folder}: no river model is in it; make one with 'river export {folder} -o NEW_FOLDER'")
    return found


def _is_river(file: Path) -> bool:
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception:
        return False
    return is_river(model)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, whose files come to the target when all went well; else they are gone.

    Other files of a target that is there already stay.

    Raises:
        RiverError: it cannot be written.
    """
    with staging(target) as stage:
        yield stage
        if target.exists():
            _move_into(stage, target)
        else:
            stage.rename(target)


def _move_into(stage: Path, target: Path) -> None:
    """Graphs last, and old ones away first: an old graph must not meet new weights, not even for a moment."""
    files = sorted((file for file in stage.rglob("*") if file.is_file()), key=lambda file: file.suffix == ".onnx")
    places = {file: target / file.relative_to(stage) for file in files}
    for file, place in places.items():
        if file.suffix == ".onnx":
            place.unlink(missing_ok=True)
    for file, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
