"""A river made for drafting: of several rivers the one whose exact decoding is fastest, measured on this machine."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.errors import InputError
from river_compile.exporters.onnx import onnx_file
from river_compile.exporters.onnx.swap import SwappableLinear, SwappableModel
from river_compile.exporters.quantizers import quantizer
from river_compile.measure.machine import cpu_name
from river_compile.measure.sensitivity import divergence, starts
from river_compile.measure.tuning import Tuning
from river_compile.passes.quantizer import ActivationAware
from river_compile.reports import ExportReport
from river_compile.runtime import OnnxDecoder
from river_compile.runtime.drafting import Costs, DraftLength, expected_speedup
from river_compile.runtime.exact import Experience

__all__ = [
    "DraftPlan",
    "DraftPoint",
    "DraftTuning",
    "acceptance_by_place",
    "choose_for_drafting",
    "export_candidate",
    "fixed_length",
    "measure_drafts",
    "timed_ratio",
]

Progress = Callable[[str, int, int], None]

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 6, 32, 48
_MOST = 8
_ROWS = (1, 2, 3, 5, 9)
_REPEATS = 7
_SENSITIVITY_TOKENS = 256
# So many of the rivers that promise most are timed.
_TIMED = 3
# Fewer drafts at a place say little of it.
_LEAST_SEEN = 5
# Less of a gain is lost in what timing errs by.
_WORTH = 1.05


@dataclass(frozen=True)
class DraftPoint:
    """A river as drafter.

    Fields:
        quantizer, bits, head_bits: how it was made; ``bits`` is the mean of a river weight.
        acceptance: share of drafts accepted, given that those before them were, by their place in the round.
        draft_ms: of a draft pass; ``verify_ms``: of backbone passes, by their rows; one row is a plain pass.
        expected: speed-up over plain decoding by costs and acceptance, at the best fixed draft length, ``length``.
        measured: speed-up over plain decoding as it was timed, median over prompts; None: not timed.
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types."""
        return {"cpu": cpu_name(), "chosen": self.chosen, "points": [asdict(point) for point in self.points]}


@dataclass(frozen=True)
class DraftTuning(Tuning):
    """Texts for a river that is to draft for exact decoding: `applied` chooses its settings by measuring.

    Fields:
        plans: gets the plan.
    """

    plans: list[DraftPlan] = field(default_factory=list)

    def applied(self, model: Path, ids: Sequence[np.ndarray], config: RiverConfig, progress: Progress) -> RiverConfig:
        self.plans.append(choose_for_drafting(model, config, Tuning(self.tokenizer, self.texts), progress=progress))
        return self.plans[-1].config

    @property
    def drafts(self) -> Mapping[str, Any] | None:
        return self.plans[-1].to_dict() if self.plans else None


def choose_for_drafting(
    model: Path,
    config: RiverConfig,
    tuning: Tuning,
    *,
    progress: Progress = lambda step, done, total: None,
) -> DraftPlan:
    """Make several rivers, decode on from tuning texts exactly with each, and choose the fastest.

    They differ in bits: 4 everywhere, 8 for the kinds of linear layer whose 4 bits cost most, and 8 everywhere; where
    it could pay, GPTQ is tried as well. The LM head has 8 bits where the config leaves it float.

    Args:
        model: a plain ONNX decoder.
        config: what all of them have in common. Bits given for patterns stay.
        tuning: texts; what is decoded goes on from their beginnings.

    Raises:
        InputError: the model cannot be used, or the texts are too short.
    """
    ids = tuning.ids(onnx_file.load(model))
    plain_quantizer, tuned = _candidates(model, config, ids, progress)
    prompts = _prompts(ids)
    with tempfile.TemporaryDirectory(prefix="river-drafts-") as folder:
        tried = _Tried(model, tuning, prompts, Path(folder), progress)
        for candidate in plain_quantizer:
            tried.add(candidate)
        if tried.tuning_could_pay():
            for candidate in tuned:
                tried.add(candidate)
        tried.time_the_best()
    chosen = max(tried.kept, key=lambda index: tried.points[index].measured or 0.0)
    return DraftPlan(replace(tried.configs[chosen], exact=True), tuple(tried.points), chosen)


class _Tried:
    """The rivers tried so far; the files of the best of them are kept.

    Args:
        model: the plain model.
        prompts: what is decoded on from.
    """

    def __init__(
        self, model: Path, tuning: Tuning, prompts: Sequence[Sequence[int]], folder: Path, progress: Progress
    ) -> None:
        self._model, self._tuning, self._prompts = model, tuning, prompts
        self._folder, self._progress = folder, progress
        self.configs: list[RiverConfig] = []
        self.points: list[DraftPoint] = []
        self.kept: dict[int, Path] = {}

    def add(self, config: RiverConfig) -> None:
        """Make a river and measure it."""
        number = len(self.configs)
        self._progress("try rivers as drafters", number, number + 1)
        file = self._folder / str(number) / "model.onnx"
        report = export_candidate(self._model, file, config, self._tuning)
        self.configs.append(config)
        self.points.append(measure_drafts(OnnxDecoder(file), self._prompts, config, report.average_bits))
        self.kept[number] = file
        if len(self.kept) > _TIMED:
            # Each holds a copy of the backbone's weights.
            worst = min(self.kept, key=lambda index: self.points[index].expected)
            shutil.rmtree(self.kept.pop(worst).parent)

    def tuning_could_pay(self) -> bool:
        """Whether 4 bits that are accepted as often as 8 bits would be faster than what there is: tuning takes
        minutes, and brings no more than that."""
        best = max(point.expected for point in self.points)
        closest = max(self.points, key=lambda point: point.bits)
        cheapest = min(self.points, key=lambda point: point.draft_ms)
        costs = Costs(cheapest.draft_ms, cheapest.verify_ms)
        bound, _ = expected_speedup(closest.acceptance, costs.of_pass(1), costs.of_draft(), costs.of_pass)
        return bound > _WORTH * best

    def time_the_best(self) -> None:
        """Fill in what exact decoding measures beside the plain model."""
        plain = OnnxDecoder(self._model)
        for number, (index, file) in enumerate(self.kept.items()):
            self._progress("time the best drafters", number, len(self.kept))
            ratios, differing = timed_ratio(plain, OnnxDecoder(file), self._prompts, _NEW_TOKENS)
            measured = round(statistics.median(ratios), 3)
            self.points[index] = replace(self.points[index], measured=measured, differing=differing)
        self._progress("time the best drafters", len(self.kept), len(self.kept))


def export_candidate(model: Path, file: Path, config: RiverConfig, tuning: Tuning) -> ExportReport:
    """Make a river to be measured: its weights beside it, so that they are mapped, and unchecked."""
    texts = tuning if isinstance(quantizer(config.quantizer), ActivationAware) else None
    return export(model, file, replace(config, external_data=True), tuning=texts, check=False)


def _prompts(ids: Sequence[np.ndarray]) -> list[list[int]]:
    long_enough = [text for text in ids if len(text) >= _PROMPT_TOKENS]
    if not long_enough:
        raise InputError(f"no tuning text has {_PROMPT_TOKENS} tokens to go on from")
    spread = np.linspace(0, len(long_enough) - 1, min(_PROMPTS, len(long_enough))).round().astype(int)
    return [long_enough[index][:_PROMPT_TOKENS].tolist() for index in spread]


def _candidates(
    model: Path, config: RiverConfig, ids: Sequence[np.ndarray], progress: Progress
) -> tuple[list[RiverConfig], list[RiverConfig]]:
    """Settings with a quantizer that is quick, and with GPTQ."""
    swappable, roles = _roles_by_cost(model, config, ids, progress)
    head = 8 if config.head_bits == "float" and swappable.head is not None else config.head_bits
    base = replace(config, head_bits=head, bits=4, quantizer=swappable.quantizer)
    # The kinds that cost most at 4 bits, in two portions, each given 8.
    counts = sorted({max(1, len(roles) // 4), max(1, len(roles) // 2)})
    portions = [tuple((f"*.{role}", 8) for role in roles[:count]) for count in counts]
    plans: list[tuple[tuple[str, int], ...]] = [(), *portions]
    found = [replace(base, bits_for=(*config.bits_for, *plan)) for plan in plans]
    return [*found, replace(base, bits=8)], [replace(one, quantizer="gptq") for one in found[:2]]


def _roles_by_cost(
    model: Path, config: RiverConfig, ids: Sequence[np.ndarray], progress: Progress
) -> tuple[SwappableModel, list[str]]:
    """The kinds of linear layer by the last part of their names, those first whose 4 bits cost most KL for a weight."""
    plain = "rtn" if isinstance(quantizer(config.quantizer), ActivationAware) else config.quantizer
    swappable = SwappableModel(model, replace(config, quantizer=plain, bits=4, bits_for=(), head_bits=8), ids)
    batch = starts(ids, _SENSITIVITY_TOKENS)
    reference = swappable.logits(batch)
    roles: dict[str, list[SwappableLinear]] = {}
    for linear in swappable.linears:
        roles.setdefault(linear.name.rpartition(".")[2], []).append(linear)
    costs: dict[str, float] = {}
    for number, (role, linears) in enumerate(roles.items()):
        progress("measure kinds of layers", number, len(roles))
        changed = {name: value for linear in linears for name, value in swappable.quantized(linear, 4).items()}
        cost = divergence(reference, swappable.logits(batch, changed))
        costs[role] = cost / sum(linear.weights for linear in linears)
    progress("measure kinds of layers", len(roles), len(roles))
    return swappable, sorted(costs, key=lambda role: -costs[role])


class _Always(DraftLength):
    """Drafts as many as there may be: what is measured is how many of them are accepted."""

    def pays(self, survival: np.ndarray, drafted: int, room: int) -> bool:
        return drafted < min(self.most, room)


def measure_drafts(
    decoder: OnnxDecoder, prompts: Sequence[Sequence[int]], config: RiverConfig, bits: float
) -> DraftPoint:
    """A river's acceptance by place, over exact decoding that goes on from prompts, and what its passes take.

    Args:
        config: the settings it was made with.
        bits: mean bits of a river weight.
    """
    costs = _costs(decoder, prompts[0])
    acceptance = acceptance_by_place(decoder, prompts)
    expected, length = expected_speedup(acceptance, costs.of_pass(1), costs.of_draft(), costs.of_pass)
    return DraftPoint(
        quantizer=config.quantizer,
        bits=round(bits, 2),
        head_bits=config.head_bits,
        acceptance=tuple(round(share, 4) for share in acceptance),
        draft_ms=round(1e3 * costs.of_draft(), 3),
        verify_ms={rows: round(1e3 * costs.of_pass(rows), 3) for rows in _ROWS},
        expected=round(expected, 3),
        length=length,
    )


@contextmanager
def fixed_length(decoder: OnnxDecoder, length: int) -> Iterator[None]:
    """Let a decoder draft this many tokens in every round, for a while; batch 1, all-river drafts."""
    before = decoder.experience
    decoder.experience = Experience(before.tie or 0.0, {(1, True): _Always(Costs(1.0, {1: 1.0}), length)})
    try:
        yield
    finally:
        decoder.experience = before


def acceptance_by_place(decoder: OnnxDecoder, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Share of drafts accepted, given that those before them in the round were."""
    reached, kept = np.zeros(_MOST), np.zeros(_MOST)
    with fixed_length(decoder, _MOST):
        for prompt in prompts:
            for step in decoder.stream([prompt], _NEW_TOKENS, exact=True, lookup=False):
                reached[: min(step.accepted + 1, step.drafted)] += 1
                kept[: step.accepted] += 1
    return [float(k / r) for k, r in zip(kept, reached, strict=True) if r >= _LEAST_SEEN]


