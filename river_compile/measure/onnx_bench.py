"""Side by side in ONNX Runtime: a plain model and its river at several exits, by batch size and context."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from river_compile.config import NEVER, RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.machine import cpu_name
from river_compile.measure.bench_rows import (
    EXITS_OFF,
    BenchRow,
    ExactTokens,
    RatedRows,
    interleave,
    memory_bandwidth,
    river_rows,
)
from river_compile.measure.fidelity import TextTokenizer
from river_compile.measure.onnx_models import Models, context_limit, open_models
from river_compile.measure.onnx_profile import Operators, profile_operators
from river_compile.measure.onnx_ways import ExactWay, Prompt, Way, some_prompts
from river_compile.measure.onnx_weights import ReadWeights
from river_compile.runtime import OnnxDecoder

__all__ = ["BenchPoint", "OnnxBench", "bench_onnx"]

Progress = Callable[[str, int, int], None]

PLAIN = "plain"
ALL_RIVER = "all river"


@dataclass
class BenchPoint(RatedRows):
    """The rows of a batch size and a context, measured in the same rounds.

    Fields:
        batch, context: sequences, and tokens of each in the cache before the first decode pass.
        bandwidth, reference: see `RatedRows`.
        exact: what exact decoding made, if that was asked for.
    """

    batch: int
    context: int
    bandwidth: float
    reference: str
    rows: list[BenchRow] = field(default_factory=list)
    exact: ExactTokens | None = None


@dataclass
class OnnxBench:
    """What was measured of an ONNX model.

    Fields:
        model: the file; ``plain`` is where the plain model is from, empty if there is none.
        river: the settings that the river was made with, as far as it tells.
        device, threads: threads within an operator; None: ONNX Runtime's own choice.
        prompts: what stands in the cache, in words.
        new_tokens, rounds: decode passes in a round, and rounds.
        bandwidth: bytes a second read from memory, measured in the same process; NaN if that is not known.
        points: by batch size at the first context, then by context at the first batch size.
        notes: what could not be measured, and why.
        operators: where passes of the first point spend their time, if that was asked for: of the plain model, with
            exits off, and all river.
    """

    model: str
    plain: str
    river: dict[str, Any]
    layers: int
    device: str
    threads: int | None
    prompts: str
    new_tokens: int
    rounds: int
    bandwidth: float
    points: list[BenchPoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    operators: list[Operators] = field(default_factory=list)

    def sweep(self, over: str) -> list[BenchPoint]:
        """The points that differ in "batch" or in "context" only, in ascending order."""
        other = "context" if over == "batch" else "batch"
        fixed, _ = Counter(getattr(point, other) for point in self.points).most_common(1)[0]
        return sorted((p for p in self.points if getattr(p, other) == fixed), key=lambda p: int(getattr(p, over)))

    def to_json(self) -> str:
        """Everything, rounds included, and the derived figures, as one JSON object; what is not known is null."""
        document = asdict(self)
        for shown, point in zip(document["points"], self.points, strict=True):
            for cells, row in zip(shown["rows"], point.rows, strict=True):
                cells.update(point.described(row))
            shown["bandwidth"] = _known(point.bandwidth)
        document["bandwidth"] = _known(self.bandwidth)
        return json.dumps(document, indent=2, allow_nan=False)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def bench_onnx(
    model: str | Path,
    *,
    plain: str | Path | None = None,
    taus: Sequence[float] = (),
    depths: Sequence[int] = (1, 4),
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (128,),
    rounds: int = 5,
    new_tokens: int = 32,
    exact: bool = False,
    int4: bool = False,
    operators: bool = False,
    tokenizer: TextTokenizer | None = None,
    config: RiverConfig | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = lambda step, done, total: None,
) -> OnnxBench:
    """Time decode passes of an ONNX decoder, all ways interleaved, with greedy choice.

    Every batch size is measured at the first context, and every context at the first batch size. All ways go on from
    one cache, which the backbone has written.

    Args:
        model: a decoder with a river; or a plain one, whose river is made in a temporary folder.
        plain: the model that a river model was made for; None: the river is taken out of it, in a temporary folder.
        taus: thresholds to run the river at, its own if there are none; ``depths`` are exit depths to force.
        rounds: interleaved rounds after one of warm-up; ``new_tokens`` are decode passes in a round.
        exact: decode exactly as well: seconds for each token, and whether the tokens are those of the backbone alone.
        operators: profile the first point's passes, see `OnnxBench`.
        int4: run the plain model with 4-bit weights too, as ONNX Runtime's own quantizer makes them.
        tokenizer: the model's; prompts are then held-out texts, a different one for each sequence, and random tokens
            without.
        config: of the river that a plain model gets.
        device, threads: see `OnnxDecoder`.

    Raises:
        InputError: there is no decoder that gets a river, or nothing of what was asked for can be run.
        ConfigError: a number has a value that it cannot have.
        MissingExtra: onnxruntime is not installed.
    """
    for name, values in (("batch", batches), ("context", contexts)):
        if not values or min(values) < 1:
            raise ConfigError(name, "must be numbers of 1 or more")
    with tempfile.TemporaryDirectory(prefix="river-bench-", ignore_cleanup_errors=True) as folder:
        models = open_models(
            Path(model),
            Path(folder),
            plain=None if plain is None else Path(plain),
            config=config,
            int4=int4,
            device=device,
            threads=threads,
            progress=progress,
        )
        river = models.river
        result = OnnxBench(
            model=str(model),
            plain=models.origin,
            river=dict(river.exported_config),
            layers=river.layers or 0,
            device=cpu_name() if device == "cpu" else device,
            threads=threads,
            prompts="random tokens" if tokenizer is None else "held-out texts",
            new_tokens=new_tokens,
            rounds=rounds,
            bandwidth=memory_bandwidth(device),
            notes=models.notes,
        )
        taus = taus or _own_tau(river)
        limit = context_limit(Path(model))
        bencher = _Bencher(models, result, taus, depths, exact, operators, limit, tokenizer, progress)
        places = dict.fromkeys([*((size, contexts[0]) for size in batches), *((batches[0], size) for size in contexts)])
        for batch, context in places:
            bencher.measure(batch, context)
    if not result.points:
        raise InputError(f"{model}: nothing of it could be measured: {'; '.join(result.notes)}")
    return result


def _own_tau(river: OnnxDecoder) -> tuple[float, ...]:
    own = river.exported_config.get("tau", NEVER)
    return (own,) if own <= 1 else ()


@dataclass
class _Bencher:
    """Measures one point after the other, and adds it, or why it cannot be measured, to the result."""

    models: Models
    result: OnnxBench
    taus: Sequence[float]
    depths: Sequence[int]
    exact: bool
    operators: bool
    limit: int | None
    tokenizer: TextTokenizer | None
    progress: Progress
    weights: dict[Path, ReadWeights] = field(default_factory=dict)

    def measure(self, batch: int, context: int) -> None:
        place = f"batch {batch}, context {context}"
        prompt = self._read(batch, context, place)
        if prompt is None:
            return
        river, new_tokens = self.models.river, self.result.new_tokens
        ways = self._ways()
        exactly = self._exactly(prompt, place) if self.exact else None
        runs: list[Callable[[bool], None]] = [partial(way.run, prompt, new_tokens) for way in ways]
        interleave(
            runs if exactly is None else [*runs, exactly.run],
            self.result.rounds,
            lambda step, done, total: self.progress(f"{step} {place}", done, total),
        )
        for way in ways:
            way.weigh(prompt.cache_bytes(river))
        point = BenchPoint(batch, context, self.result.bandwidth, ways[0].row.name, [way.row for way in ways])
        if exactly is not None:
            point.rows.append(exactly.row)
            backbone = next(way for way in ways if way.row.tau == NEVER and way.row.max_depth is None)
            point.exact = exactly.tokens(backbone.written)
        if self.operators and not self.result.points:
            self.progress("profile", 0, 1)
            profiled = [way for way in ways if way.row.name in (PLAIN, EXITS_OFF, ALL_RIVER)]
            self.result.operators = [profile_operators(way, prompt, new_tokens) for way in profiled]
            self.progress("profile", 1, 1)
        self.result.points.append(point)

    def _read(self, batch: int, context: int, place: str) -> Prompt | None:
        """The prompts in the cache; None, and a note, where the model does not take them."""
        decoder = self.models.plain or self.models.river
        if self.limit is not None and context > self.limit:
            self.result.notes.append(f"{place}: skipped: the model was made for {self.limit} tokens")
            return None
        ids = some_prompts(decoder.vocabulary, batch, context, self.tokenizer)
        self.progress(f"read {place}", 0, 1)
        try:
            decoder.check_request(batch, context + self.result.new_tokens)
            return Prompt.read(decoder, ids, self.result.new_tokens)
        except Exception as error:
            # Whatever ONNX Runtime raises where positions end, or memory.
            self.result.notes.append(f"{place}: skipped: {' '.join(str(error).split())[:200]}")
            return None
        finally:
            self.progress(f"read {place}", 1, 1)

    def _ways(self) -> list[Way]:
        """The rows to measure; the first is the one that ratios are to."""
        models, layers = self.models, self.result.layers
        plain = [(PLAIN, models.plain), (f"{PLAIN}, int4", models.int4)]
        rows = [*river_rows(layers, self.taus, self.depths), BenchRow(ALL_RIVER, tau=NEVER, max_depth=0)]
        decoders = [(BenchRow(name), decoder) for name, decoder in plain if decoder is not None]
        decoders += [(row, models.river) for row in rows]
        return [Way(row, decoder, self._weights(decoder)) for row, decoder in decoders]

    def _weights(self, decoder: OnnxDecoder) -> ReadWeights:
        """Read once: a file may hold its weights itself."""
        if decoder.path not in self.weights:
            self.weights[decoder.path] = ReadWeights.of(decoder.path)
        return self.weights[decoder.path]

    def _exactly(self, prompt: Prompt, place: str) -> ExactWay | None:
        river = self.models.river
        if not river.verifies or (len(prompt.ids) > 1 and not river.ragged):
            why = "sequences of one length only" if river.verifies else "no logits but the last token's"
            self.result.notes.append(f"{place}: not decoded exactly: the model takes {why}")
            return None
        return ExactWay(river, prompt, self.result.new_tokens)
