"""Recorded decode passes against plain ones. A recorder for the CPU stands in for CUDA graphs: it keeps their rules,
and fills with rubbish whatever CUDA would be free to overwrite."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from river_compile.backend import RiverBackend
from river_compile.config import RiverConfig
from river_compile.exporters.onnx.kv_cache import cache_argument
from river_compile.exporters.torch.dispatch import Dispatcher
from river_compile.exporters.torch.graphs import KEPT, WARM
from river_compile.exporters.torch.linear import Dequantized
from river_compile.passes.fx.graph import import_graph, written_inputs
from tests.families import LAYERS, random_model
from tests.torch_models import as_it_is, assert_same, new_cache, play, prompt, with_river_from

WARMED_UP = WARM + 2


class FakeDevice:
    """The recorders of one backend, and what was recorded; ``cache`` is what recorded work changes in place."""

    def __init__(self) -> None:
        self.cache: Any = None
        self.recorders: list[FakeRecorder] = []
        self.replays = self.flags = 0
        self.broken = False

    @property
    def recorded(self) -> int:
        return sum(len(recorder.work) for recorder in self.recorders)

    @property
    def state(self) -> list[torch.Tensor]:
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return [tensor for layer in layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]

    def recorder(self, device: torch.device) -> FakeRecorder:
        self.recorders.append(FakeRecorder(self))
        return self.recorders[-1]


class FakeRecorder:
    """What is recorded later lies where earlier work may have its temporary values: replaying that destroys it."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.work: list[FakeRecorded] = []

    def record(self, run: Callable[[], Sequence[Any]], flag: int | None) -> tuple[FakeRecorded, Sequence[Any]]:
        if self.device.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        # A capture does nothing, but a CPU cannot know the results' shapes otherwise.
        state = self.device.state
        before = [tensor.clone() for tensor in state]
        results, again = run(), run()
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        # What lies at the same address twice is no result of this work's own: a view of what it reads.
        own = [
            isinstance(one, torch.Tensor) and one.data_ptr() != two.data_ptr()
            for one, two in zip(results, again, strict=True)
        ]
        self.work.append(FakeRecorded(self, run, results, own, flag))
        self.work[-1].spoil()
        return self.work[-1], results


class FakeRecorded:
    def __init__(
        self,
        recorder: FakeRecorder,
        run: Callable[[], Sequence[Any]],
        results: Sequence[Any],
        own: list[bool],
        flag: int | None,
    ) -> None:
        self._recorder, self._run, self._results, self._own, self._flag = recorder, run, results, own, flag
        self._asked = True

    def replay(self) -> None:
        device, work = self._recorder.device, self._recorder.work
        device.replays += 1
        for later in work[work.index(self) + 1 :]:
            later.spoil()
        for result, fresh, own in zip(self._results, self._run(), self._own, strict=True):
            if own:
                result.copy_(fresh)
            elif isinstance(fresh, torch.Tensor):
                assert fresh.data_ptr() == result.data_ptr()
            else:
                assert fresh == result
        self._asked = False

    def flag(self) -> float:
        assert self._flag is not None
        assert not self._asked, "read twice"
        self._asked = True
        self._recorder.device.flags += 1
        found: float = self._results[self._flag].item()
        return found

    def spoil(self) -> None:
        for result, own in zip(self._results, self._own, strict=True):
            if own:
                result.fill_(float("nan") if result.is_floating_point() else -(1 << 20))


