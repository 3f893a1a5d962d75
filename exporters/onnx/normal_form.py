"""Files of older or rarer forms, brought into the one that the passes meet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx.external_data_helper import uses_external_data

from river_compile.errors import InputError
from river_compile.passes.onnx.external_data import tensor_values

__all__ = ["MIN_OPSET", "normal_form", "opset_of", "raise_opset", "without_weights"]

MIN_OPSET = 13
"""The first in which axes are operands, as the passes write them."""

_MIN_IR = 4
_SMALL = 1024
_STANDARD = ("", "ai.onnx")
# ONNX's tools leave other domains alone.
_HIDDEN = "river.hidden"


def normal_form(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model without local functions and sparse weights, of opset 13 and IR 4 at least; it may be changed.

    Args:
        model: read without its external data.
        path: its file, for messages and external data.

    Raises:
        InputError: ONNX's converter cannot raise the opset.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model, convert_version=True)
    _make_dense(model.graph, path.parent)
    if model.ir_version < _MIN_IR:
        # Every weight must be listed as an input there, and none can be set by a caller.
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in weights]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = _MIN_IR
    return raise_opset(model, MIN_OPSET, path)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators; 1 if the model names none."""
    return max((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), default=1)


def raise_opset(model: onnx.ModelProto, opset: int, path: Path) -> onnx.ModelProto:
    """The model in an opset of at least this version: as it is, or converted by ONNX's own converter.

    The converter sees no weights, so that its cost does not grow with them. What it forgets, the nodes' metadata, is
    put back by the names of their results.

    Raises:
        InputError: the converter cannot.
    """
    before = opset_of(model)
    if before >= opset:
        return model
    bare = without_weights(model)
    try:
        converted: onnx.ModelProto = onnx.version_converter.convert_version(bare, opset)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        problem = f"opset {before} is too old, and ONNX's converter cannot raise it to {opset}"
        raise InputError(f"{path}: {problem}: {why}") from error
    _restore(converted, model, opset)
    return converted


def _restore(converted: onnx.ModelProto, model: onnx.ModelProto, opset: int) -> None:
    """Give a converted model what the converter did not see, or lost."""
    for node in _nodes(converted.graph):
        node.domain = "" if node.domain == _HIDDEN else node.domain
    metadata = {node.output[0]: node for node in model.graph.node if node.output and node.metadata_props}
    for node in converted.graph.node:
        origin = metadata.get(node.output[0]) if node.output and not node.metadata_props else None
        if origin is not None:
            node.metadata_props.extend(origin.metadata_props)
    # The signature as it was, to the byte; and no shapes that the converter inferred.
    for field in ("input", "output", "value_info"):
        converted.graph.ClearField(field)
        getattr(converted.graph, field).extend(getattr(model.graph, field))
    present = {tensor.name for tensor in converted.graph.initializer}
    converted.graph.initializer.extend(t for t in model.graph.initializer if t.name not in present)
    if not converted.metadata_props:
        converted.metadata_props.extend(model.metadata_props)
    converted.ClearField("opset_import")
    converted.opset_import.extend(entry for entry in model.opset_import if entry.domain not in _STANDARD)
    converted.opset_import.add(domain="", version=opset)
    least = onnx.helper.find_min_ir_version_for(list(converted.opset_import), ignore_unknown=True)
    converted.ir_version = max(model.ir_version, least)


def _has(op: str, opset: int) -> bool:
    try:
        onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for ONNX's own tools.

    It has inputs for all initializers but small ones, whose values they may ask for, and a domain of its own for
    operators that a runtime has in the standard one and ONNX, at this opset, has not.
    """
    bare = onnx.ModelProto()
    for source, copy, left_out in ((model, bare, "graph"), (model.graph, bare.graph, "initializer")):
        for field, value in source.ListFields():
            if field.name == left_out:
                continue
            if isinstance(value, (str, int)):
                setattr(copy, field.name, value)
            else:
                getattr(copy, field.name).MergeFrom(value)
    listed = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _SMALL and not uses_external_data(tensor):
            bare.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            bare.graph.input.append(value)
    opset = opset_of(model)
    for node in _nodes(bare.graph):
        if node.domain in _STANDARD and not _has(node.op_type, opset):
            node.domain = _HIDDEN
    bare.opset_import.add(domain=_HIDDEN, version=1)
    return bare


def _make_dense(graph: onnx.GraphProto, folder: Path) -> None:
    """Make ordinary weights of sparse ones, as runtimes do when they load a model."""
    for sparse in graph.sparse_initializer:
        values = tensor_values(sparse.values, folder)
        indices = tensor_values(sparse.indices, folder)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        graph.initializer.append(onnx.numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]
