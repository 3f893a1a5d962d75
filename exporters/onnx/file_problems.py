"""What a file or folder is that is no model to start from, and what a model lacks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

__all__ = ["kind_of_file", "missing_weights", "problem_of_folder"]

_HEAD = 512
_SUFFIXES = {".bin", ".gguf", ".onnx", ".pt", ".pth", ".safetensors"}
# Where a format's mark lies, the mark, and what to call a file that has it.
_MARKS = (
    (0, b"GGUF", "a GGUF file"),
    (0, b"GGML", "a GGML file"),
    (8, b'{"', "a safetensors file"),
    (0, b"PK\x03\x04", "a PyTorch checkpoint or another zip archive"),
    (0, b"\x80\x02", "a pickle, as PyTorch checkpoints are"),
    (0, b"\x80\x04", "a pickle, as PyTorch checkpoints are"),
    (0, b"\x80\x05", "a pickle, as PyTorch checkpoints are"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF", "an HDF5 file"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (4, b"ORTM", "a model in ONNX Runtime's own format (.ort)"),
    (0, b"ftrt", "a TensorRT engine"),
    (0, b"<!doctype html", "a web page, not what was to be downloaded"),
    (0, b"<html", "a web page, not what was to be downloaded"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it"),
)
_TO_EXPORT = ("GGUF", "GGML", "safetensors", "PyTorch")
_TYPED_DATA = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def kind_of_file(path: Path) -> str:
    """What a file is that was given for an ONNX model, by its first bytes; empty if they tell nothing."""
    with open(path, "rb") as source:
        head = source.read(_HEAD)
    for place, mark, kind in _MARKS:
        found = head[place : place + len(mark)]
        if found == mark or (mark.startswith(b"<") and found.lower() == mark):
            hint = "; give the Hugging Face model's folder, or an ONNX export of it"
            return kind + (hint if any(word in kind for word in _TO_EXPORT) else "")
    return ""


def problem_of_folder(folder: Path) -> str:
    """Why a path leads to no folder of a Hugging Face model; empty if it may, or if it may be a hub name."""
    if not folder.is_dir():
        may_be_on_the_hub = not folder.is_absolute() and len(folder.parts) <= 2 and folder.suffix not in _SUFFIXES
        return "" if may_be_on_the_hub else "no such file or folder"
    files = sorted(path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file())
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return "an adapter (LoRA) without its base model: merge it into the model first, and give that"
    if any(path.suffix in (".safetensors", ".bin") for path in files) and (folder / "config.json").is_file():
        return ""
    for path in files:
        if path.suffix == ".onnx":
            return f"no weights of a Hugging Face model, but ONNX: give the file, {path}"
        if path.suffix == ".gguf":
            return f"{path.name} is a GGUF file; give the Hugging Face model's folder, or an ONNX export of it"
    return "" if (folder / "config.json").is_file() else "no Hugging Face model: it has no config.json"


def missing_weights(model: onnx.ModelProto) -> str:
    """Which weights a model reads and does not have; empty if it has all."""
    bare = [tensor.name for tensor in model.graph.initializer if _is_bare(tensor)]
    lost = list(dict.fromkeys(_undefined(model.graph, frozenset())))
    names = bare or lost
    if not names:
        return ""
    what = "have no values" if bare else "are read and are not there"
    return f"a graph without its weights: {len(names)} of them {what}, such as {names[0]!r}"


def _is_bare(tensor: onnx.TensorProto) -> bool:
    if uses_external_data(tensor) or tensor.raw_data or not math.prod(tensor.dims):
        return False
    return not any(len(getattr(tensor, field)) for field in _TYPED_DATA)


def _undefined(graph: onnx.GraphProto, outside: Set[str]) -> Iterator[str]:
    """Names that a graph's nodes read and nothing makes."""
    known = outside | {name for name in _made(graph) if name}
    for node in graph.node:
        yield from (name for name in node.input if name and name not in known)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _undefined(inner, known)


def _made(graph: onnx.GraphProto) -> Iterable[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    yield from (name for node in graph.node for name in node.output)
