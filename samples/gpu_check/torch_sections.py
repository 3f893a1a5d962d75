"""The sections in PyTorch."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from models import (
    Place,
    Repeated,
    captured,
    decode_ms,
    difference,
    logits_of,
    median_ms,
    random_model,
    read,
    tokens,
)
from report import Report
from torch import nn

from river_compile.config import NEVER, RiverConfig
from river_compile.exporters.onnx.kv_cache import cache_argument
from river_compile.exporters.quantizers.rtn import RoundToNearest
from river_compile.exporters.torch.graphs import WARM
from river_compile.exporters.torch.linear import Dequantized, Lowering, dequantized_product, lowering_for
from river_compile.exporters.torch.recorder import CudaRecorder, Recorded
from river_compile.exporters.torch.state import forced_exits
from river_compile.passes.quantizer import QuantizedWeight
from river_compile.runtime import hf_cache
from river_compile.runtime.drafting import expected_speedup

EXACT, KERNEL = 1e-4, 3e-2
"""Of the logits' range: float32 against float32, and with products in bfloat16."""
PRODUCT = 2e-2
"""Of a product's largest result: bfloat16 has 8 bits, and 8-bit weights are two such products added."""
ROWS = (1, 2, 4, 8, 16)
ACCEPTANCES = (0.7, 0.8, 0.9)


def depths(place: Place, report: Report) -> None:
    """Every depth against eager mode with the layers behind it rounded and dequantized."""
    ways: list[tuple[torch.dtype, Lowering, float]] = [
        (torch.float32, Dequantized(), EXACT),
        (torch.float32, lowering_for(place.device), KERNEL),
        (torch.bfloat16, lowering_for(place.device), KERNEL),
    ]
    for dtype, lowering, tolerance in ways:
        torch.compiler.reset()
        model = random_model(place, "small", dtype)
        backend = place.river({"lowering": lowering}, prefill="river")
        compiled, ids = torch.compile(model, backend=backend), tokens(place, "small", 12)
        for depth in range(len(model.model.layers) + 1):
            backend.max_depth = depth
            backend.decode_depths.clear()
            found = logits_of(model, compiled, ids, 4)
            off = difference(found, logits_of(model, with_river_from(model, depth), ids, 4))
            good = off <= tolerance and dict(backend.decode_depths) == {depth: 4}
            name = f"{str(dtype).removeprefix('torch.')}, {lowering.name}, depth {depth}"
            report.check(name, good, difference=off, tolerance=tolerance)


@torch.no_grad()
def with_river_from(model: Any, depth: int) -> Any:
    """The judge: a copy in eager mode whose linear layers from ``depth`` on are rounded to the river's grid."""
    judge, config = copy.deepcopy(model), RiverConfig()
    for layer in judge.model.layers[depth:]:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                matrix = module.weight.float().T.contiguous().cpu().numpy()
                rounded = RoundToNearest().quantize(matrix, config.bits, config.group_size).dequantize()
                module.weight.copy_(torch.from_numpy(rounded).T)
    return judge


def int4(place: Place, report: Report) -> None:
    """The product with 4- and 8-bit weights: against the float product, and its time."""
    lowering = lowering_for(place.device)
    torch.manual_seed(0)
    for bits, group, outputs in ((4, 32, 256), (4, 64, 250), (4, 128, 256), (8, 32, 256), (8, 64, 250)):
        matrix = torch.randn(512, outputs, device=place.device)
        quantized = RoundToNearest().quantize(matrix.cpu().numpy(), bits, group)
        expected = torch.from_numpy(quantized.dequantize()).to(place.device)
        for dtype in (torch.bfloat16, torch.float32):
            operands = lowering.pack(quantized, dtype, place.device)
            # One operand is the dequantized weight: no kernel takes this shape.
            off = [0.0 if len(operands) > 1 else float("inf")]
            bias = torch.randn(outputs, device=place.device)
            for rows in (1, 3, 16, 40):
                activation = torch.randn(rows, 512, device=place.device, dtype=dtype)
                found = lowering.function(activation, operands, outputs, bits, group, bias.to(dtype)).float()
                exactly = activation.float() @ expected + bias.to(dtype).float()
                off.append(float((found - exactly).abs().max() / exactly.abs().max()))
            name = f"{lowering.name}, {bits} bits, groups of {group}, {outputs} outputs, {str(dtype)[6:]}"
            report.check(name, max(off) <= PRODUCT, difference=max(off), tolerance=PRODUCT)
    for outputs, inputs in ((256, 256),) if place.rehearsal else ((6144, 4096), (28672, 4096), (4096, 14336)):
        _time_products(place, report, lowering, outputs, inputs)


