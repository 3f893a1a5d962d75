"""What an export would take on this machine: time by two short measurements, memory by arithmetic."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

import numpy as np

from river_compile.config import RiverConfig
from river_compile.exporters.onnx.onnxruntime import operands
from river_compile.exporters.quantizers import quantizer, without_texts

__all__ = ["ExportCost", "export_cost"]

_SAMPLE = (1024, 4096)
_COPIED = 1 << 26
_ROUNDS = 3
_PER_LAYER = 0.02
"""Seconds that the passes over the graph take for a decoder layer: 0.6 s for SmolLM2's 30, on two cores of a Xeon."""
_PROCESS = 0.3e9
"""Bytes of Python with the libraries that an export loads."""
_PER_WEIGHT = 6.0
"""Bytes for each number of the weight in hand: as float32, as grid indices, and packed."""


@dataclass(frozen=True)
class ExportCost:
    """What `river export` would take to make the river of an ONNX file, its weights beside it.

    Fields:
        rounding, writing, passes: seconds to round the weights, to copy the files, and for the graph.
        peak: bytes of the process's own memory, at most.
        mapped: bytes of files that the check maps and runs beside it; any process can have these pages.
    """

    rounding: float
    writing: float
    passes: float
    peak: float
    mapped: float

    @property
    def seconds(self) -> float:
        """All of it, the check left out."""
        return self.rounding + self.writing + self.passes


def export_cost(
    config: RiverConfig, *, layers: int, rounded: int, largest: int, backbone: float, added: float
) -> ExportCost | None:
    """Predict an export from a file, by what rounding and writing take here (a second); None where nothing can be
    written.

    A quantizer that reads texts takes longer than is told: it is rounding to nearest that is timed for it.

    Args:
        config: its quantizer, bits and group size.
        layers: decoder layers.
        rounded: how many weights are quantized; ``largest``: in the largest of the matrices.
        backbone, added: bytes of the model, and of its river.
    """
    try:
        with ExitStack() as files:
            writing = _median(lambda: _write(files.enter_context(tempfile.TemporaryFile()))) / _COPIED
    except OSError:
        return None
    weight = np.random.default_rng(0).standard_normal(_SAMPLE, np.float32)
    chosen = quantizer(without_texts(config.quantizer))
    rounding = _median(lambda: operands(chosen.quantize(weight, config.bits, config.group_size))) / weight.size
    return ExportCost(
        rounding=rounding * rounded,
        writing=writing * (backbone + added),
        passes=_PER_LAYER * layers,
        peak=_PROCESS + added + _PER_WEIGHT * largest,
        mapped=backbone + added,
    )


def _write(file: IO[bytes]) -> None:
    """A file that stays until all are written: memory that was used before is there sooner."""
    piece = bytes(1 << 20)
    for _ in range(_COPIED // len(piece)):
        file.write(piece)


def _median(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
