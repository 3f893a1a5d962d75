"""A Hugging Face decoder to plain ONNX, with a KV cache in the signature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from river_compile.errors import InputError, MissingExtra
from river_compile.exporters.onnx.file_problems import problem_of_folder
from river_compile.exporters.onnx.tracing import (
    CachedDecoder,
    attention_forms,
    attention_op,
    example_of,
    exportable_experts,
    quiet,
    with_attention,
)

__all__ = ["MIN_OPSET", "export_decoder", "load_decoder"]

MIN_OPSET = 23


def load_decoder(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model from a folder or a hub name, in eval mode.

    Raises:
        MissingExtra: transformers is not installed.
        InputError: there is no such model, it is no causal language model, it is quantized already, or some of its
            weights are missing.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "reading a Hugging Face model") from error
    if why := problem_of_folder(Path(folder)):
        raise InputError(f"{folder}: not a causal language model: {why}")
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: not a causal language model: {str(error).splitlines()[0]}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{folder}: an encoder-decoder model ({config.model_type}); export its decoder to ONNX, with past key "
            "values, and give that file"
        )
    quantized = getattr(config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype or "auto", output_loading_info=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if quantized:
            raise InputError(f"{folder}: already quantized ({method}), so start from the float model") from error
        problem = f"a {config.model_type!r} model that cannot be loaded as one: {str(error).splitlines()[0]}"
        raise InputError(f"{folder}: not a causal language model, or {problem}") from error
    model, found = loaded
    if getattr(model, "is_quantized", False):
        raise InputError(f"{folder}: already quantized ({method}), so start from the float model")
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{folder}: {len(missing)} weights of the model are missing, such as {missing[0]}")
    decoder: nn.Module = model.eval()
    return decoder


def export_decoder(model: nn.Module, path: Path, opset: int = MIN_OPSET) -> None:
    """Export a decoder with dynamic batch, sequence and past lengths.

    Inputs: ``input_ids`` int64 [batch, sequence], ``attention_mask`` int64 [batch, past + sequence], ``position_ids``
    int64 [batch, sequence] if the model takes them, ``past_key_values.N.key`` and ``.value`` [batch, heads, past,
    width]. Outputs: ``logits``, ``present.N.key`` and ``.value``. Opset 23 is the first with Attention,
    RotaryEmbedding and RMSNormalization as operators.

    Raises:
        InputError: the model has no KV cache of one key and one value a layer, or torch cannot export it.
    """
    example = example_of(model)
    last_error: Exception | None = None
    for attention in attention_forms(model):
        # torch's fused attention has forms that ONNX lacks, so the last resort is attention in single operators.
        try:
            with torch.no_grad(), quiet(), with_attention(model, attention), exportable_experts(model):
                program = torch.onnx.export(
                    CachedDecoder(model, example.with_positions),
                    example.arguments,
                    dynamo=True,
                    opset_version=opset,
                    dynamic_shapes=example.dynamic_shapes,
                    input_names=example.input_names,
                    output_names=example.output_names,
                    custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: attention_op},
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
