"""Models that cannot have a river: one line says what they are and which file to take instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import pytest
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from river_compile.api import export, plan
from river_compile.config import RiverConfig
from river_compile.errors import InputError
from tests.contrib_model import ContribDecoder
from tests.families import VOCABULARY
from tests.oracle import Player, assert_close, session

_CONTRIB = "com.microsoft"
# ONNX Runtime's tools infer no types behind its own operators.
_UNKNOWN = {"DefaultTensorType": TensorProto.FLOAT}


@pytest.fixture
def model(tmp_path: Path) -> ModelProto:
    return onnx.load(ContribDecoder().save(tmp_path / "plain.onnx"))


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Why a model is refused; by default it is one that ONNX Runtime runs."""

    def why(changed: ModelProto, *, loads: bool = True) -> str:
        path = tmp_path / "model.onnx"
        onnx.save(changed, path)
        if loads:
            session(path)
        for attempt in (lambda: export(path, tmp_path / "out.onnx"), lambda: plan(path)):
            with pytest.raises(InputError) as caught:
                attempt()
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "out.onnx").exists()
        return str(caught.value)

    return why


Refused = Callable[..., str]


def _value(name: str, kind: int, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _caches(values: Sequence[ValueInfoProto]) -> list[ValueInfoProto]:
    return [value for value in values if len(value.type.tensor_type.shape.dim) == 4]


def _without(values: Sequence[ValueInfoProto], dropped: Sequence[ValueInfoProto]) -> list[ValueInfoProto]:
    names = {value.name for value in dropped}
    return [value for value in values if value.name not in names]


def _changed(
    model: ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[ValueInfoProto] | None = None,
    outputs: Sequence[ValueInfoProto] | None = None,
    weights: Sequence[onnx.TensorProto] | None = None,
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "main",
        list(model.graph.input if inputs is None else inputs),
        list(model.graph.output if outputs is None else outputs),
        list(model.graph.initializer if weights is None else weights),
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _branch(model: ModelProto, prefix: str) -> onnx.GraphProto:
    """The model's nodes as a branch of their own names."""
    made = {name for node in model.graph.node for name in node.output if name}
    nodes, outputs = [], []
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = prefix + node.name
        copy.input[:] = [prefix + name if name in made else name for name in node.input]
        copy.output[:] = [prefix + name if name else name for name in node.output]
        nodes.append(copy)
    for value in model.graph.output:
        copied = ValueInfoProto()
        copied.CopyFrom(value)
        copied.name = prefix + value.name
        outputs.append(copied)
    return helper.make_graph(nodes, prefix, [], outputs)


@pytest.mark.parametrize("condition", ("use_cache_branch", "has_past"))
def test_a_merged_decoder(model: ModelProto, refused: Refused, condition: str) -> None:
    names = [value.name for value in model.graph.output]
    branches = {"then_branch": _branch(model, "with/"), "else_branch": _branch(model, "without/")}
    merged = helper.make_node("If", [condition], names, "if", **branches)
    inputs = [*model.graph.input, _value(condition, TensorProto.BOOL, [1])]
    why = refused(_changed(model, [merged], inputs))
    assert why.startswith("a merged decoder: ")
    assert condition in why
    assert "take decoder_with_past_model.onnx or model.onnx" in why


@pytest.mark.parametrize("op", ("BeamSearch", "GreedySearch", "Sampling"))
def test_a_whole_generation_loop(model: ModelProto, refused: Refused, op: str) -> None:
    ids = [_value(name, TensorProto.INT32, shape) for name, shape in (("ids", ["b", "s"]), ("most", [1]))]
    node = helper.make_node(
        op, ["ids", "most"], ["sequences"], "search", _CONTRIB, decoder=model.graph, eos_token_id=1, pad_token_id=0
    )
    looped = _changed(model, [node], ids, [_value("sequences", TensorProto.INT32, ["b", "t"])])
    why = refused(looped, loads=False)
    assert why.startswith(f"the decoder lies within a {op} node")
    assert "model.onnx" in why


def _stacked(model: ModelProto, axis: int, *, split: bool) -> ModelProto:
    """All layers' caches in one tensor, or in one of keys and one of values; the layers lie along ``axis``."""
    nodes, weights = list(model.graph.node), list(model.graph.initializer)
    pasts, presents = _caches(model.graph.input), _caches(model.graph.output)
    layers = len(pasts) // 2
    dims = ["batch", 2, "past", 16]
    inputs, outputs = _without(model.graph.input, pasts), _without(model.graph.output, presents)
    for number in range(layers):
        weights.append(onnx.numpy_helper.from_array(np.array(number), f"index.{number}"))
    weights.append(onnx.numpy_helper.from_array(np.array([axis]), "axes"))
    weights.append(onnx.numpy_helper.from_array(np.array([1 - axis]), "other"))
    stacks = []
    for which, what in enumerate(("key", "value")):
        past = f"past.{what}" if split else "past_of"
        if split:
            inputs.append(_value(past, TensorProto.FLOAT, [layers, *dims]))
            outputs.append(_value(f"stacked.{what}", TensorProto.FLOAT, [layers, "batch", 2, "total", 16]))
        else:
            nodes.insert(0, helper.make_node("Gather", ["pasts", f"index.{which}"], [f"past_of.{what}"], axis=1 - axis))
        for layer in range(layers):
            source = past if split else f"past_of.{what}"
            name = f"past_key_values.{layer}.{what}"
            nodes.insert(0 if split else 1, helper.make_node("Gather", [source, f"index.{layer}"], [name], axis=0))
            nodes.append(helper.make_node("Unsqueeze", [f"present.{layer}.{what}", "axes"], [f"one.{layer}.{what}"]))
        parts = [f"one.{layer}.{what}" for layer in range(layers)]
        nodes.append(helper.make_node("Concat", parts, [f"stacked.{what}"], axis=axis))
        stacks.append(f"stacked.{what}")
    if not split:
        shape = [layers, 2] if axis == 0 else [2, layers]
        inputs.append(_value("pasts", TensorProto.FLOAT, [*shape, *dims]))
        outputs.append(_value("presents", TensorProto.FLOAT, [*shape, "batch", 2, "total", 16]))
        both = [f"{stack}.both" for stack in stacks]
        nodes += [helper.make_node("Unsqueeze", [s, "other"], [b]) for s, b in zip(stacks, both, strict=True)]
        nodes.append(helper.make_node("Concat", both, ["presents"], axis=1 - axis))
    return _changed(model, nodes, inputs, outputs, weights)


@pytest.mark.parametrize(("axis", "split"), ((0, False), (1, False), (0, True)))
def test_one_cache_tensor_for_all_layers(model: ModelProto, refused: Refused, axis: int, split: bool) -> None:
    stacked = _stacked(model, axis, split=split)
    assert refused(stacked).startswith("one cache tensor for all layers ('past")


def test_the_prompt_half_of_a_decoder(model: ModelProto, refused: Refused) -> None:
    nodes = list(model.graph.node)
    for node in nodes:
        if node.op_type == "GroupQueryAttention":
            node.input[3] = node.input[4] = ""
    why = refused(_changed(model, nodes, _without(model.graph.input, _caches(model.graph.input))))
    assert why.startswith("the model writes a KV cache ('present.0.key', ...) and takes none")
    assert "decoder_with_past_model.onnx" in why


def test_a_model_without_a_cache(model: ModelProto, refused: Refused) -> None:
    nodes = list(model.graph.node)
    for node in nodes:
        if node.op_type == "GroupQueryAttention":
            node.input[3] = node.input[4] = ""
    pasts, presents = _caches(model.graph.input), _caches(model.graph.output)
    bare = _changed(model, nodes, _without(model.graph.input, pasts), _without(model.graph.output, presents))
    why = refused(bare)
    assert why.startswith("the model has no KV cache in its signature")
    assert "an encoder, or a decoder to be exported again with past key values" in why


def _encoder(images: bool) -> ModelProto:
    """Patches of images, or frames of sound, through two residual blocks."""
    weights = [onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32), f"w{index}") for index in range(2)]
    shape: list[int | str] = ["batch", 3, 32, 32] if images else ["batch", "frames", 8]
    nodes, hidden = [], "pixels"
    if images:
        weights.append(onnx.numpy_helper.from_array(np.ones((8, 3, 4, 4), np.float32), "patches"))
        weights.append(onnx.numpy_helper.from_array(np.array([0, 8, -1]), "flat"))
        nodes.append(helper.make_node("Conv", ["pixels", "patches"], ["maps"], strides=[4, 4]))
        nodes.append(helper.make_node("Reshape", ["maps", "flat"], ["rows"]))
        nodes.append(helper.make_node("Transpose", ["rows"], ["hidden"], perm=[0, 2, 1]))
        hidden = "hidden"
    for index in range(2):
        nodes.append(helper.make_node("MatMul", [hidden, f"w{index}"], [f"m{index}"]))
        nodes.append(helper.make_node("Add", [hidden, f"m{index}"], [f"h{index}"]))
        hidden = f"h{index}"
    inputs = [_value("pixels", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "main", inputs, [_value(hidden, TensorProto.FLOAT, ["b", "s", 8])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("images", (True, False))
def test_an_encoder_of_images_or_sound(refused: Refused, images: bool) -> None:
    why = refused(_encoder(images))
    assert "It takes 'pixels' and no tokens, as an encoder of images or sound does" in why


def test_a_table_of_embeddings(refused: Refused) -> None:
    table = onnx.numpy_helper.from_array(np.ones((VOCABULARY, 8), np.float32), "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])],
        "main",
        [_value("input_ids", TensorProto.INT64, ["b", "s"])],
        [_value("inputs_embeds", TensorProto.FLOAT, ["b", "s", 8])],
        [table],
    )
    why = refused(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    assert "no linear layer: a piece of a model, such as its embeddings" in why


@pytest.mark.parametrize("kind", ("dynamic", "QDQ", "by hand"))
def test_a_quantized_model(model: ModelProto, refused: Refused, kind: str, tmp_path: Path) -> None:
    operators = {"dynamic": "MatMulInteger", "QDQ": "DequantizeLinear", "by hand": "Cast"}
    why = refused(_quantized(model, kind, tmp_path, ""))
    assert why.endswith(f"already quantized ({operators[kind]}), so start from the float model")


@pytest.mark.parametrize("kind", ("dynamic", "QDQ", "by hand"))
def test_a_model_quantized_in_part_gets_its_river_and_stays_what_it_is(
    model: ModelProto, kind: str, tmp_path: Path
) -> None:
    mixed, river = tmp_path / "mixed.onnx", tmp_path / "out.onnx"
    onnx.save(_quantized(model, kind, tmp_path, "mlp"), mixed)
    report = export(mixed, river, RiverConfig(tau=2.0))
    assert (report.layers, report.river_layers) == (3, 3)
    assert "already quantized in part" in report.notes[0]
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 7))
    expected = Player(session(mixed), 2).step(ids)
    assert_close(Player(session(river), 2).step(ids), expected)
    quantized = Player(session(river), 2).step(ids, max_depth=0)["logits"]
    assert 0 < np.abs(quantized - expected["logits"]).max() < 0.5 * np.ptp(expected["logits"])


def test_little_that_is_float_is_not_worth_a_twin(tmp_path: Path, refused: Refused) -> None:
    """Such as an adapter beside quantized weights."""
    path = ContribDecoder(quantized=(0, 1, 2), width=128, heads=8, ffn=512).save(tmp_path / "plain.onnx")
    model = onnx.load(path)
    for index in range(3):
        scope = f"/model/layers.{index}/mlp/down_proj"
        node = next(node for node in model.graph.node if node.name == f"{scope}/MatMulNBits")
        place = list(model.graph.node).index(node)
        for name, shape in (("a", (512, 4)), ("b", (4, 128))):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), f"{scope}/{name}"))
        result = node.output[0]
        node.output[0] = f"{scope}/base"
        for op, operands, made in (
            ("Add", [f"{scope}/base", f"{scope}/out_b"], result),
            ("MatMul", [f"{scope}/out_a", f"{scope}/b"], f"{scope}/out_b"),
            ("MatMul", [node.input[0], f"{scope}/a"], f"{scope}/out_a"),
        ):
            model.graph.node.insert(place + 1, helper.make_node(op, operands, [made], f"{made}/{op}"))
    assert "already quantized (MatMulNBits)" in refused(model)


