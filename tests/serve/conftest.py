"""A small random model with a river, its tokenizer, and a service of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.serve.service import Service
from tests.serve.served import settings
from tests.words import save_word_tokenizer


@pytest.fixture(scope="session")
def model(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny.onnx"
    export(exported("llama"), path, RiverConfig(tau=0.99, bits=8))
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_word_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token=None)


@pytest.fixture(scope="module")
def service(model: Path, tokenizer: Path) -> Iterator[Service]:
    made = Service(settings(model, tokenizer))
    yield made
    made.close()