class Case:
    """A random Llama compiled twice: recorded, and plain. Both are fed alike, at addresses that differ each time."""

    def __init__(self, compiler: Any = as_it_is, **options: Any) -> None:
        torch.compiler.reset()
        self.model = random_model("llama")
        self.twin = copy.deepcopy(self.model)
        self.device = FakeDevice()
        settings = {"tau": 2.0, "prefill": "river", **options}
        self.backend = RiverBackend(
            RiverConfig(cuda_graphs=True, **settings),
            lowering=Dequantized(),
            compiler=compiler,
            recorder=self.device.recorder,
        )
        self.plain = RiverBackend(RiverConfig(**settings), lowering=Dequantized(), compiler=compiler)
        self.compiled = torch.compile(self.model, backend=self.backend)
        self.compiled_twin = torch.compile(self.twin, backend=self.plain)
        self.addresses: list[torch.Tensor] = []
        self.step = 0

    @torch.no_grad()
    def new_caches(self, kind: str = "static") -> None:
        """Caches that hold a prompt."""
        self.caches = [new_cache(self.model, kind), new_cache(self.model, kind)]
        self.length = 3
        for model, cache in zip((self.model, self.twin), self.caches, strict=True):
            model(prompt(1, self.length), past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def decode(self, depth: int | None = None, length: int = 1, check: bool = True) -> torch.Tensor:
        """The logits of one pass, which are the plain ones."""
        self.step += 1
        for backend in (self.backend, self.plain):
            backend.max_depth = depth
        self.device.cache = self.caches[0]
        found = []
        for model, cache in zip((self.compiled, self.compiled_twin), self.caches, strict=True):
            ids = prompt(1, length, seed=self.step)
            positions = torch.arange(self.length, self.length + length)[None]
            self.addresses += [ids, positions]
            found.append(model(ids, position_ids=positions, use_cache=True, **{cache_argument(model): cache}).logits)
        self.length += length
        if check:
            assert_same([found[0]], [found[1]], 1e-6)
            for ours, theirs in zip(self.caches[0].layers, self.caches[1].layers, strict=True):
                assert_same([ours.keys, ours.values], [theirs.keys, theirs.values], 1e-6)
            assert self.backend.decode_depths == self.plain.decode_depths
        return found[0]

    def warm_up(self, depths: Sequence[int | None] = (None,)) -> None:
        for depth in depths:
            for _ in range(WARMED_UP):
                self.decode(depth)

    @property
    def notes(self) -> str:
        return "\n".join(self.backend.stats().notes)


@torch.no_grad()
def test_each_depth_is_the_plain_one_and_equals_the_judge_in_any_order() -> None:
    case = Case()
    case.new_caches()
    case.warm_up([2, LAYERS, 0, 1, 3])
    recorded = case.device.recorded
    assert recorded == LAYERS + LAYERS + 1
    for depth in [3, 0, LAYERS, 2, 2, 1, 0, LAYERS, 3, 1]:
        before = case.device.replays
        case.decode(depth)
        assert case.device.replays == before + depth + 1
    assert case.device.recorded == recorded
    assert not case.notes
    judge = with_river_from(case.model, 2)
    positions = {"position_ids": torch.tensor([[case.length]])}
    cache = copy.deepcopy(case.caches[0])
    expected = judge(prompt(1, 1, seed=case.step + 1), past_key_values=cache, use_cache=True, **positions).logits
    assert_same([case.decode(2)], [expected])


@pytest.mark.slow
def test_pieces_compiled_by_inductor_are_recorded_alike() -> None:
    case = Case(compiler=None)
    case.new_caches()
    case.warm_up([2, None, 0])
    before = case.device.replays
    for depth in (None, 0, 2):
        case.decode(depth)
    assert case.device.replays == before + LAYERS + 1 + 1 + 3
    assert not case.notes


def test_what_the_caller_holds_is_not_overwritten() -> None:
    case = Case()
    case.new_caches()
    case.warm_up()
    held = [case.decode() for _ in range(4)]
    copies = [logits.clone() for logits in held]
    for depth in (0, None, 2, None):
        case.decode(depth)
    for logits, expected in zip(held, copies, strict=True):
        assert torch.equal(logits, expected)


def test_inputs_at_new_addresses_are_copied() -> None:
    case = Case()
    case.new_caches()
    case.warm_up()
    recorded = case.device.recorded
    for _ in range(5):
        case.decode()
    # All of them are kept, so no address came twice.
    assert len({tensor.data_ptr() for tensor in case.addresses}) == len(case.addresses)
    assert case.device.recorded == recorded


def test_another_cache_is_another_recording_and_few_are_kept() -> None:
    case = Case()
    for round_ in range(KEPT + 2):
        case.new_caches()
        case.warm_up()
        assert len(case.device.recorders) == round_ + 1
    held = [recordings for dispatcher in dispatchers(case) for recordings in dispatcher._recordings.values()]
    assert max(len(recordings._recordings) for recordings in held if recordings) == KEPT
    assert not case.notes


def test_two_caches_in_turns_are_two_recordings() -> None:
    case = Case()
    case.new_caches()
    case.warm_up([None, 1])
    other, length = case.caches, case.length
    case.new_caches()
    case.warm_up([None, 1])
    recorded = case.device.recorded
    for depth in (1, None, None, 1):
        other, case.caches = case.caches, other
        length, case.length = case.length, length
        case.decode(depth)
    assert len(case.device.recorders) == 2
    assert case.device.recorded == recorded


@pytest.mark.parametrize("kind", ["dynamic", "growing mask"])
def test_inputs_that_change_their_size_are_run_plainly_and_the_reason_is_told(kind: str) -> None:
    case = Case()
    if kind == "dynamic":
        case.new_caches("dynamic")
        for _ in range(14):
            case.decode()
    else:
        ids = prompt(1, 3)
        found = play(case.model, case.compiled, ids, 14, "static")
        assert_same(found, play(case.twin, case.compiled_twin, ids, 14, "static"), 1e-6)
    assert case.device.recorded == 0
    assert "runs without CUDA graphs, 1 graphs: " in case.notes
    assert "changes its size or address from pass to pass" in case.notes


def test_thresholds_are_changed_without_recording_anew() -> None:
    case = Case(min_depth=0)
    case.new_caches()
    case.warm_up([1, 2, 3, None])
    recorded = case.device.recorded
    for tau in (-1.0, 0.5, 0.9, 2.0):
        case.backend.tau = case.plain.tau = tau
        case.decode()
    case.backend.tau_offsets = case.plain.tau_offsets = (3.0, -3.0, *[0.0] * (LAYERS - 2))
    case.decode()
    assert case.backend.decode_depths[2] > WARMED_UP
    assert case.device.recorded == recorded


def test_the_flag_is_read_once_a_layer_and_only_where_it_decides() -> None:
    case = Case()
    case.new_caches()
    case.warm_up([None, 2])
    before = case.device.flags
    case.decode()
    assert case.device.flags == before + LAYERS - 1
    case.decode(2)
    assert case.device.flags == before + LAYERS


def test_changed_weights_are_quantized_and_recorded_anew() -> None:
    case = Case()
    case.new_caches()
    case.warm_up([2])
    recorded = case.device.recorded
    with torch.no_grad():
        for model in (case.model, case.twin):
            model.model.layers[3].mlp.up_proj.weight.mul_(0.5)
    case.decode(2)
    assert case.device.recorded == recorded + 1
    replacement = torch.randn_like(case.model.model.layers[0].mlp.up_proj.weight) * 0.1
    for model in (case.model, case.twin):
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(replacement.clone())
    case.warm_up([2, 0])
    assert len(case.device.recorders) == 2


def test_weights_changed_without_a_trace_are_recorded_anew_at_the_next_generation() -> None:
    case = Case()
    case.new_caches()
    case.warm_up([2])
    for model in (case.model, case.twin):
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data.mul_(0.5)
    before = case.device.replays
    # The prompt of a new generation, through the compiled model: what it reads is looked at then.
    case.caches = [new_cache(case.model, "static"), new_cache(case.model, "static")]
    case.length = 0
    case.decode(length=3, check=False)
    case.warm_up([2])
    assert case.device.replays > before
    judge = with_river_from(case.model, 2)
    positions = {"position_ids": torch.tensor([[case.length]])}
    cache = copy.deepcopy(case.caches[0])
    with torch.no_grad():
        expected = judge(prompt(1, 1, seed=case.step + 1), past_key_values=cache, use_cache=True, **positions).logits
    assert_same([case.decode(2)], [expected])


def test_a_pass_that_begins_during_another_is_run_plainly() -> None:
    case = Case()
    case.new_caches()
    case.warm_up()
    (recordings,) = {
        id(found): found for dispatcher in dispatchers(case) for found in dispatcher._recordings.values() if found
    }.values()
    before = case.device.replays
    assert recordings._in_use.acquire(blocking=False)
    case.decode()
    assert case.device.replays == before
    recordings.end()
    case.decode()
    assert case.device.replays == before + LAYERS + 1


def test_layers_without_a_twin_are_recorded_with_the_river() -> None:
    case = Case(keep_layers=(1, -1), exit_every=2)
    case.new_caches()
    case.warm_up([0, 2, None])
    before, depths = case.device.replays, (2, 0, None)
    for depth in depths:
        case.decode(depth)
    assert case.device.replays == before + sum(1 + (LAYERS if depth is None else depth) for depth in depths)
    case.decode(1)
    assert "without CUDA graphs" not in case.notes


def test_what_cannot_be_recorded_is_run_plainly_and_the_reason_is_told() -> None:
    case = Case()
    case.new_caches()
    case.device.broken = True
    case.warm_up()
    assert "RuntimeError: operation not permitted when stream is capturing" in case.notes
    case.decode(2)
    assert case.device.replays == 0


def test_generate_with_a_static_cache_is_recorded() -> None:
    case = Case(prefill="backbone")
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    name = cache_argument(case.model)
    for _ in range(2):
        case.device.cache = new_cache(case.model, "static")
        found = case.compiled.generate(prompt(1, 4), **{name: case.device.cache}, **settings)
        cache = new_cache(case.model, "static")
        assert torch.equal(found, case.compiled_twin.generate(prompt(1, 4), **{name: cache}, **settings))
    assert not case.notes
    assert len(case.device.recorders) == 2
    assert case.device.replays > 2 * 6 * (LAYERS + 1)


def test_on_a_cpu_the_option_has_no_effect_and_says_so() -> None:
    torch.compiler.reset()
    model = random_model("llama")
    backend = RiverBackend(RiverConfig(cuda_graphs=True), lowering=Dequantized(), compiler=as_it_is)
    play(model, torch.compile(model, backend=backend), prompt(1, 2), 2, "static")
    assert backend.stats().notes == ("cuda_graphs has no effect on a cpu device",)


def test_what_a_graph_writes_is_found_through_views_and_foreign_operators() -> None:
    found: list[frozenset[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(written_inputs(import_graph(module, [])))
        return module.forward

    def write(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        b.unbind(0)[1].chunk(2)[0].mul_(2)
        c[0] = d[1]
        torch.add(d[0], 1, out=e)
        return a + d

    torch.compiler.reset()
    torch.compile(write, backend=backend)(*(torch.zeros(2, 4) for _ in range(4)), torch.zeros(4))
    assert [name.strip("_")[2:] for name in sorted(found[0])] == ["a", "b", "c", "e"]


def dispatchers(case: Case) -> list[Dispatcher]:
    import gc

    return [
        found
        for found in gc.get_objects()
        if type(found) is Dispatcher and case.backend in found._recordings  # type: ignore[comparison-overlap]
    ]
