"""A plain ONNX decoder whose linear weights can be exchanged from run to run, for trying out quantizations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from river_compile.config import RiverConfig
from river_compile.errors import InputError
from river_compile.exporters.onnx import onnx_file
from river_compile.exporters.onnx.moments import Moments
from river_compile.exporters.onnx.probe import Probe
from river_compile.exporters.onnx.rewrite import dissect
from river_compile.exporters.quantizers import quantizer
from river_compile.passes.onnx.grow_river import RiverLinear, plan_river, quantize
from river_compile.passes.onnx.linear import float_type
from river_compile.passes.quantizer import ActivationAware

__all__ = ["SwappableLinear", "SwappableModel"]


@dataclass(frozen=True)
class SwappableLinear:
    """A linear layer: qualified name, decoder layer, number of weights, and the name of the weight to exchange."""

    name: str
    layer: int
    weights: int
    planned: RiverLinear
    weight: str


class SwappableModel:
    """The model with its river's weights as inputs that have defaults.

    Args:
        path: a plain ONNX decoder.
        config: says which layers, which quantizer, which group size.
        ids: tuning texts for an activation-aware quantizer.
        progress: is told texts read and texts in all.
        with_cache: whether `read` is wanted, which tells the KV cache as well.
        keep: whether quantized weights are kept, to be asked for again.

    Raises:
        RiverError: the model is no decoder that can have a river.
    """

    def __init__(
        self,
        path: Path,
        config: RiverConfig,
        ids: Sequence[np.ndarray],
        progress: Callable[[int, int], None] = lambda done, total: None,
        *,
        with_cache: bool = False,
        keep: bool = False,
    ) -> None:
        self._graph, anatomy = dissect(onnx_file.load(path), path.parent)
        planned = plan_river(self._graph, anatomy, config).quantized
        model = onnx_file.load(path)
        swappable = [
            SwappableLinear(
                linear.name, linear.layer, linear.source.inputs * linear.source.outputs, linear, _untied(model, linear)
            )
            for linear in planned
        ]
        self.linears = [linear for linear in swappable if linear.layer < len(anatomy.layers)]
        self.head = next((linear for linear in swappable if linear.layer == len(anatomy.layers)), None)
        self._quantized: dict[tuple[str, int], dict[str, np.ndarray]] | None = {} if keep else None
        self._quantizer = quantizer(config.quantizer)
        self.quantizer = self._quantizer.name
        aware = isinstance(self._quantizer, ActivationAware)
        self._moments = Moments(path, planned, ids, progress) if aware else None
        self.float_bits = max(linear.source.float_bits for linear in planned)
        presents = [slot.present for layer in anatomy.layers for slot in layer.caches] if with_cache else []
        self._probe = Probe(model, path.parent, ["logits", *presents], {linear.weight for linear in swappable})

    def quantized(self, linear: SwappableLinear, bits: int) -> dict[str, np.ndarray]:
        """The weight as the quantizer would have it, dequantized, by its name in the model."""
        if self._quantized is not None and (linear.name, bits) in self._quantized:
            return self._quantized[linear.name, bits]
        source, group_size = linear.planned.source, linear.planned.group_size
        assert group_size is not None
        weight = quantize(source, source.matrix(self._graph), bits, group_size, self._quantizer, self._moments)
        values = weight.dequantize()
        values = np.ascontiguousarray(values.T if source.transposed else values)
        found = {linear.weight: values.astype(float_type(source.weight.dtype))}
        if self._quantized is not None:
            self._quantized[linear.name, bits] = found
        return found

    def logits(self, ids: np.ndarray, weights: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Logits of one pass with some weights exchanged: int64 [batch, tokens] -> float32 [batch, tokens, vocabulary].

        Weights that several linear layers share are exchanged for all of them.
        """
        found = self._probe.read(ids, weights or {})["logits"].astype(np.float32)
        if found.shape[:-1] != np.atleast_2d(ids).shape:
            raise InputError("the model gives logits of the last token only: its rivers cannot be compared by them")
        return found

    def read(
        self, ids: np.ndarray, weights: Mapping[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """One document, int64 [tokens]: logits, float32 [tokens, vocabulary], and the KV cache, for each slot of each
        layer (the key, then the value) a float array [heads, tokens, width]."""
        found = self._probe.read(ids, weights or {})
        slots = [slot for slot in self._probe.signature.slots if slot.present in found]
        return found["logits"][0].astype(np.float32), [slot.entries(found[slot.present], len(ids)) for slot in slots]


def _untied(model: onnx.ModelProto, linear: RiverLinear) -> str:
    """The name of a linear layer's weight; if others than linear layers read it (embeddings tied to the LM head), of a
    copy of its own that the layer is given in the model."""
    weight, source = linear.weight, linear.source
    readers = [node for node in model.graph.node if weight in node.input]
    if all(node.op_type in ("MatMul", "Gemm", "Transpose", "Cast", "Identity") for node in readers):
        return weight
    producers = {name: node for node in model.graph.node for name in node.output}
    node, place = producers[source.node.outputs[0].name], 1
    while node.input[place] != weight:
        node, place = producers[node.input[place]], 0
    name = f"{weight}.untied"
    node.input[place] = name
    copy = model.graph.initializer.add()
    copy.CopyFrom(next(tensor for tensor in model.graph.initializer if tensor.name == weight))
    copy.name = name
    return name
