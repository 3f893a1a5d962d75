"""The generation loop, against transformers' own and against forward passes by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError, MissingExtra
from river_compile.runtime import OnnxDecoder, Step
from tests.contrib_model import ContribDecoder
from tests.families import LAYERS, VOCABULARY, random_model
from tests.oracle import Player, session

Exported = Callable[[str], Path]

PROMPT = [5, 9, 17, 33]


@pytest.fixture(scope="module")
def river(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("runtime") / "model.river.onnx"
    export(exported("llama"), target, RiverConfig(tau=2.0))
    return target


@pytest.fixture(scope="module")
def decoder(river: Path) -> OnnxDecoder:
    return OnnxDecoder(river, threads=1)


def _generate(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    tokens = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, eos_token_id=None
    )
    return [row[length:].tolist() for row in tokens]


def test_greedy_generation_with_exits_off_equals_transformers(decoder: OnnxDecoder) -> None:
    expected = _generate(random_model("llama"), [PROMPT], 24)
    result = decoder.generate([PROMPT], 24)
    assert result.tokens == expected
    assert result.exit_depths == [LAYERS] * 23
    assert result.mean_exit_depth == LAYERS
    assert result.tokens_per_second > 0


def test_a_batch_of_prompts_of_different_lengths_equals_transformers(decoder: OnnxDecoder) -> None:
    prompts = [PROMPT, [7], [3, 4, 5, 6, 7, 8, 9], [11, 12]]
    expected = _generate(random_model("llama"), prompts, 12)
    assert decoder.generate(prompts, 12).tokens == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert decoder.generate([prompt], 12).tokens == [tokens]


@pytest.mark.parametrize("prompts", [[[*range(3, 90)]], [[*range(3, 60)], [7, 9], PROMPT]], ids=("one", "three"))
@pytest.mark.parametrize("exact", [False, True])
def test_long_prompts_are_read_in_several_passes(
    prompts: list[list[int]], exact: bool, decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pieces of a batch are nothing but padding for its short prompts."""
    expected = _generate(random_model("llama"), prompts, 12)
    read = []
    run = OnnxDecoder._pass

    def noted(self: OnnxDecoder, ids: np.ndarray, *given: Any) -> Any:
        read.append(ids.shape)
        return run(self, ids, *given)

    monkeypatch.setattr(OnnxDecoder, "_pass", noted)
    monkeypatch.setattr("river_compile.runtime.onnxruntime._PAIRS", 10 * len(prompts) * len(prompts[0]))
    assert decoder.generate(prompts, 12, exact=exact).tokens == expected
    pieces = -(-len(prompts[0]) // 10)
    assert [shape[1] for shape in read[: pieces - 1]] == [10] * (pieces - 1)
    assert sum(shape[1] for shape in read[:pieces]) == len(prompts[0])


def test_the_plain_model_runs_as_well(exported: Exported, decoder: OnnxDecoder) -> None:
    plain = OnnxDecoder(exported("llama"))
    result = plain.generate([PROMPT], 8)
    assert result.tokens == decoder.generate([PROMPT], 8).tokens
    assert (plain.has_river, plain.layers, result.exit_depths) == (False, None, [])
    assert np.isnan(result.mean_exit_depth)
    with pytest.raises(ConfigError, match=r"tau: this model has no river"):
        plain.generate([PROMPT], 1, tau=0.5)


def test_contrib_attention_runs_as_well(tmp_path: Path) -> None:
    original, river = ContribDecoder().save(tmp_path / "model.onnx"), tmp_path / "m.onnx"
    export(original, river, RiverConfig(tau=2.0))
    assert OnnxDecoder(river).generate([PROMPT], 6).tokens == OnnxDecoder(original).generate([PROMPT], 6).tokens


def test_bound_caches_give_the_same_as_direct_ones(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of other devices, on this one."""
    expected = decoder.generate([PROMPT, [7]], 8, max_depth=2)
    monkeypatch.setattr(decoder, "_run_direct", decoder._run_bound)
    found = decoder.generate([PROMPT, [7]], 8, max_depth=2)
    assert (found.tokens, found.exit_depths) == (expected.tokens, expected.exit_depths)


def test_tau_and_depth_hold_for_one_call(decoder: OnnxDecoder) -> None:
    assert (decoder.has_river, decoder.layers) == (True, LAYERS)
    assert set(decoder.generate([PROMPT], 6, tau=-1.0).exit_depths) == {1}
    assert set(decoder.generate([PROMPT], 6, max_depth=0).exit_depths) == {0}
    assert set(decoder.generate([PROMPT], 6).exit_depths) == {LAYERS}


def test_a_generation_at_some_depth_equals_passes_by_hand(decoder: OnnxDecoder, river: Path) -> None:
    result = decoder.generate([PROMPT], 10, max_depth=2)
    player = Player(session(river), 1)
    ids, tokens = np.array([PROMPT]), []
    for _ in range(10):
        outputs = player.step(ids, max_depth=2)
        ids = outputs["logits"][:, -1:].argmax(-1)
        tokens.append(int(ids[0, 0]))
    assert result.tokens == [tokens]


def test_stop_tokens_end_a_sequence_and_are_left_out(decoder: OnnxDecoder) -> None:
    free = decoder.generate([PROMPT, [7]], 12).tokens
    stop = free[0][4]
    first = free[0].index(stop)
    result = decoder.generate([PROMPT, [7]], 12, stop_tokens=[stop])
    assert result.tokens[0] == free[0][:first]
    other = free[1].index(stop) if stop in free[1] else 12
    assert result.tokens[1] == free[1][:other]
    assert [step.tokens[0] for step in result.steps[first + 1 :]] == [()] * (len(result.steps) - first - 1)


def test_streaming_hands_out_each_token_as_it_is_made(decoder: OnnxDecoder) -> None:
    stream = decoder.stream([PROMPT], 5)
    first = next(stream)
    assert isinstance(first, Step)
    tokens = [first.tokens[0], *(step.tokens[0] for step in stream)]
    seen: list[Step] = []
    assert [(token,) for token in decoder.generate([PROMPT], 5, on_step=seen.append).tokens[0]] == tokens
    assert [step.tokens[0] for step in seen] == tokens


def test_sampling_is_repeatable_and_follows_the_distribution(decoder: OnnxDecoder) -> None:
    first = decoder.generate([PROMPT], 12, temperature=2.0, seed=1).tokens
    assert decoder.generate([PROMPT], 12, temperature=2.0, seed=1).tokens == first
    assert decoder.generate([PROMPT], 12, temperature=2.0, seed=2).tokens != first
    logits, _ = decoder.forward(np.array([PROMPT]), decoder.start(1))
    probabilities = np.exp(logits[0, -1] / 1.5 - (logits[0, -1] / 1.5).max())
    probabilities /= probabilities.sum()
    draws = decoder.generate([PROMPT] * 2000, 1, temperature=1.5, seed=0)
    counts = np.bincount([tokens[0] for tokens in draws.tokens], minlength=VOCABULARY)
    assert np.abs(counts / 2000 - probabilities).max() < 4 * np.sqrt(0.25 / 2000)
    nucleus = decoder.generate([PROMPT] * 2000, 1, temperature=1.5, top_p=0.5, seed=0)
    order = np.argsort(-probabilities)
    kept = set(order[: int(np.searchsorted(np.cumsum(probabilities[order]), 0.5)) + 1].tolist())
    assert {tokens[0] for tokens in nucleus.tokens} <= kept
    assert decoder.generate([PROMPT], 6, temperature=1.0, top_p=1e-9).tokens == decoder.generate([PROMPT], 6).tokens


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [[1], []]}, "prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(decoder: OnnxDecoder, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        decoder.generate(**({"prompts": [PROMPT], "max_new_tokens": 2} | settings))


def test_files_that_are_no_decoder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file"):
        OnnxDecoder(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(InputError, match=r"ONNX Runtime cannot load it"):
        OnnxDecoder(tmp_path / "text.onnx")
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1])], [value("y", 1, [1])])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"no decoder"):
        OnnxDecoder(tmp_path / "other.onnx")


def test_a_device_that_is_not_there(river: Path) -> None:
    with pytest.raises(ConfigError, match=r"^device: "):
        OnnxDecoder(river, device="tpu")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(MissingExtra, match=r"river-compile\[gpu\]"):
            OnnxDecoder(river, device="cuda")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"tau": float("nan")}, "tau"),
        ({"tau": -3.0}, "tau"),
        ({"max_depth": -1}, "max_depth"),
        ({"prompts": "text"}, "prompts"),
        ({"prompts": ["text"]}, "prompts"),
        ({"prompts": [1, 2]}, "prompts"),
    ],
)
def test_a_wrong_argument_is_named(decoder: OnnxDecoder, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        decoder.generate(**{"prompts": [PROMPT], "max_new_tokens": 1} | arguments)


def test_the_river_tells_of_itself_and_a_plain_model_does_not(decoder: OnnxDecoder, exported: Exported) -> None:
    assert decoder.metadata["river.layers"] == str(LAYERS)
    assert OnnxDecoder(exported("llama"), threads=1).metadata == {}


@pytest.mark.parametrize("lengths", ((2, 7), (7, 2), (3, 3)))
def test_states_that_are_joined_go_on_as_each_would_alone(decoder: OnnxDecoder, lengths: tuple[int, int]) -> None:
    prompts = [np.arange(3, 3 + length)[None] for length in lengths]
    alone, joined = [], []
    for prompt in prompts:
        state, twin = decoder.start(1), decoder.start(1)
        decoder.backbone(prompt, state)
        decoder.backbone(prompt, twin)
        alone.append(state)
        joined.append(twin)
    decoder.join(joined[0], joined[1])
    # Rows can leave again: the second stays, and loses what padding it has.
    for token in (9, 11):
        expected = [decoder.backbone(np.array([[token]]), state)[0][0, -1] for state in alone]
        found = decoder.backbone(np.array([[token], [token]]), joined[0])[0][:, -1]
        np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)
    assert joined[0].ids[:, -3:].tolist() == [[length + 2, 9, 11] for length in lengths]
    decoder.cut(joined[0], [0], [1])
    expected = decoder.backbone(np.array([[5]]), alone[1])[0]
    np.testing.assert_allclose(decoder.backbone(np.array([[5]]), joined[0])[0], expected, atol=1e-4)
    assert joined[0].mask.shape == alone[1].mask.shape
