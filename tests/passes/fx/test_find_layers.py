"""The anatomy of Dynamo's graphs: by their module paths, and by structure when those are stripped."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from river_compile.errors import LayersNotFound
from river_compile.passes.fx.find_layers import find_layers
from river_compile.passes.fx.graph import FxGraph, import_graph
from tests.families import LAYERS
from tests.torch_models import capture, family_and_cache

QUICK = (("llama", "dynamic"), ("gpt2", "static"), ("gemma2", "static"))

KINDS = {("llama", "dynamic"): [0, 0, 0, 0], ("gemma2", "static"): [0, 1, 0, 1]}
"""Of the prompt: the layers of Gemma 2 alternate."""


def strip(graph: FxGraph) -> None:
    for node in graph.module.graph.nodes:
        node.meta.pop("nn_module_stack", None)


@pytest.mark.parametrize(("family", "cache"), family_and_cache(QUICK))
def test_structure_alone_finds_what_the_module_paths_tell(family: str, cache: str) -> None:
    graphs = capture(family, cache)
    assert graphs
    kinds = []
    for graph in graphs:
        told = find_layers(graph)
        strip(graph)
        found = find_layers(graph)
        assert (told.found_by, found.found_by) == ("metadata", "structure")
        assert len(told.layers) == LAYERS
        assert found.layers == told.layers
        kinds.append([layer.kind for layer in told.layers])
    if (family, cache) in KINDS:
        assert kinds[0] == KINDS[family, cache]


def test_a_layer_is_told_in_full() -> None:
    *_, decode = capture("llama", "static")
    layers = find_layers(decode).layers
    assert {layer.kind for layer in layers} == {0}
    for index, layer in enumerate(layers):
        assert layer.index == index
        assert [slot.past.rpartition("_layers_")[2] for slot in layer.caches] == [f"{index}_keys", f"{index}_values"]
        assert len(layer.weights) == 9
        assert any("attention_mask" in name for name in layer.side_inputs)
        assert layer.side_outputs == ()
    assert [layer.hidden_out for layer in layers[:-1]] == [layer.hidden_in for layer in layers[1:]]


def traced(function: object, *inputs: torch.Tensor) -> FxGraph:
    graphs: list[FxGraph] = []

    def backend(module: fx.GraphModule, values: object) -> object:
        graphs.append(import_graph(module, []))
        return module.forward

    torch.compiler.reset()
    torch.compile(function, backend=backend)(*inputs)  # type: ignore[call-overload]
    return graphs[0]


def test_a_graph_without_cache_is_no_decoder() -> None:
    graph = traced(torch.nn.Linear(4, 4), torch.ones(2, 4))
    with pytest.raises(LayersNotFound, match="no KV cache"):
        find_layers(graph)


def test_a_cache_without_repeated_layers_is_no_decoder() -> None:
    def once(tokens: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        present = torch.cat([past, tokens[:, None]], dim=2)
        return (present.sum(2) + tokens[:, :1, 0, None]).relu() @ torch.ones(4, 4), present

    with pytest.raises(LayersNotFound, match="no chain"):
        find_layers(traced(once, torch.ones(2, 3, 4), torch.ones(2, 1, 5, 4)))
