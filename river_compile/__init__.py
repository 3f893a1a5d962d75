"""River-LLM (arXiv 2604.18396) as a compiler pass: seamless early exit for decoder-only language models."""

from typing import TYPE_CHECKING, Any

from river_compile.config import RiverConfig
from river_compile.errors import RiverError

if TYPE_CHECKING:
    from river_compile.api import ExportReport, Plan, export, plan
    from river_compile.calibration import Calibration, calibrate

__all__ = [
    "Calibration",
    "ExportReport",
    "Plan",
    "RiverConfig",
    "RiverError",
    "__version__",
    "calibrate",
    "export",
    "plan",
]
__version__ = "0.1.0"

_HOME = {
    "Calibration": "calibration",
    "ExportReport": "api",
    "Plan": "api",
    "calibrate": "calibration",
    "export": "api",
    "plan": "api",
}


def __getattr__(name: str) -> Any:
    """The heavy part of the API, imported when it is first asked for, so that `river-export --help` is quick."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
