"""Make ``torch.compile(model, backend="river").generate(...)`` run the compiled model.

``torch.compile(model)`` wraps the model, and the wrapper's ``generate`` is the method of the model within: it would
call the model within, uncompiled, whatever the backend. So for models compiled with this package's backend, and for no
others, the wrapper gets a ``generate`` during which the model's calls go to the compiled one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from river_compile.exporters.torch import seam

__all__ = ["backend_of", "install", "options_of"]


class _Generate:
    """The attribute ``generate`` of compiled modules."""

    def __init__(self, is_ours: Callable[[Any], bool]) -> None:
        self._is_ours = is_ours

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        original = module._orig_mod
        method = original.generate
        if not self._is_ours(backend_of(module)):
            return method

        def compiled_call(*arguments: Any, **settings: Any) -> Any:
            original._compiled_call_impl = None
            try:
                return module(*arguments, **settings)
            finally:
                original._compiled_call_impl = compiled_call

        @functools.wraps(method)
        def generate(*arguments: Any, **settings: Any) -> Any:
            before = original._compiled_call_impl
            original._compiled_call_impl = compiled_call
            # The model is compiled already: transformers must not compile it once more.
            settings.setdefault("disable_compile", True)
            try:
                return method(*arguments, **settings)
            finally:
                original._compiled_call_impl = before

        return generate


def install(is_ours: Callable[[Any], bool]) -> None:
    """Give modules compiled with a backend that ``is_ours`` a ``generate`` of their own. Others keep what they have."""
    wrapper = seam.module_wrapper()
    if "generate" not in vars(wrapper):
        wrapper.generate = _Generate(is_ours)  # type: ignore[attr-defined]


def backend_of(model: Any) -> Any:
    """The backend that a module was compiled with; None if it was not, or torch does not tell."""
    wrapper = _wrapper_of(model)
    return getattr(wrapper, "compiler_fn", wrapper)


def options_of(model: Any) -> Mapping[str, Any] | None:
    """The options that a module was compiled with; None if torch does not tell."""
    arguments = getattr(_wrapper_of(model), "kwargs", None)
    return arguments.get("options", {}) if isinstance(arguments, Mapping) else None


def _wrapper_of(model: Any) -> Any:
    """What torch.compile handed to Dynamo as the backend."""
    found: Any = getattr(getattr(model, "dynamo_ctx", None), "callback", None)
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return found
