"""Options that more than one command has."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from river_compile.errors import ConfigError

__all__ = ["cache_option", "chat_option", "depths", "numbers"]


def numbers(field: str) -> Callable[[click.Context, click.Parameter, str], tuple[float, ...]]:
    """A callback that reads ``0.98,0.95``."""

    def parse(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in value.split(",") if part.strip())
        except ValueError:
            raise ConfigError(field, f"{value!r} is no list of numbers, such as 0.98,0.95") from None

    return parse


def depths(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """A callback that reads ``0,15``."""
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise ConfigError("depths", f"{value!r} is no list of whole numbers, such as 0,15") from None


def chat_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--chat``, as the parameter ``chat``."""
    text = "Read each text as the assistant's turn, by the tokenizer's chat template: for models tuned to chat."
    return click.option("--chat", is_flag=True, help=text)(command)


def cache_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--cache FOLDER`` and ``--no-cache``, as one parameter ``cache``: a folder, or None."""

    def resolve(*args: Any, cache: Path | None, no_cache: bool, **kwargs: Any) -> Any:
        base = os.environ.get("XDG_CACHE_HOME")
        default = (Path(base) if base else Path.home() / ".cache") / "river-compile" / "readings"
        return command(*args, cache=None if no_cache else cache or default, **kwargs)

    resolve.__doc__ = command.__doc__
    resolve.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    options = (
        click.option(
            "--cache",
            type=click.Path(path_type=Path),
            help="Folder that keeps readings, so that an interrupted run goes on.  [default: river-compile/readings in "
            "the user's cache folder]",
        ),
        click.option("--no-cache", is_flag=True, help="Keep nothing, and read everything anew."),
    )
    for option in options:
        resolve = option(resolve)
    return resolve
