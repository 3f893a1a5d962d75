"""The quantizers besides round to nearest: thin wrappers around libraries, and GPTQ.

All of them put zero at an integer code of the grid, asymmetric unless the name says otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from river_compile.errors import ConfigError, MissingExtra
from river_compile.exporters.quantizers.gptq import gptq, least_squares
from river_compile.passes.quantizer import QuantizedWeight

__all__ = ["Gptq", "Hqq", "KQuant", "LeastSquares"]

_GPTQ_BITS = 4


class LeastSquares:
    """Scale and zero point searched for the least squared error of the weight."""

    name = "lsq"

    def quantize(self, weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
        return least_squares(weight, bits, group_size)


class KQuant:
    """Scale and zero point of least squared error, by onnxruntime's port of the k-quants of llama.cpp."""

    name = "kquant"

    def __init__(self) -> None:
        try:
            from onnxruntime.quantization.neural_compressor import weight_only
        except ImportError as error:
            raise MissingExtra("onnxruntime", "cpu", "quantizing the river") from error
        self._library = weight_only

    def quantize(self, weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
        rows = np.ascontiguousarray(weight.T)
        # A group of equal weights makes the library divide by zero; it keeps its first grid for such a group.
        with np.errstate(all="ignore"):
            _, scales, zero_points = self._library.quant_tensor_k_quant_cpu(rows.copy(), bits, group_size)
        shape = (rows.shape[0], -1)
        return _on_grid(rows, scales.reshape(shape), zero_points.reshape(shape), bits, group_size)


class Hqq:
    """Half-quadratic quantization (Badri and Shaji, 2023), by onnxruntime's port.

    HQQ's zero point is a float; here it is rounded to a code of the grid and the weight rounded anew, which costs some
    of HQQ's gain and keeps the grid one that every destination can express.
    """

    name = "hqq"

    def __init__(self) -> None:
        try:
            with _root_logger_untouched():
                from onnxruntime.quantization import matmul_nbits_quantizer as library
        except ImportError as error:
            raise MissingExtra("onnxruntime", "cpu", "quantizing the river") from error
        self._solver = library.HQQWeightOnlyQuantizer(library.HQQWeightOnlyQuantConfig())

    def quantize(self, weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
        import torch

        rows = np.ascontiguousarray(weight.T)
        _, scales, zeros = self._solver.quantize_internal(torch.from_numpy(rows), bits=bits, group_size=group_size)
        zero_points = np.clip(np.round(zeros.numpy()), 0, 2**bits - 1)
        return _on_grid(rows, scales.numpy(), zero_points, bits, group_size)


class Gptq:
    """GPTQ: rounding that makes up for its own error over the inputs seen in calibration texts."""

    def __init__(self, symmetric: bool = False) -> None:
        self.name = "gptq-symmetric" if symmetric else "gptq"
        self._symmetric = symmetric

    def quantize(self, weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
        raise ConfigError("quantizer", f"{self.name!r} needs tuning texts to run the model on, and got none here")

    def quantize_for(self, moments: np.ndarray, weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
        # At 8 bits the rounding that GPTQ makes up for is 1/256 of its 4-bit size, and not worth a second run.
        if bits > _GPTQ_BITS and not self._symmetric:
            return least_squares(weight, bits, group_size)
        return gptq(weight, moments, bits, group_size, symmetric=self._symmetric)


def _on_grid(
    rows: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, bits: int, group_size: int
) -> QuantizedWeight:
    """Weights [outputs, inputs] rounded to a grid; a group whose weights all have one sign to that between zero and its
    extreme, since the libraries fit such a group without zero."""
    groups = rows.reshape(len(rows), -1, group_size)
    top = 2**bits - 1
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    plain = np.maximum((high - low) / top, np.finfo(np.float32).tiny)
    fitted = np.isfinite(scales) & (scales > 0) & (low < 0) & (high > 0)
    scales = np.where(fitted, scales, plain).astype(np.float32)
    zero_points = np.where(fitted, zero_points, np.round(-low / plain))
    values = np.clip(np.round(groups / scales[..., None]) + zero_points[..., None], 0, top)
    return QuantizedWeight(values.astype(np.uint8), scales, zero_points.astype(np.uint8), bits)


@contextmanager
def _root_logger_untouched() -> Iterator[None]:
    """onnxruntime's quantizer configures the root logger when it is imported, which is the application's to do."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
