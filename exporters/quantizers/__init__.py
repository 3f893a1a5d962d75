"""Algorithms that make the river's weights, whatever the destination: `quantizer` finds one by its name."""

from collections.abc import Callable

from river_compile.errors import ConfigError
from river_compile.exporters.quantizers.grids import Gptq, Hqq, KQuant, LeastSquares
from river_compile.exporters.quantizers.rtn import RoundToNearest
from river_compile.passes.quantizer import ActivationAware, Quantizer

__all__ = ["QUANTIZERS", "quantizer", "without_texts"]

QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "rtn": RoundToNearest,
    "rtn-symmetric": lambda: RoundToNearest(symmetric=True),
    "lsq": LeastSquares,
    "kquant": KQuant,
    "hqq": Hqq,
    "gptq": Gptq,
    "gptq-symmetric": lambda: Gptq(symmetric=True),
}


def quantizer(name: str) -> Quantizer:
    """The quantizer of that name.

    Raises:
        ConfigError: there is no such quantizer.
        MissingExtra: it needs a package that is not installed.
    """
    if name not in QUANTIZERS:
        raise ConfigError("quantizer", f"{name!r} is none of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]()


def without_texts(name: str) -> str:
    """The name of a quantizer that looks at weights alone: the one named, or rounding in the place of one that knows
    what they are multiplied with.

    Raises: as `quantizer`.
    """
    if not isinstance(quantizer(name), ActivationAware):
        return name
    return "rtn-symmetric" if name.endswith("-symmetric") else "rtn"
