"""How torch's exporters see a Hugging Face decoder: its cache as plain tensors, attention in a form that ONNX has."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from river_compile.errors import InputError
from river_compile.exporters.onnx.kv_cache import cache_argument, cache_of

__all__ = [
    "CachedDecoder",
    "Example",
    "attention_forms",
    "attention_op",
    "example_of",
    "exportable_experts",
    "quiet",
    "with_attention",
]

_BATCH, _SEQUENCE, _PAST = 2, 3, 5


class CachedDecoder(nn.Module):
    """The model with its KV cache as a plain list of tensors."""

    def __init__(self, model: nn.Module, with_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.with_positions = with_positions
        self.cache_argument = cache_argument(model)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        from transformers import DynamicCache

        extra: dict[str, Any] = {"position_ids": position_ids} if self.with_positions else {}
        extra[self.cache_argument] = DynamicCache(past)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **extra,
        )
        return output.logits, [(layer.keys, layer.values) for layer in cache_of(output).layers]


@dataclass(frozen=True)
class Example:
    """What an export traces the decoder with, as the decoder's arguments and flat, and the names of both ends."""

    arguments: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    flat: list[torch.Tensor]
    flat_shapes: list[dict[int, Any]]
    input_names: list[str]
    output_names: list[str]
    with_positions: bool


def example_of(model: nn.Module) -> Example:
    past = _example_past(model)
    with_positions = "position_ids" in inspect.signature(model.forward).parameters
    batch, length = past[0][0].shape[0], past[0][0].shape[2]
    ids = torch.zeros(batch, _SEQUENCE, dtype=torch.int64)
    mask = torch.ones(batch, length + _SEQUENCE, dtype=torch.int64)
    positions = torch.arange(length, length + _SEQUENCE).expand(batch, -1).contiguous() if with_positions else None
    dynamic = torch.export.Dim.DYNAMIC
    row, slot = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    rows = [tensor for tensor in (ids, mask, positions) if tensor is not None]
    pairs = [(index, kind) for index in range(len(past)) for kind in ("key", "value")]
    return Example(
        arguments=(ids, mask, positions, past),
        dynamic_shapes=(row, row, row if with_positions else None, [(slot, slot)] * len(past)),
        flat=[*rows, *(tensor for pair in past for tensor in pair)],
        flat_shapes=[row] * len(rows) + [slot] * len(pairs),
        input_names=["input_ids", "attention_mask", *(["position_ids"] if with_positions else [])]
        + [f"past_key_values.{index}.{kind}" for index, kind in pairs],
        output_names=["logits", *(f"present.{index}.{kind}" for index, kind in pairs)],
        with_positions=with_positions,
    )


def _example_past(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    try:
        with torch.no_grad():
            cache = cache_of(model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True))
        if cache is None:
            raise InputError("the model keeps no KV cache: it is an encoder, or set up as one")
        shapes = [(layer.keys, layer.values) for layer in getattr(cache, "self_attention_cache", cache).layers]
    except (AttributeError, TypeError) as error:
        raise InputError(f"the model keeps no KV cache of a key and a value a layer: {error}") from error
    # Layers at the end that read what layers before them have cached keep nothing.
    while len(shapes) > 1 and shapes[-1] == (None, None):
        shapes.pop()
    if empty := [index for index, (key, value) in enumerate(shapes) if key is None or value is None]:
        raise InputError(
            f"layers {empty} of the model's KV cache hold no key and value: no ONNX signature tells of them"
        )
    return [
        (
            torch.zeros(_BATCH, key.shape[1], _PAST, key.shape[3], dtype=key.dtype),
            torch.zeros(_BATCH, value.shape[1], _PAST, value.shape[3], dtype=value.dtype),
        )
        for key, value in shapes
    ]


_GROUPED = "river_grouped_sdpa"


def attention_forms(model: Any) -> list[str | None]:
    """Attention implementations to try, the leanest first; None is the model's own."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_GROUPED, _grouped_attention)
    AttentionMaskInterface.register(_GROUPED, sdpa_mask)
    ids = torch.arange(6).reshape(2, 3)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    try:
        with torch.no_grad(), quiet():
            expected = model(input_ids=ids, attention_mask=mask).logits[:, -1].float()
            with with_attention(model, _GROUPED):
                found = model(input_ids=ids, attention_mask=mask).logits[:, -1].float()
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError):
        return [None, "eager"]
    same = bool((expected - found).abs().max() <= 1e-2 * expected.abs().max())
    return [_GROUPED, None, "eager"] if same else [None, "eager"]


def _grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """torch's attention on unrepeated key heads: ONNX's Attention takes them so, and five nodes fall away per tensor.

    Raises:
        ValueError: the model asks for more than a mask and a scale.
    """
    if attention_mask is None or any(others.get(name) is not None for name in ("softcap", "position_bias", "s_aux")):
        raise ValueError("attention with more than a mask and a scale")
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous(), None


def attention_op(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch's attention as ONNX's, which also takes one key head for many query heads, unlike torch's own translation.

    Raises:
        ValueError: it is used in a way that has no counterpart.
    """
    from onnxscript import opset23 as op

    if dropout_p or len(query.shape) != 4 or query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        raise ValueError("attention of a form that ONNX lacks")
    output, _, _, _ = op.Attention(query, key, value, attn_mask, scale=scale, is_causal=int(is_causal))
    return output


@contextmanager
def with_attention(model: Any, implementation: str | None) -> Iterator[None]:
    """The model with another attention implementation, for a while."""
    if implementation is None or not hasattr(model, "set_attn_implementation"):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def exportable_experts(model: Any) -> Iterator[None]:
    """A mixture of experts with its products batched, for a while: ONNX has no grouped product."""
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if before is None or not hasattr(model, "set_experts_implementation"):
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on optional packages."""
    import warnings

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
