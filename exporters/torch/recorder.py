"""What a device is told once and does again: CUDA graphs, and what else can stand in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

__all__ = ["CudaRecorder", "Recorded", "Recorder"]


class Recorded(Protocol):
    """Work of a device that can be done again."""

    def replay(self) -> None:
        """Start the work, on what its operands' addresses hold by then. Its results are valid until a recording of the
        same recorder that was made before it is replayed."""
        ...

    def flag(self) -> float:
        """The number that the last replay computed for the host; waits for that and nothing else.

        Requires: it was recorded with a flag, and replayed.
        """
        ...


class Recorder(Protocol):
    """Records work whose results share memory: the results of one are kept while any reference to them is."""

    def record(self, run: Callable[[], Sequence[Any]], flag: int | None) -> tuple[Recorded, Sequence[Any]]:
        """The work that ``run`` starts, not done yet, and the results, not valid yet.

        Args:
            run: returns its results; all it reads stays at its address.
            flag: which result is the one number that the host will ask for; None: it will not ask.

        Raises:
            Exception: the work cannot be recorded. Nothing of it was done.
        """
        ...


class _CudaRecorded:
    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device, host: torch.Tensor | None) -> None:
        self._graph, self._device, self._host = graph, device, host
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def replay(self) -> None:
        self._graph.replay()
        if self._host is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def flag(self) -> float:
        assert self._host is not None
        self._copied.synchronize()
        return self._host.item()


class CudaRecorder:
    """CUDA graphs over one memory pool.

    The flag goes to pinned memory at the end of its graph; the host waits for the event behind it, not for the device.
    Written to torch's documentation; it has not been run on a GPU yet. Before torch 2.12 a capture that fails may leave
    the allocator's pool open (pytorch#180395), and its memory is kept until the process ends (pytorch#190308).

    Requires: graphs of one pass are recorded in the order in which they are replayed, on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], Sequence[Any]], flag: int | None) -> tuple[Recorded, Sequence[Any]]:
        graph = torch.cuda.CUDAGraph()
        host = None if flag is None else torch.empty(1, dtype=torch.float32, pin_memory=True)
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    results = run()
                    if host is not None and flag is not None:
                        host.copy_(results[flag].reshape(1), non_blocking=True)
            finally:
                # torch.cuda.graph leaves its stream in place where the capture's end fails.
                torch.cuda.set_stream(before)
            return _CudaRecorded(graph, self._device, host), results
