"""Backbone weights of deep layers in ONNX Runtime: mapped from the model's own file, neither packed nor copied.

ONNX Runtime packs weights that cannot change into memory of its own when it loads a model. A weight that is an input
with a default can change, so it is read from where each pass is given it.
"""

from __future__ import annotations

import mmap
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data

from river_compile.errors import ConfigError, InputError
from river_compile.passes.onnx.external_data import Place, place_of

__all__ = ["DeepWeights", "deep_weights"]

_FIELD = "offload_after"
_FOLDER = "session.model_external_initializers_file_folder_path"
_BACKBONE = re.compile(r"backbone\.(\d+)/")
_ALIGNMENT = 64
_BFLOAT16 = onnx.TensorProto.BFLOAT16


class DeepWeights:
    """The weights of backbone layers from one on, mapped from their file for as long as this lives.

    Fields:
        model: the model to load in the place of the file, as bytes; its other weights lie where they lay.
        feeds: the weights, which every pass is to be given.
        nbytes: bytes of the weights.

    Args:
        path: an exported river model whose weights lie in a file beside it.
        after: how many backbone layers keep theirs in memory.

    Raises:
        ConfigError: the number is none, the model has no river, or its weights lie within it.
        InputError: the file of weights is missing or shorter than the model tells.
    """

    def __init__(self, path: Path, after: int) -> None:
        if not isinstance(after, int) or isinstance(after, bool) or after < 0:
            raise ConfigError(_FIELD, f"must be a whole number, 0 or more, not {after!r}")
        self._path, self._after = path, after
        try:
            model = onnx.load(str(path), load_external_data=False)
        except (DecodeError, OSError) as error:
            raise InputError(f"{path}: not an ONNX model, or truncated") from error
        weights = deep_weights(model, after)
        self._files: dict[str, mmap.mmap] = {}
        places = {weight.name: place_of(weight) for weight in weights}
        for place in places.values():
            if place.location not in self._files:
                self._files[place.location] = self._map(place.location)
        self.feeds = {weight.name: self._value(weight, places[weight.name]) for weight in weights}
        self.nbytes = sum(place.length for place in places.values())
        for weight in weights:
            kind = onnx.helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims))
            model.graph.input.append(kind)
        self.model: bytes = model.SerializeToString()

    def settle(self, options: Any) -> None:
        """Have a session of these options find the model's other weights."""
        options.add_session_config_entry(_FOLDER, str(self._path.parent.absolute()))

    def check(self) -> None:
        """Whether the files are whole: to read behind a file's end would kill the process.

        Raises:
            InputError: one was cut.
        """
        for location, file in self._files.items():
            if (size := file.size()) < len(file):
                raise InputError(
                    f"{self._path}: {location} was cut to {size} of its {len(file)} bytes: load the model anew"
                )

    def passed(self, depth: int | None) -> None:
        """Let go what a pass has read: one of a depth, or of one that the model does not tell."""
        if depth is None or depth > self._after:
            self.drop()

    def drop(self) -> None:
        """Let go the weights' memory; the next pass that needs them reads them from the file."""
        for file in self._files.values():
            # All that is read through this mapping are these weights, and what the system maps around them.
            file.madvise(mmap.MADV_DONTNEED)

    def _map(self, location: str) -> mmap.mmap:
        if not hasattr(mmap, "MADV_DONTNEED"):
            raise ConfigError(_FIELD, "this operating system has no madvise")
        try:
            with open(self._path.parent / location, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InputError(f"{self._path}: external data is missing: {location}") from error

    def _value(self, weight: onnx.TensorProto, place: Place) -> Any:
        from onnxruntime import OrtValue

        file = self._files[place.location]
        if place.offset + place.length > len(file):
            raise InputError(
                f"{self._path}: external data is truncated: {place.location} ends before weight {weight.name!r} does"
            )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
        # numpy has no bfloat16 of its own.
        plain = np.dtype(np.uint16) if weight.data_type == _BFLOAT16 else dtype
        values = np.frombuffer(file, plain, place.length // plain.itemsize, place.offset).reshape(tuple(weight.dims))
        return OrtValue.ortvalue_from_numpy_with_onnx_type(values, weight.data_type)


def deep_weights(model: onnx.ModelProto, after: int) -> list[onnx.TensorProto]:
    """The float weights that nothing but the backbone of layers from ``after`` on reads.

    Raises:
        ConfigError: the model has no river, or these weights lie within it.
    """
    readers: dict[str, list[int]] = defaultdict(list)
    for node in _nodes(model.graph.node):
        layer = _BACKBONE.match(node.name)
        for name in node.input:
            readers[name].append(int(layer[1]) if layer else -1)
    if not any(_BACKBONE.match(node.name) for node in _nodes(model.graph.node)):
        raise ConfigError(_FIELD, "the model has no river: there is nothing to run in the place of deep layers")
    given = {value.name for value in [*model.graph.input, *model.graph.output]}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, _BFLOAT16)
    found = [
        tensor
        for tensor in model.graph.initializer
        if min(readers[tensor.name], default=-1) >= after
        and tensor.name not in given
        and tensor.data_type in floats
        and len(tensor.dims) >= 2
    ]
    outside = [tensor for tensor in found if uses_external_data(tensor)]
    if found and not outside:
        raise ConfigError(_FIELD, "the weights lie within the model: export it with --external-data")
    return [tensor for tensor in outside if place_of(tensor).offset % _ALIGNMENT == 0]


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g.node)
