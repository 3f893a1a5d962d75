"""Decoders in ONNX Runtime."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from river_compile.config import NEVER
from river_compile.errors import ConfigError, InputError, MissingExtra
from river_compile.exporters.onnx.signature import Signature, read_graph
from river_compile.runtime.cutting import CacheForm, Cutter
from river_compile.runtime.decoder import Decoder
from river_compile.runtime.joining import Joiner
from river_compile.runtime.offloading import DeepWeights
from river_compile.runtime.protocol import State

__all__ = ["DEVICES", "OnnxDecoder"]

DEVICES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_TAU, _MAX_DEPTH, _EXIT_DEPTH = "river.tau", "river.max_depth", "river.exit_depth"
_TAU_OFFSETS = "river.tau_offsets"
_LOGITS_FROM = "river.logits_from"
_PAIRS = 1 << 23
"""Tokens of a pass times those that they look at: each head holds a score for every pair, 32 MB of them."""
_MISPLANNED = "Shape mismatch attempting to re-use buffer"


class OnnxDecoder(Decoder):
    """A decoder with a KV cache in its signature, in ONNX Runtime.

    The KV cache stays where the model wrote it: each pass's present is bound as the next one's past, on the device.

    Args:
        path: an exported river model, or the plain model it was made from.
        device: "cpu" or "cuda".
        threads: threads within an operator; the runtime's own choice if None.
        offload_after: the weights of backbone layers from this one on stay in the model's file of weights, and are in
            memory only while a pass runs so deep; None: all are loaded.

    Raises:
        MissingExtra: onnxruntime (or its CUDA build) is not installed.
        ConfigError: ``offload_after`` is not for a CPU, or the model has no river, or no file of weights beside it.
        InputError: the file cannot be loaded, is no decoder with a KV cache, or has an input that is not understood.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        threads: int | None = None,
        offload_after: int | None = None,
    ) -> None:
        self._ort = _onnxruntime(device)
        self.device = device
        self.path, self.threads = Path(path), threads
        if not self.path.is_file():
            raise InputError(f"{path}: no such file")
        self._deep = self._offloaded(offload_after)
        self.session = self._load(reuse=True)
        try:
            self.signature = Signature.of(self.session, partial(read_graph, self.path), self.path.parent)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        self._outputs = [value.name for value in self.session.get_outputs()]
        self._overridable = {value.name for value in self.session.get_overridable_initializers()}
        self.has_offsets = _TAU_OFFSETS in self._overridable
        self.fixed_batch = self.signature.batch is not None

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of weights that are in memory only while a pass runs their layers."""
        return 0 if self._deep is None else self._deep.nbytes

    @property
    def has_river(self) -> bool:
        return _TAU in self._overridable

    @property
    def exported_config(self) -> Mapping[str, Any]:
        noted: dict[str, Any] = json.loads(self.metadata.get("river.config", "{}"))
        return noted

    @property
    def verifies(self) -> bool:  # type: ignore[override]
        return self.signature.step is None and not self.tells_last_only

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return self.takes_padding

    @property
    def joins(self) -> bool:  # type: ignore[override]
        return self.ragged and not self.fixed_batch and not any(slot.static for slot in self.signature.slots)

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

    @property
    def vocabulary(self) -> int:
        """Tokens that the model tells apart."""
        return self._shape_of_two[2]

    @property
    def tells_last_only(self) -> bool:
        """Whether a pass gives logits for its last token only, whatever it read."""
        return self._shape_of_two[1] == 1

    @cached_property
    def takes_padding(self) -> bool:
        """Whether tokens behind padding are read as without it, which an attention mask alone does not say: operators
        that count its ones take padding on the right only."""
        if not self.signature.masked or self.signature.step == 1:
            return self.signature.masked
        batch = self.signature.batch or 1
        padded, alone = np.tile([[0, 0, 0, 3, 2]], (batch, 1)), np.tile([[3, 2]], (batch, 1))
        mask = np.tile([[0, 0, 0, 1, 1]], (batch, 1))
        never = NEVER if self.has_river else None
        found, _ = self._pass(padded, self.start(batch), mask, tau=never)
        expected, _ = self._pass(alone, self.start(batch), np.ones_like(alone), tau=never)
        return float(np.abs(found[:, -1] - expected[:, -1]).max()) <= 2e-2 * float(np.ptp(expected[:, -1]))

    @cached_property
    def _shape_of_two(self) -> tuple[int, ...]:
        """Of the logits of a pass over two tokens: a signature may leave it symbolic, or say it wrongly."""
        batch = self.signature.batch or 1
        return self.forward(np.zeros((batch, 2), np.int64), self.start(batch))[0].shape

    def start(self, batch: int) -> State:
        """The state before the first token: an empty KV cache for ``batch`` sequences.

        Raises:
            ConfigError: the model takes another number of sequences.
        """
        self.signature.check(batch)
        caches = {slot.past: self._on_device(slot.empty(batch)) for slot in self.signature.slots}
        nothing = np.zeros((batch, 0), np.int64)
        return State(caches, nothing, nothing)

    def forward(
        self,
        ids: np.ndarray,
        state: State,
        mask: np.ndarray | None = None,
        tau: float | None = None,
        max_depth: int | None = None,
        tau_offsets: Sequence[float] | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[np.ndarray, int | None]:
        """Run tokens through the model and move the state on.

        Args:
            ids: int64 [batch, sequence].
            state: of `start`; its KV cache is replaced by the one that holds these tokens as well.
            mask: int64 [batch, sequence], 0 for padding; all real if None.
            tau, max_depth: override the model's defaults for this pass.
            tau_offsets: likewise, one number a layer, of a model that was exported with room for them.
            last_only: leave out all logits but the last token's, if the model can; and read a prompt of some thousands
                of tokens in several passes, each with an exit of its own.

        Returns:
            Logits, float32 [batch, sequence, vocabulary], of the last token only where the model gives no others or
            ``last_only`` was asked for; and the exit depth if the model tells it.

        Raises:
            ConfigError: the model has no river to set ``tau`` for, takes no padding, or holds fewer tokens.
        """
        mask = np.ones_like(ids) if mask is None else mask
        step = self.signature.step or (self._prompt_step(ids, state) if last_only else ids.shape[1])
        if ids.shape[1] > step:
            cuts = range(step, ids.shape[1], step)
            parts = zip(np.split(ids, cuts, axis=1), np.split(mask, cuts, axis=1), strict=True)
            passes = (
                self.forward(part, state, real, tau, max_depth, tau_offsets, last_only=last_only)
                for part, real in parts
            )
            kept = list(deque(passes, maxlen=1 if last_only else None))
            return np.concatenate([logits for logits, _ in kept], axis=1), kept[-1][1]
        if not (mask.all() and state.mask.all()) and not self.takes_padding:
            raise ConfigError("prompts", "this model does not tell padding from tokens: give prompts of one length")
        return self._pass(ids, state, mask, tau, max_depth, tau_offsets, last_only)

    def _prompt_step(self, ids: np.ndarray, state: State) -> int:
        """How many tokens of a prompt a pass reads; all, where none can be read behind others: `GroupQueryAttention`
        does that for one sequence only."""
        batch, length = map(int, ids.shape)
        if batch > 1 and not self.ragged:
            return length
        seen = int(state.mask.shape[1]) + length
        return max(_PAIRS // (batch * seen), 1)

    def _pass(
        self,
        ids: np.ndarray,
        state: State,
        mask: np.ndarray,
        tau: float | None = None,
        max_depth: int | None = None,
        tau_offsets: Sequence[float] | None = None,
        last_only: bool = False,
    ) -> tuple[np.ndarray, int | None]:
        seen = np.concatenate([state.mask, mask], axis=1)
        feeds = {name: self._on_cpu(value) for name, value in self.signature.feeds(ids, seen).items()}
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
        if last_only and _LOGITS_FROM in self._overridable:
            feeds[_LOGITS_FROM] = self._on_cpu(np.array([-1]))
        if self._deep is not None:
            self._deep.check()
            feeds |= self._deep.feeds
        outputs = self._run(feeds | state.caches)
        state.caches = {slot.past: outputs[slot.present] for slot in self.signature.slots}
        state.read(ids, mask)
        depth = outputs[_EXIT_DEPTH].numpy().item() if _EXIT_DEPTH in outputs else None
        if self._deep is not None:
            self._deep.passed(depth)
        logits = outputs[self.signature.logits].numpy().astype(np.float32, copy=False)
        return logits.reshape(len(ids), -1, logits.shape[-1]), depth

    def backbone(
        self, ids: np.ndarray, state: State, mask: np.ndarray | None = None, *, last_only: bool = False
    ) -> tuple[np.ndarray, int | None]:
        if not self.has_river:
            return self.forward(ids, state, mask, last_only=last_only)
        offsets = (0.0,) * (self.layers or 0) if self.has_offsets else None
        return self.forward(ids, state, mask, NEVER, self.layers, offsets, last_only=last_only)

    def check_request(self, batch: int, tokens: int) -> None:
        self.signature.check(batch, tokens)

    def room(self, state: State) -> int | None:
        return None if self.signature.room is None else self.signature.room - state.mask.shape[1]

    def cut(self, state: State, forget: Sequence[int], rows: Sequence[int]) -> None:
        spans = state.spans(forget, rows)
        slots = {slot.past: slot for slot in self.signature.slots}
        growing = {name: state.caches[name] for name, slot in slots.items() if not slot.static}
        if growing:
            state.caches |= self._cutter.cut(growing, spans, self._on_cpu)
        for name in slots.keys() - growing.keys():
            state.caches[name] = self._moved(state.caches[name], slots[name].axis, spans)
        state.keep(spans)

    def join(self, state: State, other: State) -> None:
        shapes = (state.mask.shape, other.mask.shape)
        state.caches = self._joiner.join(state.caches, other.caches, shapes, self._on_cpu)
        state.take_in(other)

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self._growing, self._small_session)

    @cached_property
    def _joiner(self) -> Joiner:
        return Joiner(self._growing, self._small_session)

    @property
    def _growing(self) -> dict[str, CacheForm]:
        kinds = {value.name: value.type for value in self.session.get_inputs()}
        return {
            slot.past: CacheForm(kinds[slot.past], len(slot.sizes), slot.axis)
            for slot in self.signature.slots
            if not slot.static
        }

    def _small_session(self, model: bytes) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        return self._ort.InferenceSession(model, options, providers=[DEVICES[self.device]])

    def _moved(self, value: Any, axis: int, spans: Sequence[tuple[int, int, int, int]]) -> Any:
        """A cache of fixed length whose sequences stand where the spans tell; cut off is what lies behind."""
        rows = [row for row, *_ in spans]
        if rows == list(range(value.shape()[0])) and all(filling == first for _, filling, first, _ in spans):
            return value
        moved = np.moveaxis(value.numpy(), axis, 1)[rows]
        for place, (_, filling, first, last) in enumerate(spans):
            moved[place, filling : filling + last - first] = moved[place, first:last].copy()
        return self._on_device(np.ascontiguousarray(np.moveaxis(moved, 1, axis)))

    def _offloaded(self, after: int | None) -> DeepWeights | None:
        if after is None:
            return None
        if self.device != "cpu":
            raise ConfigError("offload_after", "weights are offloaded on a CPU only")
        return DeepWeights(self.path, after)

    def _load(self, *, reuse: bool) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_reuse = reuse
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        model: str | bytes = str(self.path)
        if self._deep is not None:
            self._deep.settle(options)
            model = self._deep.model
        try:
            return self._ort.InferenceSession(model, options, providers=[DEVICES[self.device]])
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{self.path}: ONNX Runtime cannot load it: {reason}") from error

    def _run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        run = self._run_direct if self.device == "cpu" else self._run_bound
        try:
            return run(feeds)
        except Exception as error:
            # Some builders note wrong shapes within the graph, and ONNX Runtime plans its memory by them.
            if _MISPLANNED not in str(error) or not self.session.get_session_options().enable_mem_reuse:
                raise
        self.session = self._load(reuse=False)
        return run(feeds)

    def _on_cpu(self, value: np.ndarray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))

    def _on_device(self, value: np.ndarray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(value, self.device, 0)

    def _run_direct(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """One call: where everything lies in host memory, binding a hundred tensors one by one costs 4% of a token."""
        return dict(zip(self._outputs, self.session.run_with_ort_values(self._outputs, feeds), strict=True))

    def _run_bound(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """With IO binding: the KV cache stays on the device, and only logits and exit depth come back."""
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name in (self.signature.logits, _EXIT_DEPTH) else self.device)
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
