"""What rivers are as drafters, whichever runtime they draft in: the settings that are tried, and what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from river_compile.config import FLOAT, RiverConfig
from river_compile.errors import InputError
from river_compile.exporters.machine import cpu_name
from river_compile.runtime.drafting import Costs, DraftLength, expected_speedup
from river_compile.runtime.exact import Experience
from river_compile.runtime.steps import Step

__all__ = [
    "MOST",
    "NEW_TOKENS",
    "ROWS",
    "DraftPlan",
    "DraftPoint",
    "always",
    "candidates",
    "draft_point",
    "prompts_of",
    "shares_by_place",
    "tuning_could_pay",
]

NEW_TOKENS = 48
"""Tokens that are decoded from each beginning of a text."""
MOST = 8
"""Drafts in a round, where it is measured how many are accepted."""
ROWS = (1, 2, 3, 5, 9)
"""Rows of the passes whose costs are told."""
_PROMPTS, _PROMPT_TOKENS = 6, 32
# Fewer drafts at a place say little of it.
_LEAST_SEEN = 5
# Less of a gain is lost in what timing errs by.
_WORTH = 1.05


@dataclass(frozen=True)
class DraftPoint:
    """A river as drafter.

    Fields:
        quantizer, bits, head_bits: how it was made; ``bits`` is the mean of a river weight.
        acceptance: share of the river's drafts accepted, given that those before them were, by their place in the
            round; places that were seldom reached are left out.
        draft_ms: of a draft pass; ``verify_ms``: of backbone passes, by their rows (`ROWS`); one row is a plain pass.
        expected: speed-up over plain decoding by costs and acceptance, at the best fixed draft length, ``length``.
        measured: speed-up over plain decoding as it was timed, lookup included, median over prompts; None: not timed.
        differing: how many of the tokens written meanwhile the plain model did not write; None: not timed.
    """

    quantizer: str
    bits: float
    head_bits: int | str
    acceptance: tuple[float, ...]
    draft_ms: float
    verify_ms: dict[int, float]
    expected: float
    length: int
    measured: float | None = None
    differing: int | None = None


@dataclass(frozen=True)
class DraftPlan:
    """The rivers tried, and the settings of the fastest.

    Fields:
        config: of that river, with ``exact`` on.
        points: of all, in the order they were tried.
        chosen: the index of the fastest.
    """

    config: RiverConfig
    points: tuple[DraftPoint, ...]
    chosen: int

    @property
    def best(self) -> DraftPoint:
        return self.points[self.chosen]

    @property
    def options(self) -> dict[str, Any]:
        """The settings for ``torch.compile(model, backend="river", options=...)``: fields that are not the default."""
        fields = ((one.name, one.default, getattr(self.config, one.name)) for one in dataclasses.fields(RiverConfig))
        return {name: value for name, default, value in fields if value != default}

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types."""
        return {"cpu": cpu_name(), "chosen": self.chosen, "points": [asdict(point) for point in self.points]}


def prompts_of(ids: Sequence[np.ndarray]) -> list[list[int]]:
    """Beginnings of texts, spread over all of them, to decode on from.

    Raises:
        InputError: no text is long enough.
    """
    long_enough = [text for text in ids if len(text) >= _PROMPT_TOKENS]
    if not long_enough:
        raise InputError(f"no tuning text has {_PROMPT_TOKENS} tokens to go on from")
    spread = np.linspace(0, len(long_enough) - 1, min(_PROMPTS, len(long_enough))).round().astype(int)
    return [long_enough[index][:_PROMPT_TOKENS].tolist() for index in spread]


def candidates(config: RiverConfig, roles: Sequence[str], quantizer: str, *, head: bool) -> list[RiverConfig]:
    """The settings to try with a quantizer: 4 bits, 8 for the kinds of linear layer that cost most, and 8 everywhere.

    Args:
        config: what all of them have in common. Bits given for patterns stay.
        roles: the last parts of the names of linear layers, those first whose 4 bits cost most.
        head: whether the LM head can be rounded; it has 8 bits where the config leaves it float.
    """
    head_bits = 8 if head and config.head_bits == FLOAT else config.head_bits
    base = replace(config, head_bits=head_bits, bits=4, quantizer=quantizer)
    counts = sorted({max(1, len(roles) // 4), max(1, len(roles) // 2)}) if roles else []
    portions = [tuple((f"*.{role}", 8) for role in roles[:count]) for count in counts]
    plans: list[tuple[tuple[str, int], ...]] = [(), *portions]
    found = [replace(base, bits_for=(*config.bits_for, *plan)) for plan in plans]
    return [*found, replace(base, bits=8)]


def always(length: int) -> Experience:
    """An experience by which so many tokens are drafted in every round by all the river, in batches of one."""
    return Experience(0.0, {(1, True): _Always(Costs(1.0, {1: 1.0}), length)})


class _Always(DraftLength):
    """Drafts as many as there may be: what is measured is how many of them are accepted."""

    def pays(self, survival: np.ndarray, drafted: int, room: int) -> bool:
        return drafted < min(self.most, room)


def shares_by_place(steps: Iterable[Step]) -> list[float]:
    """Share of drafts accepted, given that those before them in the round were; steps of one sequence, nothing looked
    up."""
    reached, kept = np.zeros(MOST), np.zeros(MOST)
    for step in steps:
        reached[: min(step.accepted + 1, step.drafted)] += 1
        kept[: step.accepted] += 1
    return [float(k / r) for k, r in zip(kept, reached, strict=True) if r >= _LEAST_SEEN]


def draft_point(config: RiverConfig, bits: float, acceptance: Sequence[float], costs: Costs) -> DraftPoint:
    """What a river promises as drafter.

    Args:
        config: the settings it was made with.
        bits: mean bits of a river weight.
        acceptance: by place in the round.
        costs: of passes, in seconds.
    """
    expected, length = expected_speedup(acceptance, costs.of_pass(1), costs.of_draft(), costs.of_pass)
    return DraftPoint(
        quantizer=config.quantizer,
        bits=round(bits, 2),
        head_bits=config.head_bits,
        acceptance=tuple(round(share, 4) for share in acceptance),
        draft_ms=round(1e3 * costs.of_draft(), 3),
        verify_ms={rows: round(1e3 * costs.of_pass(rows), 3) for rows in ROWS},
        expected=round(expected, 3),
        length=length,
    )


def tuning_could_pay(points: Sequence[DraftPoint]) -> bool:
    """Whether 4 bits that are accepted as often as 8 bits would be faster than what there is: tuning takes minutes, and
    brings no more than that."""
    best = max(point.expected for point in points)
    closest = max(points, key=lambda point: point.bits)
    cheapest = min(points, key=lambda point: point.draft_ms)
    costs = Costs(cheapest.draft_ms, dict(cheapest.verify_ms))
    bound, _ = expected_speedup(closest.acceptance, costs.of_pass(1), costs.of_draft(), costs.of_pass)
    return bound > _WORTH * best
