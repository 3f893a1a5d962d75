"""The decoder of a small random BART with its caches, written to ONNX as optimum does: by torch's legacy exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from tests.families import VOCABULARY
from tests.traced_model import export_quietly

_WIDTH, _HEADS = 64, 4


class _Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BartConfig(
            vocab_size=VOCABULARY,
            d_model=_WIDTH,
            encoder_layers=1,
            decoder_layers=layers,
            decoder_attention_heads=_HEADS,
            encoder_attention_heads=_HEADS,
            decoder_ffn_dim=128,
            encoder_ffn_dim=128,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
        self.model, self.layers = BartForConditionalGeneration(config).eval(), layers
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.5)

    def forward(self, input_ids: Any, encoder_attention_mask: Any, encoder_hidden_states: Any, *past: Any) -> Any:
        own, encoders = DynamicCache(), DynamicCache()
        for index in range(self.layers):
            key, value, encoder_key, encoder_value = past[4 * index : 4 * index + 4]
            own.update(key, value, index)
            encoders.update(encoder_key, encoder_value, index)
        cache = EncoderDecoderCache(own, encoders)
        cache.is_updated = dict.fromkeys(range(self.layers), True)
        logits = self.model(
            decoder_input_ids=input_ids,
            attention_mask=encoder_attention_mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits, *(part for layer in own.layers for part in (layer.keys, layer.values))


def cross_attending_model(path: Path, layers: int) -> Path:
    """Write the model: ``past_key_values.I.encoder`` goes in only, ``.decoder`` comes out as ``present.I.decoder``."""
    kinds = ("key", "value")
    own = [f"{index}.decoder.{kind}" for index in range(layers) for kind in kinds]
    inputs = ["input_ids", "encoder_attention_mask", "encoder_hidden_states"]
    axes = {"input_ids": {0: "batch"}, **{name: {0: "batch", 1: "source"} for name in inputs[1:]}}
    past = []
    for index in range(layers):
        for side, length in (("decoder", 3), ("encoder", 5)):
            for kind in kinds:
                inputs.append(f"past_key_values.{index}.{side}.{kind}")
                axes[inputs[-1]] = {0: "batch", 2: "past" if side == "decoder" else "source"}
                past.append(torch.randn(2, _HEADS, length, _WIDTH // _HEADS))
    outputs = ["logits", *(f"present.{slot}" for slot in own)]
    axes |= {name: {0: "batch", 2: "total"} for name in outputs[1:]}
    example = (torch.ones(2, 1, dtype=torch.long), torch.ones(2, 5, dtype=torch.long), torch.randn(2, 5, _WIDTH), *past)
    settings = {"input_names": inputs, "output_names": outputs, "opset_version": 17, "dynamo": False}
    export_quietly(_Decoder(layers), example, path, dynamic_axes=axes, **settings)
    return path
