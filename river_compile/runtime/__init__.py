"""Decoders that generate: exported models in ONNX Runtime, engines in TensorRT."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from river_compile.runtime.decoder import Decoder, Generation, State, Step
    from river_compile.runtime.onnxruntime import OnnxDecoder
    from river_compile.runtime.tensorrt import TensorRTDecoder

__all__ = ["Decoder", "Generation", "OnnxDecoder", "State", "Step", "TensorRTDecoder"]

_HOME = {"OnnxDecoder": "onnxruntime", "TensorRTDecoder": "tensorrt"}


def __getattr__(name: str) -> Any:
    """Each runtime is imported when it is first asked for, since it may not be installed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'decoder')}"), name)
