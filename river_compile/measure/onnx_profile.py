"""Where a decode pass spends its time, by operator, as ONNX Runtime's own profiler tells."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from river_compile.measure.bench_rows import BenchRow
from river_compile.measure.onnx_ways import Prompt, Way

__all__ = ["Operators", "profile_operators"]

_INSIDE = "_kernel_time"
# Their time is that of the operators within.
_OUTER = ("If", "Loop", "Scan")


@dataclass(frozen=True)
class Operators:
    """A decode pass by operator. The profiler's own work makes a pass of many operators slower than it is without.

    Fields:
        name: the row of the benchmark.
        seconds: of a pass.
        calls, spent: by operator, the costliest first, how often a pass runs it, and seconds; what is left of a pass is
            spent between operators.
    """

    name: str
    seconds: float
    calls: dict[str, float]
    spent: dict[str, float]

    @property
    def between(self) -> float:
        """Seconds of a pass that no operator takes."""
        return max(0.0, self.seconds - sum(self.spent.values()))


def profile_operators(way: Way, prompt: Prompt, new_tokens: int) -> Operators:
    """Profile a way's decode passes, in a session of its own; the first half warms up."""
    import onnxruntime

    decoder = copy.copy(way.decoder)
    with tempfile.TemporaryDirectory(prefix="river-profile-") as folder:
        options = decoder.session.get_session_options()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "passes")
        decoder.session = onnxruntime.InferenceSession(
            str(decoder.path), options, providers=decoder.session.get_providers()
        )
        # The options are the decoder's own, not a copy.
        options.enable_profiling = False
        profiled = dataclasses.replace(way, decoder=decoder, row=BenchRow(way.row.name, way.row.tau, way.row.max_depth))
        for _ in range(2):
            profiled.run(prompt, new_tokens, keep=False)
        events = json.loads(Path(decoder.session.end_profiling()).read_text())
    return _by_operator(way.row.name, events, new_tokens)


def _by_operator(name: str, events: Sequence[Mapping[str, Any]], passes: int) -> Operators:
    """Means over the last passes of a session's events, whose times are in microseconds."""
    runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])[-passes:]
    calls, spent = Counter[str](), Counter[str]()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_INSIDE) and event["ts"] >= runs[0]["ts"]:
            operator = event["args"]["op_name"]
            if operator not in _OUTER:
                calls[operator] += 1
                spent[operator] += event["dur"]
    order = [operator for operator, _ in spent.most_common()]
    return Operators(
        name,
        sum(run["dur"] for run in runs) / len(runs) / 1e6,
        {operator: calls[operator] / len(runs) for operator in order},
        {operator: spent[operator] / len(runs) / 1e6 for operator in order},
    )
