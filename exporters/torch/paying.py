"""Whether a river's products are faster than the backbone's in passes of so many rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from river_compile.exporters.torch.timing import SMALL, Forms, Kind, alike
from river_compile.passes.fx.grow_river import Product, Twin

__all__ = ["river_time"]


def river_time(
    twins: Collection[Twin], parameters: Mapping[str, torch.Tensor], forms: Forms, rows: int
) -> float | None:
    """The time of the river's products in passes of so many rows, as a part of that of the backbone's; None where none
    is so large that reading its weight takes its time.

    Args:
        parameters: the values that are parameters, by name.
    """
    products = [product for twin in twins for product in twin.products.values()]
    timed = [product for product in products if product.inputs * product.outputs >= SMALL]
    linears = [linear for product in timed for linear in product.linears]
    weights = alike((parameters[linear.weight], linear.transposed) for linear in linears)
    if not weights:
        return None
    backbone = sum(
        len(some) * min(forms.of_float(replace(kind, rows=rows), some).values()) for kind, some in weights.items()
    )
    dtypes = [parameters[product.linears[0].weight].dtype for product in timed]
    return sum(_seconds(product, dtype, forms, rows) for product, dtype in zip(timed, dtypes, strict=True)) / backbone


def _seconds(product: Product, dtype: torch.dtype, forms: Forms, rows: int) -> float:
    kind = Kind(rows, product.inputs, product.outputs, dtype, product.bits, product.group_size)
    seconds = forms.of_river(kind)
    taken = forms.taken(kind)
    forms.choose(kind, seconds, taken)
    return seconds[taken]
