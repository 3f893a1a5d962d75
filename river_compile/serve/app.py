"""The routes, as a FastAPI application that any ASGI server can run; Ray Serve does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from river_compile.errors import ConfigError
from river_compile.serve.answers import Reply, error_body
from river_compile.serve.engine import Busy
from river_compile.serve.schema import ChatRequest, CompletionRequest
from river_compile.serve.service import Failed, Service
from river_compile.serve.settings import is_key

__all__ = ["make_app"]

_BEARER = "bearer "
_CLIENT_GONE = 499


def make_app(service: Service, metrics: Callable[[], Awaitable[str]] | None = None) -> FastAPI:
    """The application.

    Args:
        service: what answers.
        metrics: the text of ``/metrics``; None: the service's own.
    """
    largest = service.settings.largest_body
    app = FastAPI(title="river-compile", docs_url=None, redoc_url=None, openapi_url=None, max_body_size=largest)
    app.add_middleware(_Keyed, keys=service.settings.keys)
    _add_errors(app)

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await _respond(service, asked, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await _respond(service, asked, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_name(service, name)
        return _model(service)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        if not service.engine.alive:
            return JSONResponse(error_body("the engine has ended", "server_error"), 503)
        active, waiting = service.engine.load
        return JSONResponse({"status": "ok", "active": active, "waiting": waiting})

    @app.get("/metrics", response_model=None)
    async def figures() -> Response:
        text = service.metrics.text() if metrics is None else await metrics()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.settings.name, "object": "model", "created": 0, "owned_by": "river-compile"}


def _check_name(service: Service, name: str | None) -> None:
    if name is not None and name != service.settings.name:
        raise HTTPException(404, f"there is no model {name!r} here, but {service.settings.name!r}")


async def _respond(service: Service, asked: CompletionRequest | ChatRequest, request: Request) -> Response:
    _check_name(service, asked.model)
    reply = Reply(service, asked, await service.answer(asked))
    if asked.stream:
        return StreamingResponse(reply.events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
    answering = asyncio.ensure_future(reply.whole())
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(answering.result()) if answering.done() else Response(status_code=_CLIENT_GONE)
    finally:
        # Also where this request itself is cancelled.
        for task in (answering, leaving):
            task.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ConfigError)
    async def wrong_value(request: Request, error: ConfigError) -> Response:
        return JSONResponse(error_body(str(error), param=error.field), 400)

    @app.exception_handler(RequestValidationError)
    async def wrong_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        own = first.get("ctx", {}).get("error")
        if isinstance(own, ConfigError):
            return JSONResponse(error_body(str(own), param=own.field), 400)
        # Where JSON breaks off is told as a number.
        place = "" if first["type"] == "json_invalid" else ".".join(str(part) for part in first["loc"][1:])
        message = f"{place}: {first['msg']}" if place else str(first["msg"])
        return JSONResponse(error_body(message, param=place or None), 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return JSONResponse(error_body(str(error), "server_busy"), 503, {"retry-after": str(error.retry_after)})

    @app.exception_handler(Failed)
    async def failed(request: Request, error: Failed) -> Response:
        return JSONResponse(error_body(str(error), "server_error"), 500)


class _Keyed:
    """Lets only those in that carry a key, where there are keys; health and metrics are open."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["type"] == "http" and scope["path"].startswith("/v1") and not self._knows(scope):
            answer = JSONResponse(error_body("a valid API key is needed"), 401, {"www-authenticate": "Bearer"})
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"").decode("utf-8", "surrogateescape")
        return given.lower().startswith(_BEARER) and is_key(given[len(_BEARER) :].strip(), self._keys)
