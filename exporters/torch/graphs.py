"""Decode passes recorded once and replayed: as CUDA graphs, one for each stretch between two decisions of the host.

A recording holds addresses, not values. So what a later pass gives is either copied into the recording's own buffers
(small inputs), or must lie where it lay (weights, KV caches, what the graph writes in place); else it is another
recording. Where inputs keep moving, the graph goes on without recordings and says why.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from river_compile.exporters.torch.recorder import Recorded, Recorder

__all__ = ["Pass", "Program", "Recordings", "Segment"]

SMALL = 1 << 20
"""The most bytes of an input that is copied into a recording's buffer before each pass."""
KEPT = 2
"""Recordings that a graph keeps: each has its own memory for all that it computes."""
WARM = 2
"""Times that a segment is run plainly before it is recorded: kernels are chosen, compiled and loaded on first use."""
PATIENCE = 8
"""Passes without a recording that are borne, besides one for every four with one."""


class Segment(Protocol):
    """Pieces that run one after the other, on a list of all values; ``results`` are the places that they leave for
    others to read."""

    @property
    def results(self) -> tuple[int, ...]: ...

    def __call__(self, values: list[Any]) -> None: ...


@dataclass(frozen=True)
class Program:
    """A graph as the stretches between two decisions of the host.

    Fields:
        heads: for each layer its backbone; before the first, the prefix.
        tails: for each exit depth, 0 to all layers, the river to the end and the suffix; at depth 0 the prefix as well.
        similarities: for each layer the place of its similarity, None where no exit is decided.
        returned: places of what the graph returns.
        inputs: names of the inputs, which lie at the first places.
        fixed: those that must not be copied: parameters, and what the graph writes in place.
    """

    heads: Sequence[Segment]
    tails: Sequence[Segment]
    similarities: Sequence[int | None]
    returned: tuple[int, ...]
    inputs: tuple[str, ...]
    fixed: frozenset[int]


class Pass:
    """One forward pass, a stretch at a time; ``values`` are all values of the graph."""

    def __init__(self, program: Program, values: list[Any]) -> None:
        self.program, self.values = program, values

    def head(self, index: int) -> None:
        self.program.heads[index](self.values)

    def similarity(self, index: int) -> float:
        place = self.program.similarities[index]
        assert place is not None
        found: float = self.values[place].item()
        return found

    def tail(self, depth: int) -> None:
        """Ensures: the returned values stay what they are, whatever is run later."""
        self.program.tails[depth](self.values)

    def end(self) -> None:
        """Give back what the pass holds."""


@dataclass
class _Held:
    recorded: Recorded
    places: tuple[int, ...]
    results: Sequence[Any]


@dataclass
class _Recording:
    """All that is recorded for one set of addresses. No input is kept: caches would stay alive.

    ``outside`` are the addresses of the inputs' memory: what lies there is the caller's.
    """

    key: tuple[Any, ...]
    recorder: Recorder
    buffers: dict[int, torch.Tensor]
    outside: frozenset[int]
    held: dict[tuple[str, int], _Held] = field(default_factory=dict)


