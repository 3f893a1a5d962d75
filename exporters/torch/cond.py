"""ONNX from torch by the FX passes: ``torch.cond`` in place of the host, and the caches as inputs and outputs.

The other way to ONNX, `exporters.rewrite`, works on the exported graph instead; both make the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.onnx import hf, onnxruntime, tracing
from river_compile.exporters.torch.weights import GraphWeights, Quantized, Store
from river_compile.passes.anatomy import Anatomy
from river_compile.passes.fx.find_layers import find_layers
from river_compile.passes.fx.graph import FxGraph, import_graph
from river_compile.passes.fx.grow_river import grow_river
from river_compile.passes.fx.insert_exits import insert_exits
from river_compile.passes.fx.pieces import Piece
from river_compile.passes.fx.share_kv import Plan, share_kv
from river_compile.passes.fx.verify import verify
from river_compile.passes.quantizer import QuantizedWeight, Quantizer

__all__ = ["CondDecoder", "cond_decoder", "export_with_cond"]

_OPERATOR = "river_compile::matmul_nbits"


@torch.library.custom_op(_OPERATOR, mutates_args=())
def matmul_nbits(
    activation: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    outputs: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """ONNX Runtime's MatMulNBits, by its definition: ``activation @ dequantized weight``, weights packed as there."""
    blocks = values.shape[1]
    indices, zeros = values, zero_points.reshape(outputs, -1)
    if bits == 4:
        indices = torch.stack([values & 15, values >> 4], -1)
        zeros = torch.stack([zeros & 15, zeros >> 4], -1).reshape(outputs, -1)[:, :blocks]
    centred = indices.reshape(outputs, blocks, group_size).float() - zeros.reshape(outputs, blocks, 1).float()
    weight = (centred * scales.reshape(outputs, blocks, 1).float()).reshape(outputs, -1)
    return (activation.float() @ weight.T).to(activation.dtype)


