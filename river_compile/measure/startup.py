"""Start-up: what a process pays before a compiled model's first tokens, with an empty and with a filled disk cache."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from river_compile.errors import InputError

__all__ = ["TOKENS", "Startup", "measure_startup"]

TOKENS = (1, 9)
"""Up to which tokens time is taken: the prompt's, and one after the graphs of decode passes are all compiled."""


@dataclass(frozen=True)
class Startup:
    """What a new process spent from a loaded model to the first and the ninth token, one number each.

    Fields:
        way: "inductor" or "river".
        cache: "cold", or "warm" after a process that filled the cache.
        cpu_seconds: of the process and the compilers it waited for, user and system.
        wall_seconds: by the clock.
        cpu_ratio, wall_ratio: to plain Inductor with the same cache.
    """

    way: str
    cache: str
    cpu_seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]
    cpu_ratio: tuple[float, ...] = field(default=())
    wall_ratio: tuple[float, ...] = field(default=())


def measure_startup(
    folder: str | Path,
    *,
    dtype: str,
    device: str,
    options: Mapping[str, Any],
    warm_rounds: int = 3,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> list[Startup]:
    """Start new processes for plain Inductor and for the river, in turn, each way with a cache folder of its own.

    Args:
        folder: a Hugging Face model.
        dtype: as torch names it.
        options: of ``torch.compile(model, backend="river", options=...)``.
        warm_rounds: processes with a filled cache, for each way; their median is what counts.

    Raises:
        InputError: a process failed, or the model got no river.
    """
    found: dict[tuple[str, str], list[_Spent]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="river-startup-", ignore_cleanup_errors=True) as inductor,
        tempfile.TemporaryDirectory(prefix="river-startup-", ignore_cleanup_errors=True) as river,
    ):
        for round_ in range(1 + warm_rounds):
            for place, (way, cache) in enumerate((("inductor", inductor), ("river", river))):
                progress("start-up", 2 * round_ + place, 2 * (1 + warm_rounds))
                request = {
                    "folder": str(folder),
                    "dtype": dtype,
                    "device": device,
                    "options": dict(options) if way == "river" else None,
                }
                found.setdefault((way, "warm" if round_ else "cold"), []).append(_run(request, cache))
    progress("start-up", 1, 1)
    return [_startup(way, cache, found) for cache in ("cold", "warm") for way in ("inductor", "river")]


_Spent = tuple[list[float], list[float]]
"""CPU and wall seconds, by `TOKENS`."""


def _startup(way: str, cache: str, found: Mapping[tuple[str, str], list[_Spent]]) -> Startup:
    (cpu, wall), (base_cpu, base_wall) = (_median(found[name, cache]) for name in (way, "inductor"))
    ratios = (
        tuple(own / base for own, base in zip(mine, bases, strict=True))
        for mine, bases in ((cpu, base_cpu), (wall, base_wall))
    )
    return Startup(way, cache, cpu, wall, *ratios)


def _median(spent: list[_Spent]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    cpu, wall = (
        tuple(statistics.median(one[kind][place] for one in spent) for place in range(len(TOKENS))) for kind in (0, 1)
    )
    return cpu, wall


def _run(request: Mapping[str, Any], cache: str) -> _Spent:
    found = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(request)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = found.stdout.splitlines()
    if found.returncode or not lines:
        why = (found.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{request['folder']}: start-up could not be measured: {why}")
    cpu, wall = json.loads(lines[-1])
    return cpu, wall


def _cpu_seconds() -> float:
    own, compilers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + compilers.ru_utime + compilers.ru_stime


def _main(request: Mapping[str, Any]) -> None:
    """What the new process does: load, compile, decode; its last line is the seconds."""
    import torch

    from river_compile.measure.greedy import decode, load_with_prompt

    options = request["options"]
    model, tokens = load_with_prompt(request["folder"], getattr(torch, request["dtype"]), request["device"])
    seconds: list[tuple[float, float]] = []
    start = _cpu_seconds(), time.perf_counter()
    how: dict[str, Any] = {"backend": "inductor"} if options is None else {"backend": "river", "options": options}
    compiled: Any = torch.compile(model, **how)
    decode(model, compiled, tokens, max(TOKENS) - 1, lambda: seconds.append((_cpu_seconds(), time.perf_counter())))
    if options is not None:
        import river_compile

        stats = river_compile.stats(compiled)
        if stats.fallbacks or not stats.river_layers:
            raise SystemExit(f"no river: {'; '.join(stats.fallbacks) or 'no layer has a twin'}")
    print(json.dumps([[seconds[token - 1][kind] - start[kind] for token in TOKENS] for kind in (0, 1)]))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _main(json.loads(sys.argv[1]))
