"""Architectures beyond the ones tested closely: the whole rewrite at every depth, once each."""

from __future__ import annotations

from pathlib import Path

import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.errors import InputError
from river_compile.exporters.onnx.hf import export_decoder
from tests.conftest import Exported
from tests.families import NAMED, NOT_EXPORTED, exported_layers, families_that_export, random_model
from tests.oracle import assert_every_depth


@pytest.mark.parametrize("family", families_that_export(*NAMED))
def test_each_depth_equals_the_plain_model_with_dequantized_weights(
    exported: Exported, family: str, tmp_path: Path
) -> None:
    layers = exported_layers(family)
    original, river = exported(family, layers), tmp_path / "m.onnx"
    report = export(original, river, RiverConfig(tau=2.0, activations="float"))
    assert report.layers == report.river_layers == layers
    # Longer than the sliding window of eight that some of them have.
    assert_every_depth(original, river, lengths=(12, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_EXPORTED)
def test_what_torch_cannot_export_is_one_clear_line(family: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch cannot export the model to ONNX: ") as caught:
        export_decoder(random_model(family), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
