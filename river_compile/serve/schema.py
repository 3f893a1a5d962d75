"""What requests may hold: the part of OpenAI's API that is served, and ``tau`` and ``exact`` of our own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from river_compile.errors import ConfigError

__all__ = ["Asked", "ChatRequest", "CompletionRequest"]

_MOST_STOPS, _LONGEST_STOP = 16, 1024
# What a client may send for others' use, and what it may send as long as it asks for nothing.
_FOR_OTHERS = frozenset({"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"})
_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Asked(BaseModel):
    """The fields that both kinds of requests have."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    exact: bool | None = None
    tau: Annotated[float, Field(allow_inf_nan=False)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, nothing in _NOTHING.items():
            if given.get(name) is not None and given[name] not in nothing:
                raise ConfigError(name, f"is not served, but for {' or '.join(map(repr, nothing))}")
        # Null is what a client sends for a field that it does not set.
        left_out = _FOR_OTHERS | _NOTHING.keys()
        return {name: value for name, value in given.items() if name not in left_out and value is not None}

    @field_validator("stop")
    @classmethod
    def _some_short_stops(cls, stop: str | list[str] | None) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > _MOST_STOPS or not all(0 < len(one) <= _LONGEST_STOP for one in stops):
            raise ConfigError("stop", f"takes up to {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} characters")
        return stops

    @property
    def stops(self) -> list[str]:
        return self.stop if isinstance(self.stop, list) else []

    @property
    def alternatives(self) -> int | None:
        """How many likeliest tokens to tell of each; None: no probabilities at all."""
        raise NotImplementedError

    @property
    def tells_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Asked):
    """The body of ``/v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def single(self) -> str | list[int]:
        """The one prompt.

        Raises:
            ConfigError: there are several.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        tokens = [part for part in self.prompt if isinstance(part, int)]
        if len(tokens) == len(self.prompt):
            return tokens
        if len(self.prompt) != 1 or isinstance(self.prompt[0], int):
            raise ConfigError("prompt", "one a request; several requests at once share passes")
        return self.prompt[0]


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Text]


class ChatRequest(Asked):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def alternatives(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ConfigError("top_logprobs", "needs logprobs to be true")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def plain_messages(self) -> list[dict[str, str]]:
        """Each with a role and one text, as chat templates take them."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content
                if isinstance(message.content, str)
                else "".join(part.text for part in message.content),
            }
            for message in self.messages
        ]
