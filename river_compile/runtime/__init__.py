"""Decoders that generate: exported models in ONNX Runtime, engines in TensorRT."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from river_compile.runtime.decoder import Decoder
    from river_compile.runtime.onnxruntime import OnnxDecoder
    from river_compile.runtime.protocol import State
    from river_compile.runtime.steps import Generation, Step
    from river_compile.runtime.tensorrt import TensorRTDecoder

__all__ = ["Decoder", "Generation", "OnnxDecoder", "State", "Step", "TensorRTDecoder"]

_HOME = {
    "Decoder": "decoder",
    "Generation": "steps",
    "OnnxDecoder": "onnxruntime",
    "State": "protocol",
    "Step": "steps",
    "TensorRTDecoder": "tensorrt",
}


def __getattr__(name: str) -> Any:
    """Each runtime is imported when it is first asked for, since it may not be installed."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
