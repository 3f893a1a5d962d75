"""The form of a KV cache's tensors: which axis holds the tokens, whether it grows, and how large the others are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from river_compile.errors import InputError, MissingExtra

__all__ = ["NUMPY", "Slot", "cache_slots", "consumers"]

NUMPY: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(bool),
}

# Operators that continue a past: the operands that hold it.
_PAST_OPERANDS = {
    "Attention": (4, 5),
    "GroupQueryAttention": (3, 4),
    "MultiHeadAttention": (6, 7),
    "SparseAttention": (3, 4),
}
_SCATTERS = {"TensorScatter": -2, "ScatterElements": 0}
_SAME_CONTENT = {"Cast", "Identity", "Transpose"}

Batched = Callable[[int, int], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Slot:
    """One tensor of the KV cache.

    Fields:
        past, present: names of the input and of the output that continues it.
        dtype: of both.
        sizes: of the empty cache; the batch is None, and the tokens are 0 or, in a static cache, all that it has room
            for.
        axis: the axis of the tokens.
        static: whether it has one length, and new entries are written behind those that are there.
    """

    past: str
    present: str
    dtype: np.dtype[Any]
    sizes: tuple[int | None, ...]
    axis: int
    static: bool

    @property
    def room(self) -> int | None:
        """Tokens that it can hold; None: any number."""
        return self.sizes[self.axis] if self.static else None

    def empty(self, batch: int) -> np.ndarray:
        return np.zeros([batch if size is None else size for size in self.sizes], self.dtype)

    def entries(self, cache: np.ndarray, tokens: int) -> np.ndarray:
        """The first sequence's entries of a cache that holds so many tokens: [heads, tokens, width]."""
        batch = self.sizes.index(None) if None in self.sizes else 0
        one = np.moveaxis(np.take(cache, [0], batch), (batch, self.axis), (0, -2))[0]
        entries: np.ndarray = one.reshape(-1, *one.shape[-2:])[:, :tokens]
        return entries


def cache_slots(
    pairs: Sequence[tuple[str, str]],
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    batch: str | int | None,
    model: Callable[[], onnx.ModelProto],
    folder: Path,
    feeds: Batched,
) -> tuple[Slot, ...]:
    """The form of each slot: as the signature declares it, else as the graph writes it, else as a short run shows it.

    Args:
        pairs: names of past and present.
        inputs, outputs: the session's, by name.
        batch: the first dimension of the token ids, as declared.
        model: the model without external data, from ``folder``; read only if the signature leaves something open.
        feeds: for a batch and a number of tokens, all inputs of a first pass but the cache.

    Raises:
        InputError: it cannot be told; names the input.
    """
    found: dict[str, Slot] = {}
    open_slots: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    for past, present in pairs:
        kind = inputs[past].type
        if kind not in ("tensor(float)", "tensor(float16)"):
            raise InputError(f"KV cache {past!r} of type {kind}: only float and float16 run here")
        declared = _declared(inputs[past].shape, outputs[present].shape, batch)
        if declared is not None:
            found[past] = Slot(past, present, NUMPY[kind], declared[0], declared[1], False)
        else:
            shape = tuple(inputs[past].shape)
            named = all(isinstance(size, (int, str)) for size in shape)
            open_slots.setdefault((*shape, kind, None if named else past), []).append((past, present))
    if open_slots:
        proto = model()
        for group in open_slots.values():
            # Dimensions of one name have one size, so one slot stands for all that are declared alike.
            past, present = group[0]
            dtype = NUMPY[inputs[past].type]
            static = _static(proto.graph, past, inputs[past].shape, outputs[present].shape, batch)
            sizes, axis = static or _measured(proto, folder, past, present, batch, feeds)
            for one, its in group:
                found[one] = Slot(one, its, dtype, sizes, axis, static is not None)
    return tuple(found[past] for past, _ in pairs)


Form = tuple[tuple[int | None, ...], int]


def _declared(past: Sequence[Any], present: Sequence[Any], batch: str | int | None) -> Form | None:
    """The form of a growing cache whose batch, growing and fixed axes its signature tells apart."""
    if len(past) != len(present) or None in past or None in present:
        return None
    open_axes = [axis for axis, size in enumerate(past) if not isinstance(size, int)]
    differing = [axis for axis in open_axes if past[axis] != present[axis]]
    batched = [axis for axis in open_axes if isinstance(batch, str) and past[axis] == batch]
    if len(differing) == 1 and not batched and differing != [0] and 0 in open_axes:
        batched = [0]
    grown = differing if len(differing) == 1 else [axis for axis in open_axes if axis not in batched]
    if len(grown) != 1 or len(batched) > 1 or grown == batched:
        return None
    sizes = [size if isinstance(size, int) else present[axis] for axis, size in enumerate(past)]
    sizes[grown[0]] = 0
    for axis in batched:
        sizes[axis] = None
    if any(size is not None and not isinstance(size, int) for size in sizes):
        return None
    # Of one name before and after a pass: it may as well be a static cache of any length.
    return (tuple(sizes), grown[0]) if differing else None


