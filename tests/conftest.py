"""Fixtures that all tests share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_ROOT = Path(__file__).parent.parent
_SOURCES = tuple(_ROOT / name for name in ("exporters/onnx/hf.py", "exporters/onnx/tracing.py", "tests/families.py"))


@pytest.fixture(scope="session")
def exported() -> Callable[[str], Path]:
    """A family's small random model as ONNX, exported once and kept under .cache until its sources change."""
    import torch
    import transformers

    from river_compile.exporters.onnx.hf import export_decoder
    from tests.families import random_model

    state = "".join(path.read_text() for path in _SOURCES) + torch.__version__ + transformers.__version__
    folder = _ROOT / ".cache" / "tests" / hashlib.sha256(state.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)

    def model(family: str) -> Path:
        path = folder / family / "model.onnx"
        with FileLock(folder / f"{family}.lock"):
            if not path.exists():
                (folder / f"{family}.part").mkdir(exist_ok=True)
                export_decoder(random_model(family), folder / f"{family}.part" / "model.onnx")
                (folder / f"{family}.part").rename(folder / family)
        return path

    return model
