"""A Hugging Face decoder compiled with a river, as `evaluate` reads it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from river_compile.backend import RiverBackend
from river_compile.compiled import tune, tuned_digest
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError, MissingExtra, RiverError
from river_compile.exporters.onnx.kv_cache import cache_argument
from river_compile.exporters.quantizers import quantizer
from river_compile.measure.subjects import BACKBONE, Reading, Setting, TorchSubject
from river_compile.measure.tuning import Progress, Tuning
from river_compile.passes.quantizer import ActivationAware

__all__ = ["DTYPES", "CompiledSubject"]

DTYPES = ("bfloat16", "float16", "float32")


class CompiledSubject:
    """A model through ``torch.compile`` with a river, beside itself in eager mode.

    The backbone reads a document in one pass, in eager mode. Everything else is read token by token through the decode
    graph that a river serves, on a static cache of one length: one graph for all documents. Read stepwise, as for
    timing, the backbone is that graph with exits off.

    Args:
        model: a causal language model of transformers in eval mode, or one compiled already, of which the original is
            taken.
        config: of the river; its ``tau`` and ``max_depth`` give way to each setting's.
        capacity: tokens of the longest document.
        backend: compiles the model; one made of ``config`` if None. What gets no river must raise (``strict``).
        name: shown; the model's class if None.

    Raises:
        InputError: it is no such model.
        MissingExtra: transformers is not installed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: RiverConfig | None = None,
        *,
        capacity: int = 512,
        backend: RiverBackend | None = None,
        name: str | None = None,
    ) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise MissingExtra("transformers", "hf", "reading a Hugging Face model")
        model = getattr(model, "_orig_mod", model)
        self.name = name or type(model).__name__
        if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
            raise InputError(f"{self.name}: not a causal language model of transformers")
        if model.training:
            raise InputError(f"{self.name}: the model is in training mode; call model.eval()")
        self._model: Any = model
        self._backend = backend or RiverBackend(replace(config or RiverConfig(), strict=True))
        self._eager = TorchSubject(model, details=_details(self._backend.config, model))
        self.layers, self.vocabulary = self._eager.layers, self._eager.vocabulary
        self._capacity = capacity
        self._compiled: Callable[..., Any] = torch.compile(model, backend=self._backend)
        self._cache: Any = None
        self._cache_name = cache_argument(self._model)

    @classmethod
    def load(
        cls, folder: Path, config: RiverConfig | None = None, *, dtype: str = DTYPES[0], capacity: int = 512
    ) -> CompiledSubject:
        """The model of a Hugging Face folder.

        Raises:
            ConfigError: ``dtype`` is none of `DTYPES`.
            InputError: there is no such model.
        """
        from river_compile.exporters.onnx.hf import load_decoder

        if dtype not in DTYPES:
            raise ConfigError("dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no model in this folder: there is no config.json")
        name = folder.name or str(folder)
        return cls(load_decoder(folder, getattr(torch, dtype)), config, capacity=capacity, name=name)

    def tune(self, tuning: Tuning, progress: Progress) -> None:
        """Make the river weights on texts, if the quantizer is one that wants it.

        Raises:
            ConfigError: there is no such quantizer.
            InputError: the texts cannot be used.
        """
        config = self._backend.config
        if isinstance(quantizer(config.quantizer), ActivationAware):
            tune(self._model, tuning.ids_for(self.vocabulary), config, progress=progress)

    @property
    def details(self) -> dict[str, str]:
        return self._eager.details

    def fingerprint(self) -> str:
        return f"{self._eager.fingerprint()} {tuned_digest(self._model)}"

    def read(self, ids: np.ndarray, setting: Setting, *, stepwise: bool) -> Reading:
        """Read one document, see `Subject`; ``stepwise`` makes a difference for the backbone only.

        Raises:
            ConfigError: a setting of the river has a value it cannot have.
            InputError: the model gets no river, or the document is longer than the capacity.
        """
        if setting == BACKBONE and not stepwise:
            return self._eager.read(ids, BACKBONE, stepwise=False)
        if len(ids) > self._capacity:
            raise InputError(f"a document of {len(ids)} tokens is longer than the {self._capacity} there is room for")
        self._backend.tau, self._backend.max_depth = setting.tau, setting.max_depth
        logits, depths, seconds = [], [], []
        with torch.no_grad():
            cache = self._empty_cache()
            for token in ids:
                started = time.perf_counter()
                row, depth = self._decode(int(token), cache)
                seconds.append(time.perf_counter() - started)
                logits.append(row)
                depths.append(depth)
        keys, values = (
            [getattr(layer, name)[0, :, : len(ids)].float().cpu().numpy() for layer in cache.layers]
            for name in ("keys", "values")
        )
        return Reading(np.concatenate(logits), np.array(depths, np.int64), keys, values, None, seconds)

    def _decode(self, token: int, cache: Any) -> tuple[np.ndarray, int]:
        """One pass: its logits, float32 [1, vocabulary], and its exit depth."""
        counted = self._backend.decode_depths
        counted.clear()
        try:
            output = self._compiled(self._tokens(token), use_cache=True, **{self._cache_name: cache})
        except (ConfigError, MissingExtra):
            raise
        except RiverError as error:
            raise InputError(f"{self.name}: no river: {error}") from error
        logits: np.ndarray = output.logits[0].float().cpu().numpy()
        if counted.total() != 1:
            raise InputError(f"{self.name}: no river: its decode pass was not compiled as one graph")
        return logits, next(counted.elements())

    def _tokens(self, token: int) -> torch.Tensor:
        return torch.tensor([[token]], device=self._model.device)

    def _empty_cache(self) -> Any:
        """The one cache: filled by an eager pass at first, since empty tensors would be a graph of their own."""
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        if self._cache is None:
            cache: Any = StaticCache(config=self._model.config, max_cache_len=self._capacity)
            # A window's own layer forgets what is compared here, and counts in a number that each graph would hold.
            cache.layers = [StaticLayer(self._capacity) if layer.is_sliding else layer for layer in cache.layers]
            self._model(self._tokens(0), use_cache=True, **{self._cache_name: cache})
            if not all(layer.is_initialized for layer in cache.layers):
                raise InputError(f"{self.name}: the model keeps no KV cache of a key and a value a layer")
            self._cache = cache
        self._cache.reset()
        return self._cache


def _details(config: RiverConfig, model: torch.nn.Module) -> dict[str, str]:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {
        "river.quantizer": config.quantizer,
        "river.bits": str(config.bits),
        "river.group_size": str(config.group_size),
        "river.config": config.to_json(),
        "runtime": f"torch {torch.__version__}, {dtype}",
    }
