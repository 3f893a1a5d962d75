"""Products of few 16-bit rows: the forms are one product, a row is the same beside others, and the fastest is taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from river_compile.backend import RiverBackend
from river_compile.config import RiverConfig
from river_compile.exporters.torch import few_rows as forms
from river_compile.exporters.torch.few_rows import MOST, Forms, Times, lower_few_rows
from river_compile.exporters.torch.remembered import Remembered
from river_compile.passes.fx.find_layers import find_layers
from river_compile.passes.fx.grow_river import River
from river_compile.passes.fx.pieces import signature
from river_compile.passes.fx.share_kv import share_kv
from tests.families import random_model
from tests.torch_models import as_it_is, capture, play, prompt


class Measured(Forms):
    """Times that are given, not measured: of one row, and of several in the same proportion."""

    def __init__(self, **single: float) -> None:
        super().__init__(as_it_is, {})
        self._given = Times(single, {name: time for name, time in single.items() if name != "loop"})

    def times(self, weights: Sequence[torch.Tensor], transposed: bool) -> Times:
        return self._given


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", [forms.by_loop, forms.single_row, forms.few_rows])
def test_a_form_is_the_product_accumulated_in_float32(form: object, bias: bool) -> None:
    torch.manual_seed(0)
    rows = 3 if form is forms.few_rows else 1
    activation, weight = torch.randn(1, rows, 512).bfloat16(), torch.randn(96, 512).bfloat16()
    addend = torch.randn(96).bfloat16() if bias else None
    exact = torch.nn.functional.linear(activation.double(), weight.double())
    found = form(activation, weight, addend)  # type: ignore[operator]
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    # Half a unit in the last of bfloat16's eight places, that of the sum before the bias too, and float32's own error.
    largest = exact.abs() + (0 if addend is None else addend.double().abs())
    exact = exact if addend is None else exact + addend.double()
    assert ((found.double() - exact).abs() <= largest * 2**-8 + exact.abs() * 2**-8 + 1e-4).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, MOST),
    inputs=st.integers(1, 40).map(lambda n: 8 * n),
    outputs=st.integers(1, 300),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_a_row_is_the_same_to_the_last_bit_however_many_are_beside_it(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    activation = torch.randn((1, rows, inputs), generator=generator).to(dtype)
    weight = torch.randn((outputs, inputs), generator=generator).to(dtype)
    together = forms.few_rows(activation, weight, None)
    alone = [forms.single_row(activation[:, row : row + 1], weight, None) for row in range(rows)]
    assert torch.equal(together, torch.cat(alone, 1))


def test_many_rows_are_torchs_own_product() -> None:
    activation, weight = torch.randn(2, MOST, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    assert torch.equal(forms.few_rows(activation, weight, None), torch.nn.functional.linear(activation, weight))


def test_float32_stays() -> None:
    *_, decode = capture("llama", "static")
    plan = share_kv(decode, find_layers(decode), River())
    parameters = {node.name: torch.empty(0) for node in decode.placeholders}
    for piece in plan.pieces:
        before = signature(piece)
        assert lower_few_rows([piece], parameters, Measured(linear=3, loop=2, weight=1)) == 0
        assert signature(piece) == before


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"linear": 1.0, "loop": 2.0, "weight": 1.2}, "single_row"),
        ({"linear": 1.0, "loop": 0.5, "weight": 1.0}, "by_loop"),
        ({"linear": 0.5, "loop": 1.0, "weight": 1.0}, "linear"),
    ],
    ids=["rows that do not depend on each other cost little", "the loop is faster", "torch is faster"],
)
def test_the_fastest_form_is_taken(
    times: dict[str, float], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    model = random_model("llama", 2).to(torch.bfloat16)
    backend = RiverBackend(RiverConfig(dump_dir=tmp_path), compiler=as_it_is)
    monkeypatch.setattr(backend, "_forms", Measured(**times))
    play(model, torch.compile(model, backend=backend), prompt(1, 20), 2, "static")
    text = "".join(path.read_text() for path in sorted(tmp_path.iterdir())[-1:])
    found = {name: text.count(f"few_rows_{name}(") for name in ("single_row", "by_loop")}
    # Seven in a layer, and the LM head; the river's own products are quantized already.
    assert found == {name: (2 * 7 + 1) * (name == expected) for name in found}


@pytest.mark.parametrize("form", ["linear", "loop", "weight"])
@pytest.mark.parametrize(
    ("family", "cache"), [("llama", "static"), ("qwen2", "dynamic"), ("gpt2", "static"), ("gemma2", "dynamic")]
)
def test_a_bfloat16_model_says_what_it_said(
    form: str, family: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence decodes through the rewritten products, with and without an exit."""
    model = random_model(family, 3).to(torch.bfloat16)
    exact = random_model(family, 3)
    ids = prompt(1, 5)
    expected = play(exact, exact, ids, 4, cache)
    plain = play(model, model, ids, 4, cache)
    torch.compiler.reset()
    backend = RiverBackend(RiverConfig(tau=2.0), compiler=as_it_is)
    times = {"linear": 2.0, "loop": 2.0, "weight": 2.0, form: 1.0}
    monkeypatch.setattr(backend, "_forms", Measured(**times))
    found = play(model, torch.compile(model, backend=backend), ids, 4, cache)
    assert not backend.stats().fallbacks
    error = max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True))
    usual = max(float((ours - theirs).abs().max()) for ours, theirs in zip(plain, expected, strict=True))
    assert error <= 2 * usual
    assert backend.stats().mean_exit_depth == 3


def test_what_was_measured_is_found_by_the_next_process(tmp_path: Path) -> None:
    weights = [torch.randn(64, 32).bfloat16() for _ in range(3)]
    first = Remembered(tmp_path)
    measured = Forms(as_it_is, first).times(weights, True)
    assert set(measured.single) == {"linear", "loop", "weight"}
    assert all(0 < seconds < 1 for seconds in [*measured.single.values(), *measured.few.values()])
    again = Remembered(tmp_path)
    assert dict(again) == dict(first)

    def no_compiler(*_: object) -> None:
        raise AssertionError("it was measured already")

    assert Forms(no_compiler, again).times(weights, True) == measured  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "[1]", '{"a": {"b": 1}}', "\0"])
def test_a_file_that_cannot_be_read_is_as_none(content: str, tmp_path: Path) -> None:
    remembered = Remembered(tmp_path)
    remembered.path.parent.mkdir()
    remembered.path.write_text(content)
    assert len(remembered) == 0
    remembered["a"] = Times({"linear": 1.0}, {"linear": 1.0})
    assert list(json.loads(remembered.path.read_text())) == ["a"]


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "river").write_text("a file where the folder would be")
    remembered = Remembered(tmp_path)
    remembered["a"] = Times({"linear": 1.0}, {"linear": 1.0})
    assert remembered["a"].single == {"linear": 1.0}
