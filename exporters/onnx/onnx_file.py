"""ONNX files: read without their weights, checked, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, EncodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from river_compile.errors import InputError, RiverError
from river_compile.exporters.onnx.file_problems import kind_of_file, missing_weights

__all__ = [
    "CALIBRATION",
    "EXTERNAL_ABOVE",
    "RIVER_CONFIG",
    "check_apart",
    "check_target",
    "fingerprint",
    "load",
    "save",
    "tensor_bytes",
]

RIVER_CONFIG = "river.config"
CALIBRATION = "river.calibration"
EXTERNAL_ABOVE = 1 << 30
_PROTOBUF_LIMIT = (1 << 31) - (1 << 24)
_ALIGNMENT = 4096
_INLINE_BELOW = 1024
_NARROW: dict[int, int] = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, onnx.TensorProto.FLOAT4E2M1: 4}
_CHUNK = 1 << 24
_NO_WEIGHT = ("river.tau", "river.max_depth", "river.tau_offsets", "river/thresholds/axes", "river/layers")
# What a river computes with beside its weights, which show all other settings but thresholds.
_FUNCTION = ("activations", "exit_every")


def load(path: Path) -> onnx.ModelProto:
    """Read a model without its external data, local functions inlined.

    Raises:
        InputError: not a file, not ONNX, truncated, already a river model, without weights; external data missing, too
            short, or outside the model's folder.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        why = kind_of_file(path) or _one_line(error)
        raise InputError(f"{path}: not an ONNX model, or truncated ({why})") from error
    if not model.graph.node or not model.opset_import:
        why = kind_of_file(path) or "it has no graph"
        raise InputError(f"{path}: not an ONNX model, or truncated ({why})")
    if any(prop.key == RIVER_CONFIG for prop in model.metadata_props):
        raise InputError(f"{path}: already a river model; export from the original")
    for tensor in _all_tensors(model.graph):
        _check_external(tensor, path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    if why := missing_weights(model):
        raise InputError(f"{path}: {why}")
    return model


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _all_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _all_tensors(attribute.g)


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    if not uses_external_data(tensor):
        return
    info = ExternalDataInfo(tensor)
    folder = path.parent.resolve()
    data = (folder / info.location).resolve()
    if not data.is_relative_to(folder):
        raise InputError(f"{path}: weight {tensor.name!r} lies outside the model's folder: {info.location}")
    if not data.is_file():
        raise InputError(f"{path}: external data is missing: {info.location}")
    end = (info.offset or 0) + (info.length or 0)
    if data.stat().st_size < end:
        raise InputError(f"{path}: external data is truncated: {info.location} ends before weight {tensor.name!r} does")


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
    data = {ExternalDataInfo(tensor).location for tensor in _all_tensors(model.graph) if uses_external_data(tensor)}
    inputs = {source.resolve(), *((source.parent / location).resolve() for location in data)}
    for output in (target, _data_beside(target)):
        if output.resolve() in inputs:
            raise InputError(f"{target}: output and input are the same file: {output.name}")


def _is_large(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor may lie outside the model. Shapes and axes may not: type inference reads them."""
    return tensor_bytes(tensor) >= _INLINE_BELOW


def _data_beside(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's data in bytes."""
    if tensor.raw_data:
        return len(tensor.raw_data)
    if uses_external_data(tensor) and ExternalDataInfo(tensor).length:
        return int(ExternalDataInfo(tensor).length)
    bits = _NARROW.get(tensor.data_type) or onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    return int(math.prod(tensor.dims) * bits // 8)


def save(
    model: onnx.ModelProto,
    path: Path,
    folder: Path | None,
    external: bool | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write a model under a temporary name, then rename it: it is there whole or not at all.

    Args:
        model: its external tensors point into ``folder`` and are streamed from there. It is changed by this call.
        external: whether weights go into ``<name>.data`` beside the model; None: when they are over 1 GB in all.
        progress: is told bytes done and bytes in all.

    Returns:
        The files written, the model first.

    Raises:
        RiverError: the disk is full or not writable, or the model is too large for one file.
    """
    total = sum(map(tensor_bytes, model.graph.initializer))
    external = total > EXTERNAL_ABOVE if external is None else external
    if not external and total > _PROTOBUF_LIMIT:
        raise RiverError(f"{path}: {total / 2**30:.1f} GB of weights do not fit into one file; use external data")
    data_name = _data_beside(path).name
    with _staging(path) as stage:
        for tensor in _all_tensors(model.graph):
            if uses_external_data(tensor) and not (external and _is_large(tensor)):
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder or ""))
                tensor.ClearField("external_data")
                tensor.data_location = onnx.TensorProto.DEFAULT
        if external:
            with open(stage / data_name, "wb") as sink:
                _stream(model, sink, data_name, folder, lambda done: progress(done, total))
        _write(model, stage / path.name)
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


def fingerprint(model: onnx.ModelProto, folder: Path | None) -> str:
    """SHA-256 of what a river model computes with at a given exit depth: all weights of backbone and river, and the
    settings that neither they nor a threshold show."""
    settings = next(json.loads(p.value) for p in model.metadata_props if p.key == RIVER_CONFIG)
    digest = hashlib.sha256(json.dumps([settings.get(name) for name in _FUNCTION]).encode())
    for tensor in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
        if tensor.name not in _NO_WEIGHT:
            digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
            for chunk in _chunks(tensor, folder):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A folder beside the target, gone afterwards whatever happens."""
    # The name is known before the folder is made, so that a signal in between leaves nothing behind.
    stage = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
        for chunk in _chunks(tensor, folder):
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


def _chunks(tensor: onnx.TensorProto, folder: Path | None) -> Iterator[bytes]:
    if not uses_external_data(tensor):
        yield tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        return
    info = ExternalDataInfo(tensor)
    with open((folder or Path()) / info.location, "rb") as source:
        source.seek(info.offset or 0)
        left = info.length if info.length else os.fstat(source.fileno()).st_size - (info.offset or 0)
        while left > 0:
            chunk = source.read(min(_CHUNK, left))
            if not chunk:
                raise InputError(f"external data ended early: {info.location}")
            left -= len(chunk)
            yield chunk
