"""What the documents say is true: their examples run, their commands are there, and so is what they name."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from river_compile.cli.main import COMMANDS, main
from river_compile.exporters.quantizers import QUANTIZERS
from tests.contrib_model import ContribDecoder

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def examples(text: str) -> list[str]:
    """The Python that stands in a page."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_examples_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With linear layers that have a bias and some that have none."""
    assert len(examples(TEXT)) == 4
    ContribDecoder(form="matmul_bias").save(tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("river_compile.exporters.quantizers.QUANTIZERS", QUANTIZERS.copy())
    names: dict[str, Any] = {}
    for number, example in enumerate(examples(TEXT), 1):
        exec(compile(example, f"CONTRIBUTING.md, example {number}", "exec"), names)


def test_folders_files_and_make_targets_are_there() -> None:
    named = re.findall(r"`([\w./]+(?:/|\.py|\.toml))`", TEXT)
    assert len(named) > 15
    wings = [ROOT / wing for wing in ("", "exporters", "passes", "river_compile/cli")]
    assert [name for name in named if not any((wing / name).exists() for wing in wings)] == []
    targets = set(re.findall(r"make ([\w-]+)", TEXT))
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(rf"river[ -]({'|'.join(COMMANDS)})(?= )(.*)")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Name and arguments of each command that stands in a block of code."""
    blocks = re.findall(
        r"^(?:    .*\n)+", re.sub(r"^```python\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.M
    )
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [match for line in lines if (match := _COMMAND.match(line))]
    return [(match[1], shlex.split(match[2], comments=True)) for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_commands_are_there(page: Path) -> None:
    """Commands take minutes and models: what is tried is whether they would be understood."""
    for name, arguments in commands(page.read_text(encoding="utf-8")):
        if name == "lm-eval":
            # Its options are the harness's own.
            continue
        command = main.get_command(click.Context(main), name)
        assert command is not None
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        known |= {"--help", "--version"}
        options = {word.partition("=")[0] for word in arguments if word.startswith("-") and not re.match(r"-\d", word)}
        assert options <= known, f"river {name} {' '.join(arguments)}"


def test_there_are_commands_to_look_at() -> None:
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_name_what_is_there(page: Path) -> None:
    """Examples load models from a hub; their names are looked up, and they are Python."""
    for example in examples(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("river_compile"):
                module = __import__(str(node.module), fromlist=["_"])
                assert all(hasattr(module, alias.name) for alias in node.names)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "river_compile"
            ):
                assert hasattr(__import__("river_compile"), node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:samples|tests|docs)/[\w./-]+)(?:::\w+)?`", text):
        assert (ROOT / named).exists(), named


def test_each_fault_has_a_test() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w./]+\.py)::(\w+)`", text)
    assert len(named) >= 20
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), f"{path}::{name}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
