"""The application on Ray Serve: a service a replica, and the replicas' figures on one page."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from typing import Any

from ray import serve

from river_compile.serve.app import make_app
from river_compile.serve.metrics import merged
from river_compile.serve.service import Service
from river_compile.serve.settings import ServeSettings

__all__ = ["Replicas", "application"]

# Beside those that have a slot or wait for one: refusals, health and metrics, which are answered at once.
_AT_ONCE = 64
_REPORT_SECONDS, _FORGET_SECONDS = 1.0, 15.0


@dataclass(frozen=True)
class Replicas:
    """How many there are, and the CPUs that Ray reserves for each."""

    count: int = 1
    cpus: float = 1.0


class Board:
    """The last figures of each replica; those of one that no longer reports are forgotten."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[float, str]] = {}

    async def report(self, replica: str, text: str) -> None:
        self._texts[replica] = (time.monotonic(), text)

    async def texts(self) -> dict[str, str]:
        oldest = time.monotonic() - _FORGET_SECONDS
        self._texts = {name: (at, text) for name, (at, text) in self._texts.items() if at >= oldest}
        return {name: text for name, (_, text) in self._texts.items()}


@serve.ingress()
class OpenAI:
    """One replica: a service, its routes, and a report of its figures every second.

    Args:
        settings: what is served.
        board: of all replicas' figures.
    """

    def __init__(self, settings: ServeSettings, board: Any) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        self._board = board
        self._service = Service(settings, self._name)
        self._reports: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        self._reports = asyncio.get_running_loop().create_task(self._report())
        return make_app(self._service, self._figures)

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose engine has ended."""
        if not self._service.engine.alive:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        # It is not there where the model could not be loaded.
        if hasattr(self, "_service"):
            self._service.close()

    async def _report(self) -> None:
        while True:
            # A board that is being replaced misses a report.
            with contextlib.suppress(Exception):
                await self._board.report.remote(self._name, self._service.metrics.text())
            await asyncio.sleep(_REPORT_SECONDS)

    async def _figures(self) -> str:
        own = {self._name: self._service.metrics.text()}
        with contextlib.suppress(Exception):
            return merged(await self._board.texts.remote() | own)
        return own[self._name]


def application(settings: ServeSettings, replicas: Replicas) -> Any:
    """The application that `ray.serve.run` takes."""
    board = serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})(Board)
    ongoing = settings.slots + settings.queue + _AT_ONCE
    served = serve.deployment(
        num_replicas=replicas.count,
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing * replicas.count,
        backpressure_config={"retry_after_s": 1},
        ray_actor_options={"num_cpus": replicas.cpus},
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=3,
    )(OpenAI)
    return served.bind(replace(settings, model=settings.model.resolve()), board.bind())
