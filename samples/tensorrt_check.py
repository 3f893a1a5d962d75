"""Check TensorRT engines on a GPU: one command, about ten minutes, everything it says is measured in that run.

    python samples/tensorrt_check.py [MODEL.onnx] [--output FOLDER] [--build-only] [--exit-every N] [--keep-first N]

Builds the plain engine and the river engine (with TensorRT-RTX that needs no GPU: --build-only stops there), then on
the GPU: logits and exit depth of every depth against ONNX Runtime on the very same ONNX, 64 greedy tokens, tokens per
second of the plain engine, the all-river engine and the river engine at forced depths, interleaved. MODEL is
SmolLM2-135M if not given (see smollm2.py).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

from river_compile.config import RiverConfig
from river_compile.errors import RiverError
from river_compile.exporters.tensorrt.build import EngineOptions, build, default_config
from river_compile.exporters.tensorrt.engine import EngineInfo
from river_compile.runtime import Decoder, TensorRTDecoder
from river_compile.runtime.tensorrt import require_gpu

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 64, 6
LENGTH = 512
TOLERANCE = 2e-2
"""Of the logits' range: float16 rounds at 1e-3, some tens of times on the way."""

console = Console(width=118)


def smollm2_onnx(folder: Path) -> Path:
    path = folder / "smollm2.onnx"
    if not path.exists():
        from smollm2 import smollm2

        from river_compile.exporters.onnx.hf import export_decoder, load_decoder

        console.print("exporting SmolLM2-135M to ONNX (a minute and a half)")
        export_decoder(load_decoder(smollm2(folder / "smollm2")), path)
    return path


