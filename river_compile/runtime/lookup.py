"""Drafts from the text itself: what followed the last tokens when they stood there before (prompt lookup decoding).

The idea is Saxena's prompt lookup decoding (2023); transformers and vLLM have it as an n-gram drafter.
"""

from __future__ import annotations

__all__ = ["Lookup"]

_LONGEST, _SHORTEST = 3, 2


class Lookup:
    """The n-grams of one sequence, of three tokens and of two, each with the place behind its last occurrence.

    Args:
        tokens: the prompt.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Add tokens at the end of the sequence."""
        for token in tokens:
            # An n-gram is noted only when something has followed it, so that a search never finds itself.
            for size in range(_SHORTEST, _LONGEST + 1):
                if len(self._tokens) >= size:
                    self._behind[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def find(self, most: int) -> list[int]:
        """Up to ``most`` tokens that followed the sequence's last n-gram, the longer one first; none if it is new."""
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            place = self._behind.get(tuple(self._tokens[-size:]))
            if place is not None:
                return self._tokens[place : place + most]
        return []
