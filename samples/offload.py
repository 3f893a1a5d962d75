"""What offloading deep backbone layers saves in memory, and what it costs in speed.

    python samples/offload.py [FOLDER] [--after 4] [--depths 4,30]
    python samples/offload.py --shape 1b --after 4 --depths 4,16
    python samples/offload.py --onnx MODEL.river.onnx --after 4 --depths 4,30

Each way decodes in a process of its own: with all weights in memory, and with the backbone layers from ``--after`` on
in a file. FOLDER is a Hugging Face model, SmolLM2-135M if none is given; ``--shape 1b`` is a random model of
Llama-3.2-1B's shape. Resident memory is the most that was seen after a token, as Linux tells: "file" is what is mapped
from files and can be read again, "own" is what cannot. Exits are by depth alone: a limit for every token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
}
PROMPT = list(range(3, 27))


class Memory:
    """Resident memory of this process, in MB, the most of several readings."""

    def __init__(self) -> None:
        self.most: dict[str, float] = {}

    def read(self) -> None:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        now = {line[0]: int(line[1]) / 1024 for line in lines if line[0] in ("VmRSS:", "RssAnon:", "RssFile:")}
        if now["VmRSS:"] > self.most.get("VmRSS:", 0):
            self.most = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--onnx", type=Path, help="an exported river model, to be run by ONNX Runtime")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--after", type=int, default=4, help="backbone layers that stay in memory")
    parser.add_argument("--depths", default="4,30", help="exit depths to decode at, with commas between")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=("memory", "offloaded"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measured(arguments)))
        return
    ways = {way: in_a_process(way) for way in ("memory", "offloaded")}
    if arguments.json:
        print(json.dumps(ways))
    else:
        Console().print(table(ways, arguments))


def in_a_process(way: str) -> Any:
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(made.stderr.strip().splitlines()[-1])
    return json.loads(made.stdout.splitlines()[-1])


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """By depth: resident memory while decoding, median milliseconds of a token, and the tokens."""
    decode = with_onnxruntime(arguments) if arguments.onnx else with_torch(arguments)
    found = {}
    for depth in map(int, arguments.depths.split(",")):
        # What is compiled, quantized and let go on first use is not what decoding takes.
        decode(depth, lambda: None)
        memory, times = Memory(), [time.perf_counter()]

        def note(memory: Memory = memory, times: list[float] = times) -> None:
            times.append(time.perf_counter())
            memory.read()

        tokens = decode(depth, note)
        between = [1e3 * (later - earlier) for earlier, later in pairwise(times[1:])]
        found[str(depth)] = {"memory": memory.most, "ms": statistics.median(between), "tokens": tokens}
    return found


def with_torch(arguments: argparse.Namespace) -> Any:
    import torch
    from smollm2 import smollm2
    from transformers import AutoModelForCausalLM, LlamaConfig

    import river_compile

    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    if arguments.shape:
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[arguments.shape]))
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.folder or smollm2(), dtype=dtype)
    options = {"offload_after": arguments.after} if arguments.way == "offloaded" else {}
    compiled: Any = torch.compile(model.eval().requires_grad_(False), backend="river", options={"tau": 2.0, **options})

    class Told:
        """What `generate` gives tokens to."""

        def __init__(self, note: Any) -> None:
            self.note = note

        def put(self, tokens: Any) -> None:
            self.note()

        def end(self) -> None:
            pass

    ids = torch.tensor([PROMPT])
    counts = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    # The first passes compile: settings can be changed from then on.
    compiled.generate(ids, attention_mask=torch.ones_like(ids), **(counts | {"max_new_tokens": 4, "min_new_tokens": 4}))

    def decode(depth: int, note: Any) -> list[int]:
        river_compile.set_max_depth(compiled, depth)
        made = compiled.generate(ids, attention_mask=torch.ones_like(ids), streamer=Told(note), **counts)
        return made[0, ids.shape[1] :].tolist()

    return decode


def with_onnxruntime(arguments: argparse.Namespace) -> Any:
    from river_compile.runtime import OnnxDecoder

    after = arguments.after if arguments.way == "offloaded" else None
    decoder = OnnxDecoder(arguments.onnx, threads=arguments.threads, offload_after=after)

    def decode(depth: int, note: Any) -> list[int]:
        made = decoder.generate(
            [PROMPT], arguments.tokens, tau=2.0, max_depth=depth, exact=False, on_step=lambda step: note()
        )
        return made.tokens[0]

    return decode


def table(ways: dict[str, Any], arguments: argparse.Namespace) -> Table:
    from river_compile.exporters.machine import cpu_name

    kind = "ONNX Runtime" if arguments.onnx else f"PyTorch, {arguments.dtype}"
    made = Table(title=f"{kind}, {cpu_name()}, {arguments.threads} threads, {arguments.tokens} tokens")
    for name in ("weights of deep layers", "exit depth", "resident MB", "file", "own", "ms a token", "tokens differ"):
        made.add_column(name, justify="right")
    for way, depths in ways.items():
        for depth, found in depths.items():
            memory, plain = found["memory"], ways["memory"][depth]
            differ = sum(one != other for one, other in zip(found["tokens"], plain["tokens"], strict=True))
            shown = [f"{memory[name]:.0f}" for name in ("VmRSS:", "RssFile:", "RssAnon:")]
            label = "in memory" if way == "memory" else f"offloaded after {arguments.after}"
            made.add_row(label, depth, *shown, f"{found['ms']:.1f}", str(differ))
    return made


if __name__ == "__main__":
    main()
