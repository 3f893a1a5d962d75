"""Between text and tokens: prompts in, pieces of an answer out, and an end where a stop string stands."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from river_compile.errors import ConfigError, InputError
from river_compile.measure.fidelity import hub_tokenizer

__all__ = ["Pieces", "StopStrings", "Words"]

_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_UNKNOWN_LENGTH = 1 << 30
_PRIMING = 8


class Words:
    """A tokenizer's folder, and what else it says of the model.

    Args:
        folder: with the tokenizer, or a hub name; a folder's config and generation config are read if they are there.

    Raises:
        MissingExtra: transformers is not installed.
        InputError: there is no tokenizer, or one of a kind that cannot decode token by token.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._tokenizer = hub_tokenizer(folder)
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise InputError(f"{folder}: its tokenizer is no fast one (tokenizer.json), which serving needs")
        # A tokenizer notes what it does to a text in itself, and is called by several threads.
        self._lock = threading.Lock()

    @property
    def context(self) -> int | None:
        """Tokens that the model reads at most; None: nothing tells."""
        config = _read(self._folder / "config.json")
        config = config | config.get("text_config", {})
        told = [config[name] for name in _CONTEXT if isinstance(config.get(name), int)]
        length = self._tokenizer.model_max_length
        told += [length] if length < _UNKNOWN_LENGTH else []
        return int(told[0]) if told else None

    @property
    def stop_tokens(self) -> frozenset[int]:
        """What ends an answer, by the tokenizer and by the generation config."""
        noted = _read(self._folder / "generation_config.json").get("eos_token_id")
        found = noted if isinstance(noted, list) else [noted]
        return frozenset(token for token in (*found, self._tokenizer.eos_token_id) if isinstance(token, int))

    def encode(self, text: str) -> list[int]:
        """
        Raises:
            ConfigError: it is no text: it has half of a surrogate pair.
        """
        _check_text(text, "prompt")
        with self._lock:
            return list(self._tokenizer(text)["input_ids"])

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages by the tokenizer's chat template, up to where the answer begins.

        Raises:
            ConfigError: there is no template, or it does not take these messages.
        """
        from jinja2.exceptions import TemplateError

        for message in messages:
            _check_text(message["content"], "messages")
        if not self._tokenizer.chat_template:
            raise ConfigError("messages", "this model's tokenizer has no chat template: use /v1/completions")
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        except (TemplateError, ValueError, TypeError) as error:
            raise ConfigError(
                "messages", f"the chat template does not take them: {' '.join(str(error).split())}"
            ) from None

    def token(self, token: int) -> str:
        """One token as text, for those who ask for probabilities."""
        with self._lock:
            return str(self._tokenizer.decode([token]))

    def pieces(self, prompt: Sequence[int] = ()) -> Pieces:
        """Decoding of an answer, as the text goes on behind a prompt; without one as it begins."""
        return Pieces(self._backend, prompt)


class Pieces:
    """Text of tokens, as far as it is whole characters."""

    def __init__(self, backend: Any, prompt: Sequence[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend, self._stream = backend, DecodeStream(skip_special_tokens=True)
        # A word's space may be dropped where a text begins.
        for token in prompt[-_PRIMING:]:
            self.add(token)

    def add(self, token: int) -> str:
        """The text that another token completes."""
        return self._stream.step(self._backend, token) or ""


class StopStrings:
    """Text up to the first of some strings; what may be the beginning of one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._held = tuple(strings), ""
        self.found = False

    def add(self, text: str) -> str:
        """What can be told now that this has come."""
        self._held += text
        places = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        kept = max((self._begun(string) for string in self._strings), default=0)
        told, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return told

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        told, self._held = self._held, ""
        return told

    def _begun(self, string: str) -> int:
        """How much of a string stands at the end of what is held."""
        longest = min(len(string) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(string[:size])), 0)


def _check_text(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(field, "is no text: it has half of a surrogate pair") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
