"""Exact decoding in transformers' `generate`: the loop behind ``custom_generate=river_compile.exact``."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from river_compile.config import NEVER
from river_compile.errors import ConfigError
from river_compile.exporters.onnx.kv_cache import CACHE_ARGUMENTS
from river_compile.exporters.torch.forms import SHORT
from river_compile.runtime import hf_cache
from river_compile.runtime.exact import Drafting, Experience, exact_steps
from river_compile.runtime.hf_window import masks_by_window
from river_compile.runtime.protocol import Passes, State
from river_compile.runtime.steps import Step

__all__ = ["Exits", "HfPasses", "generate_exactly"]

Exits = Callable[[float | None, int | None], AbstractContextManager[None]]
"""Sets tau and the depth limit (None: as they are, and no limit) for the passes within; both None: as they are."""

# What says something of each token of the prompt; later tokens are as the last one.
_BY_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class HfPasses(Passes):
    """Forward passes of a Hugging Face decoder, with the arguments that `generate` has prepared.

    Args:
        model: as it is called, compiled or not.
        arguments: model arguments beside token ids, the KV cache among them.
        exits: how exits are set.
        length: tokens that will be read in all.
        clock: tells seconds; the same to all processes over which a model is spread.
    """

    def __init__(
        self,
        model: Any,
        arguments: Mapping[str, Any],
        exits: Exits,
        length: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._exits, self.clock = model, exits, clock
        self._has_river = False
        self._cache_name = next((name for name in CACHE_ARGUMENTS if arguments.get(name) is not None), "")
        if not self._cache_name:
            raise ConfigError("exact", "needs a KV cache that generate makes or is given (use_cache=True)")
        self._arguments = dict(arguments)
        self._length = length
        windows = hf_cache.windows(self.cache, length)
        hf_cache.prepare(self.cache, length)
        if any(windows) and not masks_by_window(model, self._cache_name, windows):
            raise ConfigError("exact", "the model leaves its window to the cache alone, which then cannot be cut back")
        self.coarse = model.dtype in SHORT
        # In 16 bits a row may come out otherwise in a smaller batch.
        self.fixed_batch = self.coarse or hf_cache.is_static(self.cache)
        self._takes = inspect.signature(model.prepare_inputs_for_generation).parameters
        self._has_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._device = model.device

    @property
    def has_river(self) -> bool:
        return self._has_river

    def look_for_river(self, state: State, has_river: Callable[[], bool]) -> None:
        """Find out whether decode passes have a river; the first one may have to compile it."""
        if not has_river():
            mark = self.mark(state)
            self.backbone(state.ids[:, -1:], state)
            self.back(state, mark)
        self._has_river = has_river()

    @property
    def cache(self) -> Any:
        return self._arguments[self._cache_name]

    def prefill(self, ids: torch.Tensor) -> tuple[State, np.ndarray]:
        """Read the prompts, int64 [sequences, tokens], or what of them the cache does not hold yet.

        Returns:
            The state, and the logits after the prompts, float32 [sequences, vocabulary].
        """
        mask = self._arguments.get("attention_mask")
        batch, length = ids.shape
        seen = mask if mask is not None and mask.dim() == 2 else torch.ones_like(ids)
        past = int(self.cache.get_seq_length())
        new = length - past if seen.shape[1] == length else length
        settings: dict[str, Any] = {"is_first_iteration": True} if "is_first_iteration" in self._takes else {}
        arguments = dict(self._arguments)
        if "next_sequence_length" in self._takes:
            settings["next_sequence_length"] = new
        with self._exits(NEVER, None):
            outputs = self._call(self._model.prepare_inputs_for_generation(ids, **settings, **arguments))
        hf_cache.reserve(self.cache, self._length - length)
        numbers = np.zeros((batch, seen.shape[1]), np.int64)
        numbers[:, -length:] = ids.cpu().numpy()
        state = State({"positions": self._last_positions(seen)}, seen.cpu().numpy().astype(np.int64), numbers)
        for name in (*_BY_TOKEN, "position_ids"):
            value = self._arguments.get(name)
            if value is not None:
                self._arguments[name] = value[..., -1:]
        return state, _floats(outputs.logits[:, -1:])[:, 0]

    def _last_positions(self, seen: torch.Tensor) -> torch.Tensor:
        """Where the prompts' last tokens stand, beside how many there are: [..., sequences, 1] and int64."""
        given = self._arguments.get("position_ids")
        last = given[..., -1:] if given is not None else seen.sum(1, keepdim=True) - 1
        return torch.as_tensor(last - seen.sum(1, keepdim=True).to(last.device))

    def forward(
        self,
        ids: np.ndarray,
        state: State,
        mask: np.ndarray | None = None,
        tau: float | None = None,
        max_depth: int | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[np.ndarray, int | None]:
        with self._exits(tau, max_depth):
            return self._run(ids, state), None

    def backbone(
        self, ids: np.ndarray, state: State, mask: np.ndarray | None = None, *, last_only: bool = False
    ) -> tuple[np.ndarray, int | None]:
        return self.forward(ids, state, mask, NEVER, None)

    def _run(self, ids: np.ndarray, state: State) -> np.ndarray:
        state.read(ids, np.ones_like(ids))
        new = ids.shape[1]
        seen = torch.from_numpy(state.mask).to(self._device)
        arguments = dict(self._arguments)
        # Arguments are those of plain decoding wherever they can be: others would be compiled anew.
        if arguments.get("attention_mask") is not None or not state.mask.all():
            arguments["attention_mask"] = seen
        arguments.pop("position_ids", None)
        if "logits_to_keep" in arguments:
            arguments["logits_to_keep"] = 1 if new == 1 else 0
        if self._has_positions:
            counts = seen.cumsum(1)[:, -new:]
            arguments["position_ids"] = (state.caches["positions"] + counts).to(torch.int64)
        for name in _BY_TOKEN:
            if arguments.get(name) is not None:
                arguments[name] = arguments[name].expand(*arguments[name].shape[:-1], new)
        tokens = torch.from_numpy(state.ids[:, -new:].copy()).to(self._device)
        try:
            outputs = self._call(self._model.prepare_inputs_for_generation(tokens, **arguments))
        except (AssertionError, NotImplementedError, ValueError) as error:
            if new == 1:
                raise
            raise ConfigError(
                "exact", f"verifies several tokens in a pass, which the model refuses: {error}"
            ) from error
        hf_cache.settle(self.cache)
        return _floats(outputs.logits[:, -new:])

    def _call(self, inputs: Mapping[str, Any]) -> Any:
        return self._model(**inputs, return_dict=True)

    def room(self, state: State) -> int | None:
        return hf_cache.room(self.cache)

    def mark(self, state: State) -> Any:
        return super().mark(state), hf_cache.mark(self.cache)

    def back(self, state: State, mark: Any) -> None:
        super().back(state, mark[0])
        hf_cache.back(self.cache, mark[1])

    def cut(self, state: State, forget: Sequence[int], rows: Sequence[int]) -> None:
        spans = state.spans(forget, rows)
        hf_cache.cut(self.cache, spans, state.mask.shape[1])
        state.keep(spans)
        positions = state.caches["positions"]
        state.caches["positions"] = positions[..., list(rows), :] if len(rows) < positions.shape[-2] else positions


def _floats(logits: torch.Tensor) -> np.ndarray:
    return np.asarray(logits.detach().float().cpu().numpy())


@dataclass(frozen=True)
class _Processed:
    """Tokens as `generate` chooses them: by its processors, its sampling and its stopping criteria, row by row."""

    processors: Any
    criteria: Any
    sampled: bool
    batch: int
    device: torch.device

    @property
    def greedy(self) -> bool:
        return not self.sampled

    def scores(self, tokens: Sequence[int], logits: np.ndarray, place: int) -> np.ndarray:
        if not self.processors:
            return logits
        rows = torch.from_numpy(np.tile(logits, (self.batch, 1))).to(self.device)
        scores: np.ndarray = _floats(self.processors(self._batch_of(tokens), rows))[place]
        return scores

    def _batch_of(self, tokens: Sequence[int]) -> torch.Tensor:
        """One sequence in every place: processors and criteria may hold something for each."""
        return torch.tensor([list(tokens)], device=self.device).expand(self.batch, -1)

    def distribution(self, scores: np.ndarray) -> np.ndarray:
        probabilities: np.ndarray = torch.from_numpy(scores).double().softmax(-1).numpy()
        return probabilities

    def draw(self, probabilities: np.ndarray) -> int:
        return int(torch.multinomial(torch.from_numpy(probabilities), 1))

    def uniform(self) -> float:
        return float(torch.rand(()))

    def ends(self, tokens: Sequence[int], place: int) -> bool:
        return bool(torch.as_tensor(self.criteria(self._batch_of(tokens), None)).expand(self.batch)[place])


def generate_exactly(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    model_arguments: Mapping[str, Any],
    *,
    exits: Exits,
    has_river: Callable[[], bool],
    experience: Callable[[], Experience],
    drafting: Drafting,
    streamer: Any = None,
    on_step: Callable[[Step], None] = lambda step: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Any:
    """What `GenerationMixin._sample` returns, token for token, with the river as drafter.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_arguments: as `generate` hands
            them to a ``custom_generate`` callable.
        exits: how exits are set.
        has_river, experience: of the compiled model; asked for when its first passes have run.
        streamer: gets tokens as they are verified.
        clock: tells seconds; the same to all processes over which a model is spread.

    Raises:
        ConfigError: the settings are not those of greedy decoding or sampling over a KV cache.
    """
    _check(generation_config, model, streamer, input_ids)
    left = _left(stopping_criteria, input_ids.shape[1])
    if streamer is not None:
        streamer.put(input_ids.cpu())
    passes = HfPasses(model, model_arguments, exits, input_ids.shape[1] + left, clock)
    with hf_cache.restored(passes.cache):
        state, logits = passes.prefill(input_ids)
        choice = _Processed(
            logits_processor, stopping_criteria, bool(generation_config.do_sample), len(input_ids), input_ids.device
        )
        prompts = input_ids.tolist()
        first = [_choose(choice, *one) for one in zip(prompts, logits, range(len(prompts)), strict=True)]
        made = _Made(len(prompts), generation_config)
        made.add(Step(tuple((token,) for token in first), None, 0.0, logits=tuple(row[None] for row in logits)))
        if streamer is not None:
            streamer.put(torch.tensor(first))
        steps: Iterator[Step] = iter(())
        if left > 0:
            passes.look_for_river(state, has_river)
            drafting = replace(drafting, river=passes.has_river)
            steps = exact_steps(passes, state, first, prompts, left, drafting, choice, experience())
        for step in steps:
            on_step(step)
            made.add(step)
            if streamer is not None and step.tokens[0]:
                streamer.put(torch.tensor(step.tokens[0]))
        if streamer is not None:
            streamer.end()
    return made.output(input_ids, passes.cache, choice)


def _check(generation_config: Any, model: Any, streamer: Any, input_ids: torch.Tensor) -> None:
    if (generation_config.num_beams or 1) > 1:
        raise ConfigError("exact", "decodes greedily or by sampling, not by beam search (num_beams must be 1)")
    if model.config.is_encoder_decoder:
        raise ConfigError("exact", "is for decoder-only models")
    for name in ("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if getattr(generation_config, name, None):
            raise ConfigError("exact", f"decodes greedily or by sampling, not with {name}")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False) and generation_config.return_dict_in_generate:
            raise ConfigError("exact", f"has no {name}: tokens are read several at once, and drafts twice")
    if streamer is not None and len(input_ids) > 1:
        raise ConfigError("streamer", "shows one sequence")


def _choose(choice: _Processed, prompt: Sequence[int], logits: np.ndarray, place: int) -> int:
    scores = choice.scores(prompt, logits, place)
    return int(scores.argmax()) if choice.greedy else choice.draw(choice.distribution(scores))


def _left(criteria: Any, read: int) -> int:
    """How many tokens each sequence may still get after its first one."""
    longest = getattr(criteria, "max_length", None)
    if longest is None:
        raise ConfigError("exact", "needs max_new_tokens or max_length")
    return int(longest) - read - 1


class _Made:
    """What a generation makes, in the form of `generate`'s result."""

    def __init__(self, count: int, generation_config: Any) -> None:
        self._config = generation_config
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._logits: list[list[np.ndarray]] = [[] for _ in range(count)]

    @property
    def _wants_logits(self) -> bool:
        wanted = self._config.output_logits or self._config.output_scores
        return bool(self._config.return_dict_in_generate and wanted)

    def add(self, step: Step) -> None:
        for place, new in enumerate(step.tokens):
            self._tokens[place] += new
            if self._wants_logits and step.logits is not None:
                self._logits[place] += list(step.logits[place][: len(new)])

    def output(self, input_ids: torch.Tensor, cache: Any, choice: _Processed) -> Any:
        length = max(map(len, self._tokens))
        pad = self._config._pad_token_tensor
        filling = int(pad.reshape(-1)[0]) if pad is not None else 0
        rows = [new + [filling] * (length - len(new)) for new in self._tokens]
        sequences = torch.cat([input_ids, torch.tensor(rows, device=input_ids.device, dtype=input_ids.dtype)], 1)
        if not self._config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        logits, scores = self._by_step(sequences, choice, length) if self._wants_logits else (None, None)
        fields = inspect.signature(GenerateDecoderOnlyOutput).parameters
        return GenerateDecoderOnlyOutput(
            sequences=cast(Any, sequences),
            logits=logits if self._config.output_logits else None,
            scores=scores if self._config.output_scores else None,
            **{next(name for name in CACHE_ARGUMENTS if name in fields): cache},
        )

    def _by_step(self, sequences: torch.Tensor, choice: _Processed, length: int) -> tuple[Any, Any]:
        """Logits and scores of each new place, [sequences, vocabulary]; zeros behind a sequence's end."""
        read = sequences.shape[1] - length
        logits, scores = [], []
        for place in range(length):
            rows = [
                (own[place], choice.scores(sequences[row, : read + place].tolist(), own[place], row))
                if place < len(own)
                else (np.zeros_like(own[0]), np.zeros_like(own[0]))
                for row, own in enumerate(self._logits)
            ]
            logits.append(torch.from_numpy(np.stack([row[0] for row in rows])))
            scores.append(torch.from_numpy(np.stack([row[1] for row in rows])))
        return tuple(logits), tuple(scores)
