"""What an export takes beside its settings, and what it tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from river_compile.config import RiverConfig
from river_compile.errors import RiverError

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from river_compile.passes.anatomy import Layer

__all__ = [
    "Agreement",
    "ExportReport",
    "Plan",
    "PlannedLinear",
    "Progress",
    "QualityTexts",
    "TuningTexts",
    "write_report",
]

Progress = Callable[[str, int, int], None]


def write_report(path: Path, text: str) -> None:
    """Write what a user named a file for, and make its folder if need be.

    Raises:
        RiverError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RiverError(f"{path}: cannot be written: {error.strerror or error}") from error


class TuningTexts(Protocol):
    """What shapes a river besides its settings; `river_compile.Tuning` is one."""

    def ids(self, model: onnx.ModelProto) -> list[np.ndarray]:
        """Token ids of the texts that activation-aware quantizers read, int64 [tokens] each."""
        ...

    def applied(self, model: Path, ids: Sequence[np.ndarray], config: RiverConfig, progress: Progress) -> RiverConfig:
        """The config with what texts and budget say of its bits."""
        ...

    @property
    def drafts(self) -> Mapping[str, Any] | None:
        """What `applied` has measured of rivers as drafters, if it has: types of JSON."""
        ...

    @property
    def speeds(self) -> Mapping[str, Any] | None:
        """What `applied` has measured of forms of the river, if it has: types of JSON."""
        ...


@dataclass(frozen=True)
class Agreement:
    """How often a river and its backbone choose the same token.

    Fields:
        top1: share of tokens, in [0, 1], at threshold ``tau``.
        tokens, documents: how many were compared, of how many texts.
        exit_depth: mean backbone layers of a token; None where the model does not tell.
        advice: what would raise it, where it is low.
    """

    top1: float
    tokens: int
    documents: int
    tau: float
    exit_depth: float | None
    advice: str | None


class QualityTexts(Protocol):
    """What a new river is put to the test on; `river_compile.AgreementTexts` is one."""

    def measured(self, model: Path, config: RiverConfig, progress: Progress) -> Agreement:
        """The agreement of the river model in a file with its backbone."""
        ...


@dataclass(frozen=True)
class ExportReport:
    """What an export found and made.

    Fields:
        source, output: the files; ``output`` is None after a dry run.
        layers: decoder layers found; ``found_by`` says how: "metadata", "names" or "structure".
        kinds: how many different structures they have.
        river_layers: those with a river twin.
        exit_points: depths after which a token may exit.
        backbone_bytes, river_bytes: size of all weights of the source, and of the river's.
        added_nodes: nodes more than the source has.
        quantizer: what made the river.
        average_bits: mean bits of a river weight, scales and zero points not counted.
        notes: what did not go as asked, a line each.
        seconds: wall time for each step, and "total", which they add up to.
        agreement: with the backbone; None if it was not measured.
        drafts, speeds: what was measured to choose the river by, see `TuningTexts`.
    """

    source: str
    output: str | None
    layers: int
    found_by: str
    kinds: int
    river_layers: int
    exit_points: tuple[int, ...]
    backbone_bytes: int
    river_bytes: int
    added_nodes: int
    quantizer: str
    average_bits: float
    notes: tuple[str, ...]
    seconds: dict[str, float]
    agreement: Agreement | None = None
    drafts: Mapping[str, Any] | None = None
    speeds: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=2)


@dataclass(frozen=True)
class PlannedLinear:
    """One linear layer of the river: its qualified name, its decoder layer, its width, and its grid.

    ``bits`` and ``group_size`` are None where it stays in the backbone's float type; the report's notes say why.
    """

    name: str
    layer: int
    inputs: int
    outputs: int
    bits: int | None
    group_size: int | None

    @property
    def grid(self) -> str:
        """Bits and group size as text: ``4/32``, or ``float``."""
        return "float" if self.bits is None else f"{self.bits}/{self.group_size}"


@dataclass(frozen=True)
class Plan:
    """What an export would make: the report, the decoder's layers, and the river's linear layers."""

    report: ExportReport
    layers: tuple[Layer, ...]
    linears: tuple[PlannedLinear, ...]

    def to_json(self) -> str:
        """The plan as one JSON object: the report's fields, ``anatomy`` and ``linears``."""
        layers = [asdict(layer) | {"nodes": len(layer.nodes)} for layer in self.layers]
        linears = [asdict(linear) for linear in self.linears]
        return json.dumps(asdict(self.report) | {"anatomy": layers, "linears": linears}, indent=2)
