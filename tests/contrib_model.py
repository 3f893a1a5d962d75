"""A small random decoder as ONNX Runtime's own builder writes one: contrib operators, scoped names, no metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.families import VOCABULARY

_CONTRIB = "com.microsoft"


@dataclass
class ContribDecoder:
    """Writes the model.

    Fields:
        form: how linear layers are written: "matmul", "matmul_bias" (MatMul and Add), "gemm" (transposed weights and
            bias, on flattened activations).
        quantized: layers whose linear layers are MatMulNBits already; those of the module ``quantized_part`` only, if
            given. ``accuracy`` is their accuracy level.
        skip_norm: fused residual adds and norms, which belong to two layers at once.
    """

    layers: int = 3
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 128
    form: str = "matmul"
    quantized: tuple[int, ...] = ()
    quantized_part: str = ""
    accuracy: int = 0
    skip_norm: bool = True
    dtype: Any = np.float32
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def save(self, path: Path) -> Path:
        self._rng = np.random.default_rng(self.seed)
        head = self.width // self.heads
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", kind, ["batch", "sequence", VOCABULARY])]
        for index in range(self.layers):
            for what in ("key", "value"):
                past, present = f"past_key_values.{index}.{what}", f"present.{index}.{what}"
                inputs.append(helper.make_tensor_value_info(past, kind, ["batch", self.kv_heads, "past", head]))
                outputs.append(helper.make_tensor_value_info(present, kind, ["batch", self.kv_heads, "total", head]))
        self._prefix(head)
        hidden = self._op("Gather", [self._weight("embed", VOCABULARY, self.width), "input_ids"], "/model/embed/Gather")
        branch = None
        for index in range(self.layers):
            hidden, branch = self._layer(index, hidden, branch)
        normed, _ = self._norm("/model/norm", hidden, branch)
        head_weight = self._weight("lm_head", self.width, VOCABULARY)
        self._op("MatMul", [normed, head_weight], "/lm_head/MatMul", outputs=["logits"])
        graph = helper.make_graph(self.nodes, "main", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_CONTRIB, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path

    def _prefix(self, head: int) -> None:
        angles = np.arange(256)[:, None] / 10000 ** (np.arange(0, head, 2) / head)[None]
        self._constant("cos_cache", np.cos(angles).astype(self.dtype))
        self._constant("sin_cache", np.sin(angles).astype(self.dtype))
        self._constant("one", np.array([1], np.int64))
        ones = self._op("ReduceSum", ["attention_mask", "one"], "/model/mask/ReduceSum", keepdims=0)
        less = self._op("Sub", [ones, "one"], "/model/mask/Sub")
        self._op("Cast", [less], "/model/mask/Cast", outputs=["seqlens_k"], to=TensorProto.INT32)
        shape = self._op("Shape", ["attention_mask"], "/model/mask/Shape")
        self._constant("one_scalar", np.array(1, np.int64))
        total = self._op("Gather", [shape, "one_scalar"], "/model/mask/Gather")
        self._op("Cast", [total], "/model/mask/Cast_1", outputs=["total_length"], to=TensorProto.INT32)

    def _layer(self, index: int, hidden: str, branch: str | None) -> tuple[str, str]:
        scope = f"/model/layers.{index}"
        head, kv_width = self.width // self.heads, self.kv_heads * self.width // self.heads
        assert head * self.heads == self.width
        normed, hidden = self._norm(f"{scope}/input_layernorm", hidden, branch)
        query = self._linear(f"{scope}/attn/q_proj", normed, self.width, self.width)
        key = self._linear(f"{scope}/attn/k_proj", normed, self.width, kv_width)
        value = self._linear(f"{scope}/attn/v_proj", normed, self.width, kv_width)
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        attended = self._op(
            "GroupQueryAttention",
            [query, key, value, *past, "seqlens_k", "total_length", "cos_cache", "sin_cache"],
            f"{scope}/attn/GroupQueryAttention",
            outputs=[f"{scope}/attn/output", f"present.{index}.key", f"present.{index}.value"],
            domain=_CONTRIB,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            do_rotary=1,
        )
        attended = self._linear(f"{scope}/attn/o_proj", attended, self.width, self.width)
        normed, hidden = self._norm(f"{scope}/post_attention_layernorm", hidden, attended)
        gate = self._linear(f"{scope}/mlp/gate_proj", normed, self.width, self.ffn)
        up = self._linear(f"{scope}/mlp/up_proj", normed, self.width, self.ffn)
        sigmoid = self._op("Sigmoid", [gate], f"{scope}/mlp/Sigmoid")
        silu = self._op("Mul", [gate, sigmoid], f"{scope}/mlp/Mul")
        product = self._op("Mul", [silu, up], f"{scope}/mlp/Mul_1")
        return hidden, self._linear(f"{scope}/mlp/down_proj", product, self.ffn, self.width)

    def _norm(self, scope: str, hidden: str, branch: str | None) -> tuple[str, str]:
        """The normed hidden state and the hidden state with the branch added."""
        gamma = self._constant(f"{scope}/weight", (1 + 0.1 * self._rng.standard_normal(self.width)).astype(self.dtype))
        if branch is None:
            name = f"{scope}/SimplifiedLayerNormalization"
            return self._op("SimplifiedLayerNormalization", [hidden, gamma], name, axis=-1, epsilon=1e-5), hidden
        if self.skip_norm:
            outputs = [f"{scope}/output_0", "", "", f"{scope}/output_3"]
            name = f"{scope}/SkipLayerNorm"
            operands = [hidden, branch, gamma]
            self._op("SkipSimplifiedLayerNormalization", operands, name, outputs, _CONTRIB, epsilon=1e-5)
            return outputs[0], outputs[3]
        total = self._op("Add", [hidden, branch], f"{scope}/Add")
        name = f"{scope}/SimplifiedLayerNormalization"
        return self._op("SimplifiedLayerNormalization", [total, gamma], name, axis=-1, epsilon=1e-5), total

    def _linear(self, scope: str, activation: str, inputs: int, outputs: int) -> str:
        if any(f"layers.{index}/{self.quantized_part}" in scope for index in self.quantized):
            return self._nbits(scope, activation, inputs, outputs)
        if self.form == "gemm":
            return self._gemm(scope, activation, inputs, outputs)
        product = self._op("MatMul", [activation, self._weight(f"{scope}/weight", inputs, outputs)], f"{scope}/MatMul")
        if self.form == "matmul":
            return product
        bias = self._constant(f"{scope}/bias", (0.1 * self._rng.standard_normal(outputs)).astype(self.dtype))
        return self._op("Add", [product, bias], f"{scope}/Add")

    def _gemm(self, scope: str, activation: str, inputs: int, outputs: int) -> str:
        weight = self._weight(f"{scope}/weight", outputs, inputs, scale=inputs**-0.5)
        bias = self._constant(f"{scope}/bias", (0.1 * self._rng.standard_normal(outputs)).astype(self.dtype))
        flat = self._op("Reshape", [activation, self._constant(f"{scope}/flat", np.array([-1, inputs]))], f"{scope}/R")
        product = self._op("Gemm", [flat, weight, bias], f"{scope}/Gemm", transB=1)
        start = self._op("Shape", [activation], f"{scope}/Shape", start=0, end=2)
        width = self._constant(f"{scope}/width", np.array([outputs]))
        return self._op("Reshape", [product, self._op("Concat", [start, width], f"{scope}/C", axis=0)], f"{scope}/R1")

    def _nbits(self, scope: str, activation: str, inputs: int, outputs: int) -> str:
        values = self._rng.integers(0, 256, (outputs, inputs // 32, 16), np.uint8)
        operands = [
            activation,
            self._constant(f"{scope}/values", values),
            self._constant(f"{scope}/scales", np.full((outputs, inputs // 32), 0.02, self.dtype)),
        ]
        shape = {"K": inputs, "N": outputs, "bits": 4, "block_size": 32, "accuracy_level": self.accuracy}
        return self._op("MatMulNBits", operands, f"{scope}/MatMulNBits", None, _CONTRIB, **shape)

    def _weight(self, name: str, rows: int, columns: int, scale: float | None = None) -> str:
        values = self._rng.standard_normal((rows, columns)) * (rows**-0.5 if scale is None else scale) * 1.5
        return self._constant(name, values.astype(self.dtype))

    def _constant(self, name: str, values: np.ndarray) -> str:
        self.weights.append(onnx.numpy_helper.from_array(values, name))
        return name

    def _op(
        self,
        op: str,
        inputs: list[str],
        name: str,
        outputs: list[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        outputs = outputs or [f"{name}/output_0"]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]