def _static(
    graph: onnx.GraphProto, past: str, before: Sequence[Any], after: Sequence[Any], batch: str | int | None
) -> Form | None:
    axis = _scatter_axis(graph, past, len(before))
    if axis is None:
        return None
    sizes = [
        size if isinstance(size, int) else None if size == batch or place == 0 else size
        for place, size in enumerate(before)
    ]
    if sizes.count(None) > 1 or any(isinstance(size, str) for size in sizes) or list(before) != list(after):
        raise InputError(f"cannot tell the size of the static KV cache {past!r}, declared as {list(before)}")
    return tuple(sizes), axis


def _scatter_axis(graph: onnx.GraphProto, past: str, rank: int) -> int | None:
    """The axis along which new entries are written into a past; None if it is not written in place."""
    for node, place in consumers(graph, past):
        if node.op_type in _SCATTERS and place == 0:
            named = [a.i for a in node.attribute if a.name == "axis"]
            return (named[0] if named else _SCATTERS[node.op_type]) % rank
    return None


def consumers(graph: onnx.GraphProto, name: str) -> Iterator[tuple[onnx.NodeProto, int]]:
    """The nodes that read a tensor, in subgraphs as well, and as which operand; casts and the like count as it."""
    names = {name}
    for node in graph.node:
        for place, operand in enumerate(node.input):
            if operand in names:
                yield node, place
                if place == 0 and node.op_type in {*_SAME_CONTENT, "Reshape", "Squeeze", "Unsqueeze"}:
                    names.add(node.output[0])
        for attribute in node.attribute:
            if attribute.HasField("g"):
                for inner in names.copy():
                    yield from consumers(attribute.g, inner)


def _measured(
    model: onnx.ModelProto,
    folder: Path,
    past: str,
    present: str,
    batch: str | int | None,
    feeds: Batched,
) -> Form:
    """The form by first passes, of different sizes, over the part of the model that makes this slot."""
    try:
        session = _session(_without_past(model, present), folder)
        some = batch if isinstance(batch, int) else 1
        trials = [(some, 3), (some, 5), (some if isinstance(batch, int) else 2, 3)]
        few, more, wide = (_shape(session, present, feeds(*trial), trial[0]) for trial in trials)
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot tell the form of KV cache input {past!r}: {reason}") from error
    growing = [axis for axis, size in enumerate(few) if size != more[axis]]
    batched = [axis for axis, size in enumerate(few) if size != wide[axis]]
    if len(growing) != 1 or len(batched) > 1 or any(few[axis] != some for axis in batched):
        raise InputError(f"cannot tell the form of KV cache input {past!r}: {few} and {more} after 3 and 5 tokens")
    sizes: list[int | None] = list(few)
    sizes[growing[0]] = 0
    for axis in batched:
        sizes[axis] = None
    return tuple(sizes), growing[0]


def _session(model: onnx.ModelProto, folder: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "cpu", "looking into a model") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _shape(session: Any, present: str, given: dict[str, np.ndarray], batch: int) -> tuple[int, ...]:
    feeds = {}
    for value in session.get_inputs():
        # A past that is left is asked for its shape: the batch, as a rule the first dimension, and no tokens.
        sizes = [s if isinstance(s, int) else batch if axis == 0 else 0 for axis, s in enumerate(value.shape)]
        feeds[value.name] = given[value.name] if value.name in given else np.zeros(sizes, NUMPY[value.type])
    shape: tuple[int, ...] = session.run([present], feeds)[0].shape
    return shape


def _without_past(model: onnx.ModelProto, present: str) -> onnx.ModelProto:
    """A copy that computes this present only, as of the first tokens: no operator continues a past."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    initializers = {tensor.name for tensor in part.graph.initializer}
    pasts = {value.name for value in part.graph.input if len(value.type.tensor_type.shape.dim) >= 3}
    _forget(part.graph, pasts - initializers)
    outputs = [value for value in part.graph.output if value.name == present]
    outputs[0].type.tensor_type.ClearField("shape")
    needed = {present}
    nodes = []
    for node in reversed(part.graph.node):
        if needed.intersection(node.output):
            needed |= _reads(node)
            nodes.append(node)
    _keep(part.graph.node, nodes[::-1])
    _keep(part.graph.output, outputs)
    _keep(part.graph.initializer, [tensor for tensor in part.graph.initializer if tensor.name in needed])
    _keep(part.graph.input, [value for value in part.graph.input if value.name in needed])
    return part


def _keep(field: Any, kept: Sequence[Any]) -> None:
    copies = [type(one).FromString(one.SerializeToString()) for one in kept]
    del field[:]
    field.extend(copies)


def _forget(graph: onnx.GraphProto, pasts: set[str]) -> None:
    graph.ClearField("value_info")
    # What holds a past, whatever it is cast to or transposed.
    holding = set(pasts)
    for node in graph.node:
        if node.op_type in _SAME_CONTENT and node.input[0] in holding:
            holding.update(node.output)
        if node.op_type == "Concat" and not holding.issuperset(node.input):
            kept = [name for name in node.input if name not in holding]
            del node.input[:]
            node.input.extend(kept)
        for place in _PAST_OPERANDS.get(node.op_type, ()):
            if place < len(node.input) and node.input[place] in holding:
                node.input[place] = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget(attribute.g, holding)


def _reads(node: onnx.NodeProto) -> set[str]:
    inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    names = {name for graph in inner for one in graph.node for name in _reads(one)}
    return names | {value.name for graph in inner for value in graph.output} | set(node.input)
