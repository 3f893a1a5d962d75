"""Near ties of passes over several sequences are decided by passes over one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from river_compile.runtime import OnnxDecoder, State
from river_compile.serve.ties import AloneInTies, measured_tie
from tests.families import VOCABULARY

TOKENS = np.array([[5], [9], [17]])


class Blurred(OnnxDecoder):
    """A decoder whose passes over several sequences are far off, in a way that depends on the row."""

    blur = 0.0
    alone = 0

    def backbone(self, ids: np.ndarray, state: State, mask: Any = None) -> tuple[np.ndarray, int | None]:
        logits, depth = super().backbone(ids, state, mask)
        self.alone += len(ids) == 1
        if len(ids) > 1:
            logits = logits + self.blur * np.random.default_rng(0).standard_normal(logits.shape).astype(np.float32)
        return logits, depth


@pytest.fixture
def decoder(model: Path) -> Blurred:
    return Blurred(model, threads=1)


def _three(decoder: Blurred) -> tuple[State, list[State]]:
    """Three sequences joined, and each alone."""
    states = []
    for token in (3, 4, 6):
        state = decoder.start(1)
        decoder.backbone(np.array([[token, 7, token]]), state)
        states.append(state)
    joined = State(dict(states[0].caches), states[0].mask, states[0].ids)
    for other in states[1:]:
        decoder.join(joined, other)
    decoder.alone = 0
    return joined, states


def test_a_margin_below_the_tie_is_decided_alone_and_the_state_goes_on_as_it_was(decoder: Blurred) -> None:
    decoder.blur = 3.0
    joined, states = _three(decoder)
    found, _ = AloneInTies(decoder, tie=float("inf")).backbone(TOKENS, joined)
    assert decoder.alone == 3
    expected = [decoder.backbone(ids[None], state)[0] for ids, state in zip(TOKENS, states, strict=True)]
    np.testing.assert_array_equal(found, np.concatenate(expected))
    # The sequences are all still there, with the new token read once.
    assert joined.ids[:, -1].tolist() == [5, 9, 17] and joined.mask.shape == (3, 4)


def test_a_clear_choice_is_taken_as_it_is(decoder: Blurred) -> None:
    joined, _ = _three(decoder)
    AloneInTies(decoder, tie=1e-6).backbone(TOKENS, joined)
    assert decoder.alone == 0


def test_the_tie_is_measured_and_covers_what_passes_differ_by(decoder: Blurred) -> None:
    exact = measured_tie(decoder, VOCABULARY)
    assert 0 <= exact < 1e-3
    decoder.blur = 0.5
    assert measured_tie(decoder, VOCABULARY) > 4 * 0.5
