"""What a river would bring to a model, from its config alone: sizes, bytes a token, speed at the byte limit.

Nothing is loaded, and nothing measured but what an export would take: the model is made on torch's meta device, and
arithmetic follows. Decoding one sequence is bound by reading weights, so a token costs at least its bytes over the
memory's bandwidth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from river_compile.config import FLOAT, RiverConfig
from river_compile.errors import ConfigError, InputError, MissingExtra
from river_compile.exporters.torch.stack import find_stack, is_linear
from river_compile.measure.export_cost import ExportCost, export_cost
from river_compile.passes.quantizer import fitting_group
from river_compile.runtime.drafting import expected_speedup

__all__ = ["RiverPlan", "Sizes", "plan_river", "sizes_of"]

ACCEPTANCES = (0.7, 0.8, 0.9, 0.95)
_GRID_BITS = 32
"""Of a group: scale and middle in 16 bits each, as torch's kernels take them."""
_ROW_SHARE, _MOST_DRAFTS = 0.05, 12


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model and of its river, on one rank.

    Fields:
        layers: decoder layers.
        linears: weights of all layers' linear layers; ``others``: what else they hold (norms, biases, experts).
        river: the quantized twins of ``linears``, with what of them no grid fits.
        embedding: tables of embeddings, and what else lies outside the layers; ``head`` is the LM head, which counts
            once with them if it is tied.
        tied: whether they are.
        exit_head: the head that a token takes after its exit.
        cache_per_token: of keys and values of one token.
        rounded: how many weights are quantized, of the head too, on all ranks; ``largest``: in the largest matrix.
    """

    layers: int
    linears: float
    others: float
    river: float
    embedding: float
    head: float
    tied: bool
    exit_head: float
    cache_per_token: float
    rounded: int
    largest: int

    @property
    def backbone(self) -> float:
        """Bytes of the model as it is."""
        return self.linears + self.others + self.embedding + (0 if self.tied else self.head)

    @property
    def added(self) -> float:
        """Bytes of the river, and of a quantized head."""
        return self.river + (0 if self.exit_head == self.head else self.exit_head)

    def token(self, depth: int, context: int = 0) -> float:
        """Bytes read for a token that exits after ``depth`` layers, behind so many tokens."""
        weights = self.linears * depth + self.river * (self.layers - depth)
        head = self.head if depth == self.layers else self.exit_head
        return weights / self.layers + self.others + head + self.cache_per_token * context


@dataclass(frozen=True)
class RiverPlan:
    """What to expect of a river.

    Fields:
        model, dtype, ranks: what was asked about; ``sizes`` are those of one rank.
        context: tokens in the cache.
        bandwidth, memory: of each rank, bytes a second and bytes; None: not given.
        fraction: what part of the byte limit is reached.
        speeds: by exit depth, tokens a second of one sequence at that part of the limit.
        exact: by acceptance, speed-up of exact decoding at the best draft length, and that length.
        needed: bytes of weights and cache of a rank.
        export: what making it as ONNX would take on this machine, of the whole model; None if that cannot be measured.
    """

    model: str
    dtype: str
    ranks: int
    context: int
    bandwidth: float
    memory: float | None
    fraction: float
    sizes: Sizes
    speeds: dict[int, float]
    exact: dict[float, tuple[float, int]]
    needed: float
    export: ExportCost | None

    @property
    def fits(self) -> bool | None:
        """Whether weights and cache fit; None if the memory was not given."""
        return None if self.memory is None else self.needed <= self.memory

    def to_json(self) -> str:
        document = asdict(self) | {"fits": self.fits}
        document["sizes"] |= {"backbone": self.sizes.backbone, "added": self.sizes.added}
        return json.dumps(document, indent=2)


def plan_river(
    source: str | Path,
    bandwidth: float,
    *,
    memory: float | None = None,
    context: int = 1024,
    dtype: torch.dtype | None = None,
    ranks: int = 1,
    fraction: float = 1.0,
    depths: Sequence[int] = (1, 4, 8),
    config: RiverConfig | None = None,
) -> RiverPlan:
    """Plan a river for a model.

    Args:
        source: a folder or a hub name with a config, or a config file.
        bandwidth: of the memory, bytes a second; with several ranks, of each.
        memory: of each rank, bytes.
        context: tokens in the cache.
        dtype: of the weights; None: as the config says.
        ranks: over which linear layers, head and cache are divided (tensor parallelism).
        fraction: what part of the byte limit is reached, as measured on like machines.
        depths: exit depths to tell of; all river and exits off are told anyway.
        config: of the river: bits, group size, head.

    Raises:
        InputError: there is no config of a decoder there.
        ConfigError: a number has a value it cannot have.
        MissingExtra: transformers is not installed.
    """
    for name, value in {"bandwidth": bandwidth, "memory": memory or 1.0, "ranks": ranks, "fraction": fraction}.items():
        if value <= 0:
            raise ConfigError(name, f"must be above 0, not {value}")
    model, described = _described(source, dtype)
    config = config or RiverConfig()
    sizes = sizes_of(model, described, config, ranks)
    shown = [0, *(depth for depth in sorted(set(depths)) if 0 < depth < sizes.layers), sizes.layers]
    speeds = {depth: fraction * bandwidth / sizes.token(depth, context) for depth in shown}
    whole = sizes.token(sizes.layers, context)
    exact = {
        acceptance: expected_speedup(
            [acceptance] * _MOST_DRAFTS,
            whole,
            sizes.token(0, context),
            lambda rows: whole * (1 + _ROW_SHARE * (rows - 1)),
        )
        for acceptance in ACCEPTANCES
    }
    needed = sizes.backbone + sizes.added + sizes.cache_per_token * context
    name = str(dtype or model.dtype).removeprefix("torch.")
    whole_model = sizes if ranks == 1 else sizes_of(model, described, config)
    export = export_cost(
        config,
        layers=whole_model.layers,
        rounded=whole_model.rounded,
        largest=whole_model.largest,
        backbone=whole_model.backbone,
        added=whole_model.added,
    )
    return RiverPlan(
        str(source), name, ranks, context, bandwidth, memory, fraction, sizes, speeds, exact, needed, export
    )


def _described(source: str | Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The model on the meta device, and the config of its text part."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "reading a config") from error
    if isinstance(source, Path) and not source.exists():
        raise InputError(f"{source}: no such file or folder")
    try:
        config = AutoConfig.from_pretrained(str(source))
        with torch.device("meta"):
            make: Any = AutoModelForCausalLM
            model = make.from_config(config, dtype=dtype or config.dtype or torch.float32)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{source}: no config of a causal language model: {str(error).splitlines()[0]}") from error
    return model, config.get_text_config()


def sizes_of(model: nn.Module, described: Any, config: RiverConfig, ranks: int = 1) -> Sizes:
    """Bytes of a model, on any device, and of the river that it would get.

    Args:
        described: the config of its text part.
        ranks: see `plan_river`. What does not divide stays whole on each.

    Raises:
        LayersNotFound: it has no stack of decoder layers.
    """
    path, stack = find_stack(model)
    kept = config.kept(len(stack))
    styles: dict[str, str] = getattr(model, "_tp_plan", None) or {}
    linears = others = river = 0.0
    rounded: list[int] = []
    for index, layer in enumerate(stack):
        weights = {id(module.weight): (name, module) for name, module in layer.named_modules() if is_linear(module)}
        for parameter in layer.parameters():
            if id(parameter) not in weights:
                others += parameter.nbytes
                continue
            name, module = weights[id(parameter)]
            linears += parameter.nbytes / ranks
            inputs = parameter.shape[1 if isinstance(module, nn.Linear) else 0]
            qualified = f"{path}.{index}.{name}"
            if styles.get(re.sub(r"\d+", "*", qualified), "").startswith("rowwise") and inputs % ranks == 0:
                # A group is within a rank's shard.
                inputs //= ranks
            bits = None if index in kept else config.bits_of(qualified, f"layers.{index}")
            river += _river_bytes(parameter, inputs, bits, config.group_size) / ranks
            if _is_rounded(inputs, bits, config.group_size):
                rounded.append(parameter.numel())
    embedding: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    module = model.get_output_embeddings()  # type: ignore[operator]
    head = embedding if module is None else module.weight
    bits = None if config.head_bits == FLOAT else int(config.head_bits)
    inside = {id(parameter) for parameter in stack.parameters()} | {id(head)} - {id(embedding)}
    if _is_rounded(head.shape[1], bits, config.group_size):
        rounded.append(head.numel())
    outside = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in inside)
    return Sizes(
        layers=len(stack),
        linears=linears,
        others=others,
        river=river,
        embedding=outside / ranks,
        head=head.nbytes / ranks,
        tied=head is embedding or bool(getattr(described, "tie_word_embeddings", False)),
        exit_head=_river_bytes(head, head.shape[1], bits, config.group_size) / ranks,
        cache_per_token=_cache_per_token(described, len(stack), embedding.itemsize, ranks),
        rounded=sum(rounded),
        largest=max(rounded, default=0),
    )


def _is_rounded(inputs: int, bits: int | None, group_size: int) -> bool:
    return bits is not None and fitting_group(inputs, group_size) is not None


def _river_bytes(weight: torch.Tensor, inputs: int, bits: int | None, group_size: int) -> float:
    group = fitting_group(inputs, group_size)
    if bits is None or group is None:
        return float(weight.nbytes)
    return weight.numel() * (bits / 8 + bits // 4 * _GRID_BITS / 8 / group)


def _cache_per_token(described: Any, layers: int, itemsize: int, ranks: int) -> float:
    heads = getattr(described, "num_attention_heads", 0)
    groups = getattr(described, "num_key_value_heads", None) or heads
    width = getattr(described, "head_dim", None) or (described.hidden_size // heads if heads else 0)
    # A rank holds a head at least.
    return 2.0 * layers * max(groups / ranks, 1) * width * itemsize
