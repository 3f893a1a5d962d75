"""The one error family.

Everything that a user can get wrong is a :class:`RiverError` whose text is one line that says what is wrong and, where
there is something to do about it, what to do.
"""

from __future__ import annotations

__all__ = ["ConfigError", "InputError", "LayersNotFound", "MissingExtra", "PassError", "RiverError"]


class RiverError(Exception):
    """Base of all errors that this package raises on purpose. ``str()`` of it is one line."""


class ConfigError(RiverError, ValueError):
    """A setting has a value it cannot have. ``field`` names it as :class:`river_compile.RiverConfig` does."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class InputError(RiverError):
    """A file or model that was passed in cannot be used."""


class LayersNotFound(InputError):
    """The graph holds no chain of decoder layers with a KV cache."""


class MissingExtra(RiverError, ImportError):
    """An optional package is not installed. ``extra`` is the extra of this package that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'river-compile[{extra}]'")
        self.extra = extra


class PassError(RiverError):
    """A pass left an illegal graph behind. ``passes`` are the names of the passes that ran, the culprit last."""

    def __init__(self, passes: tuple[str, ...], problem: str) -> None:
        super().__init__(f"after {' -> '.join(passes)}: {problem}")
        self.passes = passes
