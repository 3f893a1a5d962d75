"""A river made for drafting: of several rivers the one whose exact decoding is fastest, measured on this machine."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.exporters.onnx import onnx_file
from river_compile.exporters.onnx.swap import SwappableLinear, SwappableModel
from river_compile.exporters.quantizers import quantizer, without_texts
from river_compile.measure.draft_points import (
    MOST,
    NEW_TOKENS,
    ROWS,
    DraftPlan,
    DraftPoint,
    always,
    candidates,
    draft_point,
    prompts_of,
    shares_by_place,
    tuning_could_pay,
)
from river_compile.measure.sensitivity import divergence, starts
from river_compile.measure.tuning import Tuning
from river_compile.passes.quantizer import ActivationAware
from river_compile.reports import ExportReport
from river_compile.runtime import OnnxDecoder
from river_compile.runtime.drafting import Costs

__all__ = [
    "DraftTuning",
    "acceptance_by_place",
    "choose_for_drafting",
    "export_candidate",
    "fixed_length",
    "measure_drafts",
    "timed_ratio",
]

Progress = Callable[[str, int, int], None]

_REPEATS = 7
_SENSITIVITY_TOKENS = 256
# So many of the rivers that promise most are timed.
_TIMED = 3


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
    prompts = prompts_of(ids)
    with tempfile.TemporaryDirectory(prefix="river-drafts-") as folder:
        tried = _Tried(model, tuning, prompts, Path(folder), progress)
        for candidate in plain_quantizer:
            tried.add(candidate)
        if tuning_could_pay(tried.points):
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

    def time_the_best(self) -> None:
        """Fill in what exact decoding measures beside the plain model."""
        plain = OnnxDecoder(self._model)
        for number, (index, file) in enumerate(self.kept.items()):
            self._progress("time the best drafters", number, len(self.kept))
            ratios, differing = timed_ratio(plain, OnnxDecoder(file), self._prompts, NEW_TOKENS)
            measured = round(statistics.median(ratios), 3)
            self.points[index] = replace(self.points[index], measured=measured, differing=differing)
        self._progress("time the best drafters", len(self.kept), len(self.kept))


def export_candidate(model: Path, file: Path, config: RiverConfig, tuning: Tuning) -> ExportReport:
    """Make a river to be measured: its weights beside it, so that they are mapped, and unchecked."""
    texts = tuning if isinstance(quantizer(config.quantizer), ActivationAware) else None
    return export(model, file, replace(config, external_data=True), tuning=texts, check=False)


def _candidates(
    model: Path, config: RiverConfig, ids: Sequence[np.ndarray], progress: Progress
) -> tuple[list[RiverConfig], list[RiverConfig]]:
    """Settings with a quantizer that is quick, and with GPTQ."""
    swappable, roles = _roles_by_cost(model, config, ids, progress)
    found = candidates(config, roles, swappable.quantizer, head=swappable.head is not None)
    return found, [replace(one, quantizer="gptq") for one in found[:2]]


def _roles_by_cost(
    model: Path, config: RiverConfig, ids: Sequence[np.ndarray], progress: Progress
) -> tuple[SwappableModel, list[str]]:
    """The kinds of linear layer by the last part of their names, those first whose 4 bits cost most KL for a weight."""
    settings = replace(config, quantizer=without_texts(config.quantizer), bits=4, bits_for=(), head_bits=8)
    swappable = SwappableModel(model, settings, ids)
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
    return draft_point(config, bits, acceptance, costs)


@contextmanager
def fixed_length(decoder: OnnxDecoder, length: int) -> Iterator[None]:
    """Let a decoder draft this many tokens in every round, for a while; batch 1, all-river drafts."""
    before = decoder.experience
    decoder.experience = replace(always(length), tie=before.tie or 0.0)
    try:
        yield
    finally:
        decoder.experience = before


def acceptance_by_place(decoder: OnnxDecoder, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Share of drafts accepted, given that those before them in the round were."""
    with fixed_length(decoder, MOST):
        return shares_by_place(
            step for prompt in prompts for step in decoder.stream([prompt], NEW_TOKENS, exact=True, lookup=False)
        )


def _costs(decoder: OnnxDecoder, prompt: Sequence[int]) -> Costs:
    """Median seconds of passes behind a prompt: a draft, and the backbone's by rows."""
    state = decoder.start(1)
    decoder.backbone(np.array([prompt]), state)
    mark = decoder.mark(state)
    tokens = np.array([[prompt[index % len(prompt)] for index in range(max(ROWS))]])
    runs: dict[int, Callable[[], object]] = {0: lambda: decoder.forward(tokens[:, :1], state, max_depth=0)}
    for rows in ROWS:
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
