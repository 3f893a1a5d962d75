"""A Hugging Face decoder to plain ONNX, with a KV cache in the signature."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from river_compile.errors import InputError, MissingExtra

__all__ = ["MIN_OPSET", "export_decoder", "load_decoder"]

MIN_OPSET = 23

_BATCH, _SEQUENCE, _PAST = 2, 3, 5


class _Decoder(nn.Module):
    """The model with its KV cache as a plain list of tensors."""

    def __init__(self, model: nn.Module, with_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.with_positions = with_positions

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        from transformers import DynamicCache

        positions = {"position_ids": position_ids} if self.with_positions else {}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(past),
            use_cache=True,
            **positions,
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def load_decoder(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model from a folder or a hub name, in eval mode.

    Raises:
        MissingExtra: transformers is not installed.
        InputError: there is no such model, or it is no causal language model.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "reading a Hugging Face model") from error
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: not a causal language model: {str(error).splitlines()[0]}") from error
    return model.eval()


def export_decoder(model: nn.Module, path: Path, opset: int = MIN_OPSET) -> None:
    """Export a decoder with dynamic batch, sequence and past lengths.

    Inputs: ``input_ids`` int64 [batch, sequence], ``attention_mask`` int64 [batch, past + sequence], ``position_ids``
    int64 [batch, sequence] if the model takes them, ``past_key_values.N.key`` and ``.value`` [batch, heads, past,
    width]. Outputs: ``logits``, ``present.N.key`` and ``.value``. Opset 23 is the first with Attention,
    RotaryEmbedding and RMSNormalization as operators.

    Raises:
        InputError: the model has no KV cache of one key and one value a layer, or torch cannot export it.
    """
    past = _example_past(model)
    with_positions = "position_ids" in inspect.signature(model.forward).parameters
    ids = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
    mask = torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64)
    positions = torch.arange(_PAST, _PAST + _SEQUENCE).expand(_BATCH, -1).contiguous() if with_positions else None
    dynamic = torch.export.Dim.DYNAMIC
    row = {0: dynamic, 1: dynamic}
    slot = {0: dynamic, 2: dynamic}
    names = ["input_ids", "attention_mask", *(["position_ids"] if with_positions else [])]
    pairs = [(index, kind) for index in range(len(past)) for kind in ("key", "value")]
    last_error: Exception | None = None
    for attention in _attention_forms(model):
        # torch's fused attention has forms that ONNX lacks, so the last resort is attention in single operators.
        try:
            with torch.no_grad(), _quiet(), _attention(model, attention), _exportable_experts(model):
                program = torch.onnx.export(
                    _Decoder(model, with_positions),
                    (ids, mask, positions, past),
                    dynamo=True,
                    opset_version=opset,
                    dynamic_shapes=(row, row, row if with_positions else None, [(slot, slot)] * len(past)),
                    input_names=names + [f"past_key_values.{index}.{kind}" for index, kind in pairs],
                    output_names=["logits", *(f"present.{index}.{kind}" for index, kind in pairs)],
                    custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention_op},
                    verbose=False,
                )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, AssertionError) as error:
            last_error = error
            continue
        assert program is not None
        _name_dimensions(program.model.graph)
        program.save(str(path), external_data=True)
        return
    root = last_error
    while root is not None and root.__cause__ is not None:
        root = root.__cause__  # type: ignore[assignment]
    raise InputError(f"torch cannot export the model to ONNX: {' '.join(str(root).split())[:300]}") from last_error


def _example_past(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    try:
        with torch.no_grad():
            cache = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True).past_key_values
        shapes = [(layer.keys, layer.values) for layer in cache.layers]
    except (AttributeError, TypeError) as error:
        raise InputError(f"the model keeps no KV cache of a key and a value a layer: {error}") from error
    return [
        (
            torch.zeros(_BATCH, key.shape[1], _PAST, key.shape[3], dtype=key.dtype),
            torch.zeros(_BATCH, value.shape[1], _PAST, value.shape[3], dtype=value.dtype),
        )
        for key, value in shapes
    ]


_GROUPED = "river_grouped_sdpa"


def _attention_forms(model: Any) -> list[str | None]:
    """Attention implementations to try, the leanest first; None is the model's own."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_GROUPED, _grouped_attention)
    AttentionMaskInterface.register(_GROUPED, sdpa_mask)
    ids = torch.arange(6).reshape(2, 3)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    try:
        with torch.no_grad(), _quiet():
            expected = model(input_ids=ids, attention_mask=mask).logits[:, -1].float()
            with _attention(model, _GROUPED):
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


def _attention_op(
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
def _attention(model: Any, implementation: str | None) -> Iterator[None]:
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
def _exportable_experts(model: Any) -> Iterator[None]:
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
def _quiet() -> Iterator[None]:
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


def _name_dimensions(graph: Any) -> None:
    """Readable names for the symbolic dimensions of the signature, instead of torch's s26 and s70 + s84."""
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is None or not value.name:
            continue
        if value.name.startswith("past_key_values."):
            value.shape[0], value.shape[2] = "batch", "past"
        elif value.name.startswith("present."):
            value.shape[0], value.shape[2] = "batch", "past + sequence"
        elif value.name == "attention_mask":
            value.shape[0], value.shape[1] = "batch", "past + sequence"
        else:
            value.shape[0], value.shape[1] = "batch", "sequence"
