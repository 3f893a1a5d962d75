"""A small random model with a river as a service, and requests to it in this process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from river_compile.runtime import OnnxDecoder
from river_compile.serve.app import make_app
from river_compile.serve.engine import Engine
from river_compile.serve.service import Service
from river_compile.serve.settings import ServeSettings

CONTEXT = 200
NAME = "tiny"


def settings(model: Path, tokenizer: Path, **changes: Any) -> ServeSettings:
    given: dict[str, Any] = {"slots": 4, "queue": 64, "context": CONTEXT, "threads": 1}
    return ServeSettings(model, tokenizer, NAME, **(given | changes))


@asynccontextmanager
async def client_of(service: Service, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(service), **changes)
    async with httpx.AsyncClient(transport=transport, base_url="http://served", timeout=60) as client:
        yield client


def together(service: Service, *requests: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> list[Any]:
    """What all of some requests get, made at once."""

    async def run() -> list[Any]:
        async with client_of(service) as client:
            return list(await asyncio.gather(*(request(client) for request in requests)))

    return asyncio.run(run())


def post(service: Service, route: str, body: Any, **arguments: Any) -> httpx.Response:
    """One request; a body of bytes is sent as it is."""
    given = {"content": body} if isinstance(body, bytes) else {"json": body}

    async def request(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(route, **given, **arguments)

    found: httpx.Response = together(service, request)[0]
    return found


def complete(service: Service, prompt: str | Sequence[int], **fields: Any) -> dict[str, Any]:
    answer = post(service, "/v1/completions", {"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    read: dict[str, Any] = answer.json()
    return read


def events(text: str) -> list[dict[str, Any]]:
    """The objects of server-sent events, which have to end with ``[DONE]``."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def words(tokens: Sequence[int]) -> str:
    """What the word tokenizer makes of tokens."""
    return " ".join(f"w{token}" for token in tokens)


def expected(model: Path, prompt: Sequence[int], new: int, **arguments: Any) -> list[int]:
    """What the decoder makes of a prompt by itself."""
    return _decoder(model).generate([list(prompt)], new, **arguments).tokens[0]


@cache
def _decoder(model: Path) -> OnnxDecoder:
    return OnnxDecoder(model, threads=1)


def comes_to_rest(engine: Engine) -> bool:
    """Whether all slots and the queue are soon empty: a stream is let go a moment after its last event is told."""
    until = time.perf_counter() + 10
    while engine.load != (0, 0) and time.perf_counter() < until:
        time.sleep(0.01)
    return engine.load == (0, 0)
