"""`export` and `plan`, as a Python user meets them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import river_compile
from river_compile import RiverConfig
from river_compile.errors import ConfigError, InputError, MissingExtra
from tests.families import LAYERS, random_model
from tests.oracle import session

Exported = Callable[[str], Path]


def test_a_model_in_memory_is_exported_first(tmp_path: Path) -> None:
    report = river_compile.export(random_model("llama", layers=2), tmp_path / "m.onnx")
    assert (report.source, report.layers, report.found_by) == ("LlamaForCausalLM", 2, "metadata")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    session(tmp_path / "m.onnx")


def test_a_model_in_memory_needs_an_output() -> None:
    with pytest.raises(ConfigError, match=r"^output: say where to write: LlamaForCausalLM"):
        river_compile.export(random_model("llama", layers=2))


def test_a_model_that_keeps_no_cache_is_refused(tmp_path: Path) -> None:
    import torch

    with pytest.raises(InputError, match=r"keeps no KV cache"):
        river_compile.export(torch.nn.Linear(4, 4), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_says_what_an_export_makes(exported: Exported, tmp_path: Path) -> None:
    config = RiverConfig(keep_layers=(1,), bits_for=(("*down*", 8),))
    planned = river_compile.plan(exported("llama"), config)
    report = river_compile.export(exported("llama"), tmp_path / "m.onnx", config)
    fields = ("layers", "found_by", "kinds", "river_layers", "exit_points", "river_bytes", "backbone_bytes", "notes")
    for field in fields:
        assert getattr(planned.report, field) == getattr(report, field), field
    assert planned.report.output is None
    assert len(planned.layers) == LAYERS


def test_a_folder_is_loaded_and_exported_step_by_step(tmp_path: Path) -> None:
    random_model("llama", layers=2).save_pretrained(tmp_path / "hf")
    told: list[str] = []
    report = river_compile.export(
        tmp_path / "hf",
        tmp_path / "m.onnx",
        progress=lambda step, *rest: told.append(step) if step not in told else None,
    )
    assert told == ["load model", "export to ONNX", "read", "quantize", "write", "check"]
    parts = {name: seconds for name, seconds in report.seconds.items() if name != "total"}
    assert list(parts)[:4] == ["load model", "export to ONNX", "read", "find_layers"]
    assert sum(parts.values()) == pytest.approx(report.seconds["total"], rel=0.05)
    planned = river_compile.plan(tmp_path / "hf").report.seconds
    assert sum(planned.values()) - planned["total"] == pytest.approx(planned["total"], rel=0.05)


def test_progress_is_told_of_every_step(exported: Exported, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    river_compile.export(
        exported("llama"), tmp_path / "m.onnx", progress=lambda step, *rest: told.setdefault(step, []).append(rest)
    )
    assert list(told) == ["read", "quantize", "write", "check"]
    for values in told.values():
        assert values[-1][0] == values[-1][1]
        assert values == sorted(values)


_KQUANT = "river_compile.RiverConfig(quantizer='kquant')"


@pytest.mark.parametrize(
    ("package", "action", "extra"),
    [
        ("onnxruntime", f"river_compile.export('{{model}}', '{{out}}', {_KQUANT})", "cpu"),
        ("onnxruntime", "from river_compile.runtime import OnnxDecoder; OnnxDecoder('{model}')", "cpu"),
        ("transformers", "river_compile.export('{folder}', '{out}')", "hf"),
    ],
)
def test_an_absent_extra_is_one_error_that_names_it(
    exported: Exported, tmp_path: Path, package: str, action: str, extra: str
) -> None:
    """In a process in which the package cannot be imported."""
    code = action.format(model=exported("llama"), folder=tmp_path, out=tmp_path / "m.onnx")
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"import river_compile\nfrom river_compile.errors import MissingExtra\n"
        f"try:\n    {code}\nexcept MissingExtra as error:\n    print(error.extra, '|', error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{extra} | ")
    assert f"pip install 'river-compile[{extra}]'" in done.stdout
    assert issubclass(MissingExtra, ImportError)


def test_importing_the_package_is_light() -> None:
    program = "import sys, river_compile, river_compile.cli.export; print(sorted({'torch', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