def _time_products(place: Place, report: Report, lowering: Lowering, outputs: int, inputs: int) -> None:
    generator = np.random.default_rng(0)
    copies = 2 if place.rehearsal else 6
    for bits in (4, 8, 16):
        function = dequantized_product if bits == 16 else lowering.function
        if bits == 16:
            shape = (copies, outputs, inputs)
            weights = [(weight,) for weight in torch.randn(shape, device=place.device, dtype=torch.bfloat16)]
        else:
            values = generator.integers(0, 1 << bits, (outputs, inputs // 32, 32), np.uint8)
            grid = np.full(values.shape[:2], 1 << (bits - 1), np.uint8)
            quantized = QuantizedWeight(values, np.full(grid.shape, 0.01, np.float32), grid, bits)
            first = lowering.pack(quantized, torch.bfloat16, place.device)
            # In turn, so that none is read from a cache: a decode pass reads each weight once.
            weights = [tuple(operand.clone() for operand in first) for _ in range(copies)]
        cells = {}
        for rows in ROWS:
            activation = torch.randn(rows, inputs, device=place.device, dtype=torch.bfloat16)

            product = functools.partial(function, activation, outputs=outputs, bits=bits, group_size=32, bias=None)
            run = functools.partial(_each, product, weights * 4)
            cells[f"{rows} rows, us"] = 1e3 * median_ms(place, captured(place, run), 5) / (4 * copies)
        read = sum(operand.nbytes for operand in weights[0])
        cells["GB/s at 1 row"] = 1e-3 * read / cells["1 rows, us"]
        name = "torch, bfloat16" if bits == 16 else f"{lowering.name}, {bits} bits"
        report.row("products", weight=f"{outputs}x{inputs}", way=name, **cells)


def _each(product: Callable[[Any], object], weights: Sequence[Any]) -> None:
    for operands in weights:
        product(operands)


class _Counted:
    """CUDA graphs, counted."""

    def __init__(self, device: torch.device, counts: dict[str, int]) -> None:
        self._recorder, self._counts = CudaRecorder(device), counts

    def record(self, run: Callable[[], Sequence[Any]], flag: int | None) -> tuple[Recorded, Sequence[Any]]:
        recorded = self._recorder.record(run, flag)
        self._counts["captured"] += 1
        return recorded


def graphs(place: Place, report: Report) -> None:
    """Decode passes as CUDA graphs against the same passes without: logits, exit depths, time."""
    model, ids = random_model(place, "small", torch.bfloat16), tokens(place, "small", 40)
    counts = {"captured": 0}
    # By a fixed table: on a CPU each backend would time its products and could take others, which round otherwise.
    plain = place.river({}, autotune=False)
    recorder = None if place.rehearsal else lambda device: _Counted(device, counts)
    recorded = place.river({"recorder": recorder, "store": plain.store}, cuda_graphs=True, autotune=False)
    ways = {"without": plain, "with": recorded}
    compiled = {name: torch.compile(model, backend=backend) for name, backend in ways.items()}
    layers = len(model.model.layers)
    # The last: a threshold that some similarities reach and others do not, so the host reads each of them.
    settings: list[tuple[float, int | None]] = [(NEVER, depth) for depth in range(layers + 1)]
    for tau, depth in [*settings, (_middle_similarity(model, ids), None)]:
        name = f"tau {tau:.6f}" if depth is None else f"depth {depth}"
        found, exits, times = {}, {}, {}
        for way, backend in ways.items():
            backend.tau, backend.max_depth = tau, depth
            backend.decode_depths.clear()
            found[way] = logits_of(model, compiled[way], ids, 24)
            exits[way] = dict(sorted(backend.decode_depths.items()))
        off = difference(found["with"], found["without"])
        report.check(name, off <= EXACT and exits["with"] == exits["without"], difference=off, exits=exits["with"])
        for way in ways:
            times[f"{way}, ms"] = decode_ms(place, model, compiled[way], ids, 16, 3)
        report.row("a token", setting=name, **times)
    if place.rehearsal:
        report.note("on a CPU nothing is captured: both ways run plainly")
    else:
        report.check("captured", counts["captured"] > layers, graphs=counts["captured"])
    notes = recorded.stats().notes
    report.check("no graph goes without", not any("without CUDA graphs" in note for note in notes), notes=list(notes))


@torch.no_grad()
def _middle_similarity(model: Any, ids: torch.Tensor) -> float:
    """The middle of all similarities of a layer's input and output, of single tokens and layers but the last."""
    states = model(ids, output_hidden_states=True).hidden_states
    pairs = itertools.pairwise(states[:-1])
    return float(torch.cat([torch.cosine_similarity(a.float(), b.float(), -1)[0, 16:] for a, b in pairs]).median())


def llama(name: str) -> Callable[[Place, Report], None]:
    """The section for that shape: decode in every way."""

    def section(place: Place, report: Report) -> None:
        model, ids = random_model(place, name, torch.bfloat16), tokens(place, name, 128)
        table = f"{name}, bfloat16, a token behind {ids.shape[1]}"
        new, rounds = (4, 1) if place.rehearsal else (32, 5)
        reference: list[float] = []

        def measure(way: str, forward: Callable[..., Any]) -> None:
            started = time.perf_counter()
            try:
                ms = decode_ms(place, model, forward, ids, new, rounds)
            except Exception as error:
                failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                report.row(table, way=way, failed=failed)
                if way.startswith("river"):
                    report.check(f"{way} runs", False, failed=failed)
                return
            took = time.perf_counter() - started - 1e-3 * ms * new * rounds
            reference[:] = reference or [ms]
            report.row(table, way=way, ms=ms, tokens_s=1e3 / ms, ratio=reference[0] / ms, warm_up_s=took)

        measure("Inductor, reduce-overhead", place.inductors(model, "reduce-overhead"))
        if skips := torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]:
            report.note(f"reduce-overhead ran {skips} graphs without CUDA graphs")
        store = Repeated()
        for kind, recorded in (("", False), (", CUDA graphs", True)):
            backend = place.river({"store": store}, cuda_graphs=recorded)
            compiled = torch.compile(model, backend=backend)
            for depth in sorted({len(model.model.layers), 8, 4, 1, 0} & set(range(len(model.model.layers) + 1)))[::-1]:
                backend.max_depth = depth
                measure(f"river{kind}, exit depth {depth}", compiled)
            for note in backend.stats().notes:
                report.note(f"river{kind}: {note}")
        measure("eager", model)
        measure("Inductor, max-autotune", place.inductors(model, "max-autotune"))
        stats = backend.stats()
        memory = 0 if place.rehearsal else torch.cuda.max_memory_allocated(place.device)
        report.row("bytes", weights=stats.backbone_bytes, river=stats.river_bytes, most_in_use=memory)

    return section


def exact(place: Place, report: Report) -> None:
    """What exact decoding promises, on a small model in float32, and what it costs, in Llama-3.2-1B's shape."""
    _same_tokens(place, report, "small", torch.float32, 24 if place.rehearsal else 64)
    torch.compiler.reset()
    _costs(place, report, "llama-3.2-1b")
    torch.compiler.reset()
    _same_tokens(place, report, "llama-3.2-1b", torch.bfloat16, 24 if place.rehearsal else 64)


def _same_tokens(place: Place, report: Report, name: str, dtype: torch.dtype, new: int) -> None:
    model, ids = random_model(place, name, dtype), tokens(place, name, 32)
    plain = place.river({})
    drafts = place.river({"store": plain.store}, tau=RiverConfig.tau, exact=True)
    made, seconds = {}, {}
    for way, backend in (("plain", plain), ("exact", drafts)):
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            started = time.perf_counter()
            made[way] = compiled.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )[0, ids.shape[1] :].tolist()
            seconds[way] = time.perf_counter() - started
    differing = sum(a != b for a, b in zip(made["plain"], made["exact"], strict=True))
    kind = str(dtype).removeprefix("torch.")
    report.check(f"exact, {name}, {kind}", not differing, tokens=new, differing=differing)
    stats = drafts.stats()
    cells = {f"{way}, tokens/s": new / value for way, value in seconds.items()}
    rounds = {key: stats.exact.get(key, 0) for key in ("rounds", "drafted", "accepted")}
    report.row("generate, cache that grows, second run", model=f"{name}, {kind}", **cells, **rounds)
    for note in stats.notes:
        report.note(f"{name}, {kind}: {note}")


