"""Models as ONNX Runtime's own builder writes them: GroupQueryAttention, fused norms, a shared cache buffer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from tests.contrib_model import ContribDecoder
from tests.families import VOCABULARY
from tests.oracle import Oracle, assert_close, assert_every_depth, session

_MOST = 16


@pytest.mark.parametrize("form", ("matmul", "matmul_bias", "gemm"))
@pytest.mark.parametrize("skip_norm", (True, False))
def test_each_depth_equals_the_plain_model_with_dequantized_weights(form: str, skip_norm: bool, tmp_path: Path) -> None:
    original = ContribDecoder(form=form, skip_norm=skip_norm).save(tmp_path / "model.onnx")
    river = tmp_path / "m.onnx"
    report = export(original, river, RiverConfig(tau=2.0, activations="float"))
    assert (report.layers, report.river_layers, report.found_by) == (3, 3, "names")
    assert_every_depth(original, river, batch=3)


def _shared(runner: ort.InferenceSession, prompts: list[np.ndarray], depth: int | None) -> dict[str, np.ndarray]:
    """Logits of each pass, and the cache at the end; past and present are one buffer of ``_MOST`` positions."""
    caches = {
        value.name: ort.OrtValue.ortvalue_from_numpy(
            np.zeros((len(prompts[0]), value.shape[1], _MOST, value.shape[3]), np.float32)
        )
        for value in runner.get_inputs()
        if len(value.shape) == 4
    }
    result: dict[str, np.ndarray] = {}
    seen = 0
    for ids in prompts:
        seen += ids.shape[1]
        binding = runner.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((len(ids), seen), np.int64))
        if depth is not None:
            binding.bind_ortvalue_input("river.max_depth", ort.OrtValue.ortvalue_from_numpy(np.array(depth)))
        for name, buffer in caches.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits", "cpu")
        runner.run_with_iobinding(binding)
        result[f"logits after {seen}"] = binding.get_outputs()[-1].numpy()
    return result | {name: buffer.numpy().copy() for name, buffer in caches.items()}


@pytest.mark.parametrize("depth", range(4))
def test_both_twins_write_into_one_shared_buffer(depth: int, tmp_path: Path) -> None:
    original, river = ContribDecoder().save(tmp_path / "model.onnx"), tmp_path / "m.onnx"
    export(original, river, RiverConfig(tau=2.0, activations="float"))
    rng = np.random.default_rng(depth)
    prompts = [rng.integers(3, VOCABULARY, (2, length)) for length in (5, 1, 1, 1)]
    expected = _shared(Oracle(original, river).at(depth), prompts, None)
    assert np.abs(expected["past_key_values.2.key"][:, :, 7]).min() > 0
    assert_close(_shared(session(river), prompts, depth), expected)
