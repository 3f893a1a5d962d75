"""What a model compiled with ``backend="river"`` has done, for the user's eyes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from river_compile.exporters.torch.timing import Choice

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    """What was compiled, and where tokens left the backbone.

    Fields:
        layers: decoder layers of the model, 0 before the first call.
        river_layers: those with a river twin.
        decode_depths, prefill_depths: how many forward passes ran how many backbone layers.
        graphs: graphs that Dynamo handed over and that got a river.
        artifacts: pieces compiled for them.
        compile_seconds: time spent in this backend.
        backbone_bytes: the parameters of all graphs seen, each once; replaced_bytes: those among them that the river
            has quantized; river_bytes: the quantized weights, held beside them; offloaded_bytes: parameters that lie in
            files, and in memory only while a pass runs their layers.
        notes: what did not go as asked, a line each.
        fallbacks: why a graph was compiled by plain Inductor, and how often.
        exact: of exact decoding: "rounds", "drafted" and "accepted" tokens, "near_ties", and the milliseconds spent
            "drafting" and "verifying"; empty if there was none.
        choices: the products that were timed on this machine, and the form that was taken of each.
    """

    layers: int
    river_layers: int
    decode_depths: Mapping[int, int]
    prefill_depths: Mapping[int, int]
    graphs: int
    artifacts: int
    compile_seconds: float
    backbone_bytes: int
    replaced_bytes: int
    river_bytes: int
    notes: tuple[str, ...]
    fallbacks: Mapping[str, int]
    exact: Mapping[str, int] = field(default_factory=dict)
    offloaded_bytes: int = 0
    choices: tuple[Choice, ...] = ()

    @property
    def mean_exit_depth(self) -> float:
        """Mean exit depth of decode passes; NaN if there were none."""
        passes = sum(self.decode_depths.values())
        total = sum(depth * count for depth, count in Counter(self.decode_depths).items())
        return total / passes if passes else float("nan")

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that verification kept; NaN if none was drafted."""
        drafted = self.exact.get("drafted", 0)
        return self.exact["accepted"] / drafted if drafted else float("nan")

    @property
    def _offloaded(self) -> str:
        return f"; offloaded {self.offloaded_bytes / 1e6:.0f} MB" if self.offloaded_bytes else ""

    def __str__(self) -> str:
        lines = [
            f"{self.river_layers} of {self.layers} decoder layers have a river twin; {self.graphs} graphs, "
            f"{self.artifacts} compiled pieces, {self.compile_seconds:.1f} s",
            f"backbone {self.backbone_bytes / 1e6:.0f} MB, river {self.river_bytes / 1e6:.0f} MB{self._offloaded}",
            f"mean exit depth {self.mean_exit_depth:.2f} in {sum(self.decode_depths.values())} decode passes",
        ]
        if self.exact:
            lines.append(
                f"exact: {self.exact['drafted']} tokens drafted in {self.exact['rounds']} rounds, "
                f"{self.acceptance:.0%} accepted, {self.exact['near_ties']} near ties"
            )
        if self.choices:
            taken = Counter(choice.taken for choice in self.choices).most_common()
            counts = ", ".join(f"{form} of {count}" for form, count in taken)
            lines.append(f"{len(self.choices)} kinds of products timed; taken: {counts}")
        lines += list(self.notes)
        lines += [f"plain Inductor, {count} graphs: {why}" for why, count in self.fallbacks.items()]
        return "\n".join(lines)
