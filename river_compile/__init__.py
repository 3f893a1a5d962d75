"""River-LLM (arXiv 2604.18396) as a compiler pass: seamless early exit for decoder-only language models."""

from typing import TYPE_CHECKING, Any

from river_compile.config import RiverConfig
from river_compile.errors import RiverError
from river_compile.version import __version__

if TYPE_CHECKING:
    from river_compile.api import export, plan
    from river_compile.backend import RiverBackend
    from river_compile.compiled import refresh, reset_stats, set_max_depth, set_tau, stats, tune
    from river_compile.exact_generate import exact
    from river_compile.measure.agreement import AgreementTexts
    from river_compile.measure.calibration import Calibration, calibrate
    from river_compile.measure.draft_points import DraftPlan
    from river_compile.measure.evaluation import Evaluation, evaluate
    from river_compile.measure.torch_drafting import tune_exact
    from river_compile.measure.tuning import Tuning
    from river_compile.pretrained import from_pretrained, load_river, offload, save_river
    from river_compile.reports import ExportReport, Plan
    from river_compile.statistics import Stats

__all__ = [
    "AgreementTexts",
    "Calibration",
    "DraftPlan",
    "Evaluation",
    "ExportReport",
    "Plan",
    "RiverBackend",
    "RiverConfig",
    "RiverError",
    "Stats",
    "Tuning",
    "__version__",
    "calibrate",
    "evaluate",
    "exact",
    "export",
    "from_pretrained",
    "load_river",
    "offload",
    "plan",
    "refresh",
    "reset_stats",
    "save_river",
    "set_max_depth",
    "set_tau",
    "stats",
    "tune",
    "tune_exact",
]

_HOME = {
    "AgreementTexts": "measure.agreement",
    "Calibration": "measure.calibration",
    "DraftPlan": "measure.draft_points",
    "Evaluation": "measure.evaluation",
    "ExportReport": "reports",
    "Plan": "reports",
    "RiverBackend": "backend",
    "Stats": "statistics",
    "Tuning": "measure.tuning",
    "calibrate": "measure.calibration",
    "evaluate": "measure.evaluation",
    "exact": "exact_generate",
    "export": "api",
    "from_pretrained": "pretrained",
    "load_river": "pretrained",
    "offload": "pretrained",
    "plan": "api",
    "refresh": "compiled",
    "reset_stats": "compiled",
    "save_river": "pretrained",
    "set_max_depth": "compiled",
    "set_tau": "compiled",
    "stats": "compiled",
    "tune": "compiled",
    "tune_exact": "measure.torch_drafting",
}


def __getattr__(name: str) -> Any:
    """The heavy part of the API, imported when it is first asked for, so that `river-export --help` is quick."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
