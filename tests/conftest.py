"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from pathlib import Path
from typing import Protocol

import pytest
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tracing makes very many objects that stay; to look through them as often as is usual takes a third of its time.
gc.set_threshold(100_000, 20, 20)

_ROOT = Path(__file__).parent.parent
_SOURCES = tuple(_ROOT / name for name in ("exporters/onnx/hf.py", "exporters/onnx/tracing.py", "tests/families.py"))


def pytest_collection_finish() -> None:
    """What was imported stays, and is not looked through."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Nor is it looked through at the end, which takes longer than xdist waits for its workers."""
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in a test, on pieces that are not compiled for the most part, is not kept for the user."""
    if "river_compile.backend" in sys.modules:
        monkeypatch.setattr("river_compile.backend._measured", {})


class Exported(Protocol):
    """A family's small random model as ONNX."""

    def __call__(self, family: str, layers: int = ..., dtype: str = ...) -> Path: ...


@pytest.fixture(scope="session")
def exported() -> Exported:
    """Each model is exported once and kept under .cache until its sources change."""
    import torch
    import transformers

    from river_compile.exporters.onnx.hf import export_decoder
    from tests.families import LAYERS, random_model

    state = "".join(path.read_text() for path in _SOURCES) + torch.__version__ + transformers.__version__
    folder = _ROOT / ".cache" / "tests" / hashlib.sha256(state.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)

    def model(family: str, layers: int = LAYERS, dtype: str = "float32") -> Path:
        name = f"{family}.{layers}.{dtype}"
        path, part = folder / name / "model.onnx", folder / f"{name}.part"
        with FileLock(folder / f"{name}.lock"):
            if not path.exists():
                part.mkdir(exist_ok=True)
                export_decoder(random_model(family, layers, getattr(torch, dtype)), part / path.name)
                part.rename(path.parent)
        return path

    return model
