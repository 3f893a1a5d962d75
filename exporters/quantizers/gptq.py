"""GPTQ with fixed groups: rounding that makes up for its own error, on the inputs that a weight really meets.

onnxruntime ships a GPTQ, but it returns dequantized weights only, takes each group's grid from its extremes, and its
activation order scatters groups over the channels, which MatMulNBits cannot express without a fifth operand; and the
packages that have better ones (auto-round, gptqmodel, neural-compressor) want a whole torch model in memory, a GPU, or
a torch of another version. So the algorithm stands here, over one weight and the second moment of its inputs.

Sources: Frantar et al., arXiv 2210.17323 (the rounding); Nagel et al., arXiv 2004.10568 and Behdin et al., arXiv
2309.01885 (coordinate descent on the codes); the scales are refitted by least squares between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from river_compile.exporters.quantizers.blocks import in_blocks
from river_compile.passes.quantizer import QuantizedWeight

__all__ = ["gptq", "least_squares"]

_DAMPING = 0.01
_BLOCK = 64
_SHRINKS = torch.linspace(0.65, 1.05, 9)
_LEAST_SCALE = 1e-9
# A refitted scale below this share of the old one means that a group has degenerated.
_LEAST_REFIT = 0.2


@dataclass(frozen=True)
class _Grid:
    """scales and zero points, float32 [outputs, groups]; ``top`` is the largest code."""

    scales: torch.Tensor
    zero_points: torch.Tensor
    top: int

    def centred(self, groups: torch.Tensor) -> torch.Tensor:
        """Nearest codes, the zero point subtracted, of weights [outputs, groups, group_size]."""
        zero = self.zero_points[..., None]
        return ((groups / self.scales[..., None]).round() + zero).clamp(0, self.top) - zero


def gptq(
    weight: np.ndarray, moments: np.ndarray, bits: int, group_size: int, *, symmetric: bool = False, rounds: int = 1
) -> QuantizedWeight:
    """Quantize a weight so that ``x @ weight`` changes least over the inputs x that the moments describe.

    Args:
        weight: float32 [inputs, outputs]; ``group_size`` divides inputs.
        moments: mean of x x^T, float32 [inputs, inputs].
        symmetric: zero lies in the middle of the grid, else at an integer code of its own in each group.
        rounds: of refitting scales and codes after the rounding.
    """
    target = torch.from_numpy(np.ascontiguousarray(weight.T))
    hessian = torch.from_numpy(np.ascontiguousarray(moments, dtype=np.float32)).clone()
    outputs = len(target)
    diagonal = torch.diagonal(hessian)
    # An input that is never seen costs nothing wherever it is rounded to: it counts a little, so that it stays near.
    mean = float(diagonal.mean()) or 1.0
    diagonal += _DAMPING * mean
    grid = _search(target.reshape(outputs, -1, group_size), diagonal.reshape(1, -1, group_size), bits, symmetric)
    codes = _round(target, hessian, grid, group_size).reshape(outputs, -1, group_size)
    for _ in range(rounds):
        grid = _refit_scales(target, hessian, grid, codes)
        codes = _descend(target, hessian, grid, codes)
    return _quantized(codes, grid, bits)


def least_squares(weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
    """Round to nearest on the grids of least squared error of the weight itself. Arguments: see `gptq`."""

    def searched(groups: torch.Tensor) -> QuantizedWeight:
        grid = _search(groups, torch.ones(1, 1, group_size), bits, symmetric=False)
        return _quantized(grid.centred(groups), grid, bits)

    return in_blocks(weight, group_size, searched)


def _quantized(codes: torch.Tensor, grid: _Grid, bits: int) -> QuantizedWeight:
    values = (codes + grid.zero_points[..., None]).to(torch.uint8).numpy()
    return QuantizedWeight(values, grid.scales.numpy(), grid.zero_points.to(torch.uint8).numpy(), bits)


def _search(groups: torch.Tensor, importance: torch.Tensor, bits: int, symmetric: bool) -> _Grid:
    """Of grids from narrow to wide, for each group the one of least squared error, each input weighted."""
    start = _extremes(groups, bits, symmetric)
    best, least = start, torch.full_like(start.scales, torch.inf)
    for shrink in _SHRINKS:
        for shift in (0,) if symmetric else (0, 1):
            zero_points = (start.zero_points + shift).clamp(0, start.top)
            grid = _Grid(start.scales * shrink, zero_points, start.top)
            for _ in range(2):
                codes = grid.centred(groups)
                error = (importance * (codes * grid.scales[..., None] - groups) ** 2).sum(-1)
                better = error < least
                least = torch.where(better, error, least)
                best = _Grid(
                    torch.where(better, grid.scales, best.scales),
                    torch.where(better, grid.zero_points, best.zero_points),
                    best.top,
                )
                fitted = (importance * codes * groups).sum(-1) / (importance * codes**2).sum(-1).clamp(min=1e-30)
                grid = replace(grid, scales=torch.where(fitted > _LEAST_SCALE, fitted, grid.scales))
    return best


def _extremes(groups: torch.Tensor, bits: int, symmetric: bool) -> _Grid:
    top = 2**bits - 1
    if symmetric:
        middle = 2 ** (bits - 1)
        scales = (groups.abs().amax(-1) / (middle - 0.5)).clamp(min=_LEAST_SCALE)
        return _Grid(scales, torch.full_like(scales, middle), top)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / top).clamp(min=_LEAST_SCALE)
    return _Grid(scales, (-low / scales).round().clamp(0, top), top)


def _round(target: torch.Tensor, hessian: torch.Tensor, grid: _Grid, group_size: int) -> torch.Tensor:
    """Codes, zero point subtracted, [outputs, inputs]: input by input, the most important first, each one's error
    handed on to those that follow."""
    outputs, inputs = target.shape
    order = torch.argsort(torch.diagonal(hessian), descending=True)
    ordered = hessian[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    factor = torch.linalg.cholesky(inverse, upper=True)
    rest = target[:, order].clone()
    scales = grid.scales.repeat_interleave(group_size, 1)[:, order]
    zero_points = grid.zero_points.repeat_interleave(group_size, 1)[:, order]
    codes = torch.zeros_like(rest)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        block, errors = rest[:, start:end].clone(), torch.zeros(outputs, end - start)
        for at in range(end - start):
            column = start + at
            scale, zero = scales[:, column], zero_points[:, column]
            code = ((block[:, at] / scale).round() + zero).clamp(0, grid.top) - zero
            codes[:, column] = code
            errors[:, at] = (block[:, at] - code * scale) / factor[column, column]
            block[:, at + 1 :] -= errors[:, at, None] * factor[column, None, column + 1 : end]
        rest[:, end:] -= errors @ factor[start:end, end:]
    return codes[:, torch.argsort(order)]


def _refit_scales(target: torch.Tensor, hessian: torch.Tensor, grid: _Grid, codes: torch.Tensor) -> _Grid:
    """Group by group the scale of least output error, the others held."""
    groups, size = codes.shape[1:]
    scales = grid.scales.clone()
    slope = (target - (codes * scales[..., None]).reshape(target.shape)) @ hessian
    for group in range(groups):
        span = slice(group * size, (group + 1) * size)
        own = codes[:, group]
        curvature = ((own @ hessian[span, span]) * own).sum(-1)
        step = torch.where(curvature > 0, (own * slope[:, span]).sum(-1) / curvature.clamp(min=1e-30), 0.0)
        step = torch.where(scales[:, group] + step > _LEAST_REFIT * scales[:, group], step, 0.0)
        scales[:, group] += step
        slope -= (step[:, None] * own) @ hessian[span]
    return replace(grid, scales=scales)


def _descend(target: torch.Tensor, hessian: torch.Tensor, grid: _Grid, codes: torch.Tensor) -> torch.Tensor:
    """Input by input the code of least output error, the others held."""
    shape, size = codes.shape, codes.shape[2]
    flat = codes.reshape(target.shape).clone()
    scales = grid.scales.repeat_interleave(size, 1)
    zero_points = grid.zero_points.repeat_interleave(size, 1)
    slope = (target - flat * scales) @ hessian
    for start in range(0, target.shape[1], _BLOCK):
        end = min(start + _BLOCK, target.shape[1])
        block, steps = slope[:, start:end].clone(), torch.zeros(len(target), end - start)
        for at in range(end - start):
            column = start + at
            scale, zero = scales[:, column], zero_points[:, column]
            wanted = flat[:, column] + block[:, at] / (hessian[column, column] * scale)
            code = (wanted.round() + zero).clamp(0, grid.top) - zero
            steps[:, at] = (code - flat[:, column]) * scale
            flat[:, column] = code
            block -= steps[:, at, None] * hessian[column, None, start:end]
        slope -= steps @ hessian[start:end]
    return flat.reshape(shape)
