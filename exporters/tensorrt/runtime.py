"""The seam to NVIDIA's two runtimes of one API: `tensorrt`, and `tensorrt_rtx`, which builds engines without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Any

from river_compile.errors import ConfigError, MissingExtra

__all__ = ["RUNTIMES", "TensorRT", "load_runtime"]

_MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
RUNTIMES = ("auto", *_MODULES)
_LEAST_CAPABILITY = 8.0


@dataclass
class TensorRT:
    """One of the runtimes, loaded: its name here, its module, and what it last complained about."""

    name: str
    module: Any
    complaints: list[str] = field(default_factory=list)
    logger: Any = field(init=False)

    def __post_init__(self) -> None:
        self.logger = _logger(self.module, self.complaints)

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """The compute capabilities that it can be told to build for, as "8.6"; empty if it builds for its own GPU."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        found = [_dotted(name) for name in members if name.startswith("SM")]
        # Before 8.0 there are no 4-bit integers.
        return tuple(capability for capability in found if float(capability) >= _LEAST_CAPABILITY)

    @property
    def updates_caches(self) -> bool:
        """Whether it has a layer that writes a KV cache in place."""
        return hasattr(self.module, "IKVCacheUpdateLayer")

    def targets(self, wanted: tuple[str, ...]) -> list[Any]:
        """The runtime's own words for compute capabilities.

        Raises:
            ConfigError: it cannot build for one of them.
        """
        known = self.compute_capabilities
        for capability in wanted:
            if capability not in known:
                can = f"it builds for {', '.join(known)}" if known else "it builds for the GPU at hand only"
                raise ConfigError(
                    "compute_capabilities", f"{self.name} {self.version} cannot build for {capability}; {can}"
                )
        return [self.module.ComputeCapability.__members__["SM" + c.replace(".", "")] for c in wanted]

    def complaint(self) -> str:
        """What it complained about since this was last asked, on one line."""
        text = " ".join(dict.fromkeys(" ".join(line.split()) for line in self.complaints))
        self.complaints.clear()
        return text[:600]


def load_runtime(name: str = "auto") -> TensorRT:
    """A runtime by name; "auto" is `tensorrt` where it is installed, otherwise `tensorrt-rtx`.

    Raises:
        ConfigError: there is no runtime of that name.
        MissingExtra: it is not installed.
    """
    if name not in RUNTIMES:
        raise ConfigError("runtime", f"{name!r} is none of {', '.join(RUNTIMES)}")
    for candidate in _MODULES if name == "auto" else [name]:
        for module_name in _MODULES[candidate]:
            module = _import(module_name)
            if module is not None:
                return TensorRT(candidate, module)
    extra = "tensorrt-rtx" if name == "auto" else name
    raise MissingExtra(extra, extra, "a TensorRT engine")


def _import(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    # The wheels of the full runtime can be stubs that brought no library.
    return module if hasattr(module, "Builder") else None


def _dotted(name: str) -> str:
    digits = name.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


def _logger(module: Any, complaints: list[str]) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= module.ILogger.Severity.ERROR:
                complaints.append(message)

    return Logger()
