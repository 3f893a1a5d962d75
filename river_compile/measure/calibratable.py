"""Models that can be calibrated: an exported one in ONNX Runtime, a Hugging Face decoder in the reference runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import nn

from river_compile.config import NEVER, RiverConfig
from river_compile.errors import InputError

__all__ = ["Calibratable", "OnnxCalibratable", "Thresholds", "TorchCalibratable"]


@dataclass(frozen=True)
class Thresholds:
    """Where tokens exit: above ``tau``, plus the layer's offset if there are any."""

    tau: float
    offsets: tuple[float, ...] | None = None


class Calibratable(Protocol):
    """A model with a river, as `calibrate` needs it; decoding at batch 1."""

    name: str
    layers: int
    vocabulary: int
    min_depth: int
    has_offsets: bool

    def fingerprint(self) -> str:
        """Equal for models that compute the same at every exit depth."""
        ...

    def read(self, ids: np.ndarray, thresholds: Thresholds | None, prompt_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a document: its prompt in one pass, the rest token by token; or as the backbone if None.

        Returns:
            Logits, float32 [tokens, vocabulary], and exit depths, int [tokens]. Logits before the prompt's last token
            are NaN where the model does not tell them.
        """
        ...


class OnnxCalibratable:
    """An exported river model.

    Raises:
        InputError: the file cannot be loaded or has no river.
        MissingExtra: onnxruntime is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        from river_compile.runtime import OnnxDecoder

        self._path = path
        self._decoder = OnnxDecoder(path, threads=threads)
        if not self._decoder.has_river or self._decoder.layers is None:
            raise InputError(f"{path}: no river model; make one with river-export")
        self.name = path.name
        self.layers = self._decoder.layers
        self.has_offsets = self._decoder.has_offsets
        config = self._decoder.exported_config
        if config["max_depth"] is not None:
            raise InputError(f"{path}: its exit depth is limited by max_depth; calibrate a model without a limit")
        self.min_depth = int(config["min_depth"])
        self.vocabulary = self._decoder.vocabulary
        self._fingerprint: str | None = None

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            import onnx

            from river_compile.exporters.onnx.onnx_file import fingerprint

            self._fingerprint = fingerprint(onnx.load(str(self._path), load_external_data=False), self._path.parent)
        return self._fingerprint

    def read(self, ids: np.ndarray, thresholds: Thresholds | None, prompt_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        state = self._decoder.start(1)
        if thresholds is None:
            # The backbone makes no decisions, so it may read the document in one pass.
            whole = prompt_tokens if self._decoder.tells_last_only else len(ids)
            passes = [self._decoder.forward(part, state, tau=NEVER)[0] for part in _passes(ids, whole)]
            return _told(passes, len(ids)), np.full(len(ids), self.layers)
        offsets = thresholds.offsets
        if offsets is None and self.has_offsets:
            offsets = (0.0,) * self.layers
        rows, depths = [], []
        for part in _passes(ids, prompt_tokens):
            logits, depth = self._decoder.forward(part, state, tau=thresholds.tau, tau_offsets=offsets)
            rows.append(logits)
            depths += [self.layers if depth is None else depth] * part.shape[1]
        return _told(rows, len(ids)), np.array(depths)


def _told(passes: list[np.ndarray], tokens: int) -> np.ndarray:
    """The logits of passes in a row, [1, tokens told, vocabulary] each, behind NaN for those not told."""
    told = np.concatenate(passes, axis=1)[0]
    return np.pad(told, ((tokens - len(told), 0), (0, 0)), constant_values=np.nan)


class TorchCalibratable:
    """A Hugging Face decoder with a river of its own, in the reference runtime. The module is taken over.

    Raises: as `ReferenceDecoder`.
    """

    has_offsets = True

    def __init__(self, model: nn.Module, config: RiverConfig | None = None) -> None:
        from river_compile.reference import ReferenceDecoder

        config = config or RiverConfig()
        self._decoder = ReferenceDecoder(model, config)
        self.name = self._decoder.name
        self.layers, self.vocabulary, self.min_depth = self._decoder.layers, self._decoder.vocabulary, config.min_depth

    @classmethod
    def load(cls, folder: Path) -> TorchCalibratable:
        """The model of a folder or hub name, in bfloat16, which the 4-bit kernel takes.

        Raises:
            InputError: there is no such model.
        """
        import torch

        from river_compile.exporters.onnx.hf import load_decoder

        return cls(load_decoder(folder, torch.bfloat16))

    def fingerprint(self) -> str:
        return self._decoder.fingerprint()

    def read(self, ids: np.ndarray, thresholds: Thresholds | None, prompt_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        state = self._decoder.start(1, capacity=len(ids))
        tau, offsets = (NEVER, None) if thresholds is None else (thresholds.tau, thresholds.offsets)
        rows, depths = [], []
        for part in _passes(ids, prompt_tokens):
            logits, depth = self._decoder.forward(part, state, tau=tau, tau_offsets=offsets)
            rows.append(logits[0])
            depths += [depth] * part.shape[1]
        return np.concatenate(rows), np.array(depths)


def _passes(ids: np.ndarray, prompt_tokens: int) -> list[np.ndarray]:
    """The prompt, then every token alone: int64 [1, tokens] each."""
    return [ids[None, :prompt_tokens], *ids[prompt_tokens:].reshape(-1, 1, 1)]
