"""Random models made on the device, decode passes over them, and their time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from river_compile.backend import RiverBackend
from river_compile.config import NEVER, RiverConfig
from river_compile.exporters.onnx.kv_cache import cache_argument
from river_compile.exporters.torch.linear import Lowering
from river_compile.exporters.torch.weights import Store
from river_compile.passes.fx.grow_river import Product
from river_compile.passes.quantizer import Quantizer


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False


SHAPES = {
    "small": Shape(4, 512, 1024, 8, 4, 1024),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 128256, tied=True),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "engine": Shape(8, 2048, 8192, 32, 8, 32768, tied=True),
}
TOY = Shape(2, 128, 256, 4, 2, 256)
LENGTH = 512
"""Slots of every static cache: another length would be compiled anew."""


@dataclass(frozen=True)
class Place:
    """Where a section works: on a GPU, or on a CPU with toys in the place of all models, to rehearse.

    Fields:
        inductor: whether Inductor compiles; else what Dynamo and the passes make runs as it is.
    """

    device: torch.device
    inductor: bool = True

    @property
    def rehearsal(self) -> bool:
        return self.device.type == "cpu"

    def shape(self, name: str) -> Shape:
        return TOY if self.rehearsal else SHAPES[name]

    def river(self, parts: dict[str, Any], **settings: Any) -> RiverBackend:
        """A backend of these parts and settings, which makes no exit unless it is told to."""
        config = RiverConfig(**{"tau": NEVER, "strict": True, **settings})
        compiler = None if self.inductor else lambda module, values: module
        return RiverBackend(config, compiler=compiler, **parts)

    def inductors(self, model: Any, mode: str) -> Any:
        """A model compiled by Inductor in that mode."""
        return torch.compile(model, mode=mode) if self.inductor else torch.compile(model, backend="eager")

    def wait(self) -> None:
        if not self.rehearsal:
            torch.cuda.synchronize(self.device)


def random_model(place: Place, name: str, dtype: torch.dtype) -> Any:
    """A Llama of that shape with random weights, which never are in the host's memory."""
    shape = place.shape(name)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    # By way of the meta device rotary angles, which are no weights, would have to be made anew by hand.
    with place.device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def tokens(place: Place, name: str, count: int) -> torch.Tensor:
    """Random token ids, int64 [1, count]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, place.shape(name).vocabulary, (1, count), generator=generator).to(place.device)


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, forward: Callable[..., Any] | None = None) -> tuple[Any, Any]:
    """Logits of a prompt, read by ``forward`` or else in eager mode, and the static cache that holds it."""
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    forward = model if forward is None else forward
    return forward(ids, use_cache=True, **{cache_argument(model): cache}).logits, cache


@torch.no_grad()
def logits_of(model: Any, forward: Callable[..., Any], ids: torch.Tensor, new: int) -> list[torch.Tensor]:
    """Logits after ids [1, n] but for the last ``new``, and after each of those, read one by one."""
    first, cache = read(model, ids[:, :-new], forward)
    kept = {cache_argument(model): cache}
    found = [first[:, -1].clone()]
    for place in range(ids.shape[1] - new, ids.shape[1]):
        found.append(forward(ids[:, place : place + 1], use_cache=True, **kept).logits[:, -1].clone())
    return found


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest, as a share of the range of what was expected."""
    pairs = zip(found, expected, strict=True)
    return max(
        float((ours.float() - theirs.float()).abs().max() / (theirs.max() - theirs.min())) for ours, theirs in pairs
    )


@torch.no_grad()
def decode_ms(place: Place, model: Any, forward: Callable[..., Any], ids: torch.Tensor, new: int, rounds: int) -> float:
    """Milliseconds a greedy token behind a prompt that eager mode has read: the median of rounds of ``new`` tokens.

    The first round, not counted, compiles. The host waits for the device at a round's end only.
    """
    times = []
    logits, cache = read(model, ids)
    kept = {cache_argument(model): cache}
    token = logits[:, -1:].argmax(-1)
    for _ in range(rounds + 1):
        place.wait()
        started = time.perf_counter()
        for _ in range(new):
            torch.compiler.cudagraph_mark_step_begin()
            token = forward(token, use_cache=True, **kept).logits[:, -1:].argmax(-1)
        place.wait()
        times.append(1e3 * (time.perf_counter() - started) / new)
    return statistics.median(times[1:])


def median_ms(
    place: Place, work: Callable[[], object], repeats: int, undo: Callable[[], object] = lambda: None
) -> float:
    """Milliseconds of some work, waited for each time and undone after it: the median, without two to warm up."""
    times = []
    for _ in range(repeats + 2):
        place.wait()
        started = time.perf_counter()
        work()
        place.wait()
        times.append(1e3 * (time.perf_counter() - started))
        undo()
    return statistics.median(times[2:])


def captured(place: Place, work: Callable[[], object]) -> Callable[[], object]:
    """The work as one CUDA graph: kernels of microseconds take the host longer to start than to run."""
    if place.rehearsal:
        return work
    with torch.cuda.stream(torch.cuda.Stream()):
        work()
    place.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class Repeated(Store):
    """A river whose layers have equal weights, each in memory of its own: quantizing billions of weights takes the host
    minutes, and what a product takes depends on their number only."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[object, tuple[torch.Tensor, ...]] = {}
        self._copies: dict[object, tuple[torch.Tensor, ...]] = {}

    def get(
        self, parameters: Sequence[torch.Tensor], product: Product, lowering: Lowering, chosen: Quantizer
    ) -> tuple[torch.Tensor, ...]:
        grid = product.bits, product.group_size, lowering.name
        kind = tuple(parameter.shape for parameter in parameters), grid
        own = tuple(map(id, parameters)), grid
        if kind not in self._first:
            self._first[kind] = self._copies[own] = super().get(parameters, product, lowering, chosen)
        if own not in self._copies:
            self._copies[own] = tuple(operand.clone() for operand in self._first[kind])
        return self._copies[own]

    def nbytes(self, parameters: Sequence[torch.Tensor]) -> int:
        return sum(operand.nbytes for operands in self._copies.values() for operand in operands)
