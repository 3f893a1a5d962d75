"""`evaluate`: how close a river is to its backbone on text, how early it exits, and how fast it is."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError
from river_compile.measure.exact_row import ExactResult, measure_exact
from river_compile.measure.fidelity import (
    Document,
    Interval,
    TextTokenizer,
    TokenFidelity,
    TokenizedDocument,
    bootstrap,
    chosen_texts,
    compare,
    pearson,
    spread,
    tokenize,
    vector_cosines,
)
from river_compile.measure.readings import Readings
from river_compile.measure.subject_of import subject_of
from river_compile.measure.subjects import BACKBONE, OnnxSubject, Reading, Setting, Subject

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ALL_RIVER", "DEFAULT_TAUS", "Evaluation", "SettingResult", "Speed", "TokenTrace", "evaluate"]

ALL_RIVER = Setting(max_depth=0)
DEFAULT_TAUS = (0.98, 0.95, 0.9)

_FORMAT = "1"
_SPEED_TOKENS = 48
_WARM_UP = 4

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TokenTrace:
    """What is kept of one reading, token by token.

    Fields:
        fidelity: against the backbone.
        depths: exit depth, int64 [tokens].
        key_cosine, value_cosine: of the KV cache against the backbone's, float32 [layers, tokens].
    """

    fidelity: TokenFidelity
    depths: np.ndarray
    key_cosine: np.ndarray
    value_cosine: np.ndarray


@dataclass(frozen=True)
class Speed:
    """Decode speed at batch 1, beside the backbone's in the same run.

    Fields:
        tokens_per_second: by the median pass.
        ratio: to the backbone, median over rounds; ``low`` and ``high`` are the slowest and the fastest round.
    """

    tokens_per_second: float
    ratio: Interval


@dataclass(frozen=True)
class SettingResult:
    """A setting's row: estimates with their intervals, over all documents.

    Fields:
        top1: share of tokens where the river's choice is the backbone's.
        top5: share of the backbone's five likeliest tokens among the river's five.
        kl: KL(backbone || river) a token, in nats.
        perplexity: of the texts under the river.
        top1_by_kind: ``top1`` for each kind of text.
        key_cosine, value_cosine: mean over all layers.
        key_cosine_by_layer, value_cosine_by_layer: mean over tokens.
        exit_histogram: tokens by exit depth, from 0 to the number of layers.
        speed: None where it was not measured.
    """

    label: str
    tau: float
    max_depth: int | None
    top1: Interval
    top5: Interval
    kl: Interval
    perplexity: Interval
    top1_by_kind: dict[str, Interval]
    key_cosine: Interval
    value_cosine: Interval
    key_cosine_by_layer: list[float]
    value_cosine_by_layer: list[float]
    exit_histogram: list[int]
    speed: Speed | None = None

    @property
    def mean_exit_depth(self) -> float:
        return float(np.average(np.arange(len(self.exit_histogram)), weights=self.exit_histogram))


@dataclass(frozen=True)
class Evaluation:
    """The whole of `evaluate`.

    Fields:
        model, details: the model's name and how it was made (quantizer, grid, settings).
        texts: name of each document; ``tokens`` counts their tokens.
        confidence: of every interval; they are percentile bootstraps over documents.
        perplexity_backbone: of the texts under the backbone.
        settings: a row for each setting.
        similarity_correlation: by layer, Pearson's r over tokens between the backbone's state transition similarity at
            that layer and the cosine of V in the last layer, all river (paper: 0.55 at an early layer). NaN if unknown.
        early_correlation: the same for the mean similarity over the first quarter of the layers, without the first.
        mean_similarity: by layer, the backbone's mean state transition similarity.
        exact: exact decoding, of exported models only, and where decoding is timed.
        example: a document as text pieces, one a token, and for each setting its tokens' exit depths and agreement.
    """

    model: str
    details: dict[str, str]
    layers: int
    texts: list[str]
    tokens: int
    confidence: float
    perplexity_backbone: Interval
    settings: list[SettingResult]
    similarity_correlation: list[float]
    early_correlation: float
    mean_similarity: list[float]
    example: dict[str, object] = field(default_factory=dict)
    exact: ExactResult | None = None

    def to_json(self) -> str:
        """The evaluation as one JSON object; what is not known is null."""
        return json.dumps(_plain(asdict(self)), indent=2, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def evaluate(
    model: str | Path | nn.Module | Subject,
    texts: Sequence[str | Path] | Sequence[Document] | None,
    tokenizer: TextTokenizer,
    *,
    taus: Sequence[float] = DEFAULT_TAUS,
    depths: Sequence[int] = (0,),
    max_tokens: int = 512,
    max_documents: int | None = None,
    confidence: float = 0.95,
    speed_rounds: int = 3,
    cache: Path | None = None,
    threads: int | None = None,
    config: RiverConfig | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a river model against its own backbone, teacher-forced.

    Settings with a threshold are read token by token, since each token decides for itself; forced depths in one pass a
    document, save by a compiled river, which decodes. Every reading is cached by model, text and setting, so that an
    interrupted run goes on where it stopped.

    Args:
        model: an exported river model; a Hugging Face decoder (a folder or a module), compiled with a river by
            ``torch.compile``; or any `Subject`.
        texts: files (text, or JSONL of prompts) or documents; None: the held-out texts that come with the package.
        taus: thresholds to measure.
        depths: forced exit depths to measure; 0 is all river.
        max_tokens: longer documents are cut into pieces of so many tokens.
        max_documents: only so many, evenly spread over ``texts``.
        speed_rounds: interleaved rounds of timed decoding of up to 48 tokens; 0: no timing.
        cache: a folder for the readings; None: nothing is kept.
        threads: of ONNX Runtime, if ``model`` is a file; its own choice if None.
        config: of the river of a Hugging Face decoder; its ``tau`` and ``max_depth`` give way to those measured. A
            folder's river is tuned on the package's tuning texts where the quantizer needs it; a module is tuned by
            `river_compile.tune` before.
        dtype: that a folder's model is read in, "bfloat16" (if None), "float16" or "float32".

    Raises:
        InputError: model, texts or tokenizer cannot be used, or do not belong together.
        ConfigError: a setting has a value it cannot have.
    """
    progress = progress or (lambda step, done, total: None)
    settings = _settings(taus, depths)
    subject = subject_of(model, threads, config, dtype, max_tokens, tokenizer, progress)
    if any(depth > subject.layers for depth in depths):
        raise ConfigError("depths", f"{max(depths)} is more than the model's {subject.layers} layers")
    pieces = tokenize(chosen_texts(texts, "heldout"), tokenizer, subject.vocabulary, max_tokens)
    pieces = spread(pieces, max_documents)
    traces, similarities = _read_all(subject, pieces, settings, _Store(cache, subject), progress)
    speeds = _speeds(subject, pieces, settings, speed_rounds, progress)
    rows = [
        _row(setting, traces[setting], pieces, subject.layers, confidence, speeds.get(setting)) for setting in settings
    ]
    by_layer, early = _correlations(similarities, traces.get(ALL_RIVER))
    first = traces[settings[0]]
    exact = None
    if isinstance(subject, OnnxSubject) and speed_rounds > 0:
        exact = measure_exact(subject.decoder, [piece.ids for piece in pieces], progress)
    return Evaluation(
        model=subject.name,
        details=subject.details,
        layers=subject.layers,
        texts=[piece.id for piece in pieces],
        tokens=sum(len(piece.ids) for piece in pieces),
        confidence=confidence,
        perplexity_backbone=bootstrap([t.fidelity.nll_backbone for t in first], np.exp, confidence=confidence),
        settings=rows,
        similarity_correlation=by_layer,
        early_correlation=early,
        mean_similarity=[float(row.mean()) for row in np.concatenate(similarities, axis=1)] if similarities else [],
        example=_example(pieces[0], tokenizer, {setting.label: traces[setting][0] for setting in settings}),
        exact=exact,
    )


