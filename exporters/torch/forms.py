"""The forms in which a float product of few activation rows is written; which one is taken, `few_rows` says."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from river_compile.exporters.torch import seam

__all__ = ["MOST", "SHORT", "by_loop", "few_rows", "is_steady", "single_row"]

SHORT = (torch.bfloat16, torch.float16)
"""Types in which the order of a sum shows in later tokens."""
MOST = 16
"""Rows up to which a product counts as one of few rows."""

_COMPARED = 2**17


def by_loop(activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """activation [..., inputs] of one row @ weight [outputs, inputs].T + bias, accumulated in float32, as a sum that
    Inductor makes a loop over the weight of."""
    result = (activation.float().unsqueeze(-2) * weight.float()).sum(-1)
    if bias is not None:
        result = result + bias.float()
    return result.to(activation.dtype)


def single_row(activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `few_rows`, for one row: it is computed twice, since one column alone is rounded otherwise than several."""
    pair = activation.reshape(1, -1).expand(2, -1).contiguous()
    result = torch.mm(weight, pair.t())[:, 0].reshape(*activation.shape[:-1], weight.shape[0])
    return result if bias is None else result + bias


def few_rows(activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """activation [..., inputs] of several rows @ weight [outputs, inputs].T + bias, as weight @ activation.T unless the
    rows are more than `MOST`."""
    result: torch.Tensor = torch.ops.river_compile.few_rows(activation, weight)
    return result if bias is None else result + bias


def _few_rows(activation: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if math.prod(activation.shape[:-1]) > MOST:
        return functional.linear(activation, weight)
    rows = activation.reshape(-1, activation.shape[-1])
    return torch.mm(weight, rows.t()).t().contiguous().view(*activation.shape[:-1], weight.shape[0])


# As one operator: a graph may serve few rows and many, and a compiler that sees the transposed result reads it in
# another order, and rounds what follows in another way.
seam.define_operator(
    "few_rows(Tensor activation, Tensor weight) -> Tensor",
    _few_rows,
    lambda activation, weight: activation.new_empty((*activation.shape[:-1], weight.shape[0])),
)


def is_steady(weight: torch.Tensor) -> bool:
    """Whether a row comes out the same to the last bit however many rows, up to `MOST`, are beside it, with the weight
    first.

    Kernels choose their blocks by the shape, so this is asked of each shape, and of so many numbers that blocks which
    differ show: most sums round to the same 16 bits in any order.
    """
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = weight.shape
    compared = 0
    with torch.no_grad():
        while compared < _COMPARED:
            rows = torch.randn(MOST, inputs, generator=generator).to(weight.dtype)
            alone = torch.cat([single_row(row[None], weight, None) for row in rows])
            for count in range(2, MOST + 1):
                if not torch.equal(few_rows(rows[:count], weight, None), alone[:count]):
                    return False
                compared += count * outputs
    return True
