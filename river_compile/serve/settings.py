"""What a replica is told when it starts, and what a request may ask of it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError

__all__ = ["GenerationRequest", "ServeSettings", "digest", "is_key", "read_keys"]


@dataclass(frozen=True)
class ServeSettings:
    """How a model is served.

    Fields:
        model: an ONNX decoder's file.
        tokenizer: folder of its tokenizer, or hub name.
        name: what requests call the model.
        slots: streams that are decoded at once.
        queue: requests that may wait for a slot; more are refused.
        exact, tau: where a request gives none; None: as the model was exported.
        context: tokens of prompt and answer together; None: as the model tells.
        threads: of ONNX Runtime within an operator; None: its own choice.
        keys: SHA-256 digests of the keys that a request may carry; none: it needs no key.
        largest_body: bytes of a request.

    Raises:
        ConfigError: a field has a value it cannot have.
    """

    model: Path
    tokenizer: str | Path
    name: str
    slots: int = 8
    queue: int = 64
    exact: bool | None = None
    tau: float | None = None
    context: int | None = None
    threads: int | None = None
    keys: tuple[str, ...] = ()
    largest_body: int = 1 << 20

    def __post_init__(self) -> None:
        for field, least in (("slots", 1), ("queue", 0), ("context", 2), ("threads", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ConfigError(field, f"must be {least} or more, not {value}")
        if self.tau is not None:
            RiverConfig(tau=self.tau)


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate.

    Fields:
        prompt: token ids.
        max_tokens: new tokens at most.
        exact, tau: None: the server's.
        temperature: 0 is greedy.
        top_p: tokens are sampled from the smallest set of at least this probability.
        seed: makes sampling repeatable.
        logprobs: how many alternatives to tell of each token, beside its own probability; None: neither.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    exact: bool | None = None
    tau: float | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def is_key(given: str, keys: Collection[str]) -> bool:
    """Whether a key is among those of the digests, in a time that does not tell how much of it is right."""
    made, found = digest(given), False
    for kept in keys:
        found |= hmac.compare_digest(made, kept)
    return found


def read_keys(file: Path) -> tuple[str, ...]:
    """Digests of the keys in a file, one a line; empty lines do not count.

    Raises:
        InputError: it cannot be read, or holds none: a server that was to ask for keys would ask for none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: keys cannot be read: {error}") from error
    keys = tuple(digest(line.strip()) for line in lines if line.strip())
    if not keys:
        raise InputError(f"{file}: no key is in it; write one a line")
    return keys