@torch.no_grad()
def _costs(place: Place, report: Report, name: str) -> None:
    """Milliseconds of a draft and of backbone passes by rows, and what they would bring at some acceptances."""
    model, ids = random_model(place, name, torch.bfloat16), tokens(place, name, 128)
    store = Repeated()
    for recorded in (False, True):
        # With the head of a river that drafts only.
        backend = place.river({"store": store}, cuda_graphs=recorded, exact=True)
        draft, verify = _pass_ms(place, model, torch.compile(model, backend=backend), ids)
        table = "milliseconds of a pass" + (", CUDA graphs" if recorded else "")
        report.row(table, draft=draft, **{f"{rows} rows": cost for rows, cost in verify.items()})
        for share in ACCEPTANCES:
            chances = (share,) * (max(verify) - 1)
            speedup, length = expected_speedup(chances, verify[1], draft, verify.__getitem__)
            report.row(f"what {table} promise exact decoding", acceptance=share, speedup=speedup, drafts=length)


def _pass_ms(
    place: Place, model: Any, compiled: Callable[..., Any], ids: torch.Tensor
) -> tuple[float, dict[int, float]]:
    """Milliseconds of a draft, and of a backbone pass by its rows, behind one prompt."""
    _, cache = read(model, ids)
    mark, kept = hf_cache.mark(cache), {cache_argument(model): cache}

    def ms(rows: int, depth: int | None) -> float:
        run = functools.partial(compiled, ids[:, :rows], use_cache=True, **kept)
        back = functools.partial(hf_cache.back, cache, mark)
        with forced_exits(NEVER, depth):
            # CUDA graphs are captured on the way.
            median_ms(place, run, WARM, back)
            return median_ms(place, run, 2 if place.rehearsal else 15, back)

    draft = ms(1, 0)
    return draft, {rows: ms(rows, None) for rows in ((1, 2, 3) if place.rehearsal else range(1, 17))}
