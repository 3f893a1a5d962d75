"""`river-serve`: an OpenAI-compatible server of an exported model."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from river_compile.cli.console import river_command
from river_compile.cli.options import threads_option, tokenizer_option
from river_compile.errors import InputError, MissingExtra, RiverError

if TYPE_CHECKING:
    from river_compile.serve.settings import ServeSettings

__all__ = ["main"]

_APPLICATION = "river"
# Ray gives its agents 15 seconds to come up, and a machine under load may need more at first.
_ATTEMPTS = 3

_EXAMPLES = """\b
Examples:
  river-serve out_dir                                    a folder of river-export's, on 127.0.0.1:8000
  river-serve model.exact.onnx --tokenizer path --exact  the original model's own tokens, unless a request says else
  river-serve out_dir --replicas 2 --slots 16 --api-key-file keys.txt --host 0.0.0.0
  river-serve out_dir --address auto --replicas 8        on the machines that `ray start` has brought together
"""


@river_command("river-serve", _EXAMPLES)
@click.argument("model", type=click.Path(path_type=Path))
@tokenizer_option()
@click.option("--name", help="What requests call the model.  [default: as its file or folder]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="Processes with the model.")
@click.option("--slots", type=int, default=8, show_default=True, help="Streams that a replica decodes at once.")
@click.option("--queue", type=int, default=64, show_default=True, help="Requests that may wait at a replica.")
@click.option("--exact/--no-exact", default=None, help="Where a request does not say.  [default: as exported]")
@click.option("--tau", type=float, help="Exit threshold where a request gives none, instead of the model's own.")
@click.option("--context", type=int, help="Tokens of prompt and answer together.  [default: as the model tells]")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File of keys, one a line; requests carry one.")
@threads_option
@click.option("--address", help="A Ray cluster to run on, such as auto.  [default: a Ray of its own, here]")
def main(
    model: Path,
    tokenizer: str | None,
    name: str | None,
    host: str,
    port: int,
    replicas: int,
    slots: int,
    queue: int,
    exact: bool | None,
    tau: float | None,
    context: int | None,
    api_key_file: Path | None,
    threads: int | None,
    address: str | None,
) -> None:
    """Serve a model by OpenAI's API, on Ray Serve: completions and chat, streamed and whole.

    MODEL is an .onnx file, or a folder that `river-export` made, which has its tokenizer with it.
    """
    _check_installed()
    from river_compile.serve.settings import ServeSettings, read_keys

    file, folder = _found(model, tokenizer)
    settings = ServeSettings(
        file,
        folder,
        name or (model.resolve().name if model.is_dir() else file.stem),
        slots=slots,
        queue=queue,
        exact=exact,
        tau=tau,
        context=context,
        threads=threads,
        keys=() if api_key_file is None else read_keys(api_key_file),
    )
    _serve(settings, host, port, replicas, address)


def _check_installed() -> None:
    for package in ("ray", "fastapi", "prometheus_client"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtra(package, "serve", "serving a model") from error


def _found(model: Path, tokenizer: str | None) -> tuple[Path, str]:
    """The decoder's file and the tokenizer's folder or hub name.

    Raises:
        InputError: there is no such file, no river in the folder, or no tokenizer is named for a file.
    """
    if model.is_dir():
        from river_compile.exporters.onnx.folder import river_in

        return river_in(model), _place(tokenizer or str(model))
    if not model.is_file():
        raise InputError(f"{model}: no such file or folder")
    if tokenizer is None:
        raise InputError(f"{model}: its tokenizer is not in it; name a folder with --tokenizer")
    return model, _place(tokenizer)


def _place(tokenizer: str) -> str:
    """A folder by its full path, as replicas run elsewhere; another is a hub name."""
    return str(Path(tokenizer).resolve()) if Path(tokenizer).exists() else tokenizer


def _serve(settings: ServeSettings, host: str, port: int, replicas: int, address: str | None) -> None:
    from ray import serve

    from river_compile.serve.deployment import Replicas, application
    from river_compile.serve.words import Words

    # What every replica would fail at is better said before any is started.
    Words(settings.tokenizer)
    cpus = float(settings.threads or 1)
    with _ray({"address": address} if address else _local_ray(replicas, cpus)):
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
        try:
            serve.run(application(settings, Replicas(replicas, cpus)), name=_APPLICATION)
        except RuntimeError as error:
            reason = _reason(_told_by_replicas(_APPLICATION))
            raise RiverError(f"the replicas do not start: {reason}") from error
        click.echo(f"serving {settings.name} on http://{host}:{port}/v1, {replicas} x {settings.slots} slots")
        threading.Event().wait()


@contextmanager
def _ray(given: dict[str, Any]) -> Iterator[None]:
    """Ray while it is used; what it serves ends with it, and a Ray of our own too.

    Raises:
        RiverError: it cannot be reached, or does not start.
    """
    import ray
    from ray import serve

    # What Ray does at a termination is to print its stack.
    terminating = signal.getsignal(signal.SIGTERM)
    for attempt in range(_ATTEMPTS):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **given)
            break
        # A node that does not come up in time is a bare Exception.
        except Exception as error:
            ray.shutdown()  # type: ignore[no-untyped-call]
            if attempt + 1 == _ATTEMPTS:
                reason = " ".join(str(error).split())[:300]
                raise RiverError(f"Ray does not start, or cannot be reached: {reason}") from error
    signal.signal(signal.SIGTERM, terminating)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        yield
    except KeyboardInterrupt:
        click.echo("stopping", err=True)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()  # type: ignore[no-untyped-call]


def _told_by_replicas(application: str) -> str:
    """What Ray Serve has noted of an application whose replicas do not start."""
    from ray import serve

    status = serve.status().applications[application]
    return "\n".join([status.message, *(one.message for one in status.deployments.values())])


def _reason(told: str) -> str:
    """Our own line, of all that Ray Serve tells; else the first that there is."""
    own = re.findall(r"river_compile\.errors\.\w+: (.*)", told)
    return str(own[-1]) if own else next((line.strip() for line in told.splitlines() if line.strip()), "see Ray's logs")


def _local_ray(replicas: int, cpus: float) -> dict[str, Any]:
    """A Ray that nobody else can reach, with as many CPUs as are asked for, whether the machine has them or not."""
    return {
        "address": "local",
        "num_cpus": max(1, round(replicas * cpus)),
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }
