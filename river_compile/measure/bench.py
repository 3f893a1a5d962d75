"""Side by side: a model in eager mode, compiled by Inductor, and compiled with an exit river."""

from __future__ import annotations

import gc
import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from river_compile.backend import RiverBackend
from river_compile.config import NEVER, RiverConfig
from river_compile.errors import InputError
from river_compile.exporters.machine import cpu_name
from river_compile.exporters.torch.timing import Choice
from river_compile.measure.bench_rows import (
    BenchRow,
    ExactTokens,
    RatedRows,
    interleave,
    memory_bandwidth,
    river_rows,
)
from river_compile.measure.exact_bench import ExactBench
from river_compile.measure.greedy import PROMPT, decode, load_with_prompt
from river_compile.measure.startup import Startup, measure_startup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BenchResult", "BenchRow", "bench"]

Progress = Callable[[str, int, int], None]
_REFERENCE = "inductor"


@dataclass
class BenchResult(RatedRows):
    """A table of `BenchRow`, and what the machine and the compilation were.

    Fields:
        model, device, dtype, batch, new_tokens, rounds: what was run.
        bandwidth: bytes a second read from memory, measured in the same process.
        compile_seconds: of the first generation, prompt and both decode graphs, with empty caches, by "inductor" and
            "river"; the river's includes making it.
        backbone_bytes, river_bytes: weights of the model and of the river.
        decode_peak_bytes: most memory of the process while it decodes (on a GPU: of its memory), by "inductor", with no
            river made yet, and "river", with all that Inductor's version holds still there. The difference is what the
            river costs, at most.
        startup: seconds to the first tokens in new processes, if that was asked for.
        exact: what exact decoding made, if that was asked for.
        choices: the products that were timed on this machine, and the form that was taken of each.
    """

    reference = _REFERENCE

    model: str
    device: str
    dtype: str
    batch: int
    new_tokens: int
    rounds: int
    bandwidth: float
    rows: list[BenchRow]
    compile_seconds: dict[str, float]
    backbone_bytes: int
    river_bytes: int
    decode_peak_bytes: dict[str, int]
    startup: list[Startup] = field(default_factory=list)
    exact: ExactTokens | None = None
    choices: tuple[Choice, ...] = ()

    def to_json(self) -> str:
        """Everything, rounds included, and the derived figures, as one JSON object."""
        document = asdict(self)
        for shown, row in zip(document["rows"], self.rows, strict=True):
            shown.update(self.described(row))
        return json.dumps(document, indent=2)


