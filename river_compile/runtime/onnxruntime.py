"""Decoders in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from river_compile.errors import ConfigError, InputError, MissingExtra
from river_compile.runtime.decoder import Decoder, State

__all__ = ["DEVICES", "OnnxDecoder"]

DEVICES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_CACHE_METADATA = "river.cache"
_TAU, _MAX_DEPTH, _EXIT_DEPTH = "river.tau", "river.max_depth", "river.exit_depth"
_TAU_OFFSETS = "river.tau_offsets"
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxDecoder(Decoder):
    """A decoder with a KV cache in its signature, in ONNX Runtime.

    The KV cache stays where the model wrote it: each pass's present is bound as the next one's past, on the device.

    Args:
        path: an exported river model, or the plain model it was made from.
        device: "cpu" or "cuda".
        threads: threads within an operator; the runtime's own choice if None.

    Raises:
        MissingExtra: onnxruntime (or its CUDA build) is not installed.
        InputError: the file cannot be loaded, or has no ``input_ids``, ``logits`` or KV cache.
    """

    def __init__(self, path: str | Path, device: str = "cpu", threads: int | None = None) -> None:
        self._ort = _onnxruntime(device)
        self.device = device
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file")
        try:
            self.session = self._ort.InferenceSession(str(path), options, providers=[DEVICES[device]])
        except Exception as error:
            raise InputError(f"{path}: ONNX Runtime cannot load it: {' '.join(str(error).split())[:300]}") from error
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._outputs = {value.name: value for value in self.session.get_outputs()}
        self._overridable = {value.name for value in self.session.get_overridable_initializers()}
        self.caches = self._find_caches()
        if "input_ids" not in self._inputs or "logits" not in self._outputs or not self.caches:
            raise InputError(f"{path}: no decoder: it needs input_ids, logits and a KV cache in its signature")
        self.has_river = _TAU in self._overridable
        self.has_offsets = _TAU_OFFSETS in self._overridable

    @property
    def metadata(self) -> dict[str, str]:
        """What the model tells of its river: config, quantizer, layers, calibration; empty for a plain model."""
        found: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        return {name: text for name, text in found.items() if name.startswith("river.")}

    @property
    def layers(self) -> int | None:
        """Decoder layers; None if the model does not tell."""
        count = self.session.get_modelmeta().custom_metadata_map.get("river.layers")
        return int(count) if count is not None else None

    def _find_caches(self) -> list[tuple[str, str]]:
        """Pairs of a past input and the present output that continues it."""
        noted = self.session.get_modelmeta().custom_metadata_map.get(_CACHE_METADATA)
        if noted is not None:
            return [(past, present) for past, present in json.loads(noted)]
        pasts = [name for name, value in self._inputs.items() if len(value.shape) >= 3]
        presents = [name for name, value in self._outputs.items() if len(value.shape) >= 3 and name != "logits"]
        return list(zip(pasts, presents, strict=False)) if len(pasts) == len(presents) else []

    def start(self, batch: int) -> State:
        """The state before the first token: an empty KV cache for ``batch`` sequences."""
        values = {}
        for past, present in self.caches:
            shape, after = self._inputs[past].shape, self._outputs[present].shape
            axis = next((i for i, (a, b) in enumerate(zip(shape, after, strict=True)) if a != b), 2)
            sizes = [size if isinstance(size, int) else batch for size in shape]
            sizes[axis] = 0
            values[past] = self._empty(past, sizes)
        return State(values, np.zeros((batch, 0), np.int64))

    def _empty(self, name: str, sizes: list[int]) -> Any:
        kind = self._inputs[name].type
        if kind not in _NUMPY:
            raise InputError(f"KV cache of type {kind}: only float and float16 run here")
        return self._ort.OrtValue.ortvalue_from_numpy(np.zeros(sizes, _NUMPY[kind]), self.device, 0)

    def forward(
        self,
        ids: np.ndarray,
        state: State,
        mask: np.ndarray | None = None,
        tau: float | None = None,
        max_depth: int | None = None,
        tau_offsets: Sequence[float] | None = None,
    ) -> tuple[np.ndarray, int | None]:
        """Run tokens through the model and move the state on.

        Args:
            ids: int64 [batch, sequence].
            state: of `start`; its KV cache is replaced by the one that holds these tokens as well.
            mask: int64 [batch, sequence], 0 for padding; all real if None.
            tau, max_depth: override the model's defaults for this pass.
            tau_offsets: likewise, one number a layer, of a model that was exported with room for them.

        Returns:
            Logits, float32 [batch, sequence, vocabulary], and the exit depth if the model tells it.
        """
        mask = np.ones_like(ids) if mask is None else mask
        state.mask = np.concatenate([state.mask, mask], axis=1)
        positions = np.maximum(np.cumsum(state.mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        tokens = {"input_ids": ids, "attention_mask": state.mask, "position_ids": positions}
        feeds = {name: self._on_cpu(value) for name, value in tokens.items() if name in self._inputs}
        overrides = (
            (_TAU, tau, np.float32),
            (_MAX_DEPTH, max_depth, np.int64),
            (_TAU_OFFSETS, tau_offsets, np.float32),
        )
        for name, setting, kind in overrides:
            if setting is not None:
                if name not in self._overridable:
                    lack = "no threshold for each layer" if self.has_river else "no river"
                    raise ConfigError(name.removeprefix("river."), f"this model has {lack}")
                feeds[name] = self._on_cpu(np.array(setting, kind))
        run = self._run_direct if self.device == "cpu" else self._run_bound
        outputs = run(feeds | state.caches)
        state.caches = {past: outputs[present] for past, present in self.caches}
        depth = int(outputs[_EXIT_DEPTH].numpy()) if _EXIT_DEPTH in outputs else None
        return outputs["logits"].numpy().astype(np.float32, copy=False), depth

    def _on_cpu(self, value: np.ndarray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))

    def _run_direct(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """One call: where everything lies in host memory, binding a hundred tensors one by one costs 4% of a token."""
        outputs = list(self._outputs)
        return dict(zip(outputs, self.session.run_with_ort_values(outputs, feeds), strict=True))

    def _run_bound(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """With IO binding: the KV cache stays on the device, and only logits and exit depth come back."""
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name in ("logits", _EXIT_DEPTH) else self.device)
        self.session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))


def _onnxruntime(device: str) -> Any:
    if device not in DEVICES:
        raise ConfigError("device", f"{device!r} is none of {', '.join(DEVICES)}")
    extra = "cpu" if device == "cpu" else "gpu"
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", extra, "running an exported model") from error
    if DEVICES[device] not in onnxruntime.get_available_providers():
        raise MissingExtra("onnxruntime-gpu", extra, f"running on {device}")
    return onnxruntime
