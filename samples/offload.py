"""What offloading deep backbone layers saves in memory, and what it costs in speed.

    python samples/offload.py [FOLDER] [--after 4] [--depths 4,30]
    python samples/offload.py --shape 1b --after 4 --depths 4,16
    python samples/offload.py --onnx MODEL.river.onnx --after 4 --depths 4,30

Each way decodes in a process of its own: with all weights in memory, and with the backbone layers from ``--after`` on
in a file; of PyTorch models also without a river. They take turns, so that a busy moment strikes all: the ratio is the
median over rounds. FOLDER is a Hugging Face model, SmolLM2-135M if none is given; ``--shape 1b`` is a random model of
Llama-3.2-1B's shape. Resident memory is the most that was seen after a token, as Linux tells: "file" is what is mapped
from files and can be read again, "own" is what cannot. Exits are by depth alone: a limit for every token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from side_by_side.client import Process
from side_by_side.environments import PeerError
from side_by_side.worker import serve

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
PATIENCE = 3600
LABELS = {"memory": "in memory", "offloaded": "offloaded", "plain": "no river"}


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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=LABELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        answer(arguments)
        return
    depths = arguments.depths.split(",")
    # What has no river has no depths: it runs where the deepest is asked for.
    asked = {"memory": depths, "offloaded": depths} | ({} if arguments.onnx else {"plain": depths[-1:]})
    rounds: dict[str, dict[str, list[dict[str, Any]]]] = {way: {depth: [] for depth in asked[way]} for way in asked}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, __file__, *sys.argv[1:], "--way"]
        workers = {way: stack.enter_context(Process([*command, way], logs / way, PATIENCE)) for way in asked}
        for _ in range(arguments.rounds):
            for depth in depths:
                for way in (way for way in asked if depth in asked[way]):
                    try:
                        rounds[way][depth].append(workers[way].ask(depth=int(depth)))
                    except PeerError as error:
                        raise SystemExit(str(error)) from None
    ways = {
        way: {depth: summed_up(found, rounds["memory"][depth]) for depth, found in told.items()}
        for way, told in rounds.items()
    }
    if arguments.json:
        print(json.dumps(ways))
    else:
        Console().print(table(ways, arguments))


def summed_up(rounds: list[dict[str, Any]], in_memory: list[dict[str, Any]]) -> dict[str, Any]:
    """The most memory of all rounds, their median time, the tokens; and the speed beside the river in memory."""
    return {
        "memory": max((found["memory"] for found in rounds), key=lambda memory: memory["VmRSS:"]),
        "ms": statistics.median(found["ms"] for found in rounds),
        "tokens": rounds[0]["tokens"],
        "ratio": statistics.median(kept["ms"] / found["ms"] for kept, found in zip(in_memory, rounds, strict=True)),
    }


def answer(arguments: argparse.Namespace) -> None:
    """To each depth asked for: resident memory while decoding, median milliseconds of a token, the tokens."""
    known = set()

    @cache
    def decode() -> Any:
        return with_onnxruntime(arguments) if arguments.onnx else with_torch(arguments)

    def found(request: dict[str, Any]) -> dict[str, Any]:
        depth = request["depth"]
        if depth not in known:
            # What is compiled, quantized and let go on first use is not what decoding takes.
            decode()(depth, lambda: None)
            known.add(depth)
        return measured(decode(), depth)

    serve(found)


def measured(decode: Any, depth: int) -> dict[str, Any]:
    memory, times = Memory(), [time.perf_counter()]

    def note() -> None:
        times.append(time.perf_counter())
        memory.read()

    tokens = decode(depth, note)
    between = [1e3 * (later - earlier) for earlier, later in pairwise(times[1:])]
    return {"memory": memory.most, "ms": statistics.median(between), "tokens": tokens}


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
    model.eval().requires_grad_(False)
    options = {"offload_after": arguments.after} if arguments.way == "offloaded" else {}
    if arguments.way == "plain":
        # `generate` of what torch.compile gives would call the model itself.
        model.forward = torch.compile(model.forward)
        compiled: Any = model
    else:
        compiled = torch.compile(model, backend="river", options={"tau": 2.0, **options})

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
        if arguments.way != "plain":
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
    made = Table(title=f"{kind}, offloaded after {arguments.after}; {cpu_name()}, {arguments.threads} threads")
    for name in ("", "exit depth", "resident MB", "file", "own", "ms a token", "ratio", "tokens differ"):
        made.add_column(name, justify="right")
    for way, depths in ways.items():
        for depth, found in depths.items():
            memory, plain = found["memory"], ways["memory"][depth]
            differ = sum(one != other for one, other in zip(found["tokens"], plain["tokens"], strict=True))
            shown = [f"{memory[name]:.0f}" for name in ("VmRSS:", "RssFile:", "RssAnon:")]
            made.add_row(
                LABELS[way],
                depth if way != "plain" else "",
                *shown,
                f"{found['ms']:.1f}",
                f"{found['ratio']:.2f}x",
                str(differ),
            )
    return made


if __name__ == "__main__":
    main()
