"""Ways to decode with an ONNX model, all from one cache: what a benchmark of ONNX Runtime times."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field

import numpy as np

from river_compile.config import NEVER
from river_compile.measure.bench_rows import BenchRow, ExactTokens
from river_compile.measure.fidelity import TextTokenizer, shipped_texts, tokenize
from river_compile.measure.onnx_weights import ReadWeights
from river_compile.runtime import OnnxDecoder
from river_compile.runtime.exact import Drafting, Experience, exact_steps
from river_compile.runtime.protocol import State
from river_compile.runtime.sampling import Sampling

__all__ = ["ExactWay", "Prompt", "Way", "some_prompts"]


def some_prompts(vocabulary: int, batch: int, context: int, tokenizer: TextTokenizer | None) -> np.ndarray:
    """Token ids, int64 [batch, context]: the held-out texts, begun at another place for each sequence; or random."""
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, vocabulary, (batch, context))
    pieces = tokenize(shipped_texts("heldout"), tokenizer, vocabulary, None)
    text = np.concatenate([piece.ids for piece in pieces])
    places = np.arange(batch)[:, None] * (len(text) // batch) + np.arange(context)
    return np.take(text, places, mode="wrap")


@dataclass
class Prompt:
    """Sequences in the cache.

    Fields:
        ids: their tokens, int64 [batch, context].
        state: of the model that has read them, with exits off; other models of the same signature go on from it.
        first: what it chose after each, int64 [batch].
    """

    ids: np.ndarray
    state: State
    first: np.ndarray

    @classmethod
    def read(cls, decoder: OnnxDecoder, ids: np.ndarray, room: int) -> Prompt:
        """Read prompts, and see that ``room`` more tokens can follow."""
        state = decoder.start(len(ids))
        logits, _ = decoder.backbone(ids, state, last_only=True)
        first = logits[:, -1].argmax(-1)
        beyond = decoder.mark(state)
        for _ in range(room):
            decoder.backbone(first[:, None], beyond)
        return cls(ids, state, first)

    def cache_bytes(self, decoder: OnnxDecoder) -> float:
        """Bytes of the keys and values of all tokens read."""
        total = 0.0
        for slot in decoder.signature.slots:
            size = math.prod(self.state.caches[slot.past].shape()) * slot.dtype.itemsize
            total += size * self.ids.shape[1] / slot.room if slot.static and slot.room else size
        return total


@dataclass
class Way:
    """A row as it is run, and the tokens that it wrote last, int64 [batch, new]."""

    row: BenchRow
    decoder: OnnxDecoder
    weights: ReadWeights
    written: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def run(self, prompt: Prompt, new_tokens: int, keep: bool) -> None:
        """One round: greedy decode passes from the end of the prompt."""
        state, token = self.decoder.mark(prompt.state), prompt.first
        times, made = [], []
        for _ in range(new_tokens):
            started = time.perf_counter()
            logits, depth = self._pass(token[:, None], state)
            times.append(time.perf_counter() - started)
            token = logits[:, -1].argmax(-1)
            made.append(token)
            if keep and depth is not None and self.row.tau is not None:
                self.row.depths.append(depth)
        self.written = np.stack(made, 1)
        if keep:
            self.row.seconds.append(statistics.median(times))

    def _pass(self, ids: np.ndarray, state: State) -> tuple[np.ndarray, int | None]:
        tau, depth = self.row.tau, self.row.max_depth
        if tau is None or (tau == NEVER and depth is None):
            return self.decoder.backbone(ids, state)
        offsets = (0.0,) * (self.decoder.layers or 0) if tau == NEVER and self.decoder.has_offsets else None
        return self.decoder.forward(ids, state, None, tau, depth, offsets)

    def weigh(self, cache: float) -> None:
        """Note what a pass reads: weights by its exit depth, and the cache."""
        layers, depths = self.decoder.layers or 0, self.row.depths
        if self.row.tau is None:
            depths = [layers]
        elif not depths and self.row.tau == NEVER:
            depths = [layers if self.row.max_depth is None else self.row.max_depth]
        if depths:
            self.row.bytes_per_token = cache + statistics.fmean(self.weights.bytes(layers - depth) for depth in depths)


class ExactWay:
    """Exact decoding as a way: whole rounds of drafts and verification."""

    def __init__(self, decoder: OnnxDecoder, prompt: Prompt, new_tokens: int) -> None:
        self._decoder, self._prompt, self._new = decoder, prompt, new_tokens
        self._drafting = Drafting(lookup=decoder.defaults.lookup)
        # What passes cost depends on batch and context.
        self._experience = Experience()
        self._drafted = self._accepted = 0
        self.row = BenchRow("exact")
        self._made: list[list[list[int]]] = []

    def run(self, keep: bool) -> None:
        prompt = self._prompt
        made: list[list[int]] = [[] for _ in prompt.ids]
        steps = exact_steps(
            self._decoder,
            self._decoder.mark(prompt.state),
            prompt.first.tolist(),
            prompt.ids.tolist(),
            self._new,
            self._drafting,
            Sampling(0.0, 1.0, None, frozenset()),
            self._experience,
        )
        # Costs are learnt within the first step of the first round, which is not kept.
        started = time.perf_counter()
        for step in steps:
            for sequence, new in zip(made, step.tokens, strict=True):
                sequence.extend(new)
            if keep:
                self._drafted += step.drafted
                self._accepted += step.accepted
        if keep:
            self.row.seconds.append((time.perf_counter() - started) / self._new)
            self._made.append(made)

    def tokens(self, expected: np.ndarray) -> ExactTokens:
        written = np.array(self._made)
        acceptance = self._accepted / self._drafted if self._drafted else None
        return ExactTokens(written.size, int((written != expected).sum()), acceptance)
