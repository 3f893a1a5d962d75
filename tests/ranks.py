"""Runs a function in several processes at once that form a group, as torchrun does, and ends them if they hang."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

# Loaded once; each process starts as a copy of the one that has it.
_PRELOADED = ["tests.torch_models", "transformers.models.llama.modeling_llama", "river_compile.backend"]


def run_ranks(
    work: Callable[..., Any], *arguments: Any, folder: Path, size: int = 2, seconds: float = 900
) -> list[Any]:
    """What ``work(rank, *arguments)`` returned in each process, or the error that it ended with, as text.

    Args:
        work: a function of a module; what it returns can be pickled.
        folder: where the processes meet, by a file.
        seconds: after which processes that still run are ended, and the test fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    results = context.Queue()
    # Not daemons: Inductor starts processes of its own.
    processes = [
        context.Process(target=_run, args=(work, arguments, rank, size, folder / "meet", results))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    end = time.monotonic() + seconds
    try:
        while len(found) < size and time.monotonic() < end:
            ended = not any(process.is_alive() for process in processes)
            with contextlib.suppress(queue.Empty):
                rank, found_there = results.get(timeout=1)
                found[rank] = found_there
                continue
            if ended:
                break
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    assert len(found) == size, f"only processes {sorted(found)} of {size} ended within {seconds} s: {found}"
    return [found[rank] for rank in range(size)]


def _run(work: Callable[..., Any], arguments: Any, rank: int, size: int, meet: Path, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=timedelta(seconds=600)
    )
    try:
        result = work(rank, *arguments)
    except Exception as error:
        # An error of the package is one line; of any other the test's reader wants to know where.
        result = str(error) if type(error).__module__.startswith("river_compile") else traceback.format_exc()
    results.put((rank, result))
    # The others see at once that it has ended.
    results.close()
    results.join_thread()
    os._exit(0)
