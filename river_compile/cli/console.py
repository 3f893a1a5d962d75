"""What all commands share: one line for an error, and progress on standard error."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from river_compile.errors import RiverError
from river_compile.reports import write_report
from river_compile.version import __version__

__all__ = ["answer", "progress_bars", "river_command"]


class Result(Protocol):
    """What a command finds out."""

    def to_json(self) -> str: ...


_R = TypeVar("_R", bound=Result)


def river_command(name: str, examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A function as the command ``name``, with ``--help``, examples at its end, and ``--version``."""

    def command(function: Callable[..., Any]) -> click.Command:
        settings = {"help_option_names": ["-h", "--help"]}
        made = click.command(cls=_RiverCommand, epilog=examples, context_settings=settings)(function)
        return click.version_option(__version__, prog_name=name)(made)

    return command


class _RiverCommand(click.Command):
    """A command that answers a user's mistake with one line on standard error and exit status 2.

    A termination signal unwinds like an interrupt, so that a half-written export is cleaned away.
    """

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _one_line():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _terminate)
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (RiverError, click.UsageError) as error:
        text = error.format_message() if isinstance(error, click.UsageError) else str(error)
        click.echo(f"error: {' '.join(text.split())}", err=True)
        raise click.exceptions.Exit(2) from error


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows a step, how much of it is done, and of how much; on standard error, gone at the end."""
    if quiet:
        yield lambda step, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=None)
            # A step of one piece has no fraction to show: the bar pulses until it is done.
            progress.update(tasks[step], completed=done, total=total if total > 1 or done else None)

        yield show


def answer(
    result: _R, show: Callable[[Console, _R], None], *, output: Path | None = None, as_json: bool, quiet: bool = False
) -> None:
    """Write what was found into a file, where one is named, and print it: as JSON, or as ``show`` does."""
    if output is not None:
        write_report(output, result.to_json() + "\n")
    if as_json:
        click.echo(result.to_json())
    else:
        show(Console(quiet=quiet, highlight=False), result)
