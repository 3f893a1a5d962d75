"""Weights that are spread over processes, here over one: what matters is how the graph reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from river_compile.errors import InputError
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.ranks import ranks_of
from river_compile.passes.fx.graph import value_of
from river_compile.passes.fx.localize_weights import localize_weights


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    torch.compiler.reset()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Layer(nn.Module):
    """Reads the shard of one weight, and of another the shard and the whole."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.one = nn.Parameter(distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)]))
        self.both = nn.Parameter(distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.both.redistribute(placements=[Replicate()]).to_local()
        return x @ self.one.to_local().T @ self.both.to_local() + whole.sum()


def captured(module: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, Sequence[Any]]:
    found = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.append((graph, inputs))
        return graph.forward

    with torch.no_grad():
        torch.compile(module, backend=backend)(x)
    return found[0]


def test_a_weight_whose_shard_is_read_becomes_an_input_that_is_the_shard(mesh: DeviceMesh) -> None:
    module, x = Layer(mesh), torch.randn(3, 4)
    graph, inputs = captured(module, x)
    before = str(graph.graph)
    local = localize_weights(graph, inputs)
    assert local is not None
    assert str(graph.graph) == before
    # The weight that is read in both ways stands there twice.
    taken = [inputs[place] for place in local.order]
    assert [sum(value is weight for value in taken) for weight in (module.one, module.both)] == [1, 2]
    names = [node.name for node in local.module.graph.nodes if node.op == "placeholder"]
    assert len(local.shards) == 2
    values = [seam.shard_of(v) if name in local.shards else v for name, v in zip(names, taken, strict=True)]
    with torch.no_grad():
        torch.testing.assert_close(local.module(*values)[0], module(x))
    for node in local.module.graph.nodes:
        assert node.name not in local.shards or not hasattr(value_of(node), "placements")


def test_a_graph_in_one_process_has_none(mesh: DeviceMesh) -> None:
    graph, inputs = captured(nn.Linear(4, 2), torch.randn(3, 4))
    assert localize_weights(graph, inputs) is None
    assert ranks_of(graph.graph.nodes, inputs) is None


def test_the_processes_are_those_of_the_weights_or_of_the_collectives(mesh: DeviceMesh) -> None:
    graph, inputs = captured(Layer(mesh), torch.randn(3, 4))
    found = ranks_of((), inputs)
    assert found is not None
    assert found.group is mesh.get_group()

    class Sums(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sums = super().forward(x)
            dist.all_reduce(sums, group=self.group)
            return sums

    linear = Sums(4, 2)
    linear.group = dist.new_group([0])
    graph, values = captured(linear, torch.randn(3, 4))
    found = ranks_of(graph.graph.nodes, values)
    assert found is not None
    assert found.group is linear.group
    with pytest.raises(InputError, match="several groups"):
        ranks_of(graph.graph.nodes, inputs)
