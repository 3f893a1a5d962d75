"""ONNX files: read without their weights, checked, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx.external_data_helper import uses_external_data

from river_compile.errors import InputError, RiverError
from river_compile.exporters.onnx.file_problems import kind_of_file, missing_weights
from river_compile.exporters.onnx.normal_form import normal_form
from river_compile.passes.onnx.external_data import chunks, make_inline, place_of, tensor_bytes

__all__ = [
    "CALIBRATION",
    "EXTERNAL_ABOVE",
    "RIVER_CONFIG",
    "check_apart",
    "check_target",
    "fingerprint",
    "is_river",
    "load",
    "note",
    "save",
    "staging",
]

RIVER_CONFIG = "river.config"
CALIBRATION = "river.calibration"
EXTERNAL_ABOVE = 1 << 30
_PROTOBUF_LIMIT = (1 << 31) - (1 << 24)
_ALIGNMENT = 4096
_INLINE_BELOW = 1024
_LFS = b"version https://git-lfs.github.com/spec/"
_NO_WEIGHT = {"river.tau", "river.max_depth", "river.tau_offsets", "river/layers"}
_NO_WEIGHT |= {"river.logits_from", "river/decides/one", "river/logits_from/end", "river/logits_from/axis"}
# What a river computes with beside its weights, which show all other settings but thresholds.
_FUNCTION = ("activations", "exit_every")


def load(path: Path) -> onnx.ModelProto:
    """Read a model without its external data, in its `normal_form`.

    Raises:
        InputError: not a file, not ONNX, truncated, a Git LFS pointer, already a river model, without weights; a weight
            that is not as long as its shape takes; external data missing, too short, or outside the model's folder.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        _refuse_pointer(path, str(path))
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        why = kind_of_file(path) or _one_line(error)
        raise InputError(f"{path}: not an ONNX model, or truncated ({why})") from error
    if not model.graph.node or not model.opset_import:
        why = kind_of_file(path) or "it has no graph"
        raise InputError(f"{path}: not an ONNX model, or truncated ({why})")
    if is_river(model):
        raise InputError(f"{path}: already a river model; export from the original")
    for tensor in _tensors(model):
        _check_weight(tensor, path)
    model = normal_form(model, path)
    if why := missing_weights(model):
        raise InputError(f"{path}: {why}")
    return model


def is_river(model: onnx.ModelProto) -> bool:
    """Whether a model was given a river, as its metadata tells."""
    return any(prop.key == RIVER_CONFIG for prop in model.metadata_props)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _all_tensors(nodes: Iterable[onnx.NodeProto], weights: Iterable[onnx.TensorProto]) -> Iterator[onnx.TensorProto]:
    """All tensors of nodes and their subgraphs."""
    yield from weights
    for node in nodes:
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else ()
            yield from attribute.tensors
            for graph in [*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs]:
                yield from _all_tensors(graph.node, graph.initializer)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    sparse = (part for s in model.graph.sparse_initializer for part in (s.values, s.indices))
    yield from _all_tensors(model.graph.node, [*model.graph.initializer, *sparse])
    for function in model.functions:
        yield from _all_tensors(function.node, ())


def _check_weight(tensor: onnx.TensorProto, path: Path) -> None:
    """A weight's data is there, as long as its shape takes, in the model or in a file of the model's.

    A file is the model's if its path leads nowhere but into the folder, and so do its links; or, where the model is a
    link itself, into the folder of the file that it means. A hub's cache is made so, and ONNX Runtime asks the same.
    """
    try:
        size = tensor_bytes(tensor)
        place = place_of(tensor) if uses_external_data(tensor) else None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if place is None:
        if tensor.raw_data and len(tensor.raw_data) != size:
            raise InputError(
                f"{path}: weight {tensor.name!r} is {len(tensor.raw_data)} bytes, but its shape takes {size}"
            )
        return
    location = Path(os.path.normpath(place.location))
    data = path.parent / location
    folders = (path.parent.resolve(), path.resolve().parent)
    inside = any(data.resolve().is_relative_to(folder) for folder in folders)
    if location.is_absolute() or location.parts[:1] == ("..",) or not inside:
        raise InputError(f"{path}: weight {tensor.name!r} lies outside the model's folder: {place.location}")
    if not data.is_file():
        raise InputError(f"{path}: external data is missing: {place.location}")
    if data.stat().st_size < place.offset + place.length:
        _refuse_pointer(data, f"{path}: external data {place.location}")
        raise InputError(
            f"{path}: external data is truncated: {place.location} ends before weight {tensor.name!r} does"
        )


def _refuse_pointer(file: Path, what: str) -> None:
    """Git leaves a short text in the place of a large file that it did not fetch.

    Raises:
        InputError: the file is such a text.
    """
    with open(file, "rb") as source:
        if source.read(len(_LFS)) == _LFS:
            raise InputError(f"{what} is a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'")


