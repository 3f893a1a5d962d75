"""The KV cache under the name that the installed transformers gives it."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from river_compile.exporters.onnx.kv_cache import cache_argument, cache_of
from river_compile.measure.subjects import BACKBONE, TorchSubject
from tests.families import random_model


class Old(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any: ...


class New(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None) -> Any: ...


class Wrapper(nn.Module):
    """As adapters wrap a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **settings: Any) -> Any: ...


@pytest.mark.parametrize(("model", "name"), [(Old(), "past_key_values"), (New(), "cache")])
def test_the_name_is_what_the_forward_takes(model: nn.Module, name: str) -> None:
    assert cache_argument(model) == name
    assert cache_argument(Wrapper(model)) == name


def test_a_model_takes_and_returns_its_cache_without_a_warning() -> None:
    model = random_model("llama", 2)
    assert cache_argument(model) in inspect.signature(model.forward).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = cache_of(model(torch.tensor([[3, 4]]), use_cache=True))
        output = model(torch.tensor([[5]]), use_cache=True, **{cache_argument(model): cache})
    assert cache_of(output) is cache
    assert cache.get_seq_length() == 3


def test_reading_a_text_warns_of_nothing() -> None:
    subject = TorchSubject(random_model("llama", 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading = subject.read(torch.tensor([3, 4, 5]).numpy(), BACKBONE, stepwise=True)
    assert len(reading.logits) == 3
