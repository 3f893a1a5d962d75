"""Where the first token leaves, by the similarities that torch computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from river_compile.measure.subjects import Setting
from tests.families import LAYERS


def check_first_exits(subject: Any, ids: np.ndarray, similarities: np.ndarray) -> set[int]:
    """The first token, which no earlier exit has touched, leaves where its similarity first lies above the threshold.

    Args:
        similarities: of the backbone, [layers, tokens]; thresholds lie between those of the first token.

    Returns the depths that occurred.
    """
    decided, seen = similarities[: LAYERS - 1, 0], set()
    for tau in [*(decided - 1e-3), float(decided.max()) + 1e-3]:
        expected = next((layer + 1 for layer, value in enumerate(decided) if value > tau), LAYERS)
        assert subject.read(ids[:2], Setting(tau=float(tau)), stepwise=True).depths[0] == expected
        seen.add(expected)
    return seen