def build_engine(
    model: Path, engine: Path, config: RiverConfig | None, attention_layer: bool = False
) -> tuple[Path, float]:
    """An engine, plain if there is no config, and the CPU seconds that its builder took."""
    options = EngineOptions(max_length=LENGTH, river=config is not None, attention_layer=attention_layer)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    info = build(model, engine, config, options, onnx_output=engine.with_suffix(".onnx"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    console.print(
        f"{engine.name}: {info.nbytes / 1e6:.0f} MB, parsed in {info.seconds['parse']:.1f} s, built in "
        f"{info.seconds['build']:.1f} s, builder process {cpu:.1f} CPU s, "
        f"{info.network_layers} TensorRT layers, {info.runtime} {info.version}"
    )
    return engine, cpu


class OnnxReference:
    """The ONNX that was handed to TensorRT, in ONNX Runtime on the CPU, token by token."""

    def __init__(self, path: Path, info: EngineInfo) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
        self.session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        self.info = info

    def last_logits(self, ids: np.ndarray, depth: int) -> tuple[np.ndarray, int]:
        """Logits behind the last token of one prefill, and the exit depth."""
        batch, tokens = ids.shape
        shapes = self.info.shapes(batch, tokens, 0)
        kinds = {tensor.name: tensor.dtype for tensor in self.info.inputs}
        feeds = {past: np.zeros(shapes[past], kinds[past]) for past, _ in self.info.caches}
        feeds |= {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(tokens), ids.shape),
            "river.tau": np.array([2.0], np.float32),
            "river.max_depth": np.array([depth], np.int64),
        }
        wanted = {value.name for value in self.session.get_inputs()}
        names = ["logits", "river.exit_depth"]
        logits, exit_depth = self.session.run(names, {name: value for name, value in feeds.items() if name in wanted})
        return logits[:, -1].astype(np.float32), exit_depth.item()


def compare(decoder: TensorRTDecoder, reference: OnnxReference, ids: np.ndarray) -> bool:
    table = Table(title="Each depth against ONNX Runtime, the same ONNX")
    for column in ("depth", "exit depth, engine", "exit depth, ONNX", "difference / range", "same token", ""):
        table.add_column(column, justify="right")
    good = True
    for depth in range(decoder.layers + 1):
        logits, found = decoder.forward(ids, decoder.start(len(ids)), tau=2.0, max_depth=depth)
        expected, exit_depth = reference.last_logits(ids, depth)
        difference = float(np.abs(logits[:, -1] - expected).max() / np.ptp(expected))
        same = bool((logits[:, -1].argmax(-1) == expected.argmax(-1)).all())
        fine = difference <= TOLERANCE and found == exit_depth
        good &= fine
        table.add_row(
            str(depth), str(found), str(exit_depth), f"{difference:.1e}", str(same), "ok" if fine else "WRONG"
        )
    console.print(table)
    return good


def speed(plain: dict[str, TensorRTDecoder], river: TensorRTDecoder, prompt: list[int]) -> None:
    layers = river.layers
    depths = sorted({0, 1, 4, layers // 4, layers // 2, layers}, reverse=True)
    runs: list[tuple[str, Decoder, int | None]] = [(name, decoder, None) for name, decoder in plain.items()]
    runs += [(f"river engine, exit depth {depth}" if depth else "all river", river, depth) for depth in depths]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in runs}
    for turn in range(ROUNDS + 1):
        for name, decoder, depth in runs:
            settings = {} if depth is None else {"tau": 2.0, "max_depth": depth}
            result = decoder.generate([prompt], NEW_TOKENS, **settings)
            assert len(result.tokens[0]) == NEW_TOKENS
            # The first round is warm-up, in which TensorRT-RTX compiles kernels.
            if turn:
                seconds[name].append(1 / result.tokens_per_second)
    table = Table(
        title=f"Decode, batch 1, {NEW_TOKENS} tokens after {PROMPT_TOKENS}, median of {ROUNDS} rounds, interleaved"
    )
    for column in ("", "tokens/s", "ratio, median", "ratio, least", "ratio, most"):
        table.add_column(column, justify="right" if column else "left")
    for name, times in seconds.items():
        # Against the plain engine at its best.
        ratios = [base / own for base, own in zip(seconds[runs[len(plain) - 1][0]], times, strict=True)]
        spread = (statistics.median(ratios), min(ratios), max(ratios))
        table.add_row(name, f"{1 / statistics.median(times):.1f}", *(f"{ratio:.2f}x" for ratio in spread))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a decoder as ONNX (default: SmolLM2-135M)")
    parser.add_argument("--output", type=Path, default=Path(".cache/tensorrt"), help="folder for the engines")
    parser.add_argument("--build-only", action="store_true", help="build, and do not run: needs no GPU")
    parser.add_argument("--exit-every", type=int, default=1, metavar="N", help="exits after every Nth layer only")
    parser.add_argument("--keep-first", type=int, default=0, metavar="N", help="the first N layers get no twin")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        if not arguments.build_only:
            require_gpu()
        model = arguments.model or smollm2_onnx(arguments.output)
        config = default_config(
            tau=2.0, exit_every=arguments.exit_every, keep_layers=tuple(range(arguments.keep_first))
        )
        plain, plain_cpu = build_engine(model, arguments.output / "plain.engine", None)
        river, river_cpu = build_engine(model, arguments.output / "river.engine", config)
        console.print(f"building the river took {river_cpu / plain_cpu:.2f} times the plain engine's CPU time")
        fused = plain_fused(model, arguments.output / "plain.attention.engine", river_cpu)
        if arguments.build_only:
            return 0
        return 0 if run([engine for engine in (plain, fused) if engine is not None], river) else 1
    except RiverError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def plain_fused(model: Path, engine: Path, river_cpu: float) -> Path | None:
    """The plain engine at its best, with TensorRT's attention layer, if that takes the model's attention."""
    try:
        fused, cpu = build_engine(model, engine, None, attention_layer=True)
    except RiverError as error:
        console.print(f"no plain engine with TensorRT's attention layer: {error}")
        return None
    console.print(f"and {river_cpu / cpu:.2f} times that of the plain engine with TensorRT's attention layer")
    return fused


def run(plain: list[Path], river: Path) -> bool:
    decoder = TensorRTDecoder(river, river.with_suffix(".jit"))
    import torch

    console.print(f"{torch.cuda.get_device_name()}, compute capability {torch.cuda.get_device_capability()}")
    vocabulary = next(tensor.shape[-1] for tensor in decoder.info.outputs if tensor.name == "logits")
    ids = np.random.default_rng(0).integers(3, vocabulary, (1, PROMPT_TOKENS))
    good = compare(decoder, OnnxReference(river.with_suffix(".onnx"), decoder.info), ids)
    speed({path.name: TensorRTDecoder(path, path.with_suffix(".jit")) for path in plain}, decoder, ids[0].tolist())
    decoder.save()
    return good


if __name__ == "__main__":
    sys.exit(main())
