"""The independent judge of a river model: the untouched graph, with dequantized weights where the river should flow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

_SETTINGS = {"tau": np.float32, "max_depth": np.int64, "tau_offsets": np.float32}
_WEIGHT = re.compile(r"river/(?P<names>.+)\.q(?P<bits>\d)g(?P<group>\d+)\.values")


def session(model: onnx.ModelProto | Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # ONNX Runtime folds a dequantized weight into its product, but not where the weight lies outside the branch.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class Oracle:
    """For every depth d a plain model: the original one, its layers from d on with dequantized weights."""

    def __init__(self, original: Path, river: Path) -> None:
        self._original = onnx.load(original)
        self._weights = _river_weights(onnx.load(river))
        self.layers = max(self._weights) + 1
        self._sessions: dict[int, ort.InferenceSession] = {}

    def at(self, depth: int) -> ort.InferenceSession:
        if depth not in self._sessions:
            model = onnx.ModelProto()
            model.CopyFrom(self._original)
            replaced = {}
            for layer, weights in self._weights.items():
                if layer >= depth:
                    replaced |= weights
            for tensor in model.graph.initializer:
                if tensor.name in replaced:
                    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(replaced[tensor.name].astype(dtype), tensor.name))
            self._sessions[depth] = session(model)
        return self._sessions[depth]


def _river_weights(model: onnx.ModelProto) -> dict[int, dict[str, np.ndarray]]:
    """For each layer the dequantized weights, by the name and in the layout of the original's initializers."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[int, dict[str, np.ndarray]] = {}
    for branch in (node for node in model.graph.node if node.name.startswith("river/layer.")):
        layer = int(branch.name.rpartition(".")[2])
        river = next(a.g for a in branch.attribute if a.name == "then_branch")
        for node in river.node:
            if node.op_type == "MatMulNBits" and node.input[1].startswith("river/"):
                found.setdefault(layer, {}).update(dequantize(node, initializers))
    return found


def dequantize(node: onnx.NodeProto, initializers: dict[str, onnx.TensorProto]) -> dict[str, np.ndarray]:
    """The definition of MatMulNBits, in numpy: (value - zero point) * scale in blocks along the input axis."""
    settings = {a.name: a.i for a in node.attribute}
    values, scales, zeros = (onnx.numpy_helper.to_array(initializers[name]) for name in node.input[1:4])
    outputs, blocks = values.shape[:2]
    if settings["bits"] == 4:
        values = np.stack([values & 15, values >> 4], -1).reshape(outputs, blocks, -1)
        zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(outputs, -1)[:, :blocks]
    weight = (values.astype(np.float32) - zeros.reshape(outputs, blocks, 1)) * scales.reshape(outputs, blocks, 1)
    weight = weight.reshape(outputs, -1)[:, : settings["K"]]
    match = _WEIGHT.fullmatch(node.input[1])
    assert match, node.input[1]
    result: dict[str, np.ndarray] = {}
    row = 0
    for name in match["names"].split("+"):
        root = name.removesuffix(".T")
        rows = int(_rows(initializers[root], transposed=root != name))
        part = weight[row : row + rows]
        result[root] = part if root != name else part.T
        row += rows
    assert row == outputs
    return result


def _rows(tensor: onnx.TensorProto, *, transposed: bool) -> int:
    return int(tensor.dims[0] if transposed else tensor.dims[1])


@dataclass
class Player:
    """Feeds a model step by step, its own cache carried along."""

    session: ort.InferenceSession
    batch: int
    mask: np.ndarray = field(init=False)
    caches: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.mask = np.zeros((self.batch, 0), np.int64)
        self.caches = {}
        for value in self.session.get_inputs():
            if len(value.shape) == 4:
                dtype = np.float16 if value.type == "tensor(float16)" else np.float32
                self.caches[value.name] = np.zeros((self.batch, value.shape[1], 0, value.shape[3]), dtype)

    def step(
        self, ids: np.ndarray, mask: np.ndarray | None = None, using: ort.InferenceSession | None = None, **river: Any
    ) -> dict[str, np.ndarray]:
        """All outputs of one pass, by name. ``river`` may give tau and max_depth."""
        outputs = self.run(using or self.session, ids, mask, river)
        self.caches = {name: outputs[present(name)] for name in self.caches}
        return outputs

    def run(
        self, runner: Any, ids: np.ndarray, mask: np.ndarray | None, river: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """All outputs of one pass over what was seen so far, the caches not moved on."""
        self.mask = np.concatenate([self.mask, np.ones_like(ids) if mask is None else mask], axis=1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, **self.caches}
        wanted = {value.name for value in runner.get_inputs()}
        feeds = {name: value for name, value in feeds.items() if name in wanted}
        # An engine's settings are inputs of the shape [1], a river model's are scalars.
        settings = {f"river.{name}": np.array(value, _SETTINGS[name]) for name, value in river.items()}
        feeds |= {name: np.atleast_1d(value) if name in wanted else value for name, value in settings.items()}
        names = [value.name for value in runner.get_outputs()]
        return dict(zip(names, runner.run(None, feeds), strict=True))


def present(past: str) -> str:
    return past.replace("past_key_values", "present")


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    """Every output of ``expected`` is in ``found``, to ``tolerance`` of its range."""
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert np.isfinite(value).all(), name
        bound = tolerance * max(float(np.ptp(value)) if value.size else 0.0, 1e-3)
        difference = float(np.abs(found[name].astype(np.float32) - value.astype(np.float32)).max(initial=0))
        assert difference <= bound, f"{name}: {difference} > {bound}"


def assert_every_depth(
    original: Path,
    river: Path,
    *,
    depths: Iterable[int] | None = None,
    batch: int = 2,
    lengths: Sequence[int] = (5, 1, 1),
    tolerance: float = 1e-4,
    kept: bool = False,
) -> None:
    """At each depth (all if None) the outputs of a prompt and of what follows it, so ``lengths``, are the
    oracle's; and the exit depth is that depth, unless layers are ``kept`` without a twin."""
    oracle, runner = Oracle(original, river), session(river)
    for depth in range(oracle.layers + 1) if depths is None else depths:
        rng = np.random.default_rng(depth)
        found, expected = Player(runner, batch), Player(oracle.at(depth), batch)
        for length in lengths:
            ids = rng.integers(3, 100, (batch, length))
            outputs = found.step(ids, max_depth=depth, tau=2.0)
            assert_close(outputs, expected.step(ids), tolerance)
            assert kept or outputs["river.exit_depth"] == depth