def _quantized(model: ModelProto, kind: str, folder: Path, part: str) -> ModelProto:
    """The model with the linear layers of one part of each layer quantized, as ONNX Runtime's tools or by hand."""
    names = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    others = [name for name in names if part not in name]
    source, target = folder / "float.onnx", folder / "quantized.onnx"
    onnx.save(model, source)
    if kind == "by hand":
        _round(model, set(names) - set(others))
        return model
    if kind == "dynamic":
        quantize_dynamic(source, target, nodes_to_exclude=others, extra_options=_UNKNOWN)
    else:
        settings = {"op_types_to_quantize": ["MatMul"], "nodes_to_exclude": others, "weight_type": QuantType.QInt8}
        settings["extra_options"] = _UNKNOWN
        quantize_static(source, target, _Reader(source), quant_format=QuantFormat[kind], **settings)
    return onnx.load(target)


def _round(model: ModelProto, names: set[str]) -> None:
    """Weights as int8, cast and scaled in the graph."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.name in names]:
        weight = onnx.numpy_helper.to_array(tensors[node.input[1]])
        scale = np.float32(np.abs(weight).max() / 127)
        name = node.input[1]
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(np.round(weight / scale).astype(np.int8), name))
        model.graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}/scale"))
        node.input[1] = f"{name}/scaled"
        model.graph.node.insert(0, helper.make_node("Mul", [f"{name}/cast", f"{name}/scale"], [f"{name}/scaled"]))
        model.graph.node.insert(0, helper.make_node("Cast", [name], [f"{name}/cast"], to=TensorProto.FLOAT))


class _Reader(CalibrationDataReader):
    """One batch to calibrate with."""

    def __init__(self, path: Path) -> None:
        past = np.random.default_rng(0).standard_normal((1, 2, 5, 16)).astype(np.float32)
        names = [value.name for value in _caches(onnx.load(path).graph.input)]
        ids = {"input_ids": np.arange(3)[None], "attention_mask": np.ones((1, 8), np.int64)}
        self._batches = [ids | dict.fromkeys(names, past)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._batches.pop() if self._batches else None


def test_a_second_decoder_is_told_of(model: ModelProto, tmp_path: Path) -> None:
    """Two decoders side by side: the deeper has a river, the other stays as it is."""
    shared = [value for value in model.graph.input if value.name in ("input_ids", "attention_mask")]
    small = onnx.load(ContribDecoder(layers=2).save(tmp_path / "small.onnx"))
    other = onnx.compose.add_prefix(small, "other/")
    names = {f"other/{value.name}": value.name for value in shared}
    for node in other.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    inputs = [*model.graph.input, *(value for value in other.graph.input if value.name not in names)]
    both = _changed(
        model,
        [*model.graph.node, *other.graph.node],
        inputs,
        [*model.graph.output, *other.graph.output],
        [*model.graph.initializer, *other.graph.initializer],
    )
    path = tmp_path / "both.onnx"
    onnx.save(both, path)
    session(path)
    report = export(path, tmp_path / "out.onnx")
    assert report.river_layers == 3
    why = "no layer of the one decoder that has a river writes: 4 caches, such as other/present.0.key"
    assert report.notes == (why,)
