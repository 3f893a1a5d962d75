"""The signature of an ONNX decoder understood: which input takes what, and the form of its KV cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner

from river_compile.errors import ConfigError, InputError
from river_compile.exporters.onnx.cache_forms import NUMPY, Slot, cache_slots, consumers
from river_compile.passes.onnx.graph import Uses, import_model
from river_compile.passes.onnx.residual_stream import find_stream

__all__ = ["Signature", "Slot", "read_graph"]

_CACHE_METADATA = "river.cache"
_IDS, _LOGITS = "input_ids", "logits"
_INTEGERS = ("tensor(int64)", "tensor(int32)")

# What a side input says, by its usual name and rank, or by the operator and the operand that read it.
_BY_NAME = {
    ("attention_mask", 2): "mask",
    ("position_ids", 2): "positions",
    ("cache_position", 1): "places",
    ("cache_positions", 1): "places",
}
_BY_READER = {
    ("TensorScatter", 2): "before",
    ("Attention", 6): "after",
    ("GroupQueryAttention", 5): "last",
    ("GroupQueryAttention", 6): "after",
}


def read_graph(path: Path) -> onnx.ModelProto:
    """A model that a runtime has loaded, a river model as well: without its external data, local functions inlined."""
    model = onnx.load(str(path), load_external_data=False)
    return onnx.inliner.inline_local_functions(model) if model.functions else model


@dataclass(frozen=True)
class _Side:
    """An input beside token ids and cache, and what it says of the tokens."""

    name: str
    says: str
    dtype: np.dtype[Any]
    shape: tuple[Any, ...]

    def value(self, seen: np.ndarray, new: int) -> np.ndarray:
        """
        Args:
            seen: which tokens are real, those of this pass included, int64 [batch, past + new].
            new: tokens of this pass.
        """
        batch, total = seen.shape
        if self.says == "mask":
            width = self.shape[1]
            room = width - total if isinstance(width, int) else 0
            value = np.pad(seen, ((0, 0), (0, max(room, 0))))
        elif self.says == "positions":
            value = np.maximum(np.cumsum(seen, axis=1) - 1, 0)[:, total - new :]
        elif self.says == "places":
            value = np.arange(total - new, total)
        else:
            counts = {"before": total - new, "after": total, "last": total - 1}
            value = np.full([batch, 1][: len(self.shape)], counts[self.says])
            if self.shape and self.shape[0] == 1:
                value = value[:1]
        return np.ascontiguousarray(value, self.dtype)


@dataclass(frozen=True)
class Signature:
    """What a decoder takes and gives.

    Fields:
        ids, logits: names of the input of the tokens and of the output of the next ones' scores.
        slots: the KV cache, in the layers' order, a layer's keys before its values.
        batch: sequences that it takes, where it takes one number only.
        step: tokens that a pass takes, likewise.
        room: tokens that its cache can hold; None: any number.
        masked: whether it can be told which tokens are padding.
    """

    ids: str
    logits: str
    slots: tuple[Slot, ...]
    batch: int | None
    step: int | None
    room: int | None
    sides: tuple[_Side, ...]
    ids_dtype: np.dtype[Any]

    @property
    def masked(self) -> bool:
        return any(side.says == "mask" for side in self.sides)

    @classmethod
    def of(
        cls, session: Any, model: Callable[[], onnx.ModelProto], folder: Path, apart: Collection[str] = ()
    ) -> Signature:
        """The signature of a session's model.

        Args:
            model: the model without its external data; it may be asked for, and it is not changed.
            folder: where its external data lies.
            apart: outputs that are not the decoder's.

        Raises:
            InputError: no decoder, or an input that is not understood.
        """
        model = cache(model)
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name: value for value in session.get_outputs() if value.name not in apart}
        pairs = _pairs(inputs, outputs, session.get_modelmeta().custom_metadata_map, model)
        rest = {name: value for name, value in inputs.items() if name not in dict(pairs)}
        ids, logits = _ids(rest), _logits(outputs, {present for _, present in pairs})
        if ids is None or logits is None or not pairs:
            raise InputError("no decoder: it needs input_ids, logits and a KV cache in its signature")
        sides = tuple(_side(value, model) for name, value in rest.items() if name != ids)
        rows, step = (*inputs[ids].shape, None)[:2]
        dtype = NUMPY[inputs[ids].type]

        def feeds(batch: int, tokens: int) -> dict[str, np.ndarray]:
            seen = np.ones((batch, tokens), np.int64)
            return {ids: np.zeros_like(seen, dtype)} | {side.name: side.value(seen, tokens) for side in sides}

        slots = cache_slots(pairs, inputs, outputs, rows, model, folder, feeds)
        fixed = [slot.sizes[0] for slot in slots if None not in slot.sizes and slot.axis != 0]
        return cls(
            ids,
            logits,
            slots,
            rows if isinstance(rows, int) else next(iter(fixed), None),
            step if isinstance(step, int) else None,
            min((slot.room for slot in slots if slot.room is not None), default=None),
            sides,
            dtype,
        )

    def check(self, batch: int, tokens: int = 0) -> None:
        """
        Raises:
            ConfigError: it does not take so many sequences, or its cache does not hold so many tokens.
        """
        if self.batch is not None and batch != self.batch:
            some = f"{self.batch} sequence" + "s" * (self.batch != 1)
            raise ConfigError("prompts", f"this model takes {some} at once, not {batch}")
        if self.room is not None and tokens > self.room:
            raise ConfigError("max_length", f"this model's KV cache holds {self.room} tokens, not {tokens}")

    def feeds(self, ids: np.ndarray, seen: np.ndarray) -> dict[str, np.ndarray]:
        """All inputs of a pass but the cache.

        Args:
            ids: [batch, tokens].
            seen: which tokens are real, those of this pass included, int64 [batch, past + tokens].

        Raises:
            ConfigError: it does not take so many sequences or tokens.
        """
        self.check(len(ids), seen.shape[1])
        if self.step is not None and ids.shape[1] != self.step:
            raise ConfigError("prompts", f"this model takes {self.step} tokens a pass, not {ids.shape[1]}")
        sides = {side.name: side.value(seen, ids.shape[1]) for side in self.sides}
        return {self.ids: np.ascontiguousarray(ids, self.ids_dtype)} | sides


def _pairs(
    inputs: Mapping[str, Any], outputs: Mapping[str, Any], metadata: Mapping[str, str], model: Callable[[], Any]
) -> list[tuple[str, str]]:
    """Names of a past and of the present that continues it: as an export noted, by name, or as the graph connects."""
    noted = metadata.get(_CACHE_METADATA)
    if noted is not None:
        pairs = [(past, present) for past, present in json.loads(noted)]
    else:
        pasts = _by_role([name for name, value in inputs.items() if len(value.shape) >= 3])
        presents = _by_role([name for name, value in outputs.items() if len(value.shape) >= 3 and name != _LOGITS])
        if pasts.keys() == presents.keys() and all(len(names) == 1 for names in (*pasts.values(), *presents.values())):
            pairs = [(pasts[role][0], presents[role][0]) for role in pasts]
        else:
            copy = onnx.ModelProto()
            copy.CopyFrom(model())
            graph = import_model(copy)
            segments = find_stream(graph, Uses(graph.nodes)).segments
            pairs = [(slot.past, slot.present) for segment in segments for slot in segment.caches]
    order = {past: index for index, (past, _) in enumerate(pairs)}
    return sorted(pairs, key=lambda pair: _place(pair[0], order[pair[0]]))


def _by_role(names: Sequence[str]) -> dict[tuple[str, ...], list[str]]:
    """Names by the numbers in them and whether they are of keys or values."""
    roles: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        roles.setdefault((*re.findall(r"\d+", name), _kind(name)), []).append(name)
    return roles


def _kind(name: str) -> str:
    found = re.findall(r"key|value", re.sub(r"key_?values?", "", name.lower()))
    return str(found[-1]) if found else ""


def _place(name: str, index: int) -> tuple[tuple[int, ...], str, int]:
    """Sorts a layer's keys before its values where names tell, and leaves the order as it is where they do not."""
    numbers = tuple(map(int, re.findall(r"\d+", name)))
    return (numbers, _kind(name), index) if numbers and _kind(name) else ((), "", index)


def _ids(inputs: Mapping[str, Any]) -> str | None:
    if _IDS in inputs:
        return _IDS
    rows = [n for n, v in inputs.items() if v.type in _INTEGERS and len(v.shape) == 2 and (n, 2) not in _BY_NAME]
    return rows[0] if len(rows) == 1 else None


def _logits(outputs: Mapping[str, Any], presents: set[str]) -> str | None:
    if _LOGITS in outputs:
        return _LOGITS
    scores = [n for n, v in outputs.items() if n not in presents and "float" in v.type and len(v.shape) in (2, 3)]
    return scores[0] if len(scores) == 1 else None


def _side(value: Any, model: Callable[[], onnx.ModelProto]) -> _Side:
    says = _BY_NAME.get((value.name, len(value.shape)))
    if says is None and len(value.shape) <= 1 and value.type in _INTEGERS:
        read = {_BY_READER.get((node.op_type, place)) for node, place in consumers(model().graph, value.name)}
        says = next(iter(read - {None}), None) if len(read - {None}) == 1 else None
    if says is None or value.type not in NUMPY:
        raise InputError(f"the model needs an input {value.name!r}, {value.type} {list(value.shape)}, unknown here")
    return _Side(value.name, says, NUMPY[value.type], tuple(value.shape))