class Recordings:
    """The recordings of one graph for one model.

    Its memory serves one pass at a time: another that begins meanwhile, in another thread, is run plainly.

    Args:
        program: the graph.
        recorder: makes a recorder; each recording has its own, since the memory of one is reused within it.
        device: where all tensors must be.
        fallbacks: counts, by reason, the graphs that go on without recordings.
    """

    def __init__(
        self, program: Program, recorder: Callable[[], Recorder], device: torch.device, fallbacks: Counter[str]
    ) -> None:
        self._program, self._recorder, self._device, self._fallbacks = program, recorder, device, fallbacks
        self._recordings: list[_Recording] = []
        self._last: tuple[Any, ...] = ()
        self._hits = self._misses = 0
        self._abandoned = False
        self._in_use = threading.Lock()
        self.river = 0
        """Which river the recorded tails have: grows when they are forgotten."""
        self.runs: Counter[tuple[str, int]] = Counter()

    def begin(self, values: list[Any], river: int) -> Pass:
        """The pass over these values, in which small inputs give way to the recording's buffers.

        Args:
            river: which one is among the values; one that was forgotten meanwhile is run plainly.
        """
        if not self._in_use.acquire(blocking=False):
            return Pass(self._program, values)
        this: Pass | None = None
        try:
            this = self._begin(values) if river == self.river else None
        finally:
            if not isinstance(this, _RecordedPass):
                self._in_use.release()
        return this or Pass(self._program, values)

    def end(self) -> None:
        """Let the next pass begin."""
        self._in_use.release()

    def _begin(self, values: list[Any]) -> Pass:
        arguments = values[: len(self._program.inputs)]
        recording = None if self._abandoned else self._find(arguments)
        if self._abandoned:
            return Pass(self._program, values)
        if recording is not None and recording.buffers:
            torch._foreach_copy_(list(recording.buffers.values()), [arguments[i] for i in recording.buffers])
            for index, buffer in recording.buffers.items():
                values[index] = buffer
        return _RecordedPass(self._program, values, self, recording, arguments)

    def forget_tails(self) -> None:
        """Record the river anew: its weights are others. Waits for a pass that is under way."""
        with self._in_use:
            self.river += 1
            for recording in self._recordings:
                recording.held = {name: held for name, held in recording.held.items() if name[0] != "tail"}

    def abandon(self, why: str) -> None:
        """Go on without recordings."""
        if not self._abandoned:
            self._fallbacks[why] += 1
        self._abandoned = True
        self._recordings.clear()

    def capture(self, recording: _Recording, segment: Segment, values: list[Any], flag: int | None) -> _Held | None:
        """The segment, recorded for these values; None if it cannot be, and then there are no recordings any more."""
        before, places = list(values), segment.results

        def run() -> list[Any]:
            mine = list(before)
            segment(mine)
            return [mine[place] for place in places]

        try:
            recorded, results = recording.recorder.record(run, None if flag is None else places.index(flag))
        except Exception as error:
            self.abandon(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None
        if not all(self._is_here(result) for result in results):
            self.abandon(f"it computes something elsewhere than on {self._device.type}")
            return None
        return _Held(recorded, places, results)

    def _find(self, arguments: list[Any]) -> _Recording | None:
        """The recording that fits; a new one if none does, but the pass before this one had the same inputs."""
        key = tuple(self._form(index, argument) for index, argument in enumerate(arguments))
        found = next((recording for recording in self._recordings if recording.key == key), None)
        last, self._last = self._last, key
        if found is None and key == last:
            found = self._make(key, arguments)
        elif found is not None:
            self._recordings.remove(found)
            self._recordings.append(found)
        if found is not None:
            self._hits += 1
        if found is not None or self._abandoned:
            return found
        self._misses += 1
        if self._misses > PATIENCE + self._hits // 4:
            self.abandon(f"{self._moved(last, key, arguments)} changes its size or address from pass to pass")
        return None

    def _form(self, index: int, argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        if isinstance(argument, torch.nn.Parameter):
            return argument.data_ptr()
        address = None if self._is_copied(index, argument) else argument.data_ptr()
        return address, argument.shape, argument.stride()

    def _is_copied(self, index: int, argument: Any) -> bool:
        if index in self._program.fixed or not isinstance(argument, torch.Tensor):
            return False
        return 0 <= _extent(argument) * argument.itemsize <= SMALL

    def _is_here(self, value: Any) -> bool:
        return not isinstance(value, torch.Tensor) or value.device.type == self._device.type

    def _moved(self, last: tuple[Any, ...], key: tuple[Any, ...], arguments: list[Any]) -> str:
        moved = [index for index, (old, new) in enumerate(zip(last, key, strict=True)) if old != new]
        first = next((index for index in moved if isinstance(arguments[index], torch.Tensor)), moved[0])
        return self._program.inputs[first]

    def _make(self, key: tuple[Any, ...], arguments: list[Any]) -> _Recording | None:
        elsewhere = next((i for i, argument in enumerate(arguments) if not self._is_here(argument)), None)
        if elsewhere is not None:
            self.abandon(f"{self._program.inputs[elsewhere]} is on {arguments[elsewhere].device.type}")
            return None
        copied = {i: argument for i, argument in enumerate(arguments) if self._is_copied(i, argument)}
        tensors = {i: argument for i, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)}
        outside = frozenset(_memory(tensor) for i, tensor in tensors.items() if i not in copied)
        shared = next((i for i, tensor in copied.items() if _memory(tensor) in outside), None)
        if shared is not None:
            self.abandon(f"{self._program.inputs[shared]} shares its memory with another input")
            return None
        del self._recordings[: max(len(self._recordings) - KEPT + 1, 0)]
        buffers = {
            i: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            for i, tensor in copied.items()
        }
        self._recordings.append(_Recording(key, self._recorder(), buffers, outside))
        return self._recordings[-1]


class _RecordedPass(Pass):
    """A pass that replays what is recorded, records what is warm, and runs the rest plainly.

    After a plain stretch it stays plain: recordings expect the results of those before them at their addresses.
    """

    def __init__(
        self,
        program: Program,
        values: list[Any],
        owner: Recordings,
        recording: _Recording | None,
        arguments: list[Any],
    ) -> None:
        super().__init__(program, values)
        self._owner, self._recording, self._arguments = owner, recording, arguments
        self._plain = recording is None
        self._flag: Callable[[], float] | None = None

    def head(self, index: int) -> None:
        self._flag = self._run(("head", index), self.program.heads[index], self.program.similarities[index])

    def similarity(self, index: int) -> float:
        return super().similarity(index) if self._flag is None else self._flag()

    def tail(self, depth: int) -> None:
        self._run(("tail", depth), self.program.tails[depth], None)
        if self._recording is not None:
            for place in self.program.returned:
                self.values[place] = self._kept(place)

    def end(self) -> None:
        self._owner.end()

    def _run(self, name: tuple[str, int], segment: Segment, flag: int | None) -> Callable[[], float] | None:
        held = None if self._recording is None or self._plain else self._recording.held.get(name)
        if self._recording is not None and not self._plain and held is None and self._owner.runs[name] >= WARM:
            held = self._owner.capture(self._recording, segment, self.values, flag)
            if held is not None:
                self._recording.held[name] = held
        if held is None:
            self._plain = True
            self._owner.runs[name] += 1
            segment(self.values)
            return None
        held.recorded.replay()
        for place, result in zip(held.places, held.results, strict=True):
            self.values[place] = result
        return None if flag is None else held.recorded.flag

    def _kept(self, place: int) -> Any:
        """A returned value, out of the memory that the next pass will overwrite."""
        if place < len(self._arguments):
            return self._arguments[place]
        value = self.values[place]
        assert self._recording is not None
        if not isinstance(value, torch.Tensor) or _memory(value) in self._recording.outside:
            return value
        return value.clone()


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _extent(tensor: torch.Tensor) -> int:
    """Elements from a tensor's first to its last in memory; -1 if some lie on others, or there are none."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return -1
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return -1
            extent += stride * (size - 1)
    return extent
