"""`compare_policies`: fidelity against time for every KV policy, in one runtime (the paper's central figure)."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from river_compile.config import KV_POLICIES, NEVER
from river_compile.errors import ConfigError
from river_compile.measure.fidelity import (
    Document,
    Interval,
    TextTokenizer,
    TokenizedDocument,
    bootstrap,
    check_lengths,
    compare,
    decoded_documents,
    spread,
)
from river_compile.measure.readings import Readings
from river_compile.reference import ReferenceDecoder

__all__ = ["DEFAULT_TAUS", "Comparison", "PolicyPoint", "PolicySetting", "compare_policies"]

DEFAULT_TAUS = (0.99, 0.98, 0.97, 0.9)

_TIMED_DOCUMENTS, _TIMED_TOKENS = 3, 12

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PolicySetting:
    """A KV policy at a threshold. ``max_depth`` 0 is the fully quantized model, a ``tau`` above 1 the full backbone."""

    policy: str
    tau: float = NEVER
    max_depth: int | None = None

    @property
    def label(self) -> str:
        if self.max_depth == 0:
            return "all river"
        return "backbone" if self.tau > 1 else f"{self.policy} {self.tau:g}"


_BACKBONE = PolicySetting("share")
_ALL_RIVER = PolicySetting("share", max_depth=0)


@dataclass(frozen=True)
class PolicyPoint:
    """What one setting reached.

    Fields:
        policy, tau: None for the two end points.
        top1: share of decoded tokens whose top-1 prediction is the full backbone's.
        kl: KL(backbone || this) a token, in nats.
        exit_depth: mean over decoded tokens.
        milliseconds: a token: each token's median over rounds, then the mean over tokens; None: not timed.
        speedup: over the full backbone, the median over rounds, with the slowest and fastest round.
    """

    label: str
    policy: str | None
    tau: float | None
    top1: Interval
    kl: Interval
    exit_depth: float
    milliseconds: float | None
    speedup: Interval | None


@dataclass(frozen=True)
class Comparison:
    """The figure's data.

    Fields:
        model, runtime: what was measured, and in what.
        documents, tokens: texts read, and tokens decoded in them by each setting.
        prompt_tokens: tokens of each document that every setting reads by the whole backbone, and that do not count.
        rounds, timed_tokens: of the timing.
        notes: what the river could not have, a line each.
    """

    model: str
    runtime: str
    layers: int
    documents: int
    tokens: int
    prompt_tokens: int
    rounds: int
    timed_tokens: int
    confidence: float
    points: list[PolicyPoint]
    notes: list[str]

    def to_json(self) -> str:
        """The comparison as one JSON object."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


