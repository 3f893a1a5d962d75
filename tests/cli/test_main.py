"""`river`: every command under one name, and completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner

import river_compile
from river_compile.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_there_by_both_names(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"], prog_name="river")
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: river {name} ")
    scripts = entry_points(group="console_scripts")
    assert scripts[f"river-{name}"].load() is main.get_command(None, name)  # type: ignore[attr-defined]


def test_every_script_is_a_command() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    scripts = set(re.findall(r"^river-([\w-]+) = ", text, re.MULTILINE))
    assert scripts == set(COMMANDS)


def test_help_lists_them_and_loads_none() -> None:
    result = _python("-X", "importtime", "-m", "river_compile", "--help")
    assert result.returncode == 0
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line[:30])}", result.stdout, re.MULTILINE)
    loaded = set(re.findall(r"\| +(\S+)$", result.stderr, re.MULTILINE))
    assert "river_compile.cli.main" in loaded
    assert not {"torch", "onnx", "numpy"} & loaded


def test_the_module_is_the_command() -> None:
    result = _python("-m", "river_compile", "--version")
    assert result.stdout == f"river, version {river_compile.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["exprot"], "error: no command 'exprot'; did you mean export?"),
        (
            ["xyz"],
            "error: no command 'xyz'; there are export, run, eval, calibrate, compare, plan, lm-eval, serve, bench",
        ),
        (["run", "nowhere.onnx"], "error: "),
        (["export", "--nope"], "error: No such option"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str) -> None:
    result = _python("-m", "river_compile", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(line)
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [("river ca", ["calibrate"]), ("river export --head", ["--head-bits"]), ("river exprot --", [])],
)
def test_a_shell_completes_commands_and_options(shell: str, words: str, expected: list[str]) -> None:
    code = "from river_compile.cli.main import main; main(prog_name='river')"
    # fish gives the word that is being completed, the others its place.
    place = words.rsplit(maxsplit=1)[-1] if shell == "fish" else str(len(words.split()) - 1)
    result = _python("-c", code, _RIVER_COMPLETE=f"{shell}_complete", COMP_WORDS=words, COMP_CWORD=place)
    assert "Traceback" not in result.stderr
    assert "error" not in result.stderr
    assert all(word in result.stdout for word in expected)


def test_the_old_names_complete_too() -> None:
    code = "from river_compile.cli.run import main; main(prog_name='river-run')"
    result = _python("-c", code, _RIVER_RUN_COMPLETE="bash_complete", COMP_WORDS="river-run --exa", COMP_CWORD="1")
    assert "--exact" in result.stdout
