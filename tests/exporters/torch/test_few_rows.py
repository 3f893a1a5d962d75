"""Products of few 16-bit rows: the forms are one product, a row is the same beside others, and the fastest is taken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx

from river_compile.backend import RiverBackend
from river_compile.config import RiverConfig
from river_compile.exporters.torch import forms
from river_compile.exporters.torch.few_rows import lower_few_rows
from river_compile.exporters.torch.forms import MOST, is_steady
from river_compile.exporters.torch.remembered import Remembered
from river_compile.exporters.torch.timing import Forms, Kind
from river_compile.passes.fx.find_layers import find_layers
from river_compile.passes.fx.grow_river import River
from river_compile.passes.fx.pieces import Piece, signature
from river_compile.passes.fx.share_kv import share_kv
from tests.families import random_model
from tests.torch_models import as_it_is, capture, play, prompt


class Measured(Forms):
    """Times that are given, not measured, and the same for all products."""

    def __init__(self, steady: bool = True, **seconds: float) -> None:
        super().__init__(as_it_is, {})
        self._seconds, self._steady = seconds, steady

    def of_float(self, kind: Kind, weights: Sequence[torch.Tensor]) -> Mapping[str, float]:
        return {name: time for name, time in self._seconds.items() if name != "loop" or kind.rows == 1}

    def are_steady(self, kind: Kind, weight: torch.Tensor) -> bool:
        return self._steady


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (576, 1536), (2048, 512), (20, 16), (64, 32)], ids=str)
def test_what_is_called_steady_is_the_same_to_the_last_bit_beside_any_rows(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Whether a shape is depends on the CPU's kernels: what is said of it is what holds."""
    torch.manual_seed(1)
    weight = torch.randn(shape).to(dtype)
    activation = torch.randn((1, MOST, shape[1])).to(dtype)
    alone = [forms.single_row(activation[:, row : row + 1], weight, None) for row in range(MOST)]
    same = all(
        torch.equal(forms.few_rows(activation[:, :rows], weight, None), torch.cat(alone[:rows], 1))
        for rows in range(2, MOST + 1)
    )
    if is_steady(weight):
        assert same


def test_rows_that_depend_on_each_other_are_not_called_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    def skewed(activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result = torch.nn.functional.linear(activation, weight)
        return result * (1.01 if len(activation) == 5 else 1)

    monkeypatch.setattr(forms, "few_rows", skewed)
    assert not is_steady(torch.randn(64, 64).bfloat16())


def test_many_rows_are_torchs_own_product() -> None:
    activation, weight = torch.randn(2, MOST, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    assert torch.equal(forms.few_rows(activation, weight, None), torch.nn.functional.linear(activation, weight))


def test_small_products_in_float32_stay() -> None:
    *_, decode = capture("llama", "static")
    plan = share_kv(decode, find_layers(decode), River())
    parameters = {node.name: torch.empty(0) for node in decode.placeholders}
    for piece in plan.pieces:
        before = signature(piece)
        assert lower_few_rows([piece], parameters, Measured(linear=3, loop=2, weight=1), 1) == 0
        assert signature(piece) == before


@pytest.mark.parametrize(("loop", "expected"), [(0.5, 1), (0.85, 0)], ids=["much faster", "hardly faster"])
def test_a_large_product_in_float32_takes_the_loop_where_that_is_much_faster(loop: float, expected: int) -> None:
    graph = fx.Graph()
    activation, weight = graph.placeholder("activation"), graph.placeholder("weight")
    product = graph.call_function(torch.nn.functional.linear, (activation, weight))
    graph.output((product,))
    values = {activation: torch.randn(1, 1, 256), weight: torch.randn(512, 256)}
    for node, value in {**values, product: torch.empty(1, 1, 512)}.items():
        node.meta["example_value"] = value
    piece = Piece(graph, {}, ("activation", "weight"), ("product",))
    forms = Measured(linear=1.0, loop=loop)
    assert lower_few_rows([piece], {"weight": values[weight]}, forms, 1) == expected
    assert [choice.taken for choice in forms.choices.values()] == ["loop" if expected else "linear"]
    (found,) = piece.module()(*values.values())
    torch.testing.assert_close(found, torch.nn.functional.linear(*values.values()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("times", "steady", "expected"),
    [
        ({"linear": 1.0, "loop": 2.0, "weight": 1.2}, True, "single_row"),
        ({"linear": 1.0, "loop": 2.0, "weight": 1.2}, False, "linear"),
        ({"linear": 1.0, "loop": 0.5, "weight": 1.0}, True, "by_loop"),
        ({"linear": 0.5, "loop": 1.0, "weight": 1.0}, True, "linear"),
    ],
    ids=[
        "rows that do not depend on each other cost little",
        "they would cost little, but depend on each other",
        "the loop is faster",
        "torch is faster",
    ],
)
def test_the_fastest_form_is_taken(
    times: dict[str, float], steady: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    model = random_model("llama", 2).to(torch.bfloat16)
    backend = RiverBackend(RiverConfig(dump_dir=tmp_path), compiler=as_it_is)
    monkeypatch.setattr(backend, "_forms", Measured(steady, **times))
    play(model, torch.compile(model, backend=backend), prompt(1, 20), 2, "static")
    text = "".join(path.read_text() for path in sorted(tmp_path.iterdir())[-1:])
    found = {name: text.count(f"forms_{name}(") for name in ("single_row", "by_loop")}
    # Seven in a layer, and the LM head; the river's own products are quantized already.
    assert found == {name: (2 * 7 + 1) * (name == expected) for name in found}


@pytest.mark.parametrize(
    ("form", "family", "cache"),
    [
        ("linear", "llama", "static"),
        ("loop", "gpt2", "static"),
        ("loop", "qwen2", "dynamic"),
        ("weight", "gpt2", "static"),
        ("weight", "gemma2", "dynamic"),
    ],
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
    ours = Forms(as_it_is, first)
    kind = Kind.of(weights[0], True)
    single = ours.of_float(kind, weights)
    few = ours.of_float(replace(kind, rows=4), weights)
    eight = ours.of_river(Kind(1, 256, 512, torch.float32, 8, 32))
    assert [set(found) for found in (single, few, eight)] == [
        {"linear", "loop", "weight"},
        {"linear", "weight"},
        {"int4", "int8"},
    ]
    assert all(0 < seconds < 1 for found in (single, few, eight) for seconds in found.values())
    steady = ours.are_steady(kind, weights[0])
    again = Remembered(tmp_path)
    assert dict(again) == dict(first)

    def no_compiler(*_: object) -> None:
        raise AssertionError("it was measured already")

    later = Forms(no_compiler, again)  # type: ignore[arg-type]
    assert later.of_float(kind, weights) == single
    assert later.are_steady(kind, weights[0]) == steady


@pytest.mark.parametrize("content", ["", "[1]", '{"a": {"b": "c"}}', '{"a": 1}', "\0"])
def test_a_file_that_cannot_be_read_is_as_none(content: str, tmp_path: Path) -> None:
    remembered = Remembered(tmp_path)
    remembered.path.parent.mkdir()
    remembered.path.write_text(content)
    assert len(remembered) == 0
    remembered["a"] = {"linear": 1.0}
    assert list(json.loads(remembered.path.read_text())) == ["a"]


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "river").write_text("a file where the folder would be")
    remembered = Remembered(tmp_path)
    remembered["a"] = {"linear": 1.0}
    assert remembered["a"] == {"linear": 1.0}
