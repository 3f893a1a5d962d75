"""One decoder under many signatures: what exporters call its inputs, how they order its cache, what they leave open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from river_compile.exporters.onnx.normal_form import raise_opset
from river_compile.passes.onnx.graph import export_model, import_model
from river_compile.passes.onnx.static_cache import OPSET, static_cache

__all__ = ["ROOM", "VARIANTS", "write"]

ROOM = 24


def write(source: Path, variant: str, target: Path) -> Path:
    """The model of ``source`` with another signature, to the same effect."""
    model = onnx.load(source)
    model = VARIANTS[variant](model) or model
    onnx.save(model, target)
    return target


def _caches(model: onnx.ModelProto) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    pasts = [value for value in model.graph.input if len(value.type.tensor_type.shape.dim) == 4]
    return pasts, [value for value in model.graph.output if value.name != "logits"]


def _set(value: onnx.ValueInfoProto, **dims: int | str | None) -> None:
    for axis, size in dims.items():
        dim = value.type.tensor_type.shape.dim[int(axis[1:])]
        dim.Clear()
        if isinstance(size, int):
            dim.dim_value = size
        elif size is not None:
            dim.dim_param = size


def _open_width(model: onnx.ModelProto) -> None:
    for past in _caches(model)[0]:
        _set(past, _3="kv_cache_dim")
    for present in _caches(model)[1]:
        _set(present, _3="kv_cache_dim")


def _nameless(model: onnx.ModelProto) -> None:
    for value in (*_caches(model)[0], *_caches(model)[1], *model.graph.input):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                _set(value, **{f"_{axis}": None})


def _nothing_said(model: onnx.ModelProto) -> None:
    for value in (*_caches(model)[0], *_caches(model)[1]):
        _set(value, _0=None, _1=None, _2=None, _3=None)


def _same_name(model: onnx.ModelProto) -> None:
    for value in (*_caches(model)[0], *_caches(model)[1]):
        _set(value, _2="length")


def _values_last(model: onnx.ModelProto) -> None:
    """All keys, then all values, as ONNX Runtime GenAI has them, and the outputs the other way round."""
    pasts, presents = (sorted(values, key=lambda v: "value" in v.name) for values in _caches(model))
    rest = [value for value in model.graph.input if value not in pasts]
    inputs, outputs = [*rest, *pasts], [*presents[::-1], model.graph.output[0]]
    del model.graph.input[:], model.graph.output[:]
    model.graph.input.extend(inputs)
    model.graph.output.extend(outputs)


def _tokens_first(model: onnx.ModelProto) -> None:
    """The cache as [batch, tokens, heads, width]."""
    for value in _caches(model)[0]:
        _transposed(model, value, f"{value.name}.inner", first=True)
    for value in _caches(model)[1]:
        _transposed(model, value, f"{value.name}.inner", first=False)


def _transposed(model: onnx.ModelProto, value: onnx.ValueInfoProto, inner: str, *, first: bool) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == value.name:
                    names[index] = inner
    ends = (value.name, inner) if first else (inner, value.name)
    node = helper.make_node("Transpose", [ends[0]], [ends[1]], f"{inner}/Transpose", perm=[0, 2, 1, 3])
    model.graph.node.insert(0 if first else len(model.graph.node), node)
    dims = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
    _set(value, _1=dims[2], _2=dims[1])


def _narrow_tokens(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.INT64:
            value.type.tensor_type.elem_type = TensorProto.INT32
            for node in model.graph.node:
                node.input[:] = [f"{value.name}.wide" if name == value.name else name for name in node.input]
            cast = helper.make_node("Cast", [value.name], [f"{value.name}.wide"], to=TensorProto.INT64)
            model.graph.node.insert(0, cast)


def _last_logits(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(-1), "last"))
    for node in model.graph.node:
        node.output[:] = ["all_logits" if name == "logits" else name for name in node.output]
    model.graph.node.append(helper.make_node("Gather", ["all_logits", "last"], ["logits"], axis=1))
    logits = next(value for value in model.graph.output if value.name == "logits")
    del logits.type.tensor_type.shape.dim[1]


def _one_sequence(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        _set(value, _0=1)


def _one_token(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.name in ("input_ids", "position_ids"):
            _set(value, _1=1)


def _maskless(model: onnx.ModelProto) -> None:
    """The mask made inside: ones for all that is cached and all that is new."""
    past = _caches(model)[0][0].name
    mask = next(value for value in model.graph.input if value.name == "attention_mask")
    model.graph.input.remove(mask)
    ones = numpy_helper.from_array(np.array([1], np.int64), "ones")
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["m.batch"], start=0, end=1),
        helper.make_node("Shape", ["input_ids"], ["m.new"], start=1, end=2),
        helper.make_node("Shape", [past], ["m.past"], start=2, end=3),
        helper.make_node("Add", ["m.past", "m.new"], ["m.total"]),
        helper.make_node("Concat", ["m.batch", "m.total"], ["m.shape"], axis=0),
        helper.make_node("ConstantOfShape", ["m.shape"], ["attention_mask"], value=ones),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def _other_names(model: onnx.ModelProto) -> None:
    """Names that tell nothing, and an order of the outputs that is not the inputs'."""
    pasts, presents = _caches(model)
    logits = next(value for value in model.graph.output if value.name == "logits")
    names = {value.name: f"state_{'abcdefghijkl'[index]}" for index, value in enumerate(pasts)}
    names |= {value.name: f"next_{'abcdefghijkl'[index]}" for index, value in enumerate(reversed(presents))}
    names |= {"logits": "scores", "input_ids": "tokens"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    outputs = [logits, *presents[::-1]]
    del model.graph.output[:]
    model.graph.output.extend(outputs)


def _static(model: onnx.ModelProto) -> onnx.ModelProto:
    scopes = {node.name: node.metadata_props for node in model.graph.node}
    graph = import_model(raise_opset(model, OPSET, Path()))
    static_cache(graph, ROOM)
    made = export_model(graph)
    for node in made.graph.node:
        node.metadata_props.extend(scopes.get(node.name, ()))
    return made


VARIANTS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto | None]] = {
    "open width": _open_width,
    "dimensions without names": _nameless,
    "nothing said of the cache": _nothing_said,
    "one name before and after": _same_name,
    "keys, then values": _values_last,
    "tokens before heads": _tokens_first,
    "int32 tokens": _narrow_tokens,
    "logits of the last token": _last_logits,
    "one sequence": _one_sequence,
    "one token a pass": _one_token,
    "no mask": _maskless,
    "other names": _other_names,
    "static": _static,
}
