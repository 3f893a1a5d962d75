"""Compiled pieces, one for all of a form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from river_compile.exporters.torch import seam
from river_compile.passes.fx.graph import value_of
from river_compile.passes.fx.pieces import Piece, Symbols, signature

__all__ = ["Artifacts"]


@dataclass
class _Artifact:
    """A compiled piece, and the guards on its symbolic sizes (by their new names) under which it holds."""

    run: Callable[..., Any]
    guards: list[Any]


class Artifacts:
    """Compiled pieces by their signature: two of one form are compiled once, within a graph and across graphs."""

    def __init__(self, compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]) -> None:
        self._compiler = compiler
        self._held: dict[str, list[_Artifact]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def compile(self, piece: Piece) -> Callable[..., Any]:
        """The compiled piece: operands in, a sequence of its outputs out.

        Requires: a compilation by Dynamo under way, to whose trace the piece's values belong.
        """
        symbols = Symbols(seam.describe_symbol)
        known = self._held.setdefault(f"{seam.describe_modes()}\n{signature(piece, symbols)}", [])
        old_names = {name: symbol for symbol, name in symbols.names.items()}
        for artifact in known:
            if all(seam.holds(_renamed(guard, old_names)) for guard in artifact.guards):
                return artifact.run
        values = [seam.as_it_is_now(value_of(node)) for node in piece.placeholders.values()]
        with seam.guards_since() as guards:
            run = self._compiler(piece.module(), values)
        mine = [guard for guard in guards if guard.free_symbols <= symbols.names.keys()]
        known.append(_Artifact(run, [_renamed(guard, symbols.names) for guard in mine]))
        return run


def _renamed(expression: Any, names: dict[Any, Any]) -> Any:
    import sympy

    return expression.xreplace(
        {
            symbol: sympy.Symbol(name) if isinstance(name := names[_key(symbol, names)], str) else name
            for symbol in expression.free_symbols
        }
    )


def _key(symbol: Any, names: dict[Any, Any]) -> Any:
    return symbol if symbol in names else str(symbol)
