"""The reference runtime: the model's own function at full depth, and each KV policy's meaning at every other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from river_compile.config import KV_POLICIES, RiverConfig
from river_compile.errors import ConfigError, LayersNotFound
from river_compile.exporters.onnx.kv_cache import cache_argument
from river_compile.exporters.quantizers import quantizer
from river_compile.exporters.torch.stack import find_stack, is_linear
from river_compile.reference import POLICIES, ReferenceDecoder, ReferenceState
from river_compile.reference.river import Int4Linear, river_linear
from tests.families import LAYERS, VOCABULARY, random_model

FAMILIES = ("llama", "phi3", "gpt2", "opt", "gemma2", "bloom")
PROMPT, STEPS = 5, 12
NEVER = 2.0


class Case:
    """A model, the reference runtime on a copy of it, and a text."""

    def __init__(self, family: str) -> None:
        self.model = random_model(family)
        self.decoder = ReferenceDecoder(copy.deepcopy(self.model), RiverConfig(tau=NEVER))
        rng = np.random.default_rng(1)
        self.tokens = rng.integers(3, VOCABULARY, PROMPT + STEPS).tolist()
        self.depths = rng.integers(1, LAYERS + 1, STEPS).tolist()

    def play(self, policy: str, depths: list[int]) -> tuple[torch.Tensor, list[int], ReferenceState]:
        """Prompt, then the text token by token at most as deep as told: logits [steps, vocabulary], exit depths."""
        state = self.decoder.start(policy=policy, capacity=4)
        self.decoder.logits(self.tokens[:PROMPT], state)
        passes = [
            self.decoder.logits([token], state, max_depth=depth)
            for token, depth in zip(self.tokens[PROMPT:], depths, strict=False)
        ]
        return torch.stack([logits[0, -1] for logits, _ in passes]), [depth for _, depth in passes], state

    @torch.inference_mode()
    def hidden_states(self) -> tuple[list[torch.Tensor], list[Any]]:
        """The untouched model's hidden state after each number of layers but the last, and its cache."""
        cache = DynamicCache()
        output = self.model(
            input_ids=torch.tensor([self.tokens]),
            output_hidden_states=True,
            use_cache=True,
            **{cache_argument(self.model): cache},
        )
        return list(output.hidden_states), cache.layers

    @torch.inference_mode()
    def logits_at(self, depths: list[int]) -> torch.Tensor:
        """The untouched model's logits after the prompt, were each token's layers from its depth on not there."""
        stack = find_stack(self.model)[1]
        rows = []
        for step, depth in enumerate(depths):
            handles = [layer.register_forward_hook(_pass_by, with_kwargs=True) for layer in list(stack)[depth:]]
            logits = self.model(input_ids=torch.tensor([self.tokens[: PROMPT + step + 1]])).logits
            for handle in handles:
                handle.remove()
            rows.append(logits[0, -1])
        return torch.stack(rows)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these lose by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _like(output: Any, hidden: torch.Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _pass_by(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """A hook that makes a layer hand on its input."""
    return _like(output, args[0] if args else kwargs["hidden_states"])


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.max() - expected.min())


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def llama() -> Case:
    return Case("llama")


def test_the_policies_are_those_of_the_config() -> None:
    assert set(POLICIES) == set(KV_POLICIES)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_full_depth_is_the_model_itself(case: Case, policy: str) -> None:
    logits, depths, _ = case.play(policy, [LAYERS] * STEPS)
    assert depths == [LAYERS] * STEPS
    _close(logits, case.logits_at(depths))


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_prompt_logits_are_those_of_the_model(case: Case, policy: str) -> None:
    ids = np.array([case.tokens])
    found, depth = case.decoder.forward(ids, case.decoder.start(policy=policy))
    with torch.inference_mode():
        expected = case.model(input_ids=torch.from_numpy(ids)).logits
    assert depth == LAYERS
    _close(torch.from_numpy(found), expected)


# ---- share


def _dequantized(model: Any, depth: int) -> Any:
    """The model with its layers from ``depth`` on as the river has them, by the quantizer's own arithmetic."""
    river = copy.deepcopy(model)
    rtn = quantizer("rtn")
    for layer in list(find_stack(river)[1])[depth:]:
        for module in layer.modules():
            if is_linear(module):
                transposed = isinstance(module, torch.nn.Linear)
                weight = module.weight.detach().numpy()
                rounded = rtn.quantize(np.ascontiguousarray(weight.T if transposed else weight), 4, 32).dequantize()
                module.weight.data = torch.from_numpy((rounded.T if transposed else rounded).copy())
    return river


@pytest.mark.parametrize("depth", range(1, LAYERS))
def test_share_runs_the_river_from_the_exit_on_and_leaves_a_whole_cache(case: Case, depth: int) -> None:
    logits, depths, state = case.play("share", [depth] * STEPS)
    assert depths == [depth] * STEPS
    river = _dequantized(case.model, depth)
    cache = DynamicCache(config=case.model.config)
    with torch.inference_mode():
        case.model(input_ids=torch.tensor([case.tokens[:PROMPT]]), **{cache_argument(case.model): cache})
        expected = [
            river(input_ids=torch.tensor([[token]]), **{cache_argument(river): cache}).logits[0, -1]
            for token in case.tokens[PROMPT:]
        ]
    _close(logits, torch.stack(expected))
    assert {slot.seen for slot in state.cache.slots} == {slot.entries for slot in state.cache.slots}
    assert {slot.seen for slot in state.cache.slots} == {PROMPT + STEPS}


def test_share_at_depth_zero_is_the_fully_quantized_model(case: Case) -> None:
    ids = np.array([case.tokens])
    found, depth = case.decoder.forward(ids, case.decoder.start(), max_depth=0)
    with torch.inference_mode():
        expected = _dequantized(case.model, 0)(input_ids=torch.from_numpy(ids)).logits
    assert depth == 0
    _close(torch.from_numpy(found), expected)


# ---- propagate


def test_propagate_projects_the_exit_hidden_state(case: Case) -> None:
    depth = 2
    _, _, state = case.play("propagate", [depth])
    hidden, _ = case.hidden_states()
    exit_state = hidden[depth][:, PROMPT : PROMPT + 1]
    for index in range(depth, LAYERS):
        layer = find_stack(case.model)[1][index]
        written = _written_by(case, layer, exit_state)
        slot = state.cache.slots[index]
        for found, expected in zip((slot.keys, slot.values), written, strict=True):
            _close(found[:, :, PROMPT : PROMPT + 1], expected)


@torch.inference_mode()
def _written_by(case: Case, layer: torch.nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V that the untouched model's layer writes when its input is replaced by ``hidden``, at PROMPT's place."""
    cache = DynamicCache()
    case.model(input_ids=torch.tensor([case.tokens[:PROMPT]]), **{cache_argument(case.model): cache})

    def enter(_module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    handle = layer.register_forward_pre_hook(enter, with_kwargs=True)
    case.model(input_ids=torch.tensor([[case.tokens[PROMPT]]]), **{cache_argument(case.model): cache})
    handle.remove()
    index = list(find_stack(case.model)[1]).index(layer)
    return cache.layers[index].keys[:, :, -1:], cache.layers[index].values[:, :, -1:]


def test_propagate_does_no_work_but_the_key_and_value_projections(llama: Case) -> None:
    ran: list[str] = []
    parts = llama.decoder._parts[3]
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in parts.keys_only.named_modules()
        if is_linear(module)
    ]
    llama.play("propagate", [2])
    for handle in handles:
        handle.remove()
    assert ran == ["self_attn.k_proj", "self_attn.v_proj"]


# ---- mask


@torch.inference_mode()
def _masked_oracle(case: Case, depths: list[int]) -> torch.Tensor:
    """The untouched model, all layers run for all tokens, with -inf attention on what should be absent."""
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    stack = list(find_stack(model)[1])
    cache = DynamicCache()
    model(input_ids=torch.tensor([case.tokens[:PROMPT]]), **{cache_argument(model): cache})
    now = {"depth": 0, "step": 0}

    def hide(index: int) -> Callable[..., Any]:
        def enter(_module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            absent = [PROMPT + step for step, depth in enumerate(depths[: now["step"]]) if depth <= index]
            mask = kwargs["attention_mask"]
            mask = torch.zeros(1, 1, 1, PROMPT + now["step"] + 1) if mask is None else mask.clone().float()
            mask[..., absent] = float("-inf")
            return args, kwargs | {"attention_mask": mask}

        return enter

    def stay(index: int) -> Callable[..., Any]:
        def leave(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            return output if index < now["depth"] else _like(output, args[0] if args else kwargs["hidden_states"])

        return leave

    for index, layer in enumerate(stack):
        layer.register_forward_pre_hook(hide(index), with_kwargs=True)
        layer.register_forward_hook(stay(index), with_kwargs=True)
    rows = []
    for step, depth in enumerate(depths):
        now.update(depth=depth, step=step)
        token = torch.tensor([[case.tokens[PROMPT + step]]])
        rows.append(model(input_ids=token, **{cache_argument(model): cache}).logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("family", ("llama", "gemma2", "bloom"))
def test_mask_gives_absent_entries_no_weight(family: str) -> None:
    case = Case(family)
    logits, depths, state = case.play("mask", case.depths)
    assert depths == case.depths
    _close(logits, _masked_oracle(case, case.depths))
    for index, slot in enumerate(state.cache.slots):
        assert slot.absent == [PROMPT + step for step, depth in enumerate(case.depths) if depth <= index]
        assert slot.entries == PROMPT + STEPS - len(slot.absent)


# ---- recompute


def test_recompute_leaves_what_the_backbone_would_have_written(case: Case) -> None:
    logits, depths, state = case.play("recompute", case.depths)
    assert depths == case.depths
    _close(logits, case.logits_at(case.depths))
    _, expected = case.hidden_states()
    for index, slot in enumerate(state.cache.slots):
        deeper = [step for step, depth in enumerate(case.depths) if depth > index]
        assert slot.seen == (PROMPT + deeper[-1] + 1 if deeper else PROMPT)
        _close(slot.keys[:, :, : slot.seen], expected[index].keys[:, :, : slot.seen])
        _close(slot.values[:, :, : slot.seen], expected[index].values[:, :, : slot.seen])


def test_recompute_takes_waiting_tokens_along_in_one_pass_over_each_layer(llama: Case) -> None:
    rows: list[tuple[int, int]] = []
    handles = [
        parts.backbone.register_forward_hook(lambda _m, args, _out, index=index: rows.append((index, args[0].shape[1])))
        for index, parts in enumerate(llama.decoder._parts)
    ]
    llama.play("recompute", [2, 1, LAYERS])
    for handle in handles:
        handle.remove()
    assert rows[LAYERS:] == [(0, 1), (1, 1), (0, 1), (0, 1), (1, 2), (2, 3), (3, 3)]


# ---- monotone


def test_monotone_never_goes_deeper_again_and_misses_nothing(case: Case) -> None:
    logits, depths, _ = case.play("monotone", case.depths)
    assert depths == np.minimum.accumulate(case.depths).tolist()
    _close(logits, case.logits_at(depths))


# ---- the exit decision


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_a_token_exits_after_the_first_layer_whose_similarity_is_above_tau(case: Case, policy: str) -> None:
    hidden, _ = case.hidden_states()
    between = [
        float(torch.cosine_similarity(hidden[index][0, PROMPT], hidden[index + 1][0, PROMPT], dim=0))
        for index in range(LAYERS - 1)
    ]
    for tau in (min(between) - 0.01, sum(between) / len(between), max(between) + 0.01):
        expected = next((index + 1 for index, value in enumerate(between) if value > tau), LAYERS)
        state = case.decoder.start(policy=policy)
        case.decoder.logits(case.tokens[:PROMPT], state)
        assert case.decoder.logits([case.tokens[PROMPT]], state, tau=tau)[1] == expected


def test_layers_can_have_thresholds_of_their_own_and_be_no_exit_at_all() -> None:
    model = random_model("llama")
    tokens = list(range(3, 12))
    for config, expected in (
        (RiverConfig(tau=-1.0), 1),
        (RiverConfig(tau=-1.0, min_depth=3), 3),
        (RiverConfig(tau=-1.0, exit_every=2), 2),
        (RiverConfig(tau=-1.0, tau_offsets=(3.0, 3.0, 0.0, 0.0)), 3),
        (RiverConfig(tau=-1.0, tau_offsets=(3.0,) * 4), LAYERS),
    ):
        decoder = ReferenceDecoder(copy.deepcopy(model), config)
        state = decoder.start()
        decoder.logits(tokens, state)
        assert decoder.logits([5], state)[1] == expected


# ---- the 4-bit kernel, and what is refused


def test_the_kernel_computes_the_dequantized_product() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).to(torch.bfloat16)
    twin, packed = river_linear(linear, 4, 32, quantizer("rtn"))
    assert packed
    assert isinstance(twin, Int4Linear)
    weight = np.ascontiguousarray(linear.weight.detach().float().numpy().T)
    rounded = torch.from_numpy(quantizer("rtn").quantize(weight, 4, 32).dequantize())
    states = torch.randn(1, 3, 64).to(torch.bfloat16)
    with torch.inference_mode():
        expected = states.float() @ rounded + linear.bias.float()
        found = twin(states).float()
    assert float((found - expected).abs().max()) <= 0.02 * float(expected.abs().max())


def test_what_the_kernel_does_not_take_runs_dequantized_and_is_noted() -> None:
    config = RiverConfig(bits=8, keep_layers=(1,))
    decoder = ReferenceDecoder(random_model("llama").to(torch.bfloat16), config)
    assert decoder._parts[1].river is None
    assert decoder.notes == ["21 river products run on dequantized weights: no kernel here, so no speed from them"]


def test_river_layers_share_all_that_is_not_quantized(llama: Case) -> None:
    parts = llama.decoder._parts[0]
    assert parts.river.input_layernorm.weight is parts.backbone.input_layernorm.weight
    assert parts.keys_only.self_attn.k_proj.weight is parts.backbone.self_attn.k_proj.weight


def test_bad_requests_are_one_clear_line(llama: Case) -> None:
    with pytest.raises(ConfigError, match="kv_policy: 'skip' is none of"):
        llama.decoder.start(policy="skip")
    with pytest.raises(ConfigError, match="kv_policy: must be one of"):
        RiverConfig(kv_policy="skip")
    with pytest.raises(ConfigError, match="batch: the reference runtime decodes one sequence"):
        llama.decoder.start(batch=2)
    with pytest.raises(ConfigError, match="max_depth: 0 is the river alone"):
        llama.decoder.logits([3], llama.decoder.start(policy="mask"), max_depth=0)
    with pytest.raises(LayersNotFound, match="no list of repeated decoder layers"):
        find_stack(torch.nn.Linear(2, 2))
