"""Our river and its peers, side by side: SmolLM2-135M on a CPU, one sequence, decode.

    python samples/peers.py [--peers genai-int4,river-exact] [--rounds 5] [--tokens 64] [--json FILE] [--png FILE]

Each tool is installed into a virtual environment of its own (.cache/venvs/peers-*) and makes its model of the same
float one (.cache/peers); each peer is a process of its own, and all take turns, a prompt a round. Printed as a Markdown
table: tokens a second and the ratio to plain ONNX Runtime (medians over rounds, the ratio within the round), how often
the next token of held-out texts is the one that plain ONNX Runtime chooses, tokens of the greedy text that differ from
its own, and memory. A peer that does not install or fails is a row that says so. `--list` names them all.

    python samples/peers.py --shape 1b --together 3

measures speed and memory with random weights at the shape of Llama-3.2-1B, three peers at a time beside the reference:
all at once take some 35 GB of memory there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from exact import some_prompts
from rich.console import Console
from side_by_side import report
from side_by_side.catalogue import PEERS, RECIPES, REFERENCE, Peer, chosen
from side_by_side.client import Worker
from side_by_side.environments import CACHE, PeerError
from side_by_side.models import SHAPES, Models, float_model
from side_by_side.rounds import Measured, SideBySide, groups

from river_compile.exporters.machine import cpu_name
from river_compile.measure.fidelity import decoded_documents, hub_tokenizer, load_tokenizer

LEAD, TEXT_TOKENS, ROOM = 8, 64, 128
PATIENCE = 1800.0

console = Console(stderr=True, highlight=False)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="LIST", help="names, the reference is there anyway (default: all)")
    parser.add_argument("--list", action="store_true", help="name the peers and stop")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens in a round (default 64)")
    parser.add_argument("--texts", type=int, default=18, help="held-out texts to read (default 18; 0: none)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights of a shape: speed and memory only")
    parser.add_argument("--together", type=int, help="peers at a time beside the reference (default: all)")
    parser.add_argument("--anew", action="store_true", help="make the models again, as after a change of this package")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    return parser.parse_args()


def started(peer: Peer, models: Models, threads: int, capacity: int) -> Worker:
    """A peer's worker, once its environment and its model are there.

    Raises:
        PeerError: it cannot take part.
    """
    python = peer.environment.python()
    model = models.made(peer.model) / peer.file
    load = {
        "engine": f"side_by_side.engines.{peer.engine}",
        "model": str(model),
        "threads": threads,
        "capacity": capacity,
    }
    return Worker(python, CACHE / "peers" / "logs" / f"{peer.name}.log", PATIENCE, **load, settings=peer.settings)


def held_out(folder: Path, count: int) -> list[np.ndarray]:
    tokenizer = load_tokenizer(folder)
    read = {"prompt_tokens": LEAD, "max_tokens": TEXT_TOKENS, "count": count, "skip_short": True}
    documents = decoded_documents(None, "heldout", tokenizer, tokenizer.vocabulary, **read)
    return [document.ids for document in documents]


def compare(peers: dict[str, Peer], given: argparse.Namespace) -> dict[str, Measured]:
    """Measure peers, by name.

    Raises:
        PeerError: the reference fails.
    """
    source, folder = float_model(given.shape)
    models = Models(source, folder, RECIPES, anew=given.anew)
    prompts = some_prompts(hub_tokenizer(source), min(given.rounds, 40))
    texts = [] if given.shape or not given.texts else held_out(source, given.texts)
    capacity = max(*map(len, prompts), TEXT_TOKENS) + max(given.tokens, ROOM)
    results = {name: Measured(peer.title) for name, peer in peers.items()}
    for names in groups(list(peers), REFERENCE, given.together):
        with ExitStack() as stack, console.status("") as status:
            players = {}
            for name in names:
                status.update(f"start: {name}")
                try:
                    players[name] = stack.enter_context(started(peers[name], models, given.threads, capacity))
                except PeerError as error:
                    if name == REFERENCE:
                        raise
                    results[name].failure = str(error)
            turns = SideBySide(players, results, REFERENCE, progress=status.update)
            for number in range(-1, given.rounds):
                turns.decode(prompts[number % len(prompts)], given.tokens, keep=number >= 0)
            turns.look()
            turns.read(texts, LEAD)
    return results


def main() -> None:
    given = options()
    if given.list:
        print("\n".join(f"{peer.name:20} {peer.title.replace('*', '')}" for peer in PEERS))
        return
    try:
        peers = {peer.name: peer for peer in chosen(given.peers, given.shape is not None)}
        results = compare(peers, given)
    except (PeerError, ValueError) as error:
        sys.exit(f"error: {error}")
    what = f"{given.shape}, random weights" if given.shape else "SmolLM2-135M"
    title = f"{what}; {cpu_name()}, {given.threads} threads; {given.rounds} rounds of {given.tokens} tokens"
    print(f"{title}\n\n{report.table(results, given.tokens)}")
    if given.json is not None:
        run = {"model": what, "cpu": cpu_name(), "threads": given.threads, "reference": REFERENCE}
        given.json.write_text(json.dumps(report.document(results, given.tokens, **run), indent=2) + "\n")
    if given.png is not None:
        report.draw(results, title, given.png)


if __name__ == "__main__":
    main()
