"""ONNX by torch.cond, against the ONNX that the rewrite of the exported graph makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.exporters.quantizers import quantizer
from river_compile.exporters.torch.cond import MatMulNBits, export_with_cond, matmul_nbits
from river_compile.passes.quantizer import QuantizedWeight
from tests.conftest import Exported
from tests.families import VOCABULARY, random_model
from tests.oracle import Player, assert_close, session

CONFIG = RiverConfig(tau=2.0, activations="float")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_operator_multiplies_with_the_dequantized_weight(bits: int) -> None:
    weight: QuantizedWeight = quantizer("rtn").quantize(np.random.default_rng(0).normal(size=(96, 24)), bits, 32)
    activation = torch.randn(2, 3, 96)
    operands = MatMulNBits().pack(weight, torch.float32, torch.device("cpu"))
    found = matmul_nbits(activation, *operands, 24, bits, 32)
    torch.testing.assert_close(found, activation @ torch.from_numpy(weight.dequantize()))


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_both_ways_to_onnx_make_the_same_model(family: str, exported: Exported, tmp_path: Path) -> None:
    layers = 2
    by_cond, by_rewrite = tmp_path / "cond.onnx", tmp_path / "rewrite.onnx"
    export_with_cond(random_model(family, layers), by_cond, CONFIG, quantizer("rtn"))
    export(exported(family, layers), by_rewrite, CONFIG)
    ends = [onnx.load(path).graph for path in (by_cond, by_rewrite)]
    inputs, outputs = ([{v.name for v in getattr(end, side)} for end in ends] for side in ("input", "output"))
    # Leaving out logits is a pass of the rewriting alone.
    assert inputs[0] == inputs[1] - {"river.logits_from"} and outputs[0] == outputs[1]
    assert [node.op_type for node in ends[0].node].count("If") == layers

    rng = np.random.default_rng(0)
    players = [Player(session(path), 2) for path in (by_cond, by_rewrite)]
    for depth in (0, 2, 1):
        ids = rng.integers(3, VOCABULARY, (2, 3))
        found, expected = (player.step(ids, max_depth=depth) for player in players)
        assert found["river.exit_depth"] == expected["river.exit_depth"] == depth
        assert_close(found, expected)
    for tau in (-1.0, 0.0, 0.5, 0.8):
        ids = rng.integers(3, VOCABULARY, (2, 1))
        found, expected = (player.step(ids, tau=tau) for player in players)
        assert found["river.exit_depth"] == expected["river.exit_depth"]
        assert_close(found, expected)
