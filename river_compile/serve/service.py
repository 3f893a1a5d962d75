"""A model as text in and text out: what the routes call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from river_compile.errors import InputError, RiverError
from river_compile.runtime.onnxruntime import OnnxDecoder
from river_compile.serve.engine import Engine
from river_compile.serve.metrics import Metrics
from river_compile.serve.schema import Asked, ChatRequest, CompletionRequest
from river_compile.serve.settings import GenerationRequest, ServeSettings
from river_compile.serve.stream import Event, Reason, Token
from river_compile.serve.words import StopStrings, Words

__all__ = ["Answer", "Failed", "Piece", "Service"]

# OpenAI's own, where a completion names none.
_COMPLETION_TOKENS = 16


class Failed(RiverError):
    """The model failed while it answered."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text, which may lag behind its tokens, and in the last part why it ends."""

    text: str
    tokens: tuple[Token, ...]
    reason: Reason | None = None


class Answer:
    """A request under way: pieces to be read once, then `close`.

    Args:
        stops: strings that end it.
        behind: whether the text goes on behind the prompt.

    Raises:
        ConfigError, Busy: see `Engine.submit`.
    """

    def __init__(
        self, engine: Engine, words: Words, request: GenerationRequest, stops: Sequence[str], *, behind: bool
    ) -> None:
        self._engine, self._stops = engine, StopStrings(stops)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._stream = engine.submit(request, self._tell)
        self._pieces = words.pieces(request.prompt if behind else ())
        self.prompt_tokens, self.completion_tokens = len(request.prompt), 0

    async def read(self) -> AsyncGenerator[Piece, None]:
        """
        Raises:
            Failed: the model failed.
        """
        while True:
            event = await self._events.get()
            if event.error is not None:
                raise Failed(event.error)
            piece = self._piece(event)
            self.completion_tokens += len(piece.tokens)
            if piece.text or piece.tokens or piece.reason:
                yield piece
            if piece.reason:
                return

    def close(self) -> None:
        """Free the slot, if it is still held."""
        self._engine.cancel(self._stream, "stop" if self._stops.found else "cancelled")

    def _tell(self, event: Event) -> None:
        # A loop that has closed has nobody left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _piece(self, event: Event) -> Piece:
        text = ""
        for count, token in enumerate(event.tokens, 1):
            text += self._stops.add(self._pieces.add(token.id))
            if self._stops.found:
                return Piece(text, event.tokens[:count], "stop")
        return Piece(text + (self._stops.rest() if event.reason else ""), event.tokens, event.reason)


class Service:
    """A model, its tokenizer and its engine.

    Args:
        settings: what is served.
        replica: a name in the metrics.

    Raises:
        RiverError: the model or its tokenizer cannot be used, or nothing tells how many tokens it reads.
    """

    def __init__(self, settings: ServeSettings, replica: str = "0") -> None:
        self.settings = settings
        self.words = Words(settings.tokenizer)
        decoder = OnnxDecoder(settings.model, threads=settings.threads)
        told = [length for length in (decoder.signature.room, self.words.context) if length is not None]
        context = settings.context if settings.context is not None else min(told, default=None)
        if context is None:
            raise InputError(f"{settings.model}: nothing tells how many tokens it reads: give --context")
        if decoder.signature.room is not None:
            context = min(context, decoder.signature.room)
        self.metrics = Metrics(replica, decoder.layers or 0)
        stop_tokens, vocabulary = self.words.stop_tokens, decoder.vocabulary
        self.engine = Engine(
            decoder, settings, self.metrics, vocabulary=vocabulary, context=context, stop_tokens=stop_tokens
        )
        self._tokenizing = ThreadPoolExecutor(1, "river-tokenizer")
        self.engine.start()

    def close(self) -> None:
        """End all streams."""
        self.engine.stop()
        self._tokenizing.shutdown()

    async def answer(self, asked: CompletionRequest | ChatRequest) -> Answer:
        """Take a request.

        Raises:
            ConfigError: it asks for what cannot be.
            Busy: too many wait already.
        """
        loop = asyncio.get_running_loop()
        alternatives = asked.alternatives
        if isinstance(asked, ChatRequest):
            prompt = await loop.run_in_executor(self._tokenizing, self.words.chat, asked.plain_messages)
            wanted = asked.max_completion_tokens or asked.max_tokens or max(self.engine.context - len(prompt), 1)
        else:
            single = asked.single
            if isinstance(single, str):
                single = await loop.run_in_executor(self._tokenizing, self.words.encode, single)
            prompt, wanted = single, asked.max_tokens or _COMPLETION_TOKENS
        request = _request(asked, prompt, wanted, alternatives)
        return Answer(self.engine, self.words, request, asked.stops, behind=isinstance(asked, CompletionRequest))


def _request(asked: Asked, prompt: list[int], wanted: int, alternatives: int | None) -> GenerationRequest:
    return GenerationRequest(
        tuple(prompt), wanted, asked.exact, asked.tau, asked.temperature, asked.top_p, asked.seed, alternatives
    )
