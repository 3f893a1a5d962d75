"""`river-export`, as a person or a program meets it."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

from river_compile import __version__
from river_compile.cli.export import main
from tests.contrib_model import ContribDecoder
from tests.families import random_model
from tests.oracle import session


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return ContribDecoder().save(tmp_path / "model.onnx")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _metadata(path: Path) -> dict[str, str]:
    return {prop.key: prop.value for prop in onnx.load(path, load_external_data=False).metadata_props}


def test_it_writes_beside_the_model_and_ends_with_a_table(model: Path) -> None:
    result = _run(model)
    assert result.exit_code == 0
    river = model.with_name("model.river.onnx")
    assert river.exists()
    for words in ("3, found by names", "river layers", "exit points", "2 (after layers 1 to 2)", "added nodes", "time"):
        assert words in result.stdout
    assert f"wrote {river}" in result.stdout.replace("\n", "")
    assert _metadata(river)["river.quantizer"] == "rtn"


def test_json_is_the_report_and_nothing_else(model: Path, tmp_path: Path) -> None:
    result = _run(model, "--json", "-o", tmp_path / "out.onnx")
    report = json.loads(result.stdout)
    assert report["layers"] == report["river_layers"] == 3
    assert report["exit_points"] == [1, 2]
    assert report["output"] == str(tmp_path / "out.onnx")
    assert report["river_bytes"] < report["backbone_bytes"]


def test_quiet_prints_nothing(model: Path) -> None:
    result = _run(model, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_a_dry_run_shows_the_plan_and_writes_nothing(model: Path) -> None:
    before = sorted(model.parent.iterdir())
    result = _run(model, "--dry-run", "--keep-layers", "1")
    assert result.exit_code == 0
    assert "q_proj 4/32" in result.stdout
    assert "none: backbone only" in result.stdout
    assert "dry run: nothing written" in result.stdout
    assert sorted(model.parent.iterdir()) == before
    planned = json.loads(_run(model, "--dry-run", "--json").stdout)
    assert len(planned["anatomy"]) == 3
    assert {linear["bits"] for linear in planned["linears"]} == {4}
    assert planned["river_bytes"] == json.loads(_run(model, "--json").stdout)["river_bytes"]


def test_every_option_reaches_the_exported_model(model: Path, tmp_path: Path) -> None:
    out, dump = tmp_path / "out.onnx", tmp_path / "dump"
    options = "--tau 0.7 --min-depth 2 --max-depth 3 --exit-every 2 --keep-layers 0,-1 --bits 8 --bits-for *q_proj=4"
    options += " --group-size 64 --activations float --no-extra-output --external-data --quiet"
    assert _run(model, "-o", out, "--dump-dir", dump, *options.split()).exit_code == 0
    config = json.loads(_metadata(out)["river.config"])
    expected = {
        "tau": 0.7,
        "min_depth": 2,
        "max_depth": 3,
        "exit_every": 2,
        "keep_layers": [0, -1],
        "bits": 8,
        "bits_for": [["*q_proj", 4]],
        "group_size": 64,
        "activations": "float",
        "extra_output": False,
        "external_data": True,
    }
    assert {key: config[key] for key in expected} == expected
    assert (tmp_path / "out.onnx.data").exists()
    names = ["1_find_layers.txt", "2_grow_river.txt", "3_share_kv.txt", "4_insert_exits.txt", "5_cut_logits.txt"]
    names.append("6_guard_decisions.txt")
    assert sorted(path.name for path in dump.iterdir()) == names
    assert "MatMulNBits" in (dump / names[2]).read_text()
    assert "ReduceL2" not in (dump / names[2]).read_text()


def test_layers_may_be_given_as_ranges(model: Path, tmp_path: Path) -> None:
    _run(model, "-o", tmp_path / "out.onnx", "--keep-layers", "0-1")
    assert json.loads(_metadata(tmp_path / "out.onnx")["river.config"])["keep_layers"] == [0, 1]


def test_help_explains_by_example() -> None:
    text = _run("--help").stdout
    assert "Examples:" in text
    assert "--bits-for '*down_proj*=8'" in text
    assert f"version {__version__}" in _run("--version").stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("{model} --tau nan", "error: tau: must be a finite number, not nan"),
        ("{model} --tau -2", "error: tau: must lie in [-1, 1], or above 1 for 'never exit', not -2.0"),
        ("{model} --tau high", "error: Invalid value for '--tau': 'high' is not a valid float."),
        ("{model} --bits 5", "error: Invalid value for '--bits': '5' is not one of '4', '8'."),
        ("{model} --bits-for down=5", "error: bits_for: down=5: bits must be one of (4, 8)"),
        ("{model} --bits-for down", "error: bits_for: 'down' is not of the form"),
        ("{model} --group-size 48", "error: Invalid value for '--group-size'"),
        ("{model} --keep-layers 3", "error: keep_layers: 3 is no layer of a stack of 3"),
        ("{model} --keep-layers a", "error: keep_layers: 'a' is no layer number and no range"),
        ("{model} --exit-every 0", "error: exit_every: must be a whole number, 1 or more, not 0"),
        ("{model} --quantizer magic", "error: quantizer: 'magic' is none of"),
        ("{model} -o {model}", "output and input are the same file"),
        ("{folder}/nothing.onnx", "no such file"),
        ("{folder}", "not a causal language model"),
        ("no-such-name", "error: output: say where to write: no-such-name is no file or folder"),
        ("--frobnicate", "error: No such option"),
        ("", "error: Missing argument 'MODEL'."),
    ],
)
def test_a_mistake_is_one_line_with_status_2_and_nothing_is_written(model: Path, arguments: str, line: str) -> None:
    before = sorted(model.parent.iterdir())
    result = _run(*arguments.format(model=model, folder=model.parent).split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert line in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(model.parent.iterdir()) == before


def test_a_hugging_face_folder_is_exported_first(tmp_path: Path) -> None:
    random_model("llama", layers=2).save_pretrained(tmp_path / "hf")
    before = sorted(path.name for path in (tmp_path / "hf").iterdir())
    result = _run(tmp_path / "hf")
    assert result.exit_code == 0, result.output
    assert "2, found by metadata" in result.stdout
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == sorted(
        [*before, "model.river.onnx", "model.river.onnx.data"]
    )


_SLOW_DISK = """
import time
from river_compile.exporters.onnx import onnx_file
chunks = onnx_file.chunks
def slowly(*arguments):
    for chunk in chunks(*arguments):
        time.sleep(0.5)
        yield chunk
