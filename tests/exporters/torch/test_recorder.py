"""What CudaRecorder asks of torch.cuda, and in which order: no GPU is needed to see that."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from river_compile.exporters.torch.recorder import CudaRecorder


class Stage:
    """Stands for ``torch.cuda``: notes what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.stream: Any = "the caller's"
        self.fails = False
        stage, signature = self, inspect.signature(torch.cuda.graph.__init__)

        class Graph:
            def replay(self) -> None:
                stage.calls.append("replay")

        class Capture:
            def __init__(self, *arguments: Any, **options: Any) -> None:
                bound = signature.bind(self, *arguments, **options).arguments
                assert (bound["pool"], bound["stream"]) == ("pool", "side")
                assert bound["capture_error_mode"] == "thread_local"

            def __enter__(self) -> None:
                stage.calls.append("begin")
                stage.stream = "side"

            def __exit__(self, *error: object) -> None:
                stage.calls.append("end")
                if stage.fails:
                    raise RuntimeError("capture invalidated")
                stage.stream = "the caller's"

        class Event:
            def record(self, stream: Any) -> None:
                stage.calls.append(f"record on {stream}")

            def synchronize(self) -> None:
                stage.calls.append("wait")

        class Device:
            def __init__(self, device: torch.device) -> None: ...

            def __enter__(self) -> None: ...

            def __exit__(self, *error: object) -> None: ...

        empty = torch.empty

        def unpinned(*sizes: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
            assert pin_memory
            return empty(*sizes, dtype=dtype)

        monkeypatch.setattr(torch, "empty", unpinned)
        for name, value in {
            "CUDAGraph": Graph,
            "graph": Capture,
            "Event": Event,
            "device": Device,
            "Stream": lambda device: "side",
            "graph_pool_handle": lambda: "pool",
            "current_stream": lambda device=None: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def test_the_flag_is_copied_in_the_capture_and_waited_for_behind_the_replay(stage: Stage) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    recorded, results = recorder.record(lambda: [torch.zeros(2), torch.tensor(0.75)], 1)
    assert len(results) == 2
    recorded.replay()
    assert recorded.flag() == 0.75
    assert stage.calls == ["begin", "end", "replay", "record on the caller's", "wait"]


def test_without_a_flag_nothing_is_waited_for(stage: Stage) -> None:
    recorded, _ = CudaRecorder(torch.device("cuda", 0)).record(lambda: [torch.zeros(2)], None)
    recorded.replay()
    assert stage.calls == ["begin", "end", "replay"]


def test_a_failed_capture_gives_the_callers_stream_back(stage: Stage) -> None:
    stage.fails = True
    with pytest.raises(RuntimeError, match="capture invalidated"):
        CudaRecorder(torch.device("cuda", 0)).record(lambda: [torch.zeros(2)], None)
    assert stage.stream == "the caller's"
