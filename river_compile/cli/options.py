"""Options that more than one command has. What differs on purpose, a default or what it is good for, is an argument."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from river_compile.config import ACTIVATIONS, BITS, FLOAT, GROUP_SIZES, RiverConfig
from river_compile.errors import ConfigError, InputError

__all__ = [
    "HELD_OUT",
    "activations_option",
    "bits_option",
    "cache_option",
    "chat_option",
    "choice",
    "counts_option",
    "depths_option",
    "documents_option",
    "dtype_option",
    "group_size_option",
    "head_bits_option",
    "json_option",
    "max_tokens_option",
    "output_option",
    "own_tokenizer",
    "png_option",
    "prompt_tokens_option",
    "quantizer_option",
    "quiet_option",
    "taus_option",
    "texts_option",
    "threads_option",
    "tokenizer_option",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_Number = TypeVar("_Number", int, float)

HELD_OUT = "held-out texts that come with the package"


def choice(values: tuple[object, ...]) -> click.Choice[str]:
    return click.Choice([str(value) for value in values])


def _numbers(
    field: str, kind: type[_Number], what: str
) -> Callable[[click.Context, click.Parameter, str], tuple[_Number, ...]]:
    """A callback that reads ``0.98,0.95``."""

    def parse(ctx: click.Context, param: click.Parameter, value: str) -> tuple[_Number, ...]:
        try:
            return tuple(kind(part) for part in value.split(",") if part.strip())
        except ValueError:
            raise ConfigError(field, f"{value!r} is no list of {what}") from None

    return parse


def taus_option(default: str, help: str, *, show_default: bool = True) -> Callable[[_F], _F]:
    """``--tau LIST``, as ``taus``."""
    read = _numbers("tau", float, "numbers, such as 0.98,0.95")
    return click.option(
        "--tau", "taus", callback=read, metavar="LIST", default=default, show_default=show_default, help=help
    )


def depths_option(default: str, help: str) -> Callable[[_F], _F]:
    """``--depths LIST``."""
    read = _numbers("depths", int, "whole numbers, such as 0,15")
    return click.option("--depths", callback=read, metavar="LIST", default=default, show_default=True, help=help)


def counts_option(name: str, parameter: str, default: str, help: str) -> Callable[[_F], _F]:
    """``NAME LIST``, numbers of 1 or more, as ``parameter``."""
    field = name.lstrip("-")
    read = _numbers(field, int, "whole numbers, such as 1,4,16")

    def positive(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
        numbers = read(ctx, param, value)
        if not numbers or min(numbers) < 1:
            raise ConfigError(field, f"must be numbers of 1 or more, not {value!r}")
        return numbers

    return click.option(
        name, parameter, callback=positive, metavar="LIST", default=default, show_default=True, help=help
    )


def tokenizer_option(default: str | None = None, use: str = "") -> Callable[[_F], _F]:
    told = "" if default is None else f"  [default: {default}]"
    return click.option("--tokenizer", metavar="FOLDER", help=f"Folder or hub name of the tokenizer{use}.{told}")


def own_tokenizer(model: Path) -> Path:
    """The folder of a model whose tokenizer nobody named.

    Raises:
        InputError: the model is no folder.
    """
    if not model.is_dir():
        raise InputError(f"{model}: its tokenizer is not in it; name a folder with --tokenizer")
    return model


def texts_option(default: str, name: str = "--texts", use: str = "") -> Callable[[_F], _F]:
    return click.option(
        name,
        multiple=True,
        type=click.Path(path_type=Path),
        help=f"Text file, or JSONL of texts or prompts{use}; repeatable.  [default: {default}]",
    )


def documents_option(default: int | None = None) -> Callable[[_F], _F]:
    return click.option(
        "--documents",
        type=int,
        default=default,
        show_default=default is not None,
        help="Only so many documents, evenly spread.",
    )


def prompt_tokens_option(help: str) -> Callable[[_F], _F]:
    return click.option("--prompt-tokens", type=int, default=8, show_default=True, help=help)


def max_tokens_option(default: int, help: str) -> Callable[[_F], _F]:
    return click.option("--max-tokens", type=int, default=default, show_default=True, help=help)


def threads_option(command: _F) -> _F:
    return click.option(
        "--threads", type=int, help="Threads of ONNX Runtime within an operator.  [default: its own choice]"
    )(command)


def dtype_option(
    help: str | None = None, *, default: str | None = "bfloat16", float16: bool = True
) -> Callable[[_F], _F]:
    """``--dtype``, of a Hugging Face model that is read."""
    types = ("bfloat16", *(["float16"] if float16 else []), "float32")
    return click.option("--dtype", type=choice(types), default=default, show_default=default is not None, help=help)


def quantizer_option(help: str, *, default: str | None = RiverConfig.quantizer) -> Callable[[_F], _F]:
    return click.option("--quantizer", metavar="NAME", default=default, show_default=default is not None, help=help)


def bits_option(command: _F) -> _F:
    return click.option(
        "--bits", type=choice(BITS), default=str(RiverConfig.bits), show_default=True, help="Bits of a river weight."
    )(command)


def group_size_option(command: _F) -> _F:
    return click.option(
        "--group-size",
        type=choice(GROUP_SIZES),
        default=str(RiverConfig.group_size),
        show_default=True,
        help="Weights that share a scale.",
    )(command)


def head_bits_option(command: _F) -> _F:
    return click.option(
        "--head-bits",
        type=choice((*BITS, FLOAT)),
        default=RiverConfig.head_bits,
        show_default=True,
        help="Bits of the LM head that a token takes after its exit.",
    )(command)


def activations_option(command: _F) -> _F:
    return click.option(
        "--activations",
        type=choice(ACTIVATIONS),
        default=RiverConfig.activations,
        show_default=True,
        help="What river products compute with on a CPU: int8 is three times as fast as the model's own float type.",
    )(command)


def _in_a_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that could not be written before hours go into what belongs there."""
    if value is not None and not value.parent.is_dir():
        raise InputError(f"{value}: there is no such folder")
    return value


def output_option(*names: str, help: str) -> Callable[[_F], _F]:
    """A file to write, whose folder is there."""
    return click.option(*names, type=click.Path(dir_okay=False, path_type=Path), callback=_in_a_folder, help=help)


def png_option(help: str) -> Callable[[_F], _F]:
    return output_option("--png", help=help)


def json_option(help: str = "Print JSON instead of the table.") -> Callable[[_F], _F]:
    return click.option("--json", "as_json", is_flag=True, help=help)


def quiet_option(help: str = "Print nothing but errors (and JSON, with --json).") -> Callable[[_F], _F]:
    return click.option("--quiet", "-q", is_flag=True, help=help)


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
