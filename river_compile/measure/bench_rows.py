"""What benchmarks of every runtime share: rows, interleaved rounds, ratios, the byte limit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from river_compile.config import NEVER
from river_compile.measure.greedy import wait

__all__ = ["EXITS_OFF", "BenchRow", "ExactTokens", "RatedRows", "interleave", "memory_bandwidth", "river_rows"]

EXITS_OFF = "river, exits off"

Progress = Callable[[str, int, int], None]


@dataclass
class BenchRow:
    """One way to run the model.

    Fields:
        name: what it is.
        tau, max_depth: how its passes exit; None where that does not apply.
        seconds: time of a decode pass, the median of each round; of exact decoding, time for each token.
        depths: exit depth of every decode pass.
        bytes_per_token: what a decode pass reads from memory, mean over passes; NaN where that cannot be told.
    """

    name: str
    tau: float | None = None
    max_depth: int | None = None
    seconds: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    bytes_per_token: float = math.nan

    @property
    def mean_depth(self) -> float:
        return statistics.fmean(self.depths) if self.depths else math.nan

    @property
    def median(self) -> float:
        """Seconds of a decode pass: the median over rounds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class ExactTokens:
    """What exact decoding made.

    Fields:
        tokens, differing: tokens written, and how many of them the backbone alone does not write.
        acceptance: share of the drafts that verification kept; None if nothing was drafted.
    """

    tokens: int
    differing: int
    acceptance: float | None


class RatedRows:
    """Rows that were measured in the same rounds, and what they tell beside each other.

    Fields:
        batch: sequences of a pass.
        bandwidth: bytes a second read from memory, measured in the same process.
        reference: the name of the row that ratios are to.
    """

    batch: int
    bandwidth: float
    rows: list[BenchRow]
    reference: str

    def row(self, name: str) -> BenchRow | None:
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, row: BenchRow) -> float:
        """How many times faster than the reference: the median over rounds of the ratio within a round."""
        reference = next(found for found in self.rows if found.name == self.reference)
        return statistics.median(base / own for base, own in zip(reference.seconds, row.seconds, strict=True))

    def limit(self, row: BenchRow) -> float:
        """The byte limit, tokens a second of one sequence: memory bandwidth over the bytes that a pass reads."""
        return self.bandwidth / row.bytes_per_token

    def described(self, row: BenchRow) -> dict[str, Any]:
        """What a row tells beside its fields, in types of JSON; what is not known is None."""
        figures = {
            "tokens_per_second": self.batch / row.median,
            "ratio": self.ratio(row),
            "mean_depth": row.mean_depth,
            "bytes_per_token": row.bytes_per_token,
            "byte_limit_tokens_per_second": self.batch * self.limit(row),
        }
        return {name: None if math.isnan(value) else value for name, value in figures.items()}


def river_rows(layers: int, taus: Sequence[float], depths: Sequence[int]) -> list[BenchRow]:
    """The river with exits off, at thresholds, and at exit depths, the deepest first."""
    rows = [BenchRow(EXITS_OFF, tau=NEVER)]
    rows += [BenchRow(f"river, tau {tau:g}", tau=tau) for tau in dict.fromkeys(taus)]
    return rows + [
        BenchRow(f"river, exit depth {depth}", tau=NEVER, max_depth=depth)
        for depth in sorted(set(depths), reverse=True)
        if 0 < depth < layers
    ]


def interleave(ways: Sequence[Callable[[bool], None]], rounds: int, progress: Progress) -> None:
    """Run every way once a round, so that a busy moment of the machine strikes all alike.

    Args:
        ways: each is told whether the round counts: the first, of warm-up, does not.
    """
    for number in range(rounds + 1):
        for place, way in enumerate(ways):
            progress("measure", number * len(ways) + place, (rounds + 1) * len(ways))
            way(number > 0)
    progress("measure", 1, 1)


def memory_bandwidth(device: str) -> float:
    """Bytes a second that the device reads from its memory, best of a few passes over 1 GB; NaN where torch has no part
    in the device."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return math.nan
    block = torch.ones(1 << 28, device=device)
    times = []
    for _ in range(5):
        wait(block.device)
        started = time.perf_counter()
        block.sum()
        wait(block.device)
        times.append(time.perf_counter() - started)
    return block.nbytes / min(times)
