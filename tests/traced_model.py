"""A small random decoder of plain torch, written to ONNX by either of torch's exporters at any opset."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.families import LAYERS, VOCABULARY

_WIDTH, _HEADS, _KV_HEADS, _HEAD = 64, 4, 2, 16


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.q_proj, self.o_proj = nn.Linear(_WIDTH, _WIDTH, bias=False), nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(_WIDTH, _KV_HEADS * _HEAD) for _ in range(2))
        self.up_proj, self.down_proj = nn.Linear(_WIDTH, 128), nn.Linear(128, _WIDTH)

    def forward(self, x: Any, bias: Any, key: Any, value: Any) -> Any:
        batch, length, _ = x.shape
        normed = self.norm(x)
        query, new_key, new_value = (
            project(normed).view(batch, length, -1, _HEAD).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = torch.cat([key, new_key], 2), torch.cat([value, new_value], 2)
        keys, values = (part.repeat_interleave(_HEADS // _KV_HEADS, 1) for part in (key, value))
        weights = torch.softmax(query @ keys.transpose(2, 3) * _HEAD**-0.5 + bias, -1)
        x = x + self.o_proj((weights @ values).transpose(1, 2).reshape(batch, length, _WIDTH))
        return x + self.down_proj(torch.relu(self.up_proj(self.mlp_norm(x)))), key, value


class TracedDecoder(nn.Module):
    """Takes ``input_ids``, ``attention_mask`` and a list of keys and values, as the exported file does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(VOCABULARY, _WIDTH), nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.norm, self.lm_head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.5)

    def forward(self, input_ids: Any, attention_mask: Any, past: Any) -> Any:
        x, length = self.embed(input_ids), input_ids.shape[1]
        places = torch.arange(attention_mask.shape[1])
        now = (places[:length] + (attention_mask.shape[1] - length))[:, None]
        seen = (places[None] <= now)[None, None] & attention_mask[:, None, None].bool()
        bias = torch.where(seen, torch.zeros(()), torch.full((), -1e4))
        presents = []
        for layer, (key, value) in zip(self.layers, past, strict=True):
            x, key, value = layer(x, bias, key, value)  # noqa: PLW2901
            presents.append((key, value))
        return self.lm_head(self.norm(x)), presents


def traced_model(path: Path, opset: int, *, dynamo: bool, **settings: Any) -> Path:
    """Write the model; ``settings`` go to torch.onnx.export."""
    path.parent.mkdir(parents=True, exist_ok=True)
    slots = [f"{index}.{kind}" for index in range(LAYERS) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(f"past_key_values.{slot}" for slot in slots)]
    outputs = ["logits", *(f"present.{slot}" for slot in slots)]
    past = [tuple(torch.randn(2, _KV_HEADS, 5, _HEAD) for _ in range(2)) for _ in range(LAYERS)]
    example = (torch.randint(0, VOCABULARY, (2, 3)), torch.ones(2, 8, dtype=torch.long), past)
    free: Any = torch.export.Dim.DYNAMIC
    if dynamo:
        cache = ({0: free, 2: free}, {0: free, 2: free})
        settings |= {"dynamic_shapes": ({0: free, 1: free}, {0: free, 1: free}, [cache] * LAYERS), "verbose": False}
    else:
        axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "logits")}
        axes |= {name: {0: "batch", 2: "length"} for name in [*inputs[2:], *outputs[1:]]}
        settings["dynamic_axes"] = axes | {"attention_mask": {0: "batch", 1: "total"}}
    settings |= {"input_names": inputs, "output_names": outputs, "opset_version": opset, "dynamo": dynamo}
    export_quietly(TracedDecoder().eval(), example, path, **settings)
    return path


def export_quietly(module: nn.Module, example: tuple[Any, ...], path: Path, **settings: Any) -> None:
    """torch.onnx.export without its warnings."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, example, str(path), **settings)
