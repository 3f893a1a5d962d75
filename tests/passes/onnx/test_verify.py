"""The check after every pass finds a graph that a pass has spoiled, and names the pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from river_compile.config import RiverConfig
from river_compile.errors import PassError
from river_compile.exporters.onnx.onnxruntime import MatMulNBits
from river_compile.exporters.onnx.rewrite import dissect
from river_compile.exporters.quantizers.rtn import RoundToNearest
from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.graph import OnnxGraph
from river_compile.passes.onnx.grow_river import grow_river
from river_compile.passes.onnx.insert_exits import insert_exits
from river_compile.passes.onnx.share_kv import share_kv
from river_compile.passes.onnx.verify import Original, verify

Exported = Callable[[str], Path]
Rewritten = tuple[OnnxGraph, Original, Anatomy]


@pytest.fixture
def rewritten(exported: Exported) -> Rewritten:
    path = exported("llama")
    graph, anatomy = dissect(onnx.load(path, load_external_data=False), path.parent)
    original = Original.of(graph)
    config = RiverConfig()
    river = grow_river(graph, anatomy, config, RoundToNearest(), MatMulNBits("float"))
    insert_exits(graph, anatomy, share_kv(graph, anatomy, river, None), config)
    return graph, original, anatomy


def _branch(graph: OnnxGraph, layer: int, name: str) -> gs.Graph:
    node = next(node for node in graph.nodes if node.name == f"river/layer.{layer}")
    branch: gs.Graph = node.attrs[name]
    return branch


def _fails(rewritten: Rewritten, problem: str) -> None:
    with pytest.raises(PassError, match=f"after grow_river -> insert_exits: .*{problem}") as caught:
        verify(*rewritten, ["grow_river", "insert_exits"])
    assert caught.value.passes == ("grow_river", "insert_exits")


def test_a_whole_rewrite_passes(rewritten: Rewritten) -> None:
    verify(*rewritten, ["all"])


def test_two_nodes_of_one_name(rewritten: Rewritten) -> None:
    branch = _branch(rewritten[0], 1, "then_branch")
    branch.nodes[0].name = _branch(rewritten[0], 0, "then_branch").nodes[0].name
    _fails(rewritten, "two nodes are called")


def test_a_tensor_read_before_it_is_made(rewritten: Rewritten) -> None:
    rewritten[0].nodes.reverse()
    _fails(rewritten, "before it is made")


def test_a_branch_that_reads_what_only_the_other_one_makes(rewritten: Rewritten) -> None:
    river = _branch(rewritten[0], 1, "then_branch")
    backbone = _branch(rewritten[0], 1, "else_branch")
    river.nodes[1].inputs[0] = gs.Variable(backbone.nodes[0].outputs[0].name)
    _fails(rewritten, "before it is made")


def test_an_input_that_lost_its_type(rewritten: Rewritten) -> None:
    rewritten[0].inputs[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    _fails(rewritten, "the inputs changed")


def test_an_output_renamed(rewritten: Rewritten) -> None:
    rewritten[0].outputs[0].name = "renamed"
    _fails(rewritten, "the outputs changed")


def test_a_cache_slot_that_a_branch_does_not_write(rewritten: Rewritten) -> None:
    branch = _branch(rewritten[0], 2, "then_branch")
    branch.outputs[1] = gs.Variable("past_key_values.2.key", np.float32)
    _fails(rewritten, "does not write cache slot 'present.2.key'")


def test_a_cache_slot_written_outside_as_well(rewritten: Rewritten) -> None:
    graph = rewritten[0]
    writer = next(node for node in graph.nodes if node.name == "river/layer.2")
    copy = gs.Node("Identity", "copy", inputs=[gs.Variable("past_key_values.2.key")], outputs=[writer.outputs[1]])
    graph.nodes.append(copy)
    _fails(rewritten, "made twice|written 2 times")


def test_a_backbone_with_another_weight(rewritten: Rewritten) -> None:
    branch = _branch(rewritten[0], 1, "else_branch")
    product = next(node for node in branch.nodes if node.op == "MatMul")
    other = next(node for node in _branch(rewritten[0], 2, "else_branch").nodes if node.op == "MatMul")
    product.inputs[1] = gs.Variable(other.inputs[1].name)
    _fails(rewritten, "the backbone lost 1 nodes")


def test_a_backbone_with_another_attribute(rewritten: Rewritten) -> None:
    branch = _branch(rewritten[0], 1, "else_branch")
    norm = next(node for node in branch.nodes if node.op == "RMSNormalization")
    norm.attrs["epsilon"] = 0.5
    _fails(rewritten, "the backbone lost 1 nodes")
