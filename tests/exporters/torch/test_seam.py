"""Pieces compiled by Inductor itself, where it cannot do all that it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from river_compile.backend import RiverBackend
from river_compile.config import RiverConfig
from tests.families import random_model
from tests.torch_models import assert_same, play, prompt


@pytest.fixture
def custom_operator() -> Iterator[Any]:
    """An operator that only its Python function knows, as extensions define them."""
    library = torch.library.Library("river_test", "DEF")  # type: ignore[no-untyped-call]
    library.define("twice(Tensor x, float[] weights, str? name) -> Tensor")
    library.impl("twice", lambda x, weights, name: x * sum(weights), "CompositeExplicitAutograd")
    torch.library.register_fake("river_test::twice", lambda x, weights, name: torch.empty_like(x), lib=library)
    yield lambda x: torch.ops.river_test.twice(x, [0.5, 1.5], "name")
    library._destroy()  # type: ignore[no-untyped-call]


def _compiled(model: Any) -> tuple[Any, RiverBackend]:
    torch.compiler.reset()
    backend = RiverBackend(RiverConfig(tau=2.0, autotune=False))
    return torch.compile(model, backend=backend), backend


def test_a_layer_with_an_operator_of_ones_own_has_a_river(custom_operator: Any) -> None:
    model = random_model("llama", 2)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, given, result: custom_operator(result))
    compiled, backend = _compiled(model)
    assert_same(play(model, compiled, prompt(1, 6), 2, "static"), play(model, model, prompt(1, 6), 2, "static"))
    assert backend.stats().river_layers == 2
    assert not backend.stats().fallbacks


def test_what_cannot_be_called_from_c_is_called_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = torch._inductor.standalone_compile
    asked = []

    def without_c(*given: Any, options: dict[str, Any], **settings: Any) -> Any:
        asked.append(options["config_patches"].get("cpp_wrapper", False))
        if asked[-1]:
            raise NotImplementedError("not from C++")
        return ours(*given, options=options, **settings)

    monkeypatch.setattr(torch._inductor, "standalone_compile", without_c)
    model = random_model("llama", 2)
    compiled, backend = _compiled(model)
    assert_same(play(model, compiled, prompt(1, 6), 1, "static"), play(model, model, prompt(1, 6), 1, "static"))
    assert not backend.stats().fallbacks
    assert asked == [True, False] * (len(asked) // 2)
