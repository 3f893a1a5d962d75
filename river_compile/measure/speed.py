"""A river made fast for this machine: of several forms of its weights the fastest that says as much as it should."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from river_compile.config import ACTIVATIONS, FLOAT, GROUP_SIZES, RiverConfig
from river_compile.exporters.machine import cpu_name
from river_compile.measure.drafting import export_candidate
from river_compile.measure.tuning import Tuning
from river_compile.runtime import OnnxDecoder, State

__all__ = ["SpeedPlan", "SpeedPoint", "SpeedTuning", "choose_for_speed"]

Progress = Callable[[str, int, int], None]

_TEXTS, _TOKENS = 8, 64
_CONTEXT, _ROUNDS = 64, 15
# Less is what so many tokens cannot tell apart.
_SLACK = 0.02
# Rounding activations to int8 as well costs next to nothing, but where few of them are huge.
_SPOILT = 0.05
# Less of a gain is lost in what timing errs by.
_WORTH = 1.03


@dataclass(frozen=True)
class SpeedPoint:
    """A form of the river's weights.

    Fields:
        bits, group_size, activations, head_bits: as of `RiverConfig`.
        river_ms: of an all-river decode pass, the median; ``speedup``: over the backbone's in the same rounds.
        agreement: share of tokens of tuning texts after which it chooses what the backbone chooses, all river.
    """

    bits: int
    group_size: int
    activations: str
    head_bits: int | str
    river_ms: float
    speedup: float
    agreement: float


@dataclass(frozen=True)
class SpeedPlan:
    """The forms tried, and the settings of the fastest.

    Fields:
        config: with that form.
        points: of all, in the order they were tried; the first is the one asked for.
        chosen: the index of the fastest that agrees often enough.
        spoilt: what int8 activations cost in agreement beside float ones, if it is much; else None.
        tokens: how many were compared.
    """

    config: RiverConfig
    points: tuple[SpeedPoint, ...]
    chosen: int
    spoilt: float | None
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types."""
        points = [asdict(point) for point in self.points]
        told = {"chosen": self.chosen, "spoilt": self.spoilt, "tokens": self.tokens}
        return {"cpu": cpu_name(), "points": points} | told


@dataclass(frozen=True)
class SpeedTuning(Tuning):
    """Texts for a river that is to be fast here: `applied` chooses group size, activations, bits and those of the LM
    head by measuring.

    Fields:
        plans: gets the plan.
    """

    plans: list[SpeedPlan] = field(default_factory=list)

    def applied(self, model: Path, ids: Sequence[np.ndarray], config: RiverConfig, progress: Progress) -> RiverConfig:
        config = super().applied(model, ids, config, progress)
        tuning = Tuning(self.tokenizer, self.texts)
        self.plans.append(choose_for_speed(model, config, ids, tuning, progress=progress))
        return self.plans[-1].config

    @property
    def speeds(self) -> Mapping[str, Any] | None:
        return self.plans[-1].to_dict() if self.plans else None


