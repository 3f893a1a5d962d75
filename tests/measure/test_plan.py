"""A plan from a config alone, against models that are really there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig

from river_compile.backend import RiverBackend
from river_compile.cli.plan import main
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.measure.plan import RiverPlan, plan_river
from tests.families import random_model
from tests.torch_models import as_it_is, play, prompt

GB = 1e9


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        pytest.param("llama", 4, marks=pytest.mark.slow),
        ("gemma2", 8),
        ("gpt2", 4),
        pytest.param("phi3", 8, marks=pytest.mark.slow),
        pytest.param("llama", 8, marks=pytest.mark.slow),
        pytest.param("qwen2", 4, marks=pytest.mark.slow),
    ],
)
def test_sizes_are_those_of_the_model_and_the_river_that_is_made(family: str, bits: int, tmp_path: Path) -> None:
    torch.compiler.reset()
    model = random_model(family, 3)
    model.config.save_pretrained(tmp_path)
    config = RiverConfig(tau=2.0, bits=bits, head_bits=8)
    plan = plan_river(tmp_path, GB, config=config, dtype=torch.float32)
    backend = RiverBackend(config, compiler=as_it_is)
    play(model, torch.compile(model, backend=backend), prompt(1, 5), 2, "dynamic")
    stats = backend.stats()
    assert plan.sizes.backbone == pytest.approx(sum(parameter.nbytes for parameter in model.parameters()), rel=0.01)
    assert plan.sizes.added == pytest.approx(stats.river_bytes, rel=0.15)
    assert plan.sizes.layers == stats.layers
    cache = model(prompt(1, 4), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan.sizes.cache_per_token * 4 == pytest.approx(held, rel=0.01)


def _large(folder: Path, layers: int, hidden: int, inner: int, heads: int) -> Path:
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def _plan_70b(folder: Path, ranks: int) -> RiverPlan:
    return plan_river(_large(folder, 80, 8192, 28672, 64), 3350 * GB, memory=80 * GB, ranks=ranks)


def test_models_that_no_machine_here_could_hold(tmp_path: Path) -> None:
    small = plan_river(_large(tmp_path / "8b", 32, 4096, 14336, 32), 3350 * GB, memory=80 * GB)
    assert small.sizes.backbone == pytest.approx(16.06 * GB, rel=0.01)
    assert small.fits
    one, eight = (_plan_70b(tmp_path / "70b", ranks) for ranks in (1, 8))
    assert one.sizes.backbone == pytest.approx(141.1 * GB, rel=0.01)
    assert (one.fits, eight.fits) == (False, True)
    assert eight.sizes.backbone == pytest.approx(one.sizes.backbone / 8, rel=0.01)
    assert eight.sizes.cache_per_token == one.sizes.cache_per_token / 8
    assert 7 < eight.speeds[80] / one.speeds[80] < 8.01


def test_speeds_are_bytes_over_bandwidth_and_rise_as_tokens_exit_earlier(tmp_path: Path) -> None:
    plan = plan_river(_large(tmp_path, 32, 4096, 14336, 32), 100 * GB, context=0, fraction=0.5)
    assert plan.speeds[32] == pytest.approx(50 * GB / plan.sizes.token(32))
    speeds = list(plan.speeds.values())
    assert speeds == sorted(speeds, reverse=True)
    gains = [gain for gain, _ in plan.exact.values()]
    assert gains == sorted(gains)
    assert gains[0] >= 1


def test_the_command_and_its_json(tmp_path: Path) -> None:
    folder = str(_large(tmp_path, 4, 256, 512, 8))
    table = CliRunner().invoke(main, [folder, "--bandwidth", "20", "--memory", "1", "--depths", "1,2"])
    assert table.exit_code == 0, table.output
    assert "fits into 1 GB" in table.output
    assert "4, exits off" in table.output
    result = CliRunner().invoke(main, [folder, "--bandwidth", "20", "--tp", "2", "--head-bits", "8", "--json"])
    document = json.loads(result.stdout)
    assert document["ranks"] == 2
    assert document["fits"] is None
    assert document["sizes"]["exit_head"] < document["sizes"]["head"]


def test_an_export_is_of_the_whole_model_and_told_where_files_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _large(tmp_path, 4, 256, 512, 8)
    one, two = (plan_river(folder, GB, ranks=ranks).export for ranks in (1, 2))
    assert one is not None and two is not None
    assert (one.peak, one.mapped, one.passes) == (two.peak, two.mapped, two.passes)
    assert one.rounding > 0 and one.writing > 0
    command = [str(folder), "--bandwidth", "20"]
    assert "to make it from an ONNX file" in CliRunner().invoke(main, command).output

    def full() -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "to make it" not in result.output


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["/nowhere", "--bandwidth", "1"], "error: /nowhere: no such file or folder"),
        (["{folder}", "--bandwidth", "0"], "error: bandwidth: must be above 0"),
        (["{folder}", "--bandwidth", "1", "--memory", "-3"], "error: memory: must be above 0"),
        (["{folder}"], "error: Missing option"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], line: str, tmp_path: Path) -> None:
    folder = str(_large(tmp_path, 4, 256, 512, 8))
    result = CliRunner().invoke(main, [one.format(folder=folder) for one in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(line)


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="no config of a causal language model"):
        plan_river(tmp_path, GB)
    with pytest.raises(ConfigError, match="ranks"):
        plan_river(tmp_path, GB, ranks=0)
