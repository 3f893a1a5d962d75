"""The whole rewrite, against the untouched graph with dequantized weights: every depth, shape and cache state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.reports import ExportReport
from tests.families import LAYERS, NAMED, VOCABULARY
from tests.oracle import Oracle, Player, assert_close, session

Exported = Callable[[str], Path]


@pytest.fixture(scope="module", params=NAMED)
def case(request: pytest.FixtureRequest, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(exported(request.param), tmp_path_factory.mktemp("river"))


class Case:
    """A family's plain model, its river model, and the oracle."""

    def __init__(self, original: Path, folder: Path) -> None:
        self.original = original
        self.river = folder / "model.river.onnx"
        self.report: ExportReport = export(original, self.river, RiverConfig(tau=2.0, activations="float"))
        self.oracle = Oracle(original, self.river)
        self.session = session(self.river)


def _ids(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    return rng.integers(3, VOCABULARY, (batch, length))


def test_every_layer_gets_a_twin(case: Case) -> None:
    assert case.report.layers == case.report.river_layers == LAYERS
    assert case.report.notes == ()
    assert case.report.exit_points == (1, 2, 3)


def test_the_signature_stays_and_the_river_is_added_at_its_end(case: Case) -> None:
    before = onnx.load(case.original, load_external_data=False).graph
    after = onnx.load(case.river).graph
    onnx.checker.check_model(onnx.load(case.river))
    assert list(after.input)[: len(before.input)] == list(before.input)
    assert list(after.output)[: len(before.output)] == list(before.output)
    added = {value.name for value in list(after.input)[len(before.input) :]}
    # Where the head reads row by row there is one more.
    assert added - {"river.logits_from"} == {"river.tau", "river.max_depth"}
    assert [value.name for value in list(after.output)[len(before.output) :]] == ["river.exit_depth"]
    assert {value.name for value in case.session.get_inputs()} == {value.name for value in before.input}


@pytest.mark.parametrize("depth", range(LAYERS + 1))
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (3, 2), (1, 100)])
def test_each_depth_equals_the_plain_model_with_dequantized_weights(
    case: Case, depth: int, batch: int, length: int
) -> None:
    rng = np.random.default_rng(depth)
    ids, following = _ids(rng, batch, length), _ids(rng, batch, 1)
    found, expected = Player(case.session, batch), Player(case.oracle.at(depth), batch)
    for tokens in (ids, following):
        outputs = found.step(tokens, max_depth=depth)
        assert_close(outputs, expected.step(tokens))
        assert outputs["river.exit_depth"] == depth


@pytest.mark.parametrize("depth", (0, 2, LAYERS))
def test_left_padding_changes_nothing(case: Case, depth: int) -> None:
    rng = np.random.default_rng(7)
    ids = _ids(rng, 3, 6)
    mask = np.array([[1] * 6, [0] * 2 + [1] * 4, [0] * 5 + [1]])
    found, expected = Player(case.session, 3), Player(case.oracle.at(depth), 3)
    assert_close(found.step(ids, mask, max_depth=depth), expected.step(ids, mask))
    following = _ids(rng, 3, 1)
    assert_close(found.step(following, max_depth=depth), expected.step(following))


def test_exits_off_gives_the_same_greedy_tokens_over_64_steps(case: Case) -> None:
    found, expected = Player(case.session, 1), Player(session(case.original), 1)
    token = np.array([[5, 6, 7]])
    for _ in range(64):
        ours, plain = found.step(token, tau=1.5), expected.step(token)
        assert ours["river.exit_depth"] == LAYERS
        assert ours["logits"][0, -1].argmax() == plain["logits"][0, -1].argmax()
        token = plain["logits"][:, -1:].argmax(-1)


@given(depths=st.lists(st.integers(0, LAYERS), min_size=2, max_size=6), seed=st.integers(0, 2**16))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_cache_slot_is_written_once_by_one_twin(case: Case, depths: list[int], seed: int) -> None:
    """After any schedule of depths the cache holds, at each layer and position, what that step's twin computes, and a
    later step never touches it."""
    rng = np.random.default_rng(seed)
    found, expected = Player(case.session, 2), Player(case.oracle.at(0), 2)
    for depth in depths:
        before = dict(found.caches)
        ids = _ids(rng, 2, int(rng.integers(1, 4)))
        ours = found.step(ids, max_depth=depth)
        theirs = expected.step(ids, using=case.oracle.at(depth))
        for name, old in before.items():
            new = found.caches[name]
            assert new.shape[2] == old.shape[2] + ids.shape[1]
            np.testing.assert_array_equal(new[:, :, : old.shape[2]], old)
        assert_close(ours, theirs)


def test_the_twins_differ_by_more_than_the_tolerance(case: Case) -> None:
    """Otherwise none of the tests above could fail."""
    ids = np.array([[5, 6, 7]])
    backbone, river = Player(case.oracle.at(LAYERS), 1).step(ids), Player(case.oracle.at(0), 1).step(ids)
    for name, value in backbone.items():
        assert np.abs(value - river[name]).max() > 20 * 1e-4 * np.ptp(value), name
