"""The quantizers: what each promises of its grid, and that knowing the inputs pays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError
from river_compile.exporters.onnx import onnx_file, rewrite
from river_compile.exporters.onnx.moments import Moments
from river_compile.exporters.quantizers import QUANTIZERS, blocks, quantizer
from river_compile.exporters.quantizers.gptq import gptq
from river_compile.passes.quantizer import ActivationAware, QuantizedWeight
from tests.families import VOCABULARY
from tests.oracle import session

INPUTS, OUTPUTS, GROUP = 128, 48, 32


def _weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(INPUTS, OUTPUTS)).astype(np.float32)


def _activations(tokens: int = 1000) -> np.ndarray:
    """Inputs as layers meet them: correlated, and of very different sizes."""
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(tokens, INPUTS)) @ rng.normal(size=(INPUTS, INPUTS)) / np.sqrt(INPUTS)
    return (mixed * np.exp(rng.normal(size=INPUTS))).astype(np.float32)


def _moments(rows: np.ndarray) -> np.ndarray:
    return rows.T @ rows / len(rows)


def _quantize(name: str, weight: np.ndarray, moments: np.ndarray, bits: int = 4) -> QuantizedWeight:
    chosen = quantizer(name)
    if isinstance(chosen, ActivationAware):
        return chosen.quantize_for(moments, weight, bits, GROUP)
    return chosen.quantize(weight, bits, GROUP)


def _output_error(rows: np.ndarray, weight: np.ndarray, found: QuantizedWeight) -> float:
    return float(np.linalg.norm(rows @ (found.dequantize() - weight)) / np.linalg.norm(rows @ weight))


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_lie_on_a_grid_of_so_many_bits(name: str, bits: int) -> None:
    found = _quantize(name, _weight(), _moments(_activations()), bits)
    assert found.values.shape == (OUTPUTS, INPUTS // GROUP, GROUP)
    assert found.scales.shape == found.zero_points.shape == (OUTPUTS, INPUTS // GROUP)
    assert found.values.dtype == found.zero_points.dtype == np.uint8
    assert max(found.values.max(), found.zero_points.max()) < 2**bits
    # onnxruntime's symmetric grid points its longer half, which may be the negative one, at the largest weight.
    assert (found.scales > 0).all() or name == "rtn-symmetric"
    assert (found.scales != 0).all()
    error = _output_error(_activations(), _weight(), found)
    assert error < (0.15 if bits == 4 else 0.012)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_degenerate_weights_stay_finite_and_near(name: str) -> None:
    rng = np.random.default_rng(2)
    positive = (np.abs(rng.normal(size=(INPUTS, 5))) + 1).astype(np.float32)
    for weight in (np.zeros((INPUTS, 5), np.float32), positive, np.ones((INPUTS, 5), np.float32)):
        found = _quantize(name, weight, np.eye(INPUTS, dtype=np.float32)).dequantize()
        assert np.isfinite(found).all()
        assert np.abs(found - weight).max() <= 0.15 * max(float(np.abs(weight).max()), 1e-6)


def test_symmetric_grids_have_zero_in_their_middle() -> None:
    found = _quantize("gptq-symmetric", _weight(), _moments(_activations()))
    assert (found.zero_points == 8).all()


def test_the_searched_grid_has_less_error_than_round_to_nearest() -> None:
    weight = _weight()
    errors = {
        name: np.square(quantizer(name).quantize(weight, 4, GROUP).dequantize() - weight).sum()
        for name in ("rtn", "lsq")
    }
    assert errors["lsq"] < 0.95 * errors["rtn"]


def test_knowing_the_inputs_halves_the_output_error_on_inputs_never_seen() -> None:
    rows, weight = _activations(2000), _weight()
    moments = _moments(rows[:1000])
    errors = {name: _output_error(rows[1000:], weight, _quantize(name, weight, moments)) for name in QUANTIZERS}
    assert errors["gptq"] < 0.6 * min(errors[name] for name in ("rtn", "lsq", "kquant", "hqq"))
    assert errors["gptq-symmetric"] < 0.6 * errors["rtn"]


def test_each_round_of_refitting_lowers_the_error_it_means_to_lower() -> None:
    rows, weight = _activations(), _weight()
    errors = [_output_error(rows, weight, gptq(weight, _moments(rows), 4, GROUP, rounds=n)) for n in (0, 1, 2)]
    assert errors[0] > errors[1] > errors[2]


def test_fewer_tokens_than_inputs_and_dead_inputs_are_no_problem() -> None:
    rows, weight = _activations(20), _weight()
    rows[:, 5] = 0
    found = gptq(weight, _moments(rows), 4, GROUP)
    assert np.isfinite(found.dequantize()).all()
    assert _output_error(rows, weight, found) < 0.05


def test_gptq_without_texts_says_so() -> None:
    with pytest.raises(ConfigError, match="needs tuning texts"):
        quantizer("gptq").quantize(_weight(), 4, GROUP)


@pytest.mark.parametrize("budget", (1 << 30, 1))
def test_moments_are_those_of_the_tensors_that_linears_read(exported: Callable[[str], Path], budget: int) -> None:
    """Whether measured all at once or one tensor at a time."""
    path = exported("gpt2")
    _, river = rewrite.survey(onnx_file.load(path), path.parent, RiverConfig())
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, VOCABULARY, size) for size in (7, 5)]
    moments = Moments(path, river.linears, texts, budget=budget)
    assert len(moments) == 4 * 4
    assert session(path)
    for linear in river.linears:
        found = moments[linear.source.node.inputs[0].name]
        assert found.shape == (linear.source.inputs,) * 2
        assert np.linalg.eigvalsh(found).min() > -1e-4
        assert np.linalg.matrix_rank(found, tol=1e-4 * np.trace(found)) <= 12


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_weight_is_what_its_outputs_are_whatever_its_size_and_order_in_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it stays as it was: it may be the model's own."""
    weight, kept, moments = _weight(), _weight(), _moments(_activations())
    whole = _quantize(name, weight, moments)
    monkeypatch.setattr(blocks, "_BLOCK", 5 * INPUTS)
    for form in (weight, np.asfortranarray(weight)):
        found = _quantize(name, form, moments)
        assert np.array_equal(found.values, whole.values)
        assert np.array_equal(found.zero_points, whole.zero_points)
        np.testing.assert_allclose(found.scales, whole.scales, rtol=1e-6)
        assert np.array_equal(form, kept)