def bench(
    folder: str | Path,
    *,
    taus: Sequence[float] = (),
    depths: Sequence[int] = (1, 4),
    rounds: int = 5,
    new_tokens: int = 32,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    config: RiverConfig | None = None,
    prompt: str = PROMPT,
    startup: bool = False,
    exact: bool = False,
    progress: Progress = lambda step, done, total: None,
) -> BenchResult:
    """Time decode passes of a Hugging Face model, all ways interleaved, with a static cache and greedy choice.

    Args:
        folder: a model with its tokenizer.
        taus: thresholds to run the river at; ``depths`` are exit depths to force.
        rounds: interleaved rounds after one of warm-up.
        config: of the river; its tau and max_depth are overridden.
        startup: measure start-up as well.
        exact: decode exactly as well, by ``generate``: seconds for each token, and whether the tokens are those of the
            backbone alone.

    Raises:
        InputError: it is no decoder that gets a river.
        MissingExtra: transformers is not installed.
    """
    model, tokens = load_with_prompt(folder, dtype, device, prompt, batch)
    backend = RiverBackend(config)
    compiled: dict[str, Callable[..., Any]] = {"eager": model}
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for name, kind in ((_REFERENCE, "inductor"), ("river", backend)):
        progress(f"compile: {name}", 0, 1)
        with _fresh_cache():
            torch.compiler.reset() if name == _REFERENCE else None
            compiled[name] = torch.compile(model, backend=kind)
            started = time.perf_counter()
            for _ in range(2):
                decode(model, compiled[name], tokens, 3)
            seconds[name] = time.perf_counter() - started
        peaks[name] = _peak_bytes(device, partial(decode, model, compiled[name], tokens, 3))
        progress(f"compile: {name}", 1, 1)
    stats = backend.stats()
    if stats.fallbacks or not stats.river_layers:
        raise InputError(f"{folder}: no river: {'; '.join(stats.fallbacks) or 'no layer has a twin'}")
    rows = [BenchRow("eager"), BenchRow(_REFERENCE), *river_rows(stats.layers, taus, depths)]
    rows.append(BenchRow("all quantized", tau=NEVER, max_depth=0))
    exactly = ExactBench(model, backend, tokens, new_tokens) if exact else None
    ways = [partial(_measure, row, model, compiled, backend, tokens, new_tokens) for row in rows]
    interleave(ways if exactly is None else [*ways, exactly.measure], rounds, progress)
    weights = _weigh(model, backend, stats.layers)
    for row in rows:
        depth = stats.layers if math.isnan(row.mean_depth) else row.mean_depth
        row.bytes_per_token = weights(depth)
    if exactly is not None:
        rows.append(BenchRow("exact", seconds=exactly.seconds))
    startups: list[Startup] = []
    if startup:
        options = json.loads(backend.config.to_json())
        startups = measure_startup(
            folder, dtype=str(dtype).removeprefix("torch."), device=device, options=options, progress=progress
        )
    return BenchResult(
        model=str(folder),
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        new_tokens=new_tokens,
        rounds=rounds,
        bandwidth=memory_bandwidth(device),
        rows=rows,
        compile_seconds={name: round(value, 2) for name, value in seconds.items()},
        backbone_bytes=stats.backbone_bytes,
        river_bytes=backend.stats().river_bytes,
        decode_peak_bytes=peaks,
        startup=startups,
        exact=None if exactly is None else exactly.tokens(),
        choices=stats.choices,
    )


def _measure(
    row: BenchRow,
    model: PreTrainedModel,
    compiled: dict[str, Callable[..., Any]],
    backend: RiverBackend,
    tokens: torch.Tensor,
    new_tokens: int,
    keep: bool,
) -> None:
    if row.tau is not None:
        backend.tau, backend.max_depth = row.tau, row.max_depth
    backend.decode_depths.clear()
    times = decode(model, compiled["river" if row.tau is not None else row.name], tokens, new_tokens)
    if keep:
        row.seconds.append(statistics.median(times))
        row.depths += list(backend.decode_depths.elements())


@contextmanager
def _fresh_cache() -> Iterator[None]:
    """An empty folder for Inductor's files, so that compile times are those of a first run."""
    import tempfile
    from unittest import mock

    with (
        tempfile.TemporaryDirectory(prefix="river-bench-", ignore_cleanup_errors=True) as folder,
        mock.patch.dict("os.environ", {"TORCHINDUCTOR_CACHE_DIR": folder}),
    ):
        yield


def _weigh(model: PreTrainedModel, backend: RiverBackend, layers: int) -> Callable[[float], float]:
    """Bytes of weights read for one token as a function of the exit depth."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    stats = backend.stats()
    river, backbone = stats.river_bytes, stats.replaced_bytes
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    # A table of embeddings is read by row; tied to the head it is read whole.
    rest = total - backbone - (0 if head is not None and head.weight is embedding else embedding.nbytes)
    fixed = float(rest)
    return lambda depth: fixed + backbone * depth / layers + river * (layers - depth) / layers


def _peak_bytes(device: str, work: Callable[[], object]) -> int:
    """Most memory in use during some work; on a CPU other than Linux's, up to its end."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device))
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if reset.exists():
        # 5: the peak becomes what is in use now.
        reset.write_text("5")
        work()
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
