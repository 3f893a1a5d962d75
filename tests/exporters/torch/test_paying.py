"""The time of a river's products beside the backbone's, from times that are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from river_compile.config import RiverConfig
from river_compile.exporters.quantizers.rtn import RoundToNearest
from river_compile.exporters.torch.linear import Dequantized
from river_compile.exporters.torch.paying import river_time
from river_compile.exporters.torch.timing import Forms, Kind
from river_compile.exporters.torch.weights import GraphWeights, Quantized, Store
from river_compile.passes.fx.find_layers import find_layers
from river_compile.passes.fx.grow_river import River, grow_river
from tests.torch_models import as_it_is, capture


class ByBytes(Forms):
    """A float product takes a second for each number of its weight and a tenth for each row; one with 4 bits an eighth,
    and a row a whole second; with 8 bits the kernel with one scale an output takes a quarter, and two planes a half."""

    def __init__(self) -> None:
        super().__init__(as_it_is, {})

    def of_float(self, kind: Kind, weights: Sequence[torch.Tensor]) -> Mapping[str, float]:
        size = weights[0].numel()
        return {"linear": size * (1 + kind.rows / 10), "loop": 9.0 * size}

    def of_river(self, kind: Kind) -> Mapping[str, float]:
        size = kind.inputs * kind.outputs
        if kind.bits == 4:
            return {"int4": size * (1 / 8 + kind.rows - 1)}
        return {"int4": size / 2, "int8": size / 4}


@pytest.fixture(scope="module")
def grown() -> tuple[River, River, dict[str, torch.Tensor]]:
    """A river with 4 bits and one with 8 of the same graph, and its parameters."""
    *_, decode = capture("llama", "static", layers=2)
    parameters = {
        node.name: torch.nn.Parameter(torch.randn(node.meta["example_value"].shape))
        for node in decode.placeholders
        if node.name in decode.weights
    }
    quantized = Quantized(Store(), Dequantized(), RoundToNearest(), RoundToNearest())
    weights = GraphWeights(quantized, parameters)
    rivers = [grow_river(decode, find_layers(decode), RiverConfig(bits=bits), weights) for bits in (4, 8)]
    return rivers[0], rivers[1], dict(parameters)


@pytest.mark.parametrize(("rows", "expected"), [(1, (1 / 8) / 1.1), (2, (9 / 8) / 1.2), (4, (25 / 8) / 1.4)])
def test_it_is_the_time_of_all_products_by_the_fastest_forms(
    rows: int, expected: float, grown: tuple[River, River, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("river_compile.exporters.torch.paying.SMALL", 0)
    river, _, parameters = grown
    forms = ByBytes()
    assert river_time(river.twins.values(), parameters, forms, rows) == pytest.approx(expected)
    assert {choice.taken for choice in forms.choices.values()} == {"int4"}


def test_eight_bits_are_timed_in_the_form_that_they_have(
    grown: tuple[River, River, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, river, parameters = grown
    monkeypatch.setattr("river_compile.exporters.torch.paying.SMALL", 0)
    assert river_time(river.twins.values(), parameters, ByBytes(), 1) == pytest.approx(0.5 / 1.1)
    monkeypatch.setattr("river_compile.exporters.torch.timing.SMALL", 0)
    assert river_time(river.twins.values(), parameters, ByBytes(), 1) == pytest.approx(0.25 / 1.1)


def test_small_products_are_not_timed(grown: tuple[River, River, dict[str, torch.Tensor]]) -> None:
    river, _, parameters = grown
    assert river_time(river.twins.values(), parameters, ByBytes(), 1) is None
    assert river_time((), parameters, ByBytes(), 1) is None
