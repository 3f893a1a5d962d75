"""The part of `river-export` that builds TensorRT engines."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from rich import box
from rich.console import Console
from rich.table import Table

from river_compile.cli.console import progress_bars
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError

if TYPE_CHECKING:
    from river_compile.exporters.tensorrt.build import EngineOptions
    from river_compile.exporters.tensorrt.engine import EngineInfo
    from river_compile.measure.tuning import Tuning

__all__ = ["build", "engine_options", "refuse_engine_options", "river_defaults"]

_F = TypeVar("_F", bound=Callable[..., Any])

# Said here and not imported, so that `river-export --help` need not load ONNX.
_DTYPES = ("float16", "bfloat16", "float32")
_ENGINE_ONLY = (
    "engine",
    "max_batch",
    "max_length",
    "dtype",
    "kv_cache",
    "runtime",
    "compute_capabilities",
    "weightless",
)
_OPTIONS = (
    click.option(
        "--target",
        type=click.Choice(["onnxruntime", "tensorrt"]),
        default="onnxruntime",
        show_default=True,
        help="What to export for. tensorrt builds an engine; its river has symmetric 4-bit weights in groups of 64.",
    ),
    click.option(
        "--engine",
        type=click.Path(path_type=Path),
        help="Engine to write, with its side file ENGINE.json.  [default: MODEL.engine]",
    ),
    click.option(
        "--max-batch", type=int, default=4, show_default=True, help="Most sequences the engine takes at once."
    ),
    click.option(
        "--max-length", type=int, default=2048, show_default=True, help="Most tokens of a sequence in the engine."
    ),
    click.option(
        "--dtype", type=click.Choice(_DTYPES), help="Float type of the engine.  [default: float16, or the model's own]"
    ),
    click.option(
        "--kv-cache",
        type=click.Choice(["static", "scattered", "concatenated"]),
        default="static",
        show_default=True,
        help="KV cache of the engine: a buffer written in place; two in turn, for Triton; or past in and present out.",
    ),
    click.option(
        "--runtime",
        type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
        default="auto",
        show_default=True,
        help="TensorRT to build with; tensorrt-rtx builds without a GPU.",
    ),
    click.option(
        "--compute-capability",
        "compute_capabilities",
        multiple=True,
        metavar="X.Y",
        help="GPU to build for, such as 8.9; repeatable.  [default: the runtime's own choice]",
    ),
    click.option(
        "--weightless",
        is_flag=True,
        help="Leave weights out of the engine, to be refitted from its ONNX file; needs a GPU to be built.",
    ),
)


def engine_options(command: _F) -> _F:
    """The options of engines, on a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def refuse_engine_options(context: click.Context) -> None:
    """
    Raises:
        ConfigError: an option was given that means something for an engine only.
    """
    for name in _ENGINE_ONLY:
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise ConfigError(name, "is for --target tensorrt only")


def river_defaults(context: click.Context, config: RiverConfig) -> RiverConfig:
    """The config with the defaults of TensorRT where nothing was asked for.

    Raises:
        ConfigError: int8 activations were asked for.
    """
    from river_compile.exporters.tensorrt.build import default_config

    defaults = default_config()
    fields = ("group_size", "quantizer", "activations")
    unset = [name for name in fields if context.get_parameter_source(name) == ParameterSource.DEFAULT]
    if config.activations != "float" and "activations" not in unset:
        raise ConfigError("activations", "an engine's river computes in the engine's float type; leave the option out")
    return dataclasses.replace(config, **{name: getattr(defaults, name) for name in unset})


def build(
    model: str,
    engine: Path | None,
    onnx_output: Path | None,
    config: RiverConfig,
    options: EngineOptions,
    tuning: Tuning | None,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build an engine and show what was built."""
    from river_compile.api import build_engine

    engine = engine or _beside(Path(model))
    with progress_bars(quiet or as_json) as progress:
        info = build_engine(model, engine, config, options, tuning=tuning, onnx_output=onnx_output, progress=progress)
    if as_json:
        click.echo(info.to_json())
    else:
        _show(Console(quiet=quiet, highlight=False), info, engine, onnx_output)


def build_into_repository(
    model: str,
    repository: Path | None,
    config: RiverConfig,
    options: EngineOptions,
    tuning: Tuning | None,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build an engine into a model repository of Triton.

    Raises:
        ConfigError: no repository is named, or the engine would have no weights in it.
        InputError: Triton does not load what the runtime builds, or serves no KV cache of the form asked for.
    """
    from river_compile.exporters.tensorrt.runtime import load_runtime
    from river_compile.triton import (
        KV_CACHE,
        check_kv_cache,
        check_repository,
        check_runtime,
        name_of,
        staging_place,
        write_engine,
    )

    target, name = check_repository(repository), name_of(model)
    if click.get_current_context().get_parameter_source("kv_cache") == ParameterSource.DEFAULT:
        options = dataclasses.replace(options, kv_cache=KV_CACHE)
    check_kv_cache(options.kv_cache)
    check_runtime(load_runtime(options.runtime).name)
    if options.weightless:
        raise ConfigError("weightless", "Triton fits no weights into an engine")
    with tempfile.TemporaryDirectory(prefix=".river-", dir=staging_place(target)) as folder:
        engine = Path(folder) / "model.engine"
        build(model, engine, None, config, options, tuning, quiet=quiet, as_json=as_json)
        click.echo(f"wrote {write_engine(engine, target, name)}", err=as_json)


def _beside(model: Path) -> Path:
    if model.is_dir():
        return model / "model.engine"
    return model.with_suffix(".engine") if model.suffix == ".onnx" else model.with_name(model.name + ".engine")


def _show(console: Console, info: EngineInfo, engine: Path, onnx_output: Path | None) -> None:
    targets = ", ".join(info.compute_capabilities) or "the runtime's default GPUs"
    rows = (
        ("runtime", f"{info.runtime} {info.version}, for {targets}"),
        (
            "decoder layers",
            f"{info.layers}, {info.river_layers} with a river twin, {len(info.exit_points)} exit points",
        ),
        ("KV cache", f"{info.kv_cache}, {info.dtype}"),
        ("limits", f"{info.max_batch} sequences of {info.max_length} tokens"),
        ("engine", f"{info.nbytes / 1e6:.1f} MB"),
        ("time", ", ".join(f"{n} {s:.1f} s" for n, s in info.seconds.items())),
    )
    table = Table(box=box.SIMPLE, show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    kept = f", and {onnx_output} as it was handed to TensorRT" if onnx_output is not None else ""
    console.print(f"wrote {engine} and {engine}.json{kept}", soft_wrap=True)
