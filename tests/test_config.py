"""Settings validate themselves and say which one is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, RiverError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tau", float("nan")),
        ("tau", float("inf")),
        ("tau", -1.01),
        ("tau", "0.9"),
        ("tau", True),
        ("max_depth", -1),
        ("max_depth", 1.5),
        ("min_depth", -1),
        ("exit_every", 0),
        ("keep_layers", ("x",)),
        ("bits", 3),
        ("bits_for", (("*", 5),)),
        ("group_size", 48),
        ("activations", "int4"),
        ("quantizer", ""),
        ("cuda_graphs", 1),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: ") as caught:
        RiverConfig(**{field: value})
    assert caught.value.field == field
    assert isinstance(caught.value, RiverError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tau", (-1, -1.0, 0, 0.5, 1, 1.5, 2.0))
def test_every_threshold_from_minus_one_up_is_legal(tau: float) -> None:
    assert RiverConfig(tau=tau).tau == tau


def test_options_become_a_config() -> None:
    assert RiverConfig.from_options({"tau": 0.7, "keep_layers": [0, -1]}) == RiverConfig(tau=0.7, keep_layers=(0, -1))
    assert RiverConfig.from_options(None) == RiverConfig()


def test_an_unknown_option_is_an_error_that_names_it_and_lists_the_others() -> None:
    with pytest.raises(ConfigError, match=r"^taux: no such option; there are .*tau"):
        RiverConfig.from_options({"taux": 0.7})


def test_the_first_matching_pattern_sets_the_bits() -> None:
    config = RiverConfig(bits=4, bits_for=(("*down_proj*", 8), ("layers.3", 8), ("*", 4)))
    assert config.bits_of("model.layers.0.mlp.down_proj") == 8
    assert config.bits_of("model.layers.3.mlp.up_proj", "layers.3") == 8
    assert config.bits_of("model.layers.0.mlp.up_proj", "layers.0") == 4


def test_kept_layers_count_from_either_end() -> None:
    assert RiverConfig(keep_layers=(0, -1)).kept(5) == {0, 4}
    with pytest.raises(ConfigError, match=r"^keep_layers: 5 is no layer of a stack of 5"):
        RiverConfig(keep_layers=(5,)).kept(5)


def test_exits_lie_between_min_depth_and_the_last_layer_at_every_kth() -> None:
    assert RiverConfig().exit_points(4) == (1, 2, 3)
    assert RiverConfig(min_depth=2).exit_points(4) == (2, 3)
    assert RiverConfig(exit_every=2).exit_points(6) == (2, 4)
    assert RiverConfig(min_depth=9).exit_points(4) == ()


def test_the_config_is_written_as_json_without_paths() -> None:
    written = json.loads(RiverConfig(tau=0.8, dump_dir="somewhere").to_json())  # type: ignore[arg-type]
    assert written["tau"] == 0.8
    assert written["dump_dir"] is None
