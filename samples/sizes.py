"""The gain by model size: rivers beside their plain models in ONNX Runtime, real models and random ones of a shape.

    python samples/sizes.py                        # SmolLM2-135M, and Llama-3.2-1B's shape
    python samples/sizes.py smollm2 gemma3 1b      # Gemma 3 270M too, after `make gemma3`

All weights are float32, rivers are rounded to 4 bits with an 8-bit LM head; decode passes of one sequence, all ways
interleaved. Random weights tell speed and memory and nothing of a text, so depths are forced. Models are kept under
.cache/sizes; that of the 1B shape takes 5 GB of disk, and 11 more while it is measured.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from gemma3 import gemma3
from rich import box
from rich.console import Console
from rich.table import Table
from side_by_side.models import SHAPES, random_model
from smollm2 import CACHE, smollm2

from river_compile import RiverConfig
from river_compile.exporters.onnx.hf import export_decoder, load_decoder
from river_compile.measure.onnx_bench import OnnxBench, bench_onnx

REAL = {"smollm2": smollm2, "gemma3": gemma3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2", "1b"], help=f"of {', '.join([*REAL, *SHAPES])}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=12, help="decode passes in a round")
    parser.add_argument("--group-size", type=int, default=RiverConfig.group_size, help="of the rivers")
    parser.add_argument("--int4", action="store_true", help="plain models in 4 bits too, by ONNX Runtime's quantizer")
    given = parser.parse_args()
    if unknown := set(given.models) - {*REAL, *SHAPES}:
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    found = {}
    for name in given.models:
        found[name] = bench_onnx(
            plain_model(name),
            depths=(4,),
            rounds=given.rounds,
            new_tokens=given.tokens,
            int4=given.int4,
            config=RiverConfig(tau=2.0, head_bits=8, group_size=given.group_size),
        )
    show(found)


def plain_model(name: str) -> Path:
    """The model as ONNX, made on first use."""
    path = CACHE / "sizes" / name / "model.onnx"
    if not path.exists():
        part = path.parent.with_name(f"{name}.part")
        part.mkdir(parents=True, exist_ok=True)
        # The model, and what its export leaves behind, go with the process.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            process.submit(_export, name, part / path.name).result()
        part.rename(path.parent)
    return path


def _export(name: str, path: Path) -> None:
    model = load_decoder(REAL[name]()) if name in REAL else random_model(name)
    export_decoder(model.float(), path)


def show(found: dict[str, OnnxBench]) -> None:
    first = next(iter(found.values()))
    print(f"{first.device}; milliseconds of a decode pass, and the speed-up over plain; {first.rounds} rounds")
    table = Table(box=box.SIMPLE)
    table.add_column("")
    for name, bench in found.items():
        table.add_column(f"{name}, {bench.layers} layers", justify="right")
    for way in [row.name for row in first.points[0].rows]:
        cells = []
        for bench in found.values():
            point = bench.points[0]
            row = point.row(way)
            cells.append("" if row is None else f"{1e3 * row.median:.1f} ({point.ratio(row):.2f}x)")
        table.add_row(way, *cells)
    Console().print(table)
    for name, bench in found.items():
        for note in bench.notes:
            print(f"{name}: {note}")


if __name__ == "__main__":
    main()
