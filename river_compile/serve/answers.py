"""What is answered, in OpenAI's words."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from river_compile.serve.schema import Asked, ChatRequest
from river_compile.serve.service import Answer, Failed, Piece, Service
from river_compile.serve.stream import Token

__all__ = ["Reply", "error_body"]


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    # Text of a request may stand in a message, and not all of that can be written as UTF-8.
    message = message.encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Reply:
    """The objects of one answer: whole, or as server-sent events."""

    def __init__(self, service: Service, asked: Asked, answer: Answer) -> None:
        self._service, self._asked, self._answer = service, asked, answer
        self._chat = isinstance(asked, ChatRequest)
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._offset = 0

    async def whole(self) -> dict[str, Any]:
        """
        Raises:
            Failed: the model failed.
        """
        try:
            async with aclosing(self._answer.read()) as pieces:
                read = [piece async for piece in pieces]
        finally:
            self._answer.close()
        text = "".join(piece.text for piece in read)
        tokens = [token for piece in read for token in piece.tokens]
        choice: dict[str, Any] = {"index": 0, "finish_reason": read[-1].reason, "logprobs": self._logprobs(tokens)}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self._chat else "text_completion"
        return self._object(kind, [choice]) | {"usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, up to ``[DONE]``; one that tells an error if the model fails."""
        try:
            if self._chat:
                yield self._event(self._chunk({"role": "assistant", "content": ""}))
            async with aclosing(self._answer.read()) as pieces:
                async for piece in pieces:
                    yield self._event(self._chunk_of(piece))
            if self._asked.tells_usage:
                yield self._event(self._object(self._chunk_kind, []) | {"usage": self._usage()})
            yield b"data: [DONE]\n\n"
        except Failed as error:
            yield self._event(error_body(str(error), "server_error"))
        finally:
            self._answer.close()

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk_of(self, piece: Piece) -> dict[str, Any]:
        content: Any = {"content": piece.text} if self._chat else piece.text
        return self._chunk(content, piece.tokens, piece.reason)

    def _chunk(self, content: Any, tokens: Sequence[Token] = (), reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(tokens)}
        choice["delta" if self._chat else "text"] = content
        return self._object(self._chunk_kind, [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        named = {"id": self._id, "object": kind, "created": self._created, "model": self._service.settings.name}
        return named | {"choices": choices}

    def _usage(self) -> dict[str, int]:
        read, made = self._answer.prompt_tokens, self._answer.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def _event(self, told: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(told, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._asked.alternatives is None or not tokens:
            return None
        if self._chat:
            return {"content": [self._in_chat(token) for token in tokens], "refusal": None}
        texts = [self._service.words.token(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        likeliest = [
            {self._service.words.token(one): _finite(logprob) for one, logprob in token.alternatives}
            for token in tokens
        ]
        logprobs = [_finite(token.logprob) for token in tokens]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": likeliest, "text_offset": offsets}

    def _in_chat(self, token: Token) -> dict[str, Any]:
        likeliest = [self._entry(one, logprob) for one, logprob in token.alternatives]
        return self._entry(token.id, token.logprob) | {"top_logprobs": likeliest}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._service.words.token(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float | None) -> float:
    """JSON has no infinity; OpenAI writes this for what is as good as impossible."""
    return max(logprob, -9999.0) if logprob is not None else -9999.0
