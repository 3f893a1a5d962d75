"""`river-serve` before any Ray is started: what it finds, and what it refuses in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from river_compile.cli import serve
from river_compile.serve.settings import ServeSettings, is_key, read_keys
from tests.words import save_word_tokenizer

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_word_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _serve(*arguments: object) -> Result:
    return CliRunner().invoke(serve.main, [str(argument) for argument in arguments])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What would be served, instead of serving it."""
    found: list[tuple[object, ...]] = []
    monkeypatch.setattr(serve, "_serve", lambda *arguments: found.append(arguments))
    return found


def test_options_become_settings(
    exported: Callable[[str], Path], tokenizer: Path, tmp_path: Path, told: list[tuple[object, ...]]
) -> None:
    (tmp_path / "keys").write_text("one\n\n two \n")
    model = exported("llama")
    arguments = [model, "--tokenizer", tokenizer, "--exact", "--tau", 0.9, "--slots", 3, "--queue", 5, "--context", 99]
    result = _serve(*arguments, "--api-key-file", tmp_path / "keys", "--port", 81, "--replicas", 2, "--name", "m")
    assert result.exit_code == 0, result.output
    settings, *rest = told[0]
    assert isinstance(settings, ServeSettings) and rest == ["127.0.0.1", 81, 2, None]
    assert (settings.model, settings.tokenizer, settings.name) == (model, str(tokenizer), "m")
    assert (settings.exact, settings.tau, settings.slots, settings.queue, settings.context) == (True, 0.9, 3, 5, 99)
    assert is_key("one", settings.keys) and is_key("two", settings.keys) and not is_key("", settings.keys)
    assert "two" not in repr(settings)


def test_mistakes_are_told_in_one_line(
    exported: Callable[[str], Path], tokenizer: Path, tmp_path: Path, told: list[tuple[object, ...]]
) -> None:
    model, empty = exported("llama"), tmp_path / "empty"
    empty.write_text("\n")
    for arguments, text in (
        (["nothing.onnx"], "no such file or folder"),
        ([model], "name a folder with --tokenizer"),
        ([tmp_path], f"make one with 'river export {tmp_path}"),
        ([model, "--tokenizer", tokenizer, "--slots", 0], "slots: must be 1 or more"),
        ([model, "--tokenizer", tokenizer, "--tau", "nan"], "tau"),
        ([model, "--tokenizer", tokenizer, "--api-key-file", empty], "no key is in it"),
        ([model, "--tokenizer", tokenizer, "--api-key-file", tmp_path / "none"], "keys cannot be read"),
    ):
        result = _serve(*arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and text in result.stderr, result.stderr
    assert told == []


def test_a_tokenizer_that_is_not_there_is_told_before_ray_starts(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    result = _serve(exported("llama"), "--tokenizer", tmp_path)
    assert result.exit_code == 2 and "no tokenizer" in result.stderr


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = _serve("model.onnx")
    assert result.exit_code == 2 and "pip install 'river-compile[serve]'" in result.stderr


def test_keys_are_kept_as_digests_alone(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    assert all(len(key) == 64 and "secret" not in key for key in read_keys(tmp_path / "keys"))


def test_of_a_replica_that_does_not_start_our_own_line_is_told() -> None:
    text = (
        "Deploying failed.\n  File x\nriver_compile.errors.ConfigError: tau: this model has no river\nCheck the logs."
    )
    assert serve._reason(text) == "tau: this model has no river"
    assert serve._reason("\nSomething else\n") == "Something else"
