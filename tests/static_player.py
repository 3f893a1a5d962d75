"""Feeds a model whose KV cache is a buffer of fixed length, written in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort

UNTOUCHED = 77.0
"""What buffers hold where nothing was written yet: reading it by mistake would show."""


@dataclass
class StaticPlayer:
    """As `tests.oracle.Player`, for static caches; settings are ordinary inputs, so both are always fed."""

    session: ort.InferenceSession
    batch: int
    settings: dict[str, Any]
    mask: np.ndarray = field(init=False)
    caches: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.mask = np.zeros((self.batch, 0), np.int64)
        self.caches = {}
        for value in self.session.get_inputs():
            if len(value.shape) == 4:
                dtype = np.float16 if value.type == "tensor(float16)" else np.float32
                length = value.shape[2] if isinstance(value.shape[2], int) else 0
                shape = (self.batch, value.shape[1], length, value.shape[3])
                self.caches[value.name] = np.full(shape, UNTOUCHED, dtype)

    def step(self, ids: np.ndarray, mask: np.ndarray | None = None, **river: Any) -> dict[str, np.ndarray]:
        """All outputs of one pass, by name; of a static cache the filled part."""
        self.mask = np.concatenate([self.mask, np.ones_like(ids) if mask is None else mask], axis=1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        kinds = {"tau": np.float32, "max_depth": np.int64}
        settings = {**self.settings, **river}
        feeds = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, **self.caches}
        feeds |= {f"river.{name}": np.array(value, kinds[name]) for name, value in settings.items()}
        wanted = {value.name for value in self.session.get_inputs()}
        names = [value.name for value in self.session.get_outputs()]
        found = self.session.run(None, {name: value for name, value in feeds.items() if name in wanted})
        outputs = dict(zip(names, found, strict=True))
        total = self.mask.shape[1]
        for past, buffer in self.caches.items():
            present = past.replace("past_key_values", "present")
            if buffer.shape[2] == outputs[present].shape[2] and buffer.shape[2]:
                assert (outputs[present][:, :, total:] == UNTOUCHED).all(), f"{present} was written beyond its end"
            self.caches[past] = outputs[present]
            outputs[present] = outputs[present][:, :, :total]
        return outputs
