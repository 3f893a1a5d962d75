"""The generation loop for TensorRT engines, on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from river_compile.config import NEVER
from river_compile.errors import ConfigError, InputError, RiverError
from river_compile.exporters.tensorrt.engine import EngineInfo
from river_compile.exporters.tensorrt.runtime import TensorRT, load_runtime
from river_compile.runtime import hf_cache
from river_compile.runtime.decoder import Decoder
from river_compile.runtime.protocol import State

__all__ = ["TensorRTDecoder", "require_gpu"]

_TAU, _MAX_DEPTH, _EXIT_DEPTH = "river.tau", "river.max_depth", "river.exit_depth"


class TensorRTDecoder(Decoder):
    """A decoder as a TensorRT engine, with the interface of `OnnxDecoder`.

    Buffers are torch tensors on the GPU. A static KV cache is bound as input and output at one address; a concatenated
    one is handed from each pass's outputs to the next one's inputs. Only logits and exit depth come to the host. Exact
    mode needs a cache of full length (static or scattered), which is cut back by position alone.

    Args:
        path: an engine with its side file, ``<engine>.json``.
        jit_cache: a file for the kernels that TensorRT-RTX compiles on first use, read now and written by `save`.

    Raises:
        MissingExtra: the runtime that built the engine is not installed.
        InputError: the engine is truncated, was built by another version, or does not load; or there is no GPU.
    """

    def __init__(self, path: str | Path, jit_cache: str | Path | None = None) -> None:
        path = Path(path)
        self.info = EngineInfo.load(path)
        runtime = load_runtime(self.info.runtime)
        if runtime.version != self.info.version:
            raise InputError(
                f"{path}: built by {self.info.runtime} {self.info.version}; installed is {runtime.version}, which does "
                "not load it: build it anew"
            )
        require_gpu()
        self._runtime = runtime
        self._engine = _load(runtime, path, self.info)
        self._jit_path = Path(jit_cache) if jit_cache is not None else None
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._contexts = self._make_contexts()
        # TensorRT takes no null address, not even of an empty tensor.
        self._nothing = torch.zeros(256, dtype=torch.uint8, device="cuda")

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.info.layers

    @property
    def has_river(self) -> bool:
        return self.info.river_layers > 0

    @property
    def exported_config(self) -> Mapping[str, Any]:
        return self.info.config

    def start(self, batch: int) -> State:
        """The state before the first token: an empty KV cache for ``batch`` sequences.

        Raises:
            ConfigError: the engine takes fewer sequences.
        """
        self.info.check_request(batch, 0)
        shapes = self.info.shapes(batch, 0, 0)
        kinds = {tensor.name: tensor.dtype for tensor in self.info.inputs}
        caches = {p: torch.zeros(shapes[p], dtype=getattr(torch, kinds[p]), device="cuda") for p, _ in self.info.caches}
        nothing = np.zeros((batch, 0), np.int64)
        return State(caches, nothing, nothing)

    def forward(
        self,
        ids: np.ndarray,
        state: State,
        mask: np.ndarray | None = None,
        tau: float | None = None,
        max_depth: int | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[np.ndarray, int | None]:
        """Run tokens through the model and move the state on; see `OnnxDecoder.forward`.

        Raises:
            ConfigError: the pass does not lie within the engine's profiles, or it has no river to set ``tau`` for.
            RiverError: TensorRT could not run it.
        """
        mask = np.ones_like(ids) if mask is None else mask
        batch, tokens = ids.shape
        past = state.mask.shape[1]
        length = past + tokens
        shapes = self.info.shapes(batch, tokens, past)
        self.info.check_request(batch, length)
        profile = self.info.profile_for(shapes)
        seen = np.concatenate([state.mask, mask], axis=1)
        positions = np.maximum(np.cumsum(seen, axis=1) - 1, 0)[:, -tokens:]
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": seen, "position_ids": positions}
        feeds |= self._settings(tau, max_depth)
        with torch.cuda.stream(self._stream):
            outputs = self._run(self._contexts[profile], feeds, state, shapes)
            wanted = outputs["logits"][:, -1:] if last_only else outputs["logits"]
            logits = wanted.float().cpu().numpy()
            depth = int(outputs[_EXIT_DEPTH].cpu()) if _EXIT_DEPTH in outputs else None
        state.read(ids, mask)
        state.caches = {p: outputs[present] for p, present in self.info.caches}
        return logits, depth

    def backbone(
        self, ids: np.ndarray, state: State, mask: np.ndarray | None = None, *, last_only: bool = False
    ) -> tuple[np.ndarray, int | None]:
        if self.has_river:
            return self.forward(ids, state, mask, NEVER, self.layers, last_only=last_only)
        return self.forward(ids, state, mask, last_only=last_only)

    def check_request(self, batch: int, tokens: int) -> None:
        self.info.check_request(batch, tokens)

    @property
    def fixed_batch(self) -> bool:  # type: ignore[override]
        return self._full_length

    @property
    def _full_length(self) -> bool:
        return self.info.kv_cache != "concatenated"

    def room(self, state: State) -> int | None:
        return self.info.max_length - state.mask.shape[1] if self._full_length else None

    def cut(self, state: State, forget: Sequence[int], rows: Sequence[int]) -> None:
        """
        Raises:
            ConfigError: the engine's cache is concatenated: no profile takes several tokens behind others.
        """
        if not self._full_length:
            raise ConfigError("exact", "this engine's cache is concatenated; build it with --kv-cache static")
        spans = state.spans(forget, rows)
        for cache in state.caches.values():
            hf_cache.move(cache, spans)
        state.keep(spans)

    def save(self) -> None:
        """Write the kernels compiled so far into ``jit_cache``, so that the next start needs not compile them."""
        if self._jit_path is not None and self._jit is not None:
            self._jit_path.write_bytes(memoryview(self._jit.serialize()))

    def _settings(self, tau: float | None, max_depth: int | None) -> dict[str, Any]:
        asked = {name: value for name, value in ((_TAU, tau), (_MAX_DEPTH, max_depth)) if value is not None}
        for name in asked:
            if name not in self.info.defaults:
                raise ConfigError(name.removeprefix("river."), "this engine has no river")
        return {**self.info.defaults, **asked}

    def _run(
        self, context: Any, feeds: dict[str, Any], state: State, shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        bound: dict[str, torch.Tensor] = {}
        pasts = dict(self.info.caches)
        for tensor in self.info.inputs:
            kind = getattr(torch, tensor.dtype)
            value = (
                state.caches[tensor.name] if tensor.name in pasts else torch.as_tensor(feeds[tensor.name], dtype=kind)
            )
            bound[tensor.name] = value.to("cuda").contiguous()
            if -1 in tensor.shape and not context.set_input_shape(tensor.name, shapes[tensor.name]):
                raise RiverError(
                    f"TensorRT refuses {tensor.name} {list(shapes[tensor.name])}: {self._runtime.complaint()}"
                )
        static = {present: past for past, present in self.info.caches} if self.info.kv_cache == "static" else {}
        outputs = {}
        for tensor in self.info.outputs:
            kind = getattr(torch, tensor.dtype)
            in_place = bound.get(static.get(tensor.name, ""))
            outputs[tensor.name] = (
                in_place if in_place is not None else torch.empty(shapes[tensor.name], dtype=kind, device="cuda")
            )
        for name, value in (bound | outputs).items():
            context.set_tensor_address(name, value.data_ptr() if value.numel() else self._nothing.data_ptr())
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise RiverError(f"TensorRT could not run the engine: {self._runtime.complaint()}")
        self._stream.synchronize()
        return outputs

    def _make_contexts(self) -> list[Any]:
        """One execution context a profile, so that going from prefill to decode switches nothing."""
        self._jit = None
        settings = None
        if self._jit_path is not None and hasattr(self._engine, "create_runtime_config"):
            settings = self._engine.create_runtime_config()
            self._jit = settings.create_runtime_cache()
            if self._jit_path.is_file():
                self._jit.deserialize(self._jit_path.read_bytes())
            settings.set_runtime_cache(self._jit)
        contexts = []
        for index in range(len(self.info.profiles)):
            context = self._engine.create_execution_context(*([settings] if settings is not None else []))
            if context is None:
                raise RiverError(f"TensorRT could not set up the engine: {self._runtime.complaint()}")
            context.set_optimization_profile_async(index, self._stream.cuda_stream)
            contexts.append(context)
        self._stream.synchronize()
        return contexts


def require_gpu() -> None:
    """
    Raises:
        InputError: torch finds no GPU to run an engine on.
    """
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no usable device"
        raise InputError(f"no GPU: running a TensorRT engine needs one ({why})")


def _load(runtime: TensorRT, path: Path, info: EngineInfo) -> Any:
    trt = runtime.module
    loader = trt.Runtime(runtime.logger)
    engine = loader.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        major, minor = torch.cuda.get_device_capability()
        raise InputError(
            f"{path}: {runtime.name} {runtime.version} does not load it on compute capability {major}.{minor}: "
            f"{runtime.complaint()}"
        )
    if info.weightless:
        weights = path.with_name(info.onnx or "")
        refitter = trt.Refitter(engine, runtime.logger)
        parsed = weights.is_file() and trt.OnnxParserRefitter(refitter, runtime.logger).refit_from_file(str(weights))
        if not parsed or not refitter.refit_cuda_engine():
            raise InputError(f"{path}: its weights could not be refitted from {weights}: {runtime.complaint()}")
    return engine