def _settings(taus: Sequence[float], depths: Sequence[int]) -> list[Setting]:
    for tau in taus:
        if not -1 <= tau <= 1:
            raise ConfigError("tau", f"must lie in [-1, 1], not {tau}")
    if any(depth < 0 for depth in depths):
        raise ConfigError("depths", "must be 0 or more")
    settings = [Setting(tau=tau) for tau in dict.fromkeys(taus)]
    settings += [Setting(max_depth=depth) for depth in dict.fromkeys(depths)]
    if not settings:
        raise ConfigError("taus", "name at least one threshold or depth")
    return settings


def _read_all(
    subject: Subject, pieces: list[TokenizedDocument], settings: list[Setting], store: _Store, progress: Progress
) -> tuple[dict[Setting, list[TokenTrace]], list[np.ndarray]]:
    """Each document by each setting; the backbone once a document, and only where a reading is missing."""
    traces: dict[Setting, list[TokenTrace]] = {setting: [] for setting in settings}
    similarities: list[np.ndarray] = []
    cost = [len(piece.ids) if setting.token_level else 1 for piece in pieces for setting in settings]
    done, total = 0, sum(cost)
    for piece in pieces:
        backbone: Reading | None = None
        seen = store.load_similarities(piece)
        if seen is None:
            backbone = subject.read(piece.ids, BACKBONE, stepwise=False)
            seen = backbone.similarities if backbone.similarities is not None else np.empty((0, len(piece.ids)))
            store.save_similarities(piece, seen)
        if seen.size:
            similarities.append(seen)
        for setting in settings:
            progress("read texts", done, total)
            trace = store.load(piece, setting)
            if trace is None:
                backbone = backbone or subject.read(piece.ids, BACKBONE, stepwise=False)
                trace = _trace(backbone, subject.read(piece.ids, setting, stepwise=setting.token_level), piece.ids)
                store.save(piece, setting, trace)
            traces[setting].append(trace)
            done += len(piece.ids) if setting.token_level else 1
    progress("read texts", total, total)
    return traces, similarities