def _costs(decoder: OnnxDecoder, prompt: Sequence[int]) -> Costs:
    """Median seconds of passes behind a prompt: a draft, and the backbone's by rows."""
    state = decoder.start(1)
    decoder.backbone(np.array([prompt]), state)
    mark = decoder.mark(state)
    tokens = np.array([[prompt[index % len(prompt)] for index in range(max(_ROWS))]])
    runs: dict[int, Callable[[], object]] = {0: lambda: decoder.forward(tokens[:, :1], state, max_depth=0)}
    for rows in _ROWS:
        runs[rows] = lambda rows=rows: decoder.backbone(tokens[:, :rows], state)  # type: ignore[misc]
    seconds: dict[int, list[float]] = {rows: [] for rows in runs}
    for _ in range(_REPEATS + 1):
        for rows, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[rows].append(time.perf_counter() - started)
            decoder.back(state, mark)
    # The first of each allocates.
    medians = {rows: statistics.median(values[1:]) for rows, values in seconds.items()}
    return Costs(medians.pop(0), medians)


def timed_ratio(
    plain: OnnxDecoder, decoder: OnnxDecoder, prompts: Sequence[Sequence[int]], new_tokens: int, **settings: Any
) -> tuple[list[float], int]:
    """Speed-up of exact decoding over the plain model for each prompt, interleaved, after one to warm up; and how many
    tokens differ."""
    decoder.generate(prompts[:1], new_tokens, exact=True, **settings)
    plain.generate(prompts[:1], new_tokens)
    ratios, differing = [], 0
    for prompt in prompts:
        expected = plain.generate([prompt], new_tokens)
        made = decoder.generate([prompt], new_tokens, exact=True, **settings)
        ratios.append(expected.decode_seconds / made.decode_seconds)
        differing += sum(a != b for a, b in zip(expected.tokens[0], made.tokens[0], strict=True))
    return ratios, differing
