"""A Hugging Face decoder that exits early, token by token, under any KV policy, the skipped work really skipped."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.onnx.kv_cache import cache_argument
from river_compile.exporters.torch.stack import find_stack
from river_compile.passes.quantizer import Quantizer
from river_compile.reference.cache import RiverCache
from river_compile.reference.layers import Probe, Slot, keys_only
from river_compile.reference.policies import POLICIES, Call, LayerParts, Policy
from river_compile.reference.river import grow_river

__all__ = ["ReferenceDecoder", "ReferenceState", "fingerprint"]


@dataclass
class ReferenceState:
    """One sequence: its tokens so far, its KV cache, and what its policy remembers."""

    policy: Policy
    cache: RiverCache
    tokens: list[int] = field(default_factory=list)


@dataclass
class _Pass:
    """One forward pass under way. ``depth`` is None until the token has exited."""

    state: ReferenceState
    first: int
    end: int
    tau: float
    tau_offsets: Sequence[float]
    last_depth: int
    may_exit: bool
    depth: int | None = None


class ReferenceDecoder:
    """Runs a Hugging Face decoder at batch 1, with the exit decision after every layer.

    Its embedding, masks, rotary angles, final norm and LM head are the model's own code, and so are its decoder layers:
    this class only stands between them, in the model's own list of layers. A token that has exited makes the rest of
    the stack do what the KV policy says, and nothing else. A prompt (a first pass, or one of many tokens) runs the
    backbone whole under every policy; with ``max_depth`` 0 it runs the river.

    Args:
        model: a causal language model of transformers. It is taken over: its layers are replaced.
        config: thresholds and the river's settings. ``kv_policy`` is what `start` takes by default.
        quantizer: makes the river; the one that the config names if None.
        progress: is told river layers made and layers in all.

    Raises:
        LayersNotFound: the model holds no list of decoder layers.
        InputError: it keeps no KV cache of a key and a value a layer.
    """

    has_river = True

    def __init__(
        self,
        model: nn.Module,
        config: RiverConfig | None = None,
        quantizer: Quantizer | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        from river_compile.exporters.quantizers import quantizer as by_name

        self.config = config or RiverConfig()
        self._model = model.eval()
        signature = inspect.signature(model.forward).parameters
        self._cache_name = cache_argument(model)
        self._with_positions = "position_ids" in signature
        self._keeps_logits = "logits_to_keep" in signature
        self._stored = fingerprint(model)
        self.name = type(model).__name__
        path, stack = find_stack(model)
        self.layers = len(stack)
        chosen = quantizer or by_name(self.config.quantizer)
        river, self.notes = grow_river(stack, path, self.config, chosen, progress)
        self._parts = [
            LayerParts(probe.layer, twin, keys_only(probe, self.layers), probe.wraps)
            for probe, twin in zip(self._probe(stack), river, strict=True)
        ]
        self._pass: _Pass | None = None
        for index, parts in enumerate(self._parts):
            stack[index] = Slot(parts.backbone, index, self._layer)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model tells apart."""
        return int(self._model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]

    @property
    def runtime(self) -> str:
        """The runtime in words: what a time was measured in."""
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        return f"torch {torch.__version__} eager, {dtype}, {torch.get_num_threads()} threads"

    def fingerprint(self) -> str:
        """Of the weights as they came, and of all settings that shape the river or the exit decision."""
        return f"{self._stored} {self.config.to_json()}"

    def start(self, batch: int = 1, policy: str | None = None, capacity: int = 512) -> ReferenceState:
        """The state before the first token.

        Args:
            batch: must be 1.
            policy: a KV policy; the config's if None.
            capacity: tokens that the cache has room for; it grows when there are more.

        Raises:
            ConfigError: there is no such policy, or the batch is not 1.
        """
        name = policy or self.config.kv_policy
        if name not in POLICIES:
            raise ConfigError("kv_policy", f"{name!r} is none of {', '.join(POLICIES)}")
        if batch != 1:
            raise ConfigError("batch", f"the reference runtime decodes one sequence, not {batch}")
        return ReferenceState(POLICIES[name](), RiverCache(self.layers, capacity))

    @torch.inference_mode()
    def forward(
        self,
        ids: np.ndarray,
        state: ReferenceState,
        mask: np.ndarray | None = None,
        tau: float | None = None,
        max_depth: int | None = None,
        tau_offsets: Sequence[float] | None = None,
    ) -> tuple[np.ndarray, int]:
        """Run tokens through the model and move the state on.

        Args:
            ids: int64 [1, sequence].
            state: of `start`.
            mask: int64 [1, sequence], all ones: padding makes no sense at batch 1.
            tau, max_depth, tau_offsets: override the config's for this pass.

        Returns:
            Logits, float32 [1, sequence, vocabulary], and the exit depth.

        Raises:
            ConfigError: padding; ``max_depth`` 0 with another policy than share.
        """
        logits, depth = self.logits(ids[0].tolist(), state, tau, max_depth, tau_offsets)
        if mask is not None and not mask.all():
            raise ConfigError("mask", "the reference runtime takes no padding")
        return logits.float().numpy(), depth

    def logits(
        self,
        tokens: list[int],
        state: ReferenceState,
        tau: float | None = None,
        max_depth: int | None = None,
        tau_offsets: Sequence[float] | None = None,
    ) -> tuple[torch.Tensor, int]:
        """`forward` in torch's own terms: logits in the model's type, [1, sequence, vocabulary]."""
        max_depth = self.config.max_depth if max_depth is None else max_depth
        if max_depth == 0 and state.policy.name != "share":
            raise ConfigError("max_depth", "0 is the river alone, which only the policy 'share' has")
        decode = len(tokens) == 1 and bool(state.tokens)
        state.tokens.extend(tokens)
        end = len(state.tokens)
        first = state.policy.first_token(state.cache.slots)
        state.cache.begin_pass(first)
        last = self.layers if max_depth is None else max_depth
        if decode:
            last = min(last, state.policy.latest_exit(self.layers))
        elif last:
            last = self.layers
        offsets = self.config.tau_offsets if tau_offsets is None else tau_offsets
        self._pass = _Pass(
            state,
            first,
            end,
            self.config.tau if tau is None else tau,
            offsets or (0.0,) * self.layers,
            last,
            decode,
            depth=0 if last == 0 else None,
        )
        positions = {"position_ids": torch.arange(first, end)[None]} if self._with_positions else {}
        keep = {"logits_to_keep": len(tokens)} if self._keeps_logits else {}
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([state.tokens[first:]]),
                use_cache=True,
                **{self._cache_name: state.cache},
                **positions,
                **keep,
            )
        depth = self._pass.depth
        self._pass = None
        return output.logits[:, -len(tokens) :], self.layers if depth is None else depth

    def _layer(self, index: int, hidden: torch.Tensor, call: Call) -> Any:
        """What happens where the model calls its decoder layer ``index``."""
        after = self._after_layer(index, hidden, call)
        assert self._pass is not None
        missing = self._pass.end - self._pass.first - after.shape[1]
        if index == self.layers - 1 and missing:
            # Some models hold the result against the number of tokens that they were given.
            after = nn.functional.pad(after, (0, 0, missing, 0))
        return (after,) if self._parts[index].wraps else after

    def _after_layer(self, index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        now = self._pass
        assert now is not None, "the model runs outside of ReferenceDecoder.forward"
        parts, policy, slot = self._parts[index], now.state.policy, now.state.cache.slots[index]
        if now.depth is not None:
            return policy.skip(parts, slot, hidden, call)
        hidden, call = policy.enter(slot, hidden, call, now.end)
        after = parts.run(parts.backbone, hidden, call)
        depth = index + 1
        if depth >= now.last_depth or (
            now.may_exit and self._exits(depth, hidden, after, now.tau + now.tau_offsets[index])
        ):
            now.depth = depth
            policy.exited(after, depth, now.end - 1)
        return after

    def _exits(self, depth: int, before: torch.Tensor, after: torch.Tensor, threshold: float) -> bool:
        """The exit decision of the new token (paper, section 3), in float32; a NaN is above nothing."""
        if depth < self.config.min_depth or depth % self.config.exit_every or depth >= self.layers:
            return False
        similarity = torch.cosine_similarity(before[0, -1].float(), after[0, -1].float(), dim=-1)
        return bool(similarity > threshold)

    def _probe(self, stack: nn.ModuleList) -> list[Probe]:
        """How the model calls each of its layers, by one token sent through."""
        probes = [Probe(layer) for layer in stack]
        for index, probe in enumerate(probes):
            stack[index] = probe
        cache = RiverCache(self.layers, 2)
        try:
            with torch.inference_mode():
                self._model(input_ids=torch.tensor([[1]]), use_cache=True, **{self._cache_name: cache})
        finally:
            for index, probe in enumerate(probes):
                stack[index] = probe.layer
        if any(slot.seen != 1 for slot in cache.slots):
            raise InputError("the model keeps no KV cache of a key and a value a layer")
        return probes


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, their names and types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