def _trace(backbone: Reading, river: Reading, ids: np.ndarray) -> TokenTrace:
    pairs = [(backbone.keys, river.keys), (backbone.values, river.values)]
    cosines = [
        np.stack([vector_cosines(a, b) for a, b in zip(*pair, strict=True)]).astype(np.float32) for pair in pairs
    ]
    return TokenTrace(compare(backbone.logits, river.logits, ids), river.depths, *cosines)


class _Store:
    """What was compared once, by document and setting."""

    def __init__(self, folder: Path | None, subject: Subject) -> None:
        self._kept = Readings(folder, f"evaluation {_FORMAT} {subject.fingerprint()}" if folder is not None else "")

    def load(self, piece: TokenizedDocument, setting: Setting) -> TokenTrace | None:
        found = self._kept.load(piece.ids, setting)
        if found is None:
            return None
        measures = TokenFidelity(*(found[name] for name in ("top1", "top5", "kl", "nll_backbone", "nll")))
        return TokenTrace(measures, found["depths"], found["key_cosine"], found["value_cosine"])

    def save(self, piece: TokenizedDocument, setting: Setting, trace: TokenTrace) -> None:
        arrays = vars(trace.fidelity) | {
            name: getattr(trace, name) for name in ("depths", "key_cosine", "value_cosine")
        }
        self._kept.save(piece.ids, setting, arrays)

    def load_similarities(self, piece: TokenizedDocument) -> np.ndarray | None:
        found = self._kept.load(piece.ids, "similarities")
        return None if found is None else found["similarities"]

    def save_similarities(self, piece: TokenizedDocument, values: np.ndarray) -> None:
        self._kept.save(piece.ids, "similarities", {"similarities": values})