def check_target(path: Path) -> None:
    """Before any work: the file can be written.

    Raises:
        InputError: it is a folder, or it lies in no folder that can be written to.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the file to write")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: {parent} is no folder that can be written to")


def check_apart(target: Path, source: Path, model: onnx.ModelProto) -> None:
    """Writing the target, and its external data, touches no file of the source.

    Raises:
        InputError: it would.
    """
    data = {place_of(tensor).location for tensor in _tensors(model) if uses_external_data(tensor)}
    inputs = {source.resolve(), *((source.parent / location).resolve() for location in data)}
    for output in (target, _data_beside(target)):
        if output.resolve() in inputs:
            raise InputError(f"{target}: output and input are the same file: {output.name}")


def _is_large(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor may lie outside the model. Shapes and axes may not: type inference reads them."""
    return tensor_bytes(tensor) >= _INLINE_BELOW


def _data_beside(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def save(
    model: onnx.ModelProto,
    path: Path,
    folder: Path | None,
    external: bool | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[Path], None] = lambda written: None,
) -> list[Path]:
    """Write a model under a temporary name, then rename it: it is there whole or not at all.

    Args:
        model: its external tensors point into ``folder`` and are streamed from there. It is changed by this call.
        external: whether weights go into ``<name>.data`` beside the model; None: when the model has large
            ones there, or they are over 1 GB in all. They are streamed there without being held in memory, and mapped
            where the model runs.
        progress: is told bytes done and bytes in all.
        check: is told the temporary name when all is written; what it raises leaves the target as it was.

    Returns:
        The files written, the model first.

    Raises:
        RiverError: the disk is full or not writable, or the model is too large for one file.
    """
    total = sum(map(tensor_bytes, model.graph.initializer))
    if external is None:
        external = total > EXTERNAL_ABOVE or any(uses_external_data(t) for t in model.graph.initializer if _is_large(t))
    if not external and total > _PROTOBUF_LIMIT:
        raise RiverError(f"{path}: {total / 2**30:.1f} GB of weights do not fit into one file; use external data")
    data_name = _data_beside(path).name
    with staging(path) as stage:
        held = [t for t in model.graph.initializer if not (external and _is_large(t))]
        for tensor in _all_tensors(model.graph.node, held):
            make_inline(tensor, folder)
        if external:
            with open(stage / data_name, "wb") as sink:
                _stream(model, sink, data_name, folder, lambda done: progress(done, total))
        _write(model, stage / path.name)
        check(stage / path.name)
        names = [data_name, path.name] if external else [path.name]
        if external:
            # An old model must not meet the new weights, not even for a moment.
            path.unlink(missing_ok=True)
        for name in names:
            os.replace(stage / name, path.parent / name)
        if not external:
            (path.parent / data_name).unlink(missing_ok=True)
    progress(total, total)
    return [path.parent / name for name in reversed(names)]


def note(path: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata to a written model, without reading or copying it.

    A Protobuf message behind another is merged into it, so what is appended is a model of these entries and nothing
    else.

    Raises:
        RiverError: the file cannot be written to.
    """
    entries = onnx.ModelProto()
    onnx.helper.set_model_props(entries, dict(metadata))
    try:
        with open(path, "ab") as file:
            file.write(entries.SerializeToString())
    except OSError as error:
        raise RiverError(f"{path}: cannot be written: {error.strerror or _one_line(error)}") from error


def fingerprint(model: onnx.ModelProto, folder: Path | None) -> str:
    """SHA-256 of what a river model computes with at a given exit depth: all weights of backbone and river, and the
    settings that neither they nor a threshold show."""
    settings = next(json.loads(p.value) for p in model.metadata_props if p.key == RIVER_CONFIG)
    digest = hashlib.sha256(json.dumps([settings.get(name) for name in _FUNCTION]).encode())
    for tensor in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
        if tensor.name not in _NO_WEIGHT:
            digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
            for chunk in chunks(tensor, folder):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def staging(path: Path, place: Path | None = None) -> Iterator[Path]:
    """A folder beside the target, or in ``place``, gone afterwards whatever happens.

    Raises:
        RiverError: something cannot be written; names the target.
    """
    place = place or path.parent
    # The name is known before the folder is made, so that a signal in between leaves nothing behind.
    stage = place / f".{path.name}.{secrets.token_hex(4)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        try:
            stage.mkdir()
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise RiverError(f"{path}: cannot be written: {error.strerror or _one_line(error)}") from error


def _write(model: onnx.ModelProto, path: Path) -> None:
    try:
        path.write_bytes(model.SerializeToString())
    except (EncodeError, ValueError) as error:
        raise RiverError(f"{path.name}: the model is too large for one file; use external data") from error


def _stream(
    model: onnx.ModelProto, sink: BinaryIO, location: str, folder: Path | None, progress: Callable[[int], None]
) -> None:
    """Move the large initializers of the model into one file, without holding more than a chunk of those on disk."""
    done = 0
    for tensor in filter(_is_large, model.graph.initializer):
        sink.seek(-(-sink.tell() // _ALIGNMENT) * _ALIGNMENT)
        offset = sink.tell()
        for chunk in chunks(tensor, folder):
            sink.write(chunk)
            done += len(chunk)
            progress(done)
        length = sink.tell() - offset
        for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(name)
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
