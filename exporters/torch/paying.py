"""Whether a river's products are faster than the backbone's in passes of so many rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch

from river_compile.exporters.torch.timing import SMALL, Forms, Kind
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
    counts = Counter((linear.transposed, linear.weight) for product in timed for linear in product.linears)
    alike: dict[tuple[bool, torch.dtype, tuple[int, ...]], list[torch.Tensor]] = {}
    for transposed, name in counts.elements():
        weight = parameters[name]
        alike.setdefault((transposed, weight.dtype, tuple(weight.shape)), []).append(weight)
    if not alike:
        return None
    backbone = sum(
        len(weights) * min(forms.of_float(weights, key[0], rows)[1].values()) for key, weights in alike.items()
    )
    dtypes = [parameters[product.linears[0].weight].dtype for product in timed]
    return sum(_seconds(product, dtype, forms, rows) for product, dtype in zip(timed, dtypes, strict=True)) / backbone


def _seconds(product: Product, dtype: torch.dtype, forms: Forms, rows: int) -> float:
    kind = Kind(rows, product.inputs, product.outputs, dtype, product.bits, product.group_size)
    seconds = forms.of_river(kind)
    taken = forms.taken(kind)
    forms.choose(kind, seconds, taken)
    return seconds[taken]
