"""What of a river did not go as asked, in words that both wings share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

__all__ = ["notes_of", "ranges", "some"]


class _Noted(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def note(self) -> str: ...


def notes_of(kept: Mapping[int, str], partial: Sequence[int], linears: Iterable[_Noted]) -> list[str]:
    """A line for each thing that did not go as asked.

    Args:
        kept: the layers without a twin, and why.
        partial: layers whose twin shares most weights with them.
        linears: of the twins, with what is to be said of each.
    """
    reasons: dict[str, list[int]] = {}
    for index, why in sorted(kept.items()):
        reasons.setdefault(why, []).append(index)
    lines = [f"backbone only, {why}: layers {ranges(layers)}" for why, layers in reasons.items()]
    if partial:
        why = "most weights are in no linear layer (a mixture of experts?) and stay as they are"
        lines.append(f"{why}: layers {ranges(partial)}")
    remarks: dict[str, list[str]] = {}
    for linear in linears:
        if linear.note:
            remarks.setdefault(linear.note, []).append(linear.name)
    return lines + [f"{note}: {some(names)}" for note, names in remarks.items()]


def ranges(numbers: Sequence[int]) -> str:
    """``0-2, 5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def some(names: Sequence[str], what: str = "linear layers") -> str:
    """The one name, or how many there are and the first."""
    return names[0] if len(names) == 1 else f"{len(names)} {what}, such as {names[0]}"
