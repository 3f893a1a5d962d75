"""Pieces compiled by Inductor itself, where it cannot do all that it is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from river_compile.exporters.torch import seam


@pytest.fixture
def custom_operator() -> Iterator[Any]:
    """An operator that only its Python function knows, as extensions define them."""
    library = torch.library.Library("river_test", "DEF")  # type: ignore[no-untyped-call]
    library.define("twice(Tensor x, float[] weights, str? name) -> Tensor")
    library.impl("twice", lambda x, weights, name: x * sum(weights), "CompositeExplicitAutograd")
    torch.library.register_fake("river_test::twice", lambda x, weights, name: torch.empty_like(x), lib=library)
    yield lambda x: torch.ops.river_test.twice(x, [0.5, 1.5], "name")
    library._destroy()  # type: ignore[no-untyped-call]


def _is_right_in_a_piece(function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether a function gives the same as one compiled piece, without a word."""
    torch.compiler.reset()
    given = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = torch.compile(function, backend=seam.compile_piece)(given)
    return torch.equal(found, function(given))


def test_a_piece_with_an_operator_of_ones_own_is_compiled(custom_operator: Any) -> None:
    assert _is_right_in_a_piece(lambda x: custom_operator(x + 1).relu())


def test_what_cannot_be_called_from_c_is_called_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = torch._inductor.standalone_compile
    asked = []

    def without_c(*given: Any, options: dict[str, Any], **settings: Any) -> Any:
        asked.append(options["config_patches"].get("cpp_wrapper", False))
        if asked[-1]:
            raise NotImplementedError("not from C++")
        return ours(*given, options=options, **settings)

    monkeypatch.setattr(torch._inductor, "standalone_compile", without_c)
    assert _is_right_in_a_piece(lambda x: (x + 1).relu())
    assert asked == [True, False]
