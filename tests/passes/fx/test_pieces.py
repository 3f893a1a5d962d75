"""Pieces and the river's twins: the pieces are the graph, and the checks catch what is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, PassError
from river_compile.passes.anatomy import Anatomy
from river_compile.passes.fx.find_layers import find_layers
from river_compile.passes.fx.graph import FxGraph, value_of
from river_compile.passes.fx.grow_river import Product, River, grow_river
from river_compile.passes.fx.insert_exits import insert_exits, similarity, similarity_name
from river_compile.passes.fx.pieces import signature
from river_compile.passes.fx.share_head import share_head
from river_compile.passes.fx.share_kv import Plan, share_kv
from river_compile.passes.fx.verify import verify
from tests.torch_models import capture


class FloatWeights:
    """River weights for looking at graphs: the right number of operands, no numbers."""

    def operands(self, product: Product) -> list[torch.Tensor]:
        return [torch.zeros(sum(linear.outputs for linear in product.linears), product.linears[0].inputs)]

    @staticmethod
    def function(
        activation: torch.Tensor, operands: list[torch.Tensor], outputs: int, bits: int, group: int, bias: object
    ) -> torch.Tensor:
        return activation @ operands[0].T


@pytest.fixture(scope="module", params=["dynamic", "static"])
def decode(request: pytest.FixtureRequest) -> FxGraph:
    return capture("llama", request.param)[-1]


def passes(graph: FxGraph, config: RiverConfig | None = None) -> tuple[Anatomy, River, Plan]:
    config = config or RiverConfig()
    anatomy = find_layers(graph)
    river = grow_river(graph, anatomy, config, FloatWeights())
    plan = share_kv(graph, anatomy, river)
    insert_exits(graph, anatomy, plan, config)
    verify(graph, anatomy, ["all"], river, plan)
    return anatomy, river, plan


def test_every_twin_has_its_linear_layers_in_four_products(decode: FxGraph) -> None:
    _, river, _ = passes(decode)
    for index, twin in river.twins.items():
        names = [[linear.name for linear in product.linears] for product in twin.products.values()]
        prefix = f"model.layers.{index}."
        assert names == [
            [f"{prefix}self_attn.{which}_proj" for which in "qkv"],
            [f"{prefix}self_attn.o_proj"],
            [f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"],
            [f"{prefix}mlp.down_proj"],
        ]
        assert not {n for n in twin.river.inputs if "proj" in n and not n.startswith("river/")}
        assert twin.river.outputs == twin.backbone.outputs


def test_both_twins_read_the_same_cache(decode: FxGraph) -> None:
    anatomy, river, _ = passes(decode)
    for layer in anatomy.layers:
        twin = river.twins[layer.index]
        for slot in layer.caches:
            assert slot.past in twin.backbone.inputs
            assert slot.past in twin.river.inputs


def test_all_layers_have_one_signature(decode: FxGraph) -> None:
    _, river, plan = passes(decode)
    assert len({signature(piece) for piece in plan.layers}) == 1
    assert len({signature(twin.river) for twin in river.twins.values()}) == 1


def test_bits_of_a_pattern_make_a_product_of_their_own(decode: FxGraph) -> None:
    _, river, _ = passes(decode, RiverConfig(bits_for=(("*.v_proj", 8), ("layers.0", 8))))
    bits = [[(len(p.linears), p.bits) for p in twin.products.values()] for twin in river.twins.values()]
    assert bits[0] == [(3, 8), (1, 8), (2, 8), (1, 8)]
    assert bits[1] == [(2, 4), (1, 8), (1, 4), (2, 4), (1, 4)]


def test_kept_layers_have_no_twin(decode: FxGraph) -> None:
    _, river, plan = passes(decode, RiverConfig(keep_layers=(0, -1)))
    assert sorted(river.twins) == sorted(plan.twins) == [1, 2]
    assert river.notes == ["backbone only, asked for: layers 0, 3"]
    with pytest.raises(ConfigError, match="keep_layers"):
        passes(decode, RiverConfig(keep_layers=(9,)))


def test_exit_points_are_returned_and_every_piece_yields_its_similarity(decode: FxGraph) -> None:
    anatomy, _, plan = passes(decode)
    config = RiverConfig(min_depth=2, keep_layers=(2,))
    river = grow_river(decode, anatomy, config, FloatWeights())
    plan = share_kv(decode, anatomy, river)
    assert insert_exits(decode, anatomy, plan, config) == (2,)
    assert [piece.outputs[-1] == similarity_name(i) for i, piece in enumerate(plan.layers)] == [True, True, False, True]


def test_similarity_is_the_least_cosine_of_all_tokens_that_are_no_padding() -> None:
    before = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    after = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    torch.testing.assert_close(similarity(before, after, None).double(), cosine.min(), atol=1e-6, rtol=0)
    mask = torch.tensor([[0, 0, 1, 0, 1], [1, 1, 1, 1, 1]])
    least = torch.cat([cosine[0, [0, 2]], cosine[1]]).min()
    torch.testing.assert_close(similarity(before, after, mask).double(), least, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_state_is_above_no_threshold(bad: float) -> None:
    before = torch.ones(1, 2, 8)
    after = before.clone()
    after[0, 0, 0] = bad
    assert not similarity(before, after, None).item() > -1


def test_verify_names_the_passes_after_a_twin_lost_its_cache_write(decode: FxGraph) -> None:
    anatomy, river, plan = passes(decode)
    layer = river.twins[1].layer
    piece = river.twins[1].river
    write = next(node for node in piece.graph.nodes if node.name == layer.caches[0].present)
    other = next(n for n in piece.graph.nodes if n.op == "placeholder" and value_of(n).dim() == 4)
    write.replace_all_uses_with(other)
    piece.graph.erase_node(write)
    broken = dataclasses.replace(piece, outputs=tuple(n for n in piece.outputs if n != layer.caches[0].present))
    river.twins[1] = dataclasses.replace(river.twins[1], river=broken, backbone=broken)
    with pytest.raises(PassError, match=r"after a -> b: .*layer 1 is not written exactly once"):
        verify(decode, anatomy, ["a", "b"], river, plan)


def test_verify_catches_a_size_that_no_operand_binds() -> None:
    graph = capture("gemma2", "dynamic")[-1]
    anatomy, river, plan = passes(graph)
    symbols = {n.name for n in graph.placeholders if isinstance(value_of(n), torch.SymInt)}
    assert symbols
    assert plan.prefix is not None
    for node in list(plan.prefix.placeholders.values()):
        if isinstance(value_of(node), torch.SymInt):
            node.meta["example_value"] = value_of(node) + 1
    with pytest.raises(PassError, match=r"the size s\d+ is bound by no operand of"):
        verify(graph, anatomy, ["share_kv"], river, plan)


def test_verify_catches_a_piece_that_is_missing(decode: FxGraph) -> None:
    anatomy, river, plan = passes(decode)
    del plan.layers[2]
    with pytest.raises(PassError, match="the backbone lost"):
        verify(decode, anatomy, ["share_kv"], river, plan)


def test_verify_catches_a_head_that_yields_other_values(decode: FxGraph) -> None:
    config = RiverConfig(head_bits=8)
    anatomy, river, plan = passes(decode, config)
    assert share_head(decode, plan, config, FloatWeights())
    verify(decode, anatomy, ["share_head"], river, plan)
    assert plan.exit_suffix is not None
    plan.exit_suffix = dataclasses.replace(plan.exit_suffix, outputs=("another",))
    with pytest.raises(PassError, match="after an exit yields other values"):
        verify(decode, anatomy, ["share_head"], river, plan)


def test_verify_catches_layers_that_do_not_follow_each_other(decode: FxGraph) -> None:
    anatomy, _, _ = passes(decode)
    swapped = Anatomy((anatomy.layers[0], anatomy.layers[2], *anatomy.layers[3:]), "metadata")
    with pytest.raises(PassError, match="no run of consecutive nodes"):
        verify(decode, swapped, ["find_layers"])
