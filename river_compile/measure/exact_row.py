"""Exact decoding as a row of an evaluation: whether it writes what its backbone writes, and how fast."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from river_compile.config import NEVER
from river_compile.measure.fidelity import Interval
from river_compile.runtime import Generation, OnnxDecoder

__all__ = ["ExactResult", "measure_exact"]

_PROMPT_TOKENS, _NEW_TOKENS, _DOCUMENTS = 32, 48, 6


@dataclass(frozen=True)
class ExactResult:
    """Exact decoding beside plain decoding by the same model's backbone, both going on from the same prompts.

    Fields:
        documents, tokens: prompts, and tokens that each of both wrote.
        differing: how many of them differ.
        acceptance: share of drafted tokens that verification kept; 0 if none was drafted.
        tokens_per_second: median over prompts.
        ratio: to plain decoding, median over prompts; ``low`` and ``high`` are the slowest and the fastest prompt.
    """

    documents: int
    tokens: int
    differing: int
    acceptance: float
    tokens_per_second: float
    ratio: Interval


def measure_exact(
    decoder: OnnxDecoder, texts: Sequence[np.ndarray], progress: Callable[[str, int, int], None]
) -> ExactResult | None:
    """Go on from the beginnings of texts, int64 [tokens] each; None where no text has a token to begin with, or the
    model cannot verify several tokens at once."""
    if not decoder.verifies:
        return None
    room = decoder.signature.room
    new_tokens = _NEW_TOKENS if room is None else min(_NEW_TOKENS, room - _PROMPT_TOKENS)
    chosen = [texts[index] for index in np.linspace(0, len(texts) - 1, min(_DOCUMENTS, len(texts))).round().astype(int)]
    prompts = [text[:_PROMPT_TOKENS].tolist() for text in chosen if len(text)]
    if not prompts or new_tokens < 2:
        return None
    never = {"exact": False, "tau": NEVER, "max_depth": decoder.layers}
    decoder.generate(prompts[:1], 8, exact=True)
    pairs: list[tuple[Generation, Generation]] = []
    for number, prompt in enumerate(prompts):
        progress("decode exactly", number, len(prompts))
        plain = decoder.generate([prompt], new_tokens, **never)  # type: ignore[arg-type]
        pairs.append((plain, decoder.generate([prompt], new_tokens, exact=True)))
    progress("decode exactly", len(prompts), len(prompts))
    ratios = [plain.decode_seconds / exact.decode_seconds for plain, exact in pairs]
    drafted = sum(exact.drafted for _, exact in pairs)
    return ExactResult(
        documents=len(pairs),
        tokens=sum(len(plain.tokens[0]) for plain, _ in pairs),
        differing=sum(a != b for plain, exact in pairs for a, b in zip(plain.tokens[0], exact.tokens[0], strict=True)),
        acceptance=sum(exact.accepted for _, exact in pairs) / max(drafted, 1),
        tokens_per_second=statistics.median((new_tokens - 1) / exact.decode_seconds for _, exact in pairs),
        ratio=Interval(statistics.median(ratios), min(ratios), max(ratios)),
    )
