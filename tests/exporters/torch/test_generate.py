"""Whatever generates with a compiled module runs its compiled form, in its own thread alone, or says otherwise."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

import river_compile
from river_compile import RiverBackend, RiverConfig
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.linear import Dequantized
from tests.families import random_model
from tests.torch_models import as_it_is, prompt, with_river_from

TOKENS = 6
GREEDY: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def quick(model: Any, **options: Any) -> tuple[Any, RiverBackend]:
    backend = RiverBackend(RiverConfig(**options), lowering=Dequantized(), compiler=as_it_is)
    return torch.compile(model, backend=backend), backend


def passes(backend: RiverBackend) -> int:
    return sum(backend.decode_depths.values()) + sum(backend.prefill_depths.values())


class Between(LogitsProcessor):  # type: ignore[misc]
    """Does something between two passes."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.action()
        return scores


def between(action: Any) -> Any:
    return LogitsProcessorList([Between(action)])


class Delegating(nn.Module):
    """Finds what it lacks in the model within, as wrappers of models do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        return self.model(*arguments, **settings)


class Forwarding(nn.Module):
    """Has a generate of its own, with arguments of its own, that calls the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = Delegating(model)

    def generate(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base_model.generate(ids, **GREEDY)
        return found

    def generate_alone(self, ids: torch.Tensor) -> torch.Tensor:
        return self.base_model.model.forward(ids).logits  # type: ignore[no-any-return]

    def stream_generate(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        for _ in range(2):
            yield self.generate(ids)

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        return self.base_model(*arguments, **settings)


def test_a_wrapper_that_hands_generate_on_runs_compiled() -> None:
    model = random_model("llama", 2)
    expected = model.generate(prompt(1, 4), **GREEDY)
    compiled, backend = quick(Delegating(model), tau=2.0)
    assert torch.equal(compiled.generate(prompt(1, 4), **GREEDY), expected)
    assert passes(backend) == TOKENS
    compiled, backend = quick(Forwarding(model), tau=2.0)
    assert torch.equal(compiled.generate(prompt(1, 4)), expected)
    assert passes(backend) == TOKENS
    assert [int(torch.equal(found, expected)) for found in compiled.stream_generate(prompt(1, 4))] == [1, 1]
    assert passes(backend) == 3 * TOKENS
    assert model._compiled_call_impl is None


def test_what_generates_past_the_compiled_model_says_so_once() -> None:
    compiled, backend = quick(Forwarding(random_model("llama", 2)))
    with pytest.warns(UserWarning, match="generate_alone made no pass through the compiled model"):
        compiled.generate_alone(prompt(1, 4))
    assert passes(backend) == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*made no pass")
        compiled.generate_alone(prompt(1, 4))
        compiled.generate(prompt(1, 4))


def test_generations_that_overlap_run_compiled_and_leave_the_model_as_it_was() -> None:
    """One begins between two passes of the other and ends after it; the model itself generates meanwhile."""
    model = random_model("llama", 2)
    compiled, backend = quick(model, max_depth=0)
    plain = model.generate(prompt(1, 4), **GREEDY)
    expected = compiled.generate(prompt(1, 4), **GREEDY)
    assert passes(backend) == TOKENS
    began, done = threading.Event(), threading.Event()
    found: list[torch.Tensor] = []

    def second() -> None:
        def wait() -> None:
            began.set()
            done.wait(60)

        found.append(compiled.generate(prompt(1, 4), logits_processor=between(wait), **GREEDY))

    thread = threading.Thread(target=second)

    def start() -> None:
        if not thread.ident:
            thread.start()
            began.wait(60)
            other = threading.Thread(target=lambda: found.append(model.generate(prompt(1, 4), **GREEDY)))
            other.start()
            other.join()

    found.append(compiled.generate(prompt(1, 4), logits_processor=between(start), **GREEDY))
    found.append(model.generate(prompt(1, 4), **GREEDY))
    done.set()
    thread.join()
    for tokens, ours in zip(found, (plain, expected, plain, expected), strict=True):
        assert torch.equal(tokens, ours)
    assert passes(backend) == 3 * TOKENS
    assert model._compiled_call_impl is None


def test_threads_do_not_mix_and_every_pass_is_counted() -> None:
    model = random_model("llama", 2)
    compiled, backend = quick(model, max_depth=1)
    prompts = [prompt(1, 4, seed=seed) for seed in range(3)]
    expected = [compiled.generate(ids, **GREEDY) for ids in prompts]
    found: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        found[index] = compiled.generate(prompts[index], **GREEDY)

    before = passes(backend)
    for _ in range(2):
        threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, tokens in enumerate(expected):
            assert torch.equal(found[index], tokens)
    assert passes(backend) - before == 6 * TOKENS


def test_an_error_in_the_middle_leaves_the_model_as_it_was() -> None:
    model = random_model("llama", 2)
    compiled, backend = quick(model)

    def fail() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        compiled.generate(prompt(1, 4), logits_processor=between(fail), **GREEDY)
    assert model._compiled_call_impl is None
    before = passes(backend)
    model.generate(prompt(1, 4), **GREEDY)
    assert passes(backend) == before
    with torch.inference_mode():
        compiled.generate(prompt(1, 4), **GREEDY)
    assert passes(backend) == before + TOKENS


def test_a_streamer_in_a_thread() -> None:
    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(token)} " for token in ids)

    model = random_model("llama", 2)
    compiled, backend = quick(model, tau=2.0)
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
    settings = {**GREEDY, "input_ids": prompt(1, 4), "streamer": streamer}
    thread = threading.Thread(target=compiled.generate, kwargs=settings)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [str(int(token)) for token in model.generate(prompt(1, 4), **GREEDY)[0, 4:]]
    assert passes(backend) == TOKENS


def test_a_copy_made_while_it_generates_is_on_its_own() -> None:
    import copy

    model = random_model("llama", 2)
    compiled, backend = quick(model, tau=2.0)
    copies: list[Any] = []

    def take() -> None:
        if not copies:
            copies.append(copy.deepcopy(model))

    compiled.generate(prompt(1, 4), logits_processor=between(take), **GREEDY)
    assert copies[0]._compiled_call_impl is None
    before = passes(backend)
    copies[0].generate(prompt(1, 4), **GREEDY)
    assert passes(backend) == before
    assert river_compile.stats(compiled).decode_depths == {2: TOKENS - 1}


def test_a_model_with_adapters_runs_compiled_and_the_river_follows_a_merge() -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        modules = ["q_proj", "up_proj"]
        return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=modules, init_lora_weights=False)).eval()

    compiled, backend = quick(adapted(random_model("llama", 2)), tau=2.0)
    expected = adapted(random_model("llama", 2)).generate(input_ids=prompt(1, 4), **GREEDY)
    assert torch.equal(compiled.generate(input_ids=prompt(1, 4), **GREEDY), expected)
    assert passes(backend) == TOKENS
    # Dynamo compiles one method a few times only.
    torch.compiler.reset()
    base = random_model("llama", 2)
    river, _ = quick(base, max_depth=0, prefill="river")
    river.generate(prompt(1, 4), **GREEDY)
    merged = adapted(base).merge_and_unload()
    expected = with_river_from(merged, 0).generate(prompt(1, 4), **GREEDY)
    assert torch.equal(river.generate(prompt(1, 4), **GREEDY), expected)


def test_more_graphs_than_dynamos_own_limit_are_compiled() -> None:
    """A module compiled several times over, and the limit afterwards what it was."""
    model = random_model("llama", 2)
    expected = model.generate(prompt(1, 5), max_new_tokens=3, do_sample=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(3):
            compiled = torch.compile(model, backend=RiverBackend(RiverConfig(tau=2.0), compiler=as_it_is))
            assert torch.equal(compiled.generate(prompt(1, 5), max_new_tokens=3, do_sample=False), expected)
            decoded = sum(river_compile.stats(compiled).decode_depths.values())
            assert decoded == 2, f"compilation {number} ran uncompiled"
        assert torch._dynamo.config.recompile_limit == 2


def test_the_limit_is_restored_after_generations_that_overlap() -> None:
    before = torch._dynamo.config.recompile_limit
    first, second = seam.many_graphs(), seam.many_graphs()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch._dynamo.config.recompile_limit >= seam.GRAPHS
    second.__exit__(None, None, None)
    assert torch._dynamo.config.recompile_limit == before