def compare_policies(
    decoder: ReferenceDecoder,
    texts: Sequence[str | Path] | Sequence[Document] | None,
    tokenizer: TextTokenizer,
    *,
    policies: Sequence[str] = KV_POLICIES,
    taus: Sequence[float] = DEFAULT_TAUS,
    prompt_tokens: int = 8,
    max_tokens: int = 64,
    max_documents: int | None = 8,
    rounds: int = 5,
    confidence: float = 0.95,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure every KV policy at every threshold, teacher-forced, against the full backbone in the same runtime.

    Each document's first tokens are a prompt, read by the whole backbone; then every token is decoded alone, with its
    own exit decision. Fidelity is cached by model, text and setting, so that an interrupted run goes on; times are
    always taken anew, setting by setting within each round, so that they are of one run.

    Args:
        texts: files or documents; None: the held-out texts that come with the package.
        max_tokens: only the first so many tokens of a document.
        max_documents: only so many, evenly spread over ``texts``; None: all.
        rounds: of timing, after one that does not count; 0: no timing.
        cache: a folder for the readings; None: nothing is kept.

    Raises:
        InputError: texts and model do not belong together, or a text has no token beyond its prompt.
        ConfigError: a policy or a threshold does not exist.
    """
    progress = progress or (lambda step, done, total: None)
    settings = _settings(policies, taus)
    check_lengths(prompt_tokens, max_tokens)
    prompt_tokens, max_tokens = prompt_tokens + tokenizer.lead, max_tokens + tokenizer.lead
    documents = decoded_documents(
        texts,
        "heldout",
        tokenizer,
        decoder.vocabulary,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        count=max_documents,
        skip_short=True,
    )
    kept = Readings(cache, f"policies 1 {decoder.fingerprint()} {prompt_tokens}")
    readings = _read_all(decoder, documents, settings, prompt_tokens, kept, progress)
    timed = spread(documents, _TIMED_DOCUMENTS)
    seconds = _time_all(decoder, timed, settings, prompt_tokens, rounds, progress)
    base = seconds.get(_BACKBONE)
    return Comparison(
        model=decoder.name,
        runtime=decoder.runtime,
        layers=decoder.layers,
        documents=len(documents),
        tokens=sum(len(document.ids) - prompt_tokens for document in documents),
        prompt_tokens=prompt_tokens,
        rounds=rounds,
        timed_tokens=0 if base is None else base.shape[1],
        confidence=confidence,
        points=[_point(setting, readings[setting], seconds.get(setting), base, confidence) for setting in settings],
        notes=list(decoder.notes),
    )


def _settings(policies: Sequence[str], taus: Sequence[float]) -> list[PolicySetting]:
    for policy in policies:
        if policy not in KV_POLICIES:
            raise ConfigError("kv_policy", f"{policy!r} is none of {', '.join(KV_POLICIES)}")
    for tau in taus:
        if not -1 <= tau <= 1:
            raise ConfigError("tau", f"must lie in [-1, 1], not {tau}")
    return [_BACKBONE, _ALL_RIVER, *(PolicySetting(policy, tau) for policy in policies for tau in taus)]


def _decode(
    decoder: ReferenceDecoder, ids: np.ndarray, setting: PolicySetting, prompt_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits after each decoded token, float32 [tokens, vocabulary]; exit depths; seconds of each pass."""
    state = decoder.start(policy=setting.policy, capacity=len(ids))
    decoder.logits(ids[:prompt_tokens].tolist(), state, setting.tau, setting.max_depth)
    logits, depths, seconds = [], [], []
    for token in ids[prompt_tokens:].tolist():
        started = time.perf_counter()
        row, depth = decoder.logits([token], state, setting.tau, setting.max_depth)
        seconds.append(time.perf_counter() - started)
        logits.append(row[0, -1].float().numpy())
        depths.append(depth)
    return np.stack(logits), np.array(depths), np.array(seconds)


def _read_all(
    decoder: ReferenceDecoder,
    documents: Sequence[TokenizedDocument],
    settings: Sequence[PolicySetting],
    prompt_tokens: int,
    kept: Readings,
    progress: Progress,
) -> dict[PolicySetting, list[dict[str, np.ndarray]]]:
    """For each setting and document ``top1``, ``kl`` and ``depth``, [decoded tokens]."""
    found: dict[PolicySetting, list[dict[str, np.ndarray]]] = {setting: [] for setting in settings}
    for number, document in enumerate(documents):
        backbone: np.ndarray | None = None
        for index, setting in enumerate(settings):
            progress("read texts", number * len(settings) + index, len(documents) * len(settings))
            reading = kept.load(document.ids, setting)
            if reading is None:
                if backbone is None:
                    backbone, _, _ = _decode(decoder, document.ids, _BACKBONE, prompt_tokens)
                logits, depths, _ = _decode(decoder, document.ids, setting, prompt_tokens)
                reading = _against(backbone, logits) | {"depth": depths}
                kept.save(document.ids, setting, reading)
            found[setting].append(reading)
    progress("read texts", 1, 1)
    return found


def _against(backbone: np.ndarray, logits: np.ndarray) -> dict[str, np.ndarray]:
    # Only the two sets of predictions are compared, not the text's next token, so any ids of that length will do; a
    # document of one decoded token is compared with itself doubled, for the comparison wants two.
    twice = [np.concatenate([rows, rows]) if len(rows) == 1 else rows for rows in (backbone, logits)]
    measured = compare(twice[0], twice[1], np.zeros(len(twice[0]), np.int64))
    return {"top1": measured.top1[: len(logits)], "kl": measured.kl[: len(logits)]}


def _time_all(
    decoder: ReferenceDecoder,
    documents: Sequence[TokenizedDocument],
    settings: Sequence[PolicySetting],
    prompt_tokens: int,
    rounds: int,
    progress: Progress,
) -> dict[PolicySetting, np.ndarray]:
    """Seconds of each decoded token, [rounds, tokens], for each setting; every round goes through all of them."""
    taken: dict[PolicySetting, list[np.ndarray]] = {setting: [] for setting in settings}
    for number in range(rounds + 1 if rounds else 0):
        for index, setting in enumerate(settings):
            progress("time decoding", number * len(settings) + index, (rounds + 1) * len(settings))
            passes = [
                _decode(decoder, document.ids[: prompt_tokens + _TIMED_TOKENS], setting, prompt_tokens)[2]
                for document in documents
            ]
            # The first round warms up.
            if number:
                taken[setting].append(np.concatenate(passes))
    progress("time decoding", 1, 1)
    return {setting: np.stack(rows) for setting, rows in taken.items() if rows}


def _point(
    setting: PolicySetting,
    readings: Sequence[dict[str, np.ndarray]],
    seconds: np.ndarray | None,
    base: np.ndarray | None,
    confidence: float,
) -> PolicyPoint:
    milliseconds, speedup = None, None
    if seconds is not None and base is not None:
        milliseconds = float(np.median(seconds, axis=0).mean() * 1e3)
        ratios = (base.sum(axis=1) / seconds.sum(axis=1)).tolist()
        speedup = Interval(statistics.median(ratios), min(ratios), max(ratios))
    end_point = setting in (_BACKBONE, _ALL_RIVER)
    return PolicyPoint(
        label=setting.label,
        policy=None if end_point else setting.policy,
        tau=None if end_point else setting.tau,
        top1=bootstrap([reading["top1"] for reading in readings], confidence=confidence),
        kl=bootstrap([reading["kl"] for reading in readings], confidence=confidence),
        exit_depth=float(np.concatenate([reading["depth"] for reading in readings]).mean()),
        milliseconds=milliseconds,
        speedup=speedup,
    )