@matmul_nbits.register_fake
def _(
    activation: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    outputs: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return activation.new_empty((*activation.shape[:-1], outputs))


class MatMulNBits:
    """The lowering of the river's products to that operator."""

    name = "matmul-nbits"
    max_rows = 1 << 30

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        values, scales, zero_points = map(torch.from_numpy, onnxruntime.operands(weight).values())
        return values.to(device), scales.to(device, dtype), zero_points.to(device)

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return _product


def _product(
    activation: torch.Tensor,
    operands: Sequence[torch.Tensor],
    outputs: int,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    result: torch.Tensor = matmul_nbits(activation, *operands, outputs, bits, group_size)
    return result if bias is None else result + bias


@dataclass(frozen=True)
class _Callable:
    """A piece, made before the export: its tracer cannot make modules."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: fx.GraphModule

    @classmethod
    def of(cls, piece: Piece) -> _Callable:
        return cls(piece.inputs, piece.outputs, piece.module())

    def run(self, values: dict[str, Any]) -> None:
        values |= dict(zip(self.outputs, self.module(*(values[name] for name in self.inputs)), strict=True))


class CondDecoder(nn.Module):
    """The rewritten graph as a module: the inputs of the decoder, then tau and the depth limit; its outputs, then the
    exit depth, int64 [1]. Each layer with a twin is one ``torch.cond`` whose branches return hidden state, keys and
    values; nothing is written in place.
    """

    def __init__(self, graph: FxGraph, plan: Plan, points: Sequence[int], held: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._tensors = nn.ParameterDict()
        self._names = {name: f"t{index}" for index, name in enumerate(held)}
        for name, tensor in held.items():
            self._tensors[self._names[name]] = nn.Parameter(tensor.detach(), requires_grad=False)
        self._inputs = [node.name for node in graph.placeholders if node.name not in held]
        self._results = [node.name for node in graph.results]
        self._prefix, self._suffix = (_Callable.of(piece) if piece else None for piece in (plan.prefix, plan.suffix))
        self._layers = [_Callable.of(piece) for piece in plan.layers]
        self._rivers = {index: _Callable.of(twin.river) for index, twin in plan.twins.items()}
        self._points = frozenset(points)

    def forward(
        self, inputs: Sequence[torch.Tensor | None], tau: torch.Tensor, max_depth: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        values: dict[str, Any] = {name: self._tensors[key] for name, key in self._names.items()}
        values |= dict(zip(self._inputs, inputs, strict=True))
        if self._prefix is not None:
            self._prefix.run(values)
        exited = max_depth < 0
        depth = torch.zeros((), dtype=torch.int64)
        for index, layer in enumerate(self._layers):
            river = self._rivers.get(index)
            if river is None:
                layer.run(values)
                depth = depth + 1
                continue
            exited = exited | (max_depth <= index)
            depth = depth + (~exited).to(torch.int64)
            exited = self._branch(layer, river, exited, tau, values, decides=index + 1 in self._points)
        if self._suffix is not None:
            self._suffix.run(values)
        return (*(values[name] for name in self._results), depth.reshape(1))

    def _branch(
        self,
        layer: _Callable,
        twin: _Callable,
        exited: torch.Tensor,
        tau: torch.Tensor,
        values: dict[str, Any],
        *,
        decides: bool,
    ) -> torch.Tensor:
        """Run one of a layer's twins; whether the model has exited after it."""
        names = list(dict.fromkeys([*layer.inputs, *twin.inputs]))
        outputs = twin.outputs

        def river(tau: torch.Tensor, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
            own = dict(zip(names, operands, strict=True))
            twin.run(own)
            return (*(own[name] for name in outputs), torch.ones((), dtype=torch.bool))

        def backbone(tau: torch.Tensor, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
            own = dict(zip(names, operands, strict=True))
            layer.run(own)
            above = own[layer.outputs[-1]] > tau if decides else torch.zeros((), dtype=torch.bool)
            return (*(own[name] for name in outputs), above)

        results = torch.cond(exited, river, backbone, (tau, *(values[name] for name in names)))
        values |= dict(zip(outputs, results[:-1], strict=True))
        flag: torch.Tensor = results[-1]
        return flag


def cond_decoder(
    program: torch.export.ExportedProgram, config: RiverConfig, chosen: Quantizer
) -> tuple[CondDecoder, Anatomy]:
    """The passes on an exported decoder with functional caches.

    Raises:
        RiverError: it is no decoder that can be rewritten, or a pass failed its check.
    """
    kinds = torch.export.graph_signature.InputKind
    held: dict[str, torch.Tensor] = {}
    parameters = []
    for spec in program.graph_signature.input_specs:
        if spec.kind == kinds.USER_INPUT:
            continue
        assert spec.target is not None
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
        assert isinstance(tensor, torch.Tensor)
        held[spec.arg.name] = tensor
        if spec.kind == kinds.PARAMETER:
            parameters.append(spec.arg.name)
    graph = import_graph(program.graph_module, parameters)
    graph.local_sizes = True
    anatomy = find_layers(graph)
    weights = GraphWeights(Quantized(Store(), MatMulNBits(), chosen, chosen), held)
    river = grow_river(graph, anatomy, config, weights)
    plan = share_kv(graph, anatomy, river)
    points = insert_exits(graph, anatomy, plan, config)
    verify(graph, anatomy, ["find_layers", "grow_river", "share_kv", "insert_exits"], river, plan)
    for twin in river.twins.values():
        for names, product in twin.products.items():
            held |= dict(zip(names, weights.operands(product), strict=True))
    return CondDecoder(graph, plan, points, held), anatomy


def export_with_cond(model: nn.Module, path: Path, config: RiverConfig, chosen: Quantizer) -> Anatomy:
    """Write a Hugging Face decoder as ONNX with an exit river, by `torch.cond`.

    The signature is that of `hf.export_decoder`, with ``river.tau`` and ``river.max_depth`` as overridable initializers
    and ``river.exit_depth`` as an output.

    Raises:
        ConfigError: the config has thresholds by layer, or a calibration, which this way out does not carry.
        RiverError: it is no decoder that can be rewritten, or torch cannot export it.
    """
    for name, value in (("tau_offsets", config.tau_offsets), ("calibration", config.calibration)):
        if value is not None:
            raise ConfigError(name, "torch.cond carries one threshold and no evidence; export by graph surgery instead")
    example = tracing.example_of(model)
    decoder = tracing.CachedDecoder(model, with_positions=example.with_positions)
    try:
        with torch.no_grad(), tracing.quiet(), tracing.with_attention(model, tracing.attention_forms(model)[0]):
            program = torch.export.export(
                decoder, example.arguments, dynamic_shapes=example.dynamic_shapes, strict=False
            )
            rewritten, anatomy = cond_decoder(program, config, chosen)
            exported = torch.onnx.export(
                rewritten,
                (example.flat, torch.tensor(config.tau), torch.tensor(len(anatomy.layers))),
                dynamo=True,
                opset_version=hf.MIN_OPSET,
                dynamic_shapes=(example.flat_shapes, None, None),
                input_names=[*example.input_names, "river.tau", "river.max_depth"],
                output_names=[*example.output_names, "river.exit_depth"],
                custom_translation_table={
                    torch.ops.aten.scaled_dot_product_attention.default: tracing.attention_op,
                    torch.ops.river_compile.matmul_nbits.default: _translation(config),
                },
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"torch cannot export the model: {' '.join(str(error).split())[:300]}") from error
    assert exported is not None
    _with_defaults(exported.model_proto, config, len(anatomy.layers), path)
    return anatomy


def _translation(config: RiverConfig) -> Callable[..., Any]:
    """How the operator above is written in ONNX."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    def operand(name: str, kind: str) -> Any:
        return OpSchema.FormalParameter(name, kind)

    schema = OpSchema(
        "MatMulNBits",
        "com.microsoft",
        1,
        inputs=[operand("A", "T"), operand("B", "U"), operand("scales", "T"), operand("zero_points", "U")],
        outputs=[operand("Y", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ("U", ["tensor(uint8)"], ""),
        ],
        attributes=[
            OpSchema.Attribute(name, OpSchema.AttrType.INT, "", required=False)
            for name in ("K", "N", "bits", "block_size", "accuracy_level")
        ],
    )
    product = Op(Opset("com.microsoft", 1), "MatMulNBits", schema)
    accuracy = onnxruntime.INT8_ACCURACY if config.activations == "int8" else 0

    def translate(
        activation: Any, values: Any, scales: Any, zero_points: Any, outputs: int, bits: int, group_size: int
    ) -> Any:
        return product(
            activation,
            values,
            scales,
            zero_points,
            K=int(values.shape[1]) * group_size,
            N=outputs,
            bits=bits,
            block_size=group_size,
            accuracy_level=accuracy,
        )

    return translate


def _with_defaults(model: onnx.ModelProto, config: RiverConfig, layers: int, path: Path) -> None:
    """Save the model with defaults for tau and the depth limit, and what it was made with."""
    limit = layers if config.max_depth is None else config.max_depth
    for name, value in (("river.tau", np.float32(config.tau)), ("river.max_depth", np.int64(limit))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    onnx.helper.set_model_props(
        model, {p.key: p.value for p in model.metadata_props} | {"river.config": config.to_json()}
    )
    onnx.save(model, str(path))
