"""A Llama of a Hugging Face folder as a GGUF file, for llama.cpp.

    python -m side_by_side.gguf_file HF_FOLDER FILE.gguf Q4_0|Q8_0

Weights are rounded by the `gguf` package's own quantizers. A tied LM head is the table of embeddings, which has 8 bits,
as llama.cpp's own tool leaves it more bits than the rest. No tokenizer is written: peers are given token ids.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from transformers import AutoModelForCausalLM


def _rows_of_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp's rotary embedding wants them: neighbours turn together, where
    transformers turns the first half of a head with the second."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def write(folder: Path, file: Path, kind: str) -> None:
    """
    Raises:
        SystemExit: it is no Llama with plain rotary embeddings.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    if config.model_type != "llama" or config.rope_parameters["rope_type"] != "default":
        raise SystemExit(f"{folder}: only a Llama with plain rotary embeddings can be written")
    writer = gguf.GGUFWriter(file, "llama")
    _write_settings(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        if found := re.search(r"\.(q_proj|k_proj)\.weight$", name):
            weight = _rows_of_pairs(weight, heads[found[1]])
        chosen = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            outer = name in ("model.embed_tokens.weight", "lm_head.weight")
            chosen = gguf.GGMLQuantizationType["Q8_0" if outer else kind]
        written = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(written, quantize(weight, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