onnx_file.chunks = slowly
"""


def _start(*arguments: object, slow_disk: bool = False) -> subprocess.Popen[str]:
    # A test run in the background of a shell has interrupts ignored, and would hand that on.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from river_compile.cli.export import main; main()"
    if slow_disk:
        code = _SLOW_DISK + code
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Large enough for the writing to be seen."""
    return ContribDecoder(layers=4, width=256, ffn=1024).save(tmp_path / "model.onnx")


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(large: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of the disk: the write fails half way in both cases."""
    out = tmp_path / "out" / "river.onnx"
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    for place in ("--external-data", "--no-external-data"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, usual[1]))
        try:
            result = _run(large, "-o", out, place, "--quiet")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        assert result.exit_code == 2
        assert "cannot be written: File too large" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("how", (signal.SIGTERM, signal.SIGINT, signal.SIGKILL))
def test_killed_half_way_it_leaves_the_old_result(large: Path, tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out" / "river.onnx"
    out.parent.mkdir()
    out.write_bytes(b"the old result")
    digest = hashlib.sha256(large.read_bytes()).hexdigest()
    process = _start(large, "-o", out, "--external-data", "--quiet", slow_disk=True)
    _wait_until(lambda: any(path.name.startswith(".") for path in out.parent.iterdir()), process)
    os.kill(process.pid, how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert out.read_bytes() == b"the old result"
    assert hashlib.sha256(large.read_bytes()).hexdigest() == digest
    visible = [path.name for path in out.parent.iterdir() if not path.name.startswith(".")]
    assert visible == ["river.onnx"]
    if how != signal.SIGKILL:
        assert len(list(out.parent.iterdir())) == 1


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def test_two_at_once_do_not_disturb_each_other(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    both = [_start(model, "-o", out, "--external-data", "--quiet") for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    session(out)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".")]) == 0
