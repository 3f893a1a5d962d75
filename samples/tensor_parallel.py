"""Generate with a model that is spread over processes by transformers' tensor parallel plan, and has a river.

    python samples/tensor_parallel.py [MODEL_FOLDER] [--ranks 2] [--tau 0.9] [--tokens 12]

It starts itself again by torchrun, as one would from a shell:

    torchrun --nproc-per-node 2 samples/tensor_parallel.py

Without a folder it makes a small random Llama in a temporary one. Two processes on one machine share its cores and its
memory: this shows that the tokens are right, and says nothing of speed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import AutoModelForCausalLM, DistributedConfig, LlamaConfig, LlamaForCausalLM

import river_compile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder of a Hugging Face model (default: a random one)")
    parser.add_argument("--ranks", type=int, default=2, help="processes, where torchrun has not started them already")
    parser.add_argument("--tau", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=12)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(arguments.ranks), *sys.argv]
        raise SystemExit(subprocess.run([sys.executable, *command], check=False).returncode)
    torch.distributed.init_process_group()
    with tempfile.TemporaryDirectory() as folder:
        generate(arguments.model or shared_model(Path(folder)), arguments.tau, arguments.tokens)
    torch.distributed.destroy_process_group()


def generate(folder: Path, tau: float, tokens: int) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    plan = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=plan).eval()
    ids = torch.arange(5, 17)[None]
    settings: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    tell("eager", model.generate(ids, **settings))

    compiled = torch.compile(model, backend="river", options={"tau": 2.0})
    tell("river, exits off", compiled.generate(ids, **settings))
    for depth in (0, 1):
        river_compile.set_max_depth(compiled, depth)
        river_compile.reset_stats(compiled)
        made = compiled.generate(ids, **settings)
        tell(f"river, exit depth {depth}", made, river_compile.stats(compiled).decode_depths)
    river_compile.set_max_depth(compiled, None)
    river_compile.set_tau(compiled, tau)
    river_compile.reset_stats(compiled)
    made = compiled.generate(ids, **settings)
    tell(f"river, tau {tau}", made, river_compile.stats(compiled).decode_depths)
    made = compiled.generate(ids, custom_generate=river_compile.exact, **settings)
    tell("exact", made, river_compile.stats(compiled).exact)
    tell(f"each of {torch.distributed.get_world_size()} processes", str(river_compile.stats(compiled)))
    tell("Processes on one machine share its memory: this is for correctness only, not for speed.")


def shared_model(folder: Path) -> Path:
    """A small random Llama that the first process makes and all load."""
    shared = [folder]
    torch.distributed.broadcast_object_list(shared)
    if torch.distributed.get_rank() == 0:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
        model.save_pretrained(shared[0])
    torch.distributed.barrier()
    return shared[0]


def tell(what: str, made: Any = None, counts: Any = None) -> None:
    """Print in the first process; of tokens, those after the prompt."""
    if torch.distributed.get_rank() == 0:
        shown = made[0, 12:].tolist() if isinstance(made, torch.Tensor) else made
        print(what if made is None else f"{what}: {shown}", "" if counts is None else dict(counts), flush=True)


if __name__ == "__main__":
    main()