def choose_for_speed(
    model: Path,
    config: RiverConfig,
    ids: Sequence[np.ndarray],
    tuning: Tuning,
    *,
    progress: Progress = lambda step, done, total: None,
) -> SpeedPlan:
    """Make the river in several forms, time each beside its backbone on this machine, and choose the fastest.

    One thing after the other: group size with int8 and with float activations, then the other number of bits, then an
    LM head of 8 and of 4 bits where the config leaves it float. A form that is faster is taken if it agrees with the
    backbone about as often as the one asked for; if that one's int8 activations spoil the model, as often as with float
    ones.

    Args:
        model: a plain ONNX decoder.
        config: the form asked for, and what all have in common. Bits given for patterns stay.
        ids: token ids of texts, int64 [tokens] each.
        tuning: for quantizers that read texts.

    Raises:
        InputError: the model cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="river-speed-") as folder:
        tried = _Tried(model, tuning, [text[:_TOKENS] for text in ids[:_TEXTS]], Path(folder), progress)
        others = [
            replace(config, activations=activations, group_size=group_size)
            for activations in (config.activations, *(kind for kind in ACTIVATIONS if kind != config.activations))
            for group_size in (config.group_size, *(size for size in GROUP_SIZES if size != config.group_size))
        ]
        for other in others:
            tried.add(other)
        tried.need_what_float_activations_reach()
        tried.add(replace(tried.best, bits=8 if config.bits == 4 else 4))
        for head_bits in (8, 4) if config.head_bits == FLOAT else ():
            tried.add(replace(tried.best, head_bits=head_bits))
    chosen = tried.configs.index(tried.best)
    return SpeedPlan(tried.best, tuple(tried.points), chosen, tried.spoilt, sum(map(len, tried.expected)))


class _Tried:
    """The forms tried so far, and the best of them; ``expected`` is what the backbone chooses in each text."""

    def __init__(
        self, model: Path, tuning: Tuning, texts: Sequence[np.ndarray], folder: Path, progress: Progress
    ) -> None:
        self._model, self._tuning, self._folder, self._progress = model, tuning, folder, progress
        self._texts = texts
        self.expected: list[np.ndarray] = []
        self.configs: list[RiverConfig] = []
        self.points: list[SpeedPoint] = []
        self.spoilt: float | None = None

    @property
    def best(self) -> RiverConfig:
        """The fastest form that agrees often enough; the one asked for, if none is faster by more than noise."""
        first = self.points[0]
        enough = (first.agreement + (self.spoilt or 0.0)) - _SLACK
        good = [index for index, point in enumerate(self.points) if point.agreement >= enough]
        fastest = max(good, key=lambda index: self.points[index].speedup)
        lead = self.points[fastest].speedup / first.speedup
        return self.configs[0 if 0 in good and lead < _WORTH else fastest]

    def need_what_float_activations_reach(self) -> None:
        """Raise what is enough, where int8 activations cost much of it."""
        asked, first = self.configs[0], self.points[0]
        if asked.activations == "int8":
            unrounded = self.points[self.configs.index(replace(asked, activations=FLOAT))]
            lost = unrounded.agreement - first.agreement
            self.spoilt = round(lost, 4) if lost > _SPOILT else None

    def add(self, config: RiverConfig) -> None:
        """Make the river in a form and measure it."""
        self._progress("try forms of the river", len(self.configs), len(self.configs) + 1)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            file = Path(folder) / "model.onnx"
            export_candidate(self._model, file, config, self._tuning)
            decoder = OnnxDecoder(file)
            river, backbone = _seconds(decoder, np.resize(self._texts[0], _CONTEXT))
            if not self.expected:
                # All forms have one backbone.
                self.expected = [_chosen(decoder, text, None) for text in self._texts]
            pairs = zip(self._texts, self.expected, strict=True)
            same = np.concatenate([_chosen(decoder, text, 0) == expected for text, expected in pairs])
        self.configs.append(config)
        self.points.append(
            SpeedPoint(
                config.bits,
                config.group_size,
                config.activations,
                config.head_bits,
                river_ms=round(1e3 * river, 3),
                speedup=round(backbone / river, 3),
                agreement=round(float(same.mean()), 4),
            )
        )


def _seconds(decoder: OnnxDecoder, prompt: np.ndarray) -> tuple[float, float]:
    """Median seconds of a decode pass behind a prompt: all river, and of the backbone in the same rounds."""
    batch = decoder.signature.batch or 1
    ids, state = np.repeat(prompt[None], batch, axis=0), decoder.start(batch)
    room = decoder.signature.room
    decoder.backbone(ids if room is None else ids[:, : room - 1], state)
    mark = decoder.mark(state)
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS + 1):
        for seconds, depth in zip(spent, (0, None), strict=True):
            started = time.perf_counter()
            _run(decoder, ids[:, :1], state, depth)
            seconds.append(time.perf_counter() - started)
            decoder.back(state, mark)
    # The first of each allocates.
    river, backbone = (statistics.median(seconds[1:]) for seconds in spent)
    return river, backbone


def _chosen(decoder: OnnxDecoder, text: np.ndarray, depth: int | None) -> np.ndarray:
    """The choice after each token of a text, int64 [tokens]: all river at depth 0, else the backbone's."""
    batch = decoder.signature.batch or 1
    state = decoder.start(batch)
    ids = np.repeat(text[None, : decoder.signature.room], batch, axis=0)
    parts = np.split(ids, ids.shape[1], axis=1) if decoder.tells_last_only else [ids]
    return np.concatenate([_run(decoder, part, state, depth)[0].argmax(-1) for part in parts])


def _run(decoder: OnnxDecoder, ids: np.ndarray, state: State, depth: int | None) -> np.ndarray:
    """Logits of a pass: of the backbone, if there is no depth."""
    made = decoder.backbone(ids, state) if depth is None else decoder.forward(ids, state, max_depth=depth)
    return made[0]
