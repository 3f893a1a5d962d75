"""Make ``torch.compile(model, backend="river").generate(...)`` run the compiled model.

``torch.compile(model)`` wraps the model, and the wrapper's ``generate`` is the method of the model within: it would
call the model within, uncompiled, whatever the backend. So for modules compiled with this package's backend, and for no
others, methods that generate run with a route: while one is under way, in its own thread or task alone, calls to the
model that generates go to the compiled one. That model may be the module itself or one within (PEFT, wrappers that hand
``generate`` on); one within is compiled as the module is.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from river_compile.exporters.torch import seam
from river_compile.exporters.torch.state import State

__all__ = ["backend_of", "install", "options_of", "under_way"]

_GENERATES = re.compile(r"(stream_)?(generate|chat)(_\w+)?$")
"""Names of methods that generate."""

StatesOf = Callable[[Any], Sequence[State]]
Adapt = Callable[[Any, str, dict[str, Any]], None]
"""Is given a compiled module, the name of a method that generates, and its keyword arguments, to change them."""


class _Route:
    """One generation of a compiled module: whether a compiled pass is under way, and how many there were."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.inside = False
        self.passes = 0
        self._compiled: dict[int, Callable[..., Any]] = {id(module._orig_mod): module}

    def call(self, model: torch.nn.Module, arguments: Any, settings: Any) -> Any:
        """Call the compiled form of a model."""
        if id(model) not in self._compiled:
            self._compiled[id(model)] = self.module.dynamo_ctx(model.__call__)
        self.passes += 1
        self.inside = True
        try:
            return self._compiled[id(model)](*arguments, **settings)
        finally:
            self.inside = False


_route: ContextVar[_Route | None] = ContextVar("river_route", default=None)


def under_way() -> Any:
    """The compiled module whose method that generates is running here; None if none is.

    The model within may have been compiled several times, each time with other options.
    """
    route = _route.get()
    return None if route is None else route.module


class _Switch:
    """Stands in a model's ``__call__`` while generations are under way; to whoever has no route it is as before."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self.before = model._compiled_call_impl
        self.users = 0

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return _switched(self, arguments, settings)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model has no generation under way."""


def _switched(switch: _Switch, arguments: Any, settings: Any) -> Any:
    model = switch._model()
    assert model is not None
    route = None if torch.compiler.is_compiling() else _route.get()
    if route is not None and not route.inside:
        return route.call(model, arguments, settings)
    if route is not None or switch.before is None:
        return model._call_impl(*arguments, **settings)  # type: ignore[no-untyped-call]
    return switch.before(*arguments, **settings)


_switches: MutableMapping[torch.nn.Module, _Switch] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def _switched_models(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Models with a switch, each with one however many generations there are, and with none after the last."""
    with _lock:
        for model in models:
            if model not in _switches:
                _switches[model] = _Switch(model)
                model._compiled_call_impl = _switches[model]
            _switches[model].users += 1
    try:
        yield
    finally:
        with _lock:
            for model in models:
                switch = _switches[model]
                switch.users -= 1
                if not switch.users:
                    del _switches[model]
                    if model._compiled_call_impl is switch:
                        model._compiled_call_impl = switch.before


def _generating(
    module: Any, name: str, method: Callable[..., Any], states_of: StatesOf, adapt: Adapt
) -> Callable[..., Any]:
    """A method of a compiled module that generates: the one place where a generation begins and ends.

    Args:
        module: what torch.compile returned.
        method: the method of the model within.
        states_of: the settings and counts of a compiled module; none before its first pass.
        adapt: see `Adapt`.
    """

    @functools.wraps(method)
    def generate(*arguments: Any, **settings: Any) -> Any:
        original = module._orig_mod
        if hasattr(original, "_valid_auto_compile_criteria") and _takes(method, "disable_compile"):
            # The model is compiled already: transformers must not compile it once more.
            settings.setdefault("disable_compile", True)
        adapt(module, name, settings)
        for state in states_of(module):
            state.unverified = True
        route = _Route(module)
        with _switched_models(_generators(original)), _under(route), seam.many_graphs():
            result = method(*arguments, **settings)
        if inspect.isgenerator(result):
            return _stepwise(result, route, name)
        _warn_if_unused(route, name)
        return result

    return generate


def _generators(original: torch.nn.Module) -> list[torch.nn.Module]:
    """The model and those within it that generate on their own."""
    return [
        model
        for model in original.modules()
        if model is original or callable(inspect.getattr_static(type(model), "generate", None))
    ]


@contextmanager
def _under(route: _Route) -> Iterator[None]:
    token = _route.set(route)
    try:
        yield
    finally:
        _route.reset(token)


def _stepwise(generator: Any, route: _Route, name: str) -> Generator[Any, None, Any]:
    """A generator each step of which has the route; between steps its consumer has none."""
    models = _generators(route.module._orig_mod)
    try:
        while True:
            with _switched_models(models), _under(route), seam.many_graphs():
                try:
                    item = next(generator)
                except StopIteration as stop:
                    _warn_if_unused(route, name)
                    return stop.value
            yield item
    finally:
        generator.close()


def _takes(method: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(found.name == name or found.kind is found.VAR_KEYWORD for found in parameters)


_warned: MutableMapping[Any, set[str]] = weakref.WeakKeyDictionary()


def _warn_if_unused(route: _Route, name: str) -> None:
    warned = _warned.setdefault(route.module, set())
    if route.passes or name in warned:
        return
    warned.add(name)
    warnings.warn(
        f"{name} made no pass through the compiled model: it ran uncompiled, without a river; compile the model that "
        "it calls",
        stacklevel=3,
    )


def install(is_ours: Callable[[Any], bool], states_of: StatesOf, adapt: Adapt) -> None:
    """Let the methods that generate run the compiled model, for modules compiled with a backend that ``is_ours``.

    Others keep what they have.
    """
    wrapper: Any = seam.module_wrapper()
    seam.skip_frames(_Switch.__call__, _switched, _Route.call)
    attribute = wrapper.__getattr__
    if hasattr(attribute, "river_states_of"):
        return

    @functools.wraps(attribute)
    def __getattr__(module: Any, name: str) -> Any:  # noqa: N807
        found = attribute(module, name)
        if _GENERATES.match(name) and callable(found) and is_ours(backend_of(module)):
            return _generating(module, name, found, states_of, adapt)
        return found

    __getattr__.river_states_of = states_of  # type: ignore[attr-defined]
    wrapper.__getattr__ = __getattr__


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
