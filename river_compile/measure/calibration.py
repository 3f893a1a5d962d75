"""`calibrate`: the fastest threshold whose risk is bounded, with the evidence for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from river_compile.config import NEVER
from river_compile.errors import ConfigError
from river_compile.measure.calibratable import Calibratable, OnnxCalibratable, Thresholds, TorchCalibratable
from river_compile.measure.fidelity import (
    Document,
    TextTokenizer,
    TokenizedDocument,
    check_lengths,
    compare,
    decoded_documents,
)
from river_compile.measure.readings import Readings
from river_compile.measure.risk import check_risk, fixed_sequence, hoeffding_bentkus, least_documents
from river_compile.reports import write_report
from river_compile.version import __version__

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DEFAULT_TAUS", "LOSSES", "Calibration", "Tested", "calibrate"]

DEFAULT_TAUS = (0.998, 0.995, 0.99, 0.985, 0.98, 0.975, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
LOSSES = ("disagreement", "kl")

_NO_EXIT = 3.0
_EXPLORED_SHARE = 0.25
# What exploration tries: no exit in the first part of the stack; a threshold that falls linearly to tau with depth.
_CLOSED_PARTS = (0.0, 0.25, 0.5, 0.75)
_TILTS = (0.0, 0.02)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tested:
    """A threshold put to the test: mean loss over documents, p-value of "its risk is above the bound", exit depth."""

    tau: float
    risk: float
    p_value: float
    exit_depth: float
    certified: bool


@dataclass(frozen=True)
class Calibration:
    """A threshold with its evidence. `RiverConfig(calibration=...)` and ``river-export --calibration`` take it.

    Fields:
        tau, min_depth, tau_offsets: what to set; ``tau`` is 2 ("never exit") where nothing was certified.
        certified: whether ``tau`` has been shown to keep the risk at most ``max_risk`` with this ``confidence``; where
            nothing has been, never to exit is free of risk.
        loss: of a document: the share of its tokens whose top-1 prediction is not the backbone's ("disagreement"), or
            the mean over its tokens of KL(backbone || river), clipped at ``kl_clip`` nats and divided by it ("kl").
        documents, tokens: tested on: documents, and tokens whose prediction counts.
        explored_documents: others, used to choose ``tau_offsets`` and not tested on.
        prompt_tokens: of each document that were read in one pass, as a prompt is; the last one's prediction counts.
        least_documents: without so many documents nothing can be certified, whatever the loss.
        risk, p_value, exit_depth: of the threshold chosen, as measured; None for "never exit".
        curve: every threshold tested, from the safest down to the first that failed.
        nearest_miss: that one.
        texts_sha256: of the token ids of all documents tested. ``model_sha256``: what the model computes with.
        version: of this package.
    """

    tau: float
    min_depth: int
    tau_offsets: tuple[float, ...] | None
    certified: bool
    max_risk: float
    confidence: float
    loss: str
    kl_clip: float
    documents: int
    tokens: int
    prompt_tokens: int
    explored_documents: int
    least_documents: int
    risk: float | None
    p_value: float | None
    exit_depth: float | None
    curve: tuple[Tested, ...]
    nearest_miss: Tested | None
    layers: int
    model: str
    model_sha256: str
    texts_sha256: str
    version: str

    @property
    def exits(self) -> bool:
        """Whether a threshold was found at which tokens may exit."""
        return self.tau <= 1

    def to_json(self) -> str:
        """The calibration as one JSON object."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write the JSON.

        Raises:
            RiverError: the file cannot be written.
        """
        write_report(Path(path), self.to_json() + "\n")

    def verdict(self) -> str:
        """The outcome in one line."""
        bound = f"risk at most {self.max_risk:g} with {self.confidence:.0%} confidence"
        if self.exits:
            return f"tau {self.tau:g}: {bound} (measured {self.risk:.4f}, mean exit depth {self.exit_depth:.1f})"
        if self.documents < self.least_documents:
            return (
                f"never exit: {bound} takes at least {self.least_documents} documents even with no loss at all, "
                f"and there are {self.documents}"
            )
        missed = self.nearest_miss
        assert missed is not None
        return (
            f"never exit: no threshold has a {bound}; the nearest, tau {missed.tau:g}, has a measured risk of "
            f"{missed.risk:.4f} (p = {missed.p_value:.3f})"
        )


def calibrate(
    model: str | Path | nn.Module | Calibratable,
    texts: Sequence[str | Path] | Sequence[Document] | None,
    tokenizer: TextTokenizer,
    *,
    max_risk: float = 0.02,
    confidence: float = 0.95,
    loss: str = "disagreement",
    kl_clip: float = 1.0,
    taus: Sequence[float] = DEFAULT_TAUS,
    by_layer: bool = False,
    prompt_tokens: int = 8,
    max_tokens: int = 64,
    max_documents: int | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """The fastest threshold whose risk is at most ``max_risk``, with the probability ``confidence`` of being right.

    Learn-then-Test (arXiv 2110.01052): thresholds are tested in a fixed order, from the safest down, by
    Hoeffding-Bentkus p-values, until the first that cannot be certified; the one before it is chosen. Documents are the
    exchangeable unit: the bound is on the expected loss of a new document drawn as these were.

    Args:
        model: an exported river model; a Hugging Face decoder (a folder or a module), run with a river of its own in
            `river_compile.reference`; or any `Calibratable`.
        texts: files or documents, one threshold's loss each; None: the calibration texts that come with the package.
        taus: thresholds to test; they are put in order.
        by_layer: choose the least depth and a threshold for each layer as well, on a quarter of the documents, which
            is then not tested on. An exported model needs room for it (``RiverConfig(tau_offsets=())``).
        prompt_tokens: a document's first tokens, read in one pass like the prompt they would be (the model's own rule
            for prefill holds there); only predictions from the last of them on count. Decoding without any prompt would
            let the first token exit, on whose keys and values all later ones lean hardest. A chat template before the
            text counts neither here nor in ``max_tokens``.
        max_tokens: only the first so many tokens of a document are read.
        max_documents: only so many, evenly spread over ``texts``.
        threads: of ONNX Runtime within an operator; its own choice if None.
        cache: a folder for readings, by model, text and threshold, so that an interrupted run goes on; None: none.
        progress: is told the step, and documents done and in all.

    Raises:
        ConfigError: a setting has a value it cannot have.
        InputError: model, texts or tokenizer cannot be used, or do not belong together.
    """
    check_risk(max_risk, confidence)
    order = _check(taus, loss, kl_clip)
    check_lengths(prompt_tokens, max_tokens)
    prompt_tokens, max_tokens = prompt_tokens + tokenizer.lead, max_tokens + tokenizer.lead
    subject = _subject(model, threads)
    if by_layer and not subject.has_offsets:
        raise ConfigError("by_layer", "the model has one threshold for all layers; export it with room for more")
    documents = decoded_documents(
        texts,
        "calibration",
        tokenizer,
        subject.vocabulary,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        count=max_documents,
        skip_short=False,
    )
    need = least_documents(max_risk, confidence)
    kept = Readings(cache, f"calibration 2 {subject.fingerprint()} {prompt_tokens}")
    reader = _Reader(subject, loss, kl_clip, prompt_tokens, kept, progress)
    explored: list[TokenizedDocument] = []
    start = Thresholds(NEVER)
    if by_layer:
        explored, documents = _split(documents)
        if len(documents) >= need:
            start = _explore(reader, explored, order, max_risk)
    curve: list[Tested] = []
    # Where even no loss at all would not be evidence enough, nothing is read.
    for tau in order if len(documents) >= need else ():
        curve.append(_test(reader, documents, replace(start, tau=tau), max_risk, confidence))
        if not curve[-1].certified:
            break
    passed = [tested for tested in curve if tested.certified]
    chosen = passed[-1] if passed else None
    offsets = start.offsets if chosen else None
    return Calibration(
        tau=chosen.tau if chosen else NEVER,
        min_depth=subject.min_depth,
        tau_offsets=offsets,
        certified=chosen is not None,
        max_risk=max_risk,
        confidence=confidence,
        loss=loss,
        kl_clip=kl_clip,
        documents=len(documents),
        tokens=sum(len(document.ids) - prompt_tokens + 1 for document in documents),
        prompt_tokens=prompt_tokens,
        explored_documents=len(explored),
        least_documents=need,
        risk=chosen.risk if chosen else None,
        p_value=chosen.p_value if chosen else None,
        exit_depth=chosen.exit_depth if chosen else None,
        curve=tuple(curve),
        nearest_miss=curve[-1] if curve and not curve[-1].certified else None,
        layers=subject.layers,
        model=subject.name,
        model_sha256=subject.fingerprint(),
        texts_sha256=hashlib.sha256(b"\0".join(document.ids.tobytes() for document in documents)).hexdigest(),
        version=__version__,
    )


def _check(taus: Sequence[float], loss: str, kl_clip: float) -> list[float]:
    """The thresholds, the safest first."""
    if loss not in LOSSES:
        raise ConfigError("loss", f"{loss!r} is none of {', '.join(LOSSES)}")
    if not kl_clip > 0:
        raise ConfigError("kl_clip", f"must be above 0, not {kl_clip}")
    if not taus or not all(-1 <= tau <= 1 for tau in taus):
        raise ConfigError("tau", f"name thresholds in [-1, 1], not {', '.join(map(str, taus)) or 'none'}")
    return sorted(set(taus), reverse=True)


def _subject(model: Any, threads: int | None) -> Calibratable:
    if isinstance(model, (str, Path)):
        path = Path(model)
        if path.is_file() or path.suffix == ".onnx":
            return OnnxCalibratable(path, threads)
        return TorchCalibratable.load(path)
    if hasattr(model, "read"):
        return model  # type: ignore[no-any-return]
    return TorchCalibratable(model)


def _split(documents: list[TokenizedDocument]) -> tuple[list[TokenizedDocument], list[TokenizedDocument]]:
    """A quarter of the documents to explore, drawn at random but always alike, and the others to test."""
    drawn = np.random.default_rng(0).permutation(len(documents))
    count = max(1, round(_EXPLORED_SHARE * len(documents)))
    chosen = set(drawn[:count].tolist())
    return (
        [document for index, document in enumerate(documents) if index in chosen],
        [document for index, document in enumerate(documents) if index not in chosen],
    )


class _Reader:
    """Losses and exit depths of documents at thresholds, each read once."""

    def __init__(
        self,
        subject: Calibratable,
        loss: str,
        kl_clip: float,
        prompt_tokens: int,
        kept: Readings,
        progress: Progress | None,
    ) -> None:
        self.layers, self.min_depth = subject.layers, subject.min_depth
        self._subject, self._loss, self._clip, self._kept = subject, loss, kl_clip, kept
        self._prompt = prompt_tokens
        self._progress = progress or (lambda step, done, total: None)

    def read(self, documents: Sequence[TokenizedDocument], at: Thresholds, step: str) -> tuple[np.ndarray, float]:
        """The loss of each document, float [documents], and the mean exit depth over all decoded tokens."""
        losses, depths = [], []
        for number, document in enumerate(documents):
            self._progress(step, number, len(documents))
            reading = self._kept.load(document.ids, at)
            if reading is None:
                counted = slice(self._prompt - 1, None)
                backbone, _ = self._subject.read(document.ids, None, self._prompt)
                logits, exits = self._subject.read(document.ids, at, self._prompt)
                measured = compare(backbone[counted], logits[counted], document.ids[counted])
                reading = {"top1": measured.top1, "kl": measured.kl, "depth": exits[self._prompt :]}
                self._kept.save(document.ids, at, reading)
            losses.append(self._loss_of(reading))
            depths.append(reading["depth"])
        self._progress(step, len(documents), len(documents))
        return np.array(losses), float(np.concatenate(depths).mean())

    def _loss_of(self, reading: dict[str, np.ndarray]) -> float:
        if self._loss == "disagreement":
            return float(1 - reading["top1"].mean())
        return float(np.minimum(reading["kl"], self._clip).mean() / self._clip)


def _test(
    reader: _Reader, documents: Sequence[TokenizedDocument], at: Thresholds, max_risk: float, confidence: float
) -> Tested:
    losses, depth = reader.read(documents, at, f"tau {at.tau:g}")
    p_value = hoeffding_bentkus(losses.mean(), len(losses), max_risk)
    return Tested(
        at.tau, float(losses.mean()), float(p_value), depth, bool(fixed_sequence(p_value[None], confidence) == 1)
    )


def _explore(
    reader: _Reader, documents: Sequence[TokenizedDocument], taus: Sequence[float], max_risk: float
) -> Thresholds:
    """The offsets under which a threshold within the risk, by mean loss alone, exits earliest."""
    best, earliest = Thresholds(NEVER), float(reader.layers) + 1
    for closed, tilt in product(_CLOSED_PARTS, _TILTS):
        candidate = Thresholds(NEVER, _offsets(reader.layers, closed, tilt))
        for tau in taus:
            at = replace(candidate, tau=tau)
            losses, depth = reader.read(documents, at, f"explore {closed:g}/{tilt:g}, tau {tau:g}")
            if losses.mean() > max_risk:
                break
            if depth < earliest:
                best, earliest = candidate, depth
    return best


def _offsets(layers: int, closed: float, tilt: float) -> tuple[float, ...]:
    first = round(closed * layers)
    return tuple(
        _NO_EXIT if index < first else round(tilt * (1 - index / max(layers - 1, 1)), 6) for index in range(layers)
    )
