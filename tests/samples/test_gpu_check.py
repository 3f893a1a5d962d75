"""The check of a GPU, rehearsed on a CPU; and that no section's end is the end of the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ROOT / "samples" / "gpu_check"
SECTIONS = ("depths", "int4", "graphs", "llama-3.2-1b", "exact", "llama-3.1-8b", "onnxruntime", "tensorrt")


class Run:
    """The command, run to its end: exit status, what it printed, and its JSON by section."""

    def __init__(self, out: Path, *arguments: object, path: Path | None = None) -> None:
        command = [sys.executable, str(SAMPLE), "--out", str(out), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if path is not None:
            environment["PYTHONPATH"] = str(path)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent, check=False)
        self.status, self.output = done.returncode, done.stdout
        self.sections: dict[str, dict[str, Any]] = json.loads((out / "gpu_check.json").read_text())
        self.text = (out / "gpu_check.txt").read_text()

    def rows(self, section: str, table: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.sections[section]["tables"][table]
        return rows


def fake_torch(folder: Path, program: str) -> Path:
    """A torch that does something else, found before the true one."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(program)
    return folder


def test_a_section_that_would_take_longer_than_is_left_says_so_and_does_not_start(tmp_path: Path) -> None:
    found = Run(tmp_path / "out", "--rehearse", "--minutes", 0.2)
    assert found.status == 0
    assert list(found.sections) == list(SECTIONS)
    for name, result in found.sections.items():
        assert result["status"] == "skipped" and "s are left" in result["why"]
        assert f"== {name}: skipped" in found.text
        assert name in found.output


def test_a_crash_costs_the_section_that_crashes_and_the_exit_status(tmp_path: Path) -> None:
    program = "import os, sys\nif 'int4' in sys.argv: os.kill(os.getpid(), 11)\nraise ImportError('no such luck')"
    found = Run(tmp_path / "out", "--sections", "depths,int4,graphs", path=fake_torch(tmp_path, program))
    assert found.status == 1
    assert {name: result["status"] for name, result in found.sections.items()} == {
        "depths": "broken",
        "int4": "broken",
        "graphs": "broken",
    }
    assert "signal 11" in found.sections["int4"]["why"]
    assert "no such luck" in found.sections["graphs"]["why"] and "no such luck" in found.sections["graphs"]["log"]


def test_a_section_that_outlasts_its_time_is_stopped_with_all_it_has_started(tmp_path: Path) -> None:
    program = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path(__file__).with_name('pid').write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    path = fake_torch(tmp_path, program)
    script = (
        "import json, os, pathlib, runpy, sys\n"
        f"sys.path.insert(0, {str(SAMPLE)!r})\n"
        f"check = runpy.run_path({str(SAMPLE / '__main__.py')!r})\n"
        f"print(json.dumps(check['run_section']('int4', 2.0, [], dict(os.environ), pathlib.Path({str(tmp_path)!r}))))"
    )
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    result = json.loads(done.stdout)
    assert result["status"] == "out of time" and 2 <= result["seconds"] < 60
    status = Path(f"/proc/{(path / 'torch' / 'pid').read_text()}/status")
    assert not status.exists() or "(zombie)" in status.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_would_do(tmp_path: Path) -> None:
    found = Run(tmp_path / "out", "--sections", "int4")
    assert found.status == 0
    assert found.sections["int4"]["status"] == "skipped" and "--rehearse" in found.sections["int4"]["why"]


def test_wheels_are_used_and_may_come_in_parts(tmp_path: Path) -> None:
    """A wheel with a torch that tells where it is, in three parts."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = tmp_path / "torch-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torch/__init__.py", "raise ImportError('from the wheel')")
        archive.writestr("torch-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
        archive.writestr("torch-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("torch-1.0.dist-info/RECORD", "")
    content = wheel.read_bytes()
    for number in range(3):
        third = content[number * len(content) // 3 : (number + 1) * len(content) // 3]
        (wheels / f"{wheel.name}.part-a{'abc'[number]}").write_bytes(third)
    found = Run(tmp_path / "out", "--sections", "int4", "--wheels", wheels)
    assert "from the wheel" in found.sections["int4"]["why"]


def test_a_product_that_is_off_fails_the_run(tmp_path: Path) -> None:
    """The kernel's products, made 5% too large in every process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if '--run' in sys.argv or '--run' in sys.orig_argv:\n"
        "    import river_compile.exporters.torch.linear as linear\n"
        "    right = linear.packed_product\n"
        "    linear.packed_product = lambda *arguments, **named: right(*arguments, **named) * 1.05\n"
    )
    found = Run(tmp_path / "out", "--rehearse", "--sections", "int4", "--minutes", 60, path=tmp_path)
    assert found.status == 1 and found.sections["int4"]["status"] == "wrong"
    assert not any(check["good"] for check in found.sections["int4"]["checks"])
    assert "WRONG" in found.text and "not right: int4" in found.output


def test_the_help_names_every_section() -> None:
    done = subprocess.run([sys.executable, str(SAMPLE), "--help"], capture_output=True, text=True, check=True)
    assert "python samples/gpu_check" in done.stdout
    assert all(f"    {name} " in done.stdout for name in SECTIONS)


@pytest.mark.slow
def test_the_torch_sections_need_nothing_that_a_bare_machine_lacks(tmp_path: Path) -> None:
    """Products, in a rehearsal without click and the ONNX tools."""
    for name in ("click", "onnx_graphsurgeon", "onnxruntime", "gguf"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on a bare machine')")
    found = Run(tmp_path / "out", "--rehearse", "--sections", "int4", "--minutes", 60, path=tmp_path)
    assert found.status == 0 and found.sections["int4"]["status"] == "right"
    ways = [row["way"] for row in found.rows("int4", "products")]
    assert ways == ["int4-cpu, 4 bits", "int4-cpu, 8 bits", "torch, bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "inductor"])
def test_all_of_it_rehearsed(tmp_path: Path, how: str) -> None:
    found = Run(tmp_path / "out", "--rehearse", how, "--minutes", 120)
    assert found.status == 0, found.output
    assert {name: result["status"] for name, result in found.sections.items()} == dict.fromkeys(SECTIONS, "right")
    for name, result in found.sections.items():
        assert result["checks"] or name.startswith("llama")
    for name in ("llama-3.2-1b", "llama-3.1-8b"):
        (table,) = (table for table in found.sections[name]["tables"] if table.startswith(name))
        ways = [row["way"] for row in found.rows(name, table)]
        assert {"eager", "Inductor, reduce-overhead", "Inductor, max-autotune", "river, exit depth 0"} <= set(ways)
    assert [row["acceptance"] for row in found.rows("exact", "what milliseconds of a pass promise exact decoding")]
    exits = [check["exits"] for check in found.sections["graphs"]["checks"] if "tau" in check["check"]]
    assert len(exits[0]) > 1
    assert {row["engine"] for row in found.rows("tensorrt", "engines")} >= {"plain.engine", "river.engine"}


@pytest.mark.slow
def test_building_smollm2_with_a_twin_for_every_layer_takes_at_most_three_times_the_plain_build(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    made = subprocess.run(
        [sys.executable, str(SAMPLE.parent / "smollm2.py")], capture_output=True, text=True, check=True
    )
    chosen = ("--sections", "tensorrt", "--model", made.stdout.strip())
    found = Run(tmp_path / "out", "--rehearse", "--minutes", 60, *chosen)
    assert found.status == 0, found.output
    seconds = {row["engine"]: row["builder_cpu_s"] for row in found.rows("tensorrt", "engines")}
    assert 1 < seconds["river.engine"] / seconds["plain.engine"] <= 3