def _speeds(
    subject: Subject, pieces: list[TokenizedDocument], settings: list[Setting], rounds: int, progress: Progress
) -> dict[Setting, Speed]:
    """Decode the start of the longest document by every setting and the backbone, interleaved round by round."""
    if rounds < 1:
        return {}
    ids = max(pieces, key=lambda piece: len(piece.ids)).ids[: _SPEED_TOKENS + _WARM_UP]
    rates: dict[Setting, list[float]] = {setting: [] for setting in (BACKBONE, *settings)}
    # The first round warms up and is not counted.
    for number in range(rounds + 1):
        for index, setting in enumerate(rates):
            progress("time decoding", number * len(rates) + index, (rounds + 1) * len(rates))
            passes = subject.read(ids, setting, stepwise=True).seconds
            if number:
                rates[setting].append(1 / statistics.median(passes[_WARM_UP:] or passes))
    progress("time decoding", 1, 1)
    speeds = {}
    for setting, own in rates.items():
        ratios = [rate / base for rate, base in zip(own, rates[BACKBONE], strict=True)]
        speeds[setting] = Speed(statistics.median(own), Interval(statistics.median(ratios), min(ratios), max(ratios)))
    return speeds


def _row(
    setting: Setting,
    traces: list[TokenTrace],
    pieces: list[TokenizedDocument],
    layers: int,
    confidence: float,
    speed: Speed | None,
) -> SettingResult:
    def interval(
        values: Iterable[np.ndarray], transform: Callable[[np.ndarray], np.ndarray] = lambda mean: mean
    ) -> Interval:
        return bootstrap(list(values), transform, confidence=confidence)

    kinds = sorted({piece.kind for piece in pieces})
    by_kind = {k: [t for t, piece in zip(traces, pieces, strict=True) if piece.kind == k] for k in kinds}
    depths = np.concatenate([trace.depths for trace in traces])
    return SettingResult(
        label=setting.label,
        tau=setting.tau,
        max_depth=setting.max_depth,
        top1=interval(trace.fidelity.top1 for trace in traces),
        top5=interval(trace.fidelity.top5 for trace in traces),
        kl=interval(trace.fidelity.kl for trace in traces),
        perplexity=interval((trace.fidelity.nll for trace in traces), np.exp),
        top1_by_kind={kind: interval(t.fidelity.top1 for t in some) for kind, some in by_kind.items()},
        key_cosine=interval(trace.key_cosine.mean(axis=0) for trace in traces),
        value_cosine=interval(trace.value_cosine.mean(axis=0) for trace in traces),
        key_cosine_by_layer=np.concatenate([t.key_cosine for t in traces], axis=1).mean(axis=1).tolist(),
        value_cosine_by_layer=np.concatenate([t.value_cosine for t in traces], axis=1).mean(axis=1).tolist(),
        exit_histogram=np.bincount(depths, minlength=layers + 1).tolist(),
        speed=speed,
    )


def _correlations(similarities: list[np.ndarray], all_river: list[TokenTrace] | None) -> tuple[list[float], float]:
    if not similarities or all_river is None:
        return [], float("nan")
    values = np.concatenate([trace.value_cosine[-1] for trace in all_river])
    by_token = np.concatenate(similarities, axis=1)
    # The first block turns every hidden state alike: it says nothing about a token.
    early = by_token[1 : max(2, round(len(by_token) / 4))].mean(axis=0)
    return [pearson(row, values) for row in by_token], pearson(early, values)


def _example(piece: TokenizedDocument, tokenizer: TextTokenizer, traces: dict[str, TokenTrace]) -> dict[str, object]:
    return {
        "id": piece.id,
        "tokens": [tokenizer.decode([int(token)]) for token in piece.ids],
        "settings": {
            label: {"depths": trace.depths.tolist(), "agrees": trace.fidelity.top1.tolist()}
            for label, trace in traces.items()
        },
    }
