"""Models under evaluation, behind one small protocol: read tokens, tell logits, exit depths and the KV cache."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from river_compile.config import NEVER
from river_compile.errors import InputError

if TYPE_CHECKING:
    import torch


__all__ = ["BACKBONE", "OnnxSubject", "Reading", "Setting", "Subject", "TorchSubject"]


@dataclass(frozen=True)
class Setting:
    """How a subject reads: with exits at a threshold, or at a forced depth.

    Fields:
        tau: exit threshold; above 1 is "never exit".
        max_depth: backbone layers at most; 0 is all river.
    """

    tau: float = NEVER
    max_depth: int | None = None

    @property
    def label(self) -> str:
        if self.max_depth is not None:
            return "all river" if self.max_depth == 0 else f"exit depth {self.max_depth}"
        return "backbone" if self.tau > 1 else f"tau {self.tau:g}"

    @property
    def token_level(self) -> bool:
        """Whether tokens decide for themselves, so that a document must be read token by token."""
        return self.tau <= 1 and self.max_depth != 0


BACKBONE = Setting()


@dataclass
class Reading:
    """What a subject said while it read one document.

    Fields:
        logits: float32 [tokens, vocabulary].
        depths: exit depth of each token, int64 [tokens].
        keys, values: the KV cache in the end, a float array [heads, tokens, width] for each decoder layer.
        similarities: state transition similarity of each decoder layer, float32 [layers, tokens], NaN where it is not
            known; of the backbone only, and None where the subject does not tell.
        seconds: wall time of each pass.
    """

    logits: np.ndarray
    depths: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    similarities: np.ndarray | None = None
    seconds: list[float] = field(default_factory=list)


class Subject(Protocol):
    """A model with a river: the backbone is the same model with exits off."""

    name: str
    layers: int
    vocabulary: int

    @property
    def details(self) -> dict[str, str]:
        """How it was made: quantizer, settings, as far as it tells."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes with the model's weights and graph."""
        ...

    def read(self, ids: np.ndarray, setting: Setting, *, stepwise: bool) -> Reading:
        """Read one document from an empty KV cache.

        Args:
            ids: int64 [tokens].
            stepwise: one token a pass, else all in one pass (a prefill, which has one exit depth for all tokens).
        """
        ...


class OnnxSubject:
    """An exported river model in ONNX Runtime.

    Args:
        path: the river model.
        threads: threads within an operator; the runtime's own choice if None.

    Raises:
        InputError: the file cannot be loaded or has no river.
        MissingExtra: onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        from river_compile.runtime import OnnxDecoder

        self.path = Path(path)
        self.name = self.path.name
        self.decoder = OnnxDecoder(path, threads=threads)
        if not self.decoder.has_river or self.decoder.layers is None:
            raise InputError(f"{path}: no river model; make one with river-export")
        self.layers = self.decoder.layers
        self.vocabulary = self.decoder.vocabulary
        self._probe: Any = None

    @property
    def details(self) -> dict[str, str]:
        return {key: value for key, value in self.decoder.metadata.items() if key != "river.cache"}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in (self.path, self.path.with_name(self.path.name + ".data")):
            if file.exists():
                with open(file, "rb") as stream:
                    for chunk in iter(lambda: stream.read(1 << 24), b""):
                        digest.update(chunk)
        return digest.hexdigest()

    def read(self, ids: np.ndarray, setting: Setting, *, stepwise: bool) -> Reading:
        state = self.decoder.start(1)
        logits, depths, seconds = [], [], []
        for part in _passes(ids, stepwise or self.decoder.tells_last_only):
            started = time.perf_counter()
            row, depth = self.decoder.forward(part[None], state, tau=setting.tau, max_depth=setting.max_depth)
            seconds.append(time.perf_counter() - started)
            logits.append(row[0])
            depths += [self.layers if depth is None else depth] * len(part)
        slots = self.decoder.signature.slots
        caches = [slot.entries(state.caches[slot.past].numpy(), len(ids)) for slot in slots]
        reading = Reading(np.concatenate(logits), np.array(depths, np.int64), caches[0::2], caches[1::2], None, seconds)
        if setting == BACKBONE and not stepwise and self.decoder.signature.step is None:
            reading.similarities = self._similarities(ids)
        return reading

    def _similarities(self, ids: np.ndarray) -> np.ndarray:
        """Of a backbone pass, by a copy of the model whose outputs include the hidden states between layers."""
        from river_compile.exporters.onnx.probe import HiddenStates

        if self._probe is None:
            self._probe = HiddenStates(self.path)
        states = self._probe.read(ids)
        return _transition_similarities(states, self.layers)


class TorchSubject:
    """A Hugging Face decoder in eager torch, which never exits: it is its own backbone.

    Args:
        model: the untouched model, in eval mode.
        details: how the river beside it was made.
    """

    def __init__(self, model: torch.nn.Module, details: dict[str, str] | None = None) -> None:
        self._model = cast(Any, model)
        config = self._model.config
        self.name = type(model).__name__
        self.layers = int(config.get_text_config().num_hidden_layers)
        self.vocabulary = int(self._model.get_output_embeddings().weight.shape[0])
        self._details = details or {}

    @property
    def details(self) -> dict[str, str]:
        return self._details

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(sorted(self._details.items())).encode())
        for name, tensor in self._model.state_dict().items():
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def read(self, ids: np.ndarray, setting: Setting, *, stepwise: bool) -> Reading:
        import torch
        from transformers import DynamicCache

        from river_compile.exporters.onnx.kv_cache import cache_argument

        cache: Any = DynamicCache()
        kept = {cache_argument(self._model): cache}
        logits, seconds, states = [], [], []
        with torch.no_grad():
            for part in _passes(ids, stepwise):
                tokens = torch.from_numpy(part[None]).to(self._model.device)
                started = time.perf_counter()
                output = self._model(input_ids=tokens, use_cache=True, output_hidden_states=True, **kept)
                states.append(np.stack([state[0].float().cpu().numpy() for state in output.hidden_states]))
                logits.append(output.logits[0].float().cpu().numpy())
                seconds.append(time.perf_counter() - started)
        keys = [layer.keys[0].float().cpu().numpy() for layer in cache.layers]
        values = [layer.values[0].float().cpu().numpy() for layer in cache.layers]
        # The last hidden state that transformers returns lies behind the final norm: it is no layer's output.
        hidden = list(np.concatenate(states, axis=1)[:-1])
        similarities = _transition_similarities(dict(enumerate(hidden)), self.layers)
        return Reading(np.concatenate(logits), np.full(len(ids), self.layers), keys, values, similarities, seconds)


def _passes(ids: np.ndarray, stepwise: bool) -> list[np.ndarray]:
    return list(ids.reshape(-1, 1)) if stepwise else [ids]


def _transition_similarities(states: dict[int, np.ndarray], layers: int) -> np.ndarray:
    """Cosine of input and output of decoder blocks (paper, section 3).

    Args:
        states: by depth, the hidden state after that many layers, float [tokens, width].
    """
    tokens = len(next(iter(states.values())))
    found = np.full((layers, tokens), np.nan, np.float32)
    for depth, after in states.items():
        before = states.get(depth - 1)
        if before is not None:
            lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
            found[depth - 1] = (before * after).sum(axis=-1) / np.maximum(lengths, 1e-30)
    return found
