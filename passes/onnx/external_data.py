"""Weights, within the model or in a file beside it: where they lie, how long they are, what they hold."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from river_compile.errors import InputError

__all__ = ["Place", "chunks", "make_inline", "place_of", "tensor_bytes", "tensor_values"]

_NARROW = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where external data lies: a file, by its path in the model's folder, and bytes in it."""

    location: str
    offset: int
    length: int


def place_of(tensor: onnx.TensorProto) -> Place:
    """Where a tensor's external data lies. A length that is not told is what type and shape take.

    Raises:
        InputError: there is no location; a number is none, or negative; the length is not what type and shape take.
    """
    told = {entry.key: entry.value for entry in tensor.external_data}
    if not told.get("location"):
        raise InputError(f"weight {tensor.name!r} is external data without a location")
    size = tensor_bytes(tensor)
    offset, length = _number(tensor, told, "offset", 0), _number(tensor, told, "length", size)
    if length != size:
        raise InputError(f"weight {tensor.name!r} is {length} bytes of external data, but its shape takes {size}")
    return Place(told["location"], offset, length)


def _number(tensor: onnx.TensorProto, told: dict[str, str], key: str, otherwise: int) -> int:
    text = told.get(key, "").strip()
    if not text:
        return otherwise
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"weight {tensor.name!r}: the {key} of its external data is {text!r}, not a number of bytes")
    return int(text)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's data in bytes, as type and shape tell it.

    Raises:
        InputError: there is no such type or shape, or texts lie in external data.
    """
    if any(size < 0 for size in tensor.dims):
        raise InputError(f"weight {tensor.name!r} has a negative size in its shape {list(tensor.dims)}")
    if tensor.data_type == onnx.TensorProto.STRING and not uses_external_data(tensor):
        return sum(map(len, tensor.string_data))
    try:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        bits = _NARROW.get(name) or onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    except (KeyError, ValueError):
        raise InputError(f"weight {tensor.name!r} has a type that is not known: {tensor.data_type}") from None
    if tensor.data_type == onnx.TensorProto.STRING:
        raise InputError(f"weight {tensor.name!r} is texts, which cannot be external data")
    return int(-(-math.prod(tensor.dims) * bits // 8))


def tensor_values(tensor: onnx.TensorProto, folder: Path | None) -> np.ndarray:
    """The values of a tensor, read from external data if need be. Links are followed: `onnx_file.load` checks them."""
    if not uses_external_data(tensor):
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    if onnx.TensorProto.DataType.Name(tensor.data_type) not in _NARROW and sys.byteorder == "little":
        place = place_of(tensor)
        data = np.fromfile((folder or Path()) / place.location, np.uint8, place.length, offset=place.offset)
        if len(data) < place.length:
            raise InputError(f"external data ended early: {place.location}")
        return data.view(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tensor.dims)
    inline = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=b"".join(chunks(tensor, folder)))
    return np.asarray(onnx.numpy_helper.to_array(inline))


def make_inline(tensor: onnx.TensorProto, folder: Path | None) -> None:
    """Move external data into the tensor itself; one that has none stays as it is."""
    if uses_external_data(tensor):
        tensor.raw_data = b"".join(chunks(tensor, folder))
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT


def chunks(tensor: onnx.TensorProto, folder: Path | None) -> Iterator[bytes]:
    """The bytes of a tensor, as raw data has them, a limited number at once.

    Raises:
        InputError: external data ends early.
    """
    if not uses_external_data(tensor):
        yield tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        return
    place = place_of(tensor)
    with open((folder or Path()) / place.location, "rb") as source:
        source.seek(place.offset)
        left = place.length
        while left > 0:
            chunk = source.read(min(_CHUNK, left))
            if not chunk:
                raise InputError(f"external data ended early: {place.location}")
            left -= len(chunk)
            yield chunk
