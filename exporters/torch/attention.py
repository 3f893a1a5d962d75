"""Attention of few rows, row by row: each as in a pass of its own."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from river_compile.exporters.torch import seam
from river_compile.exporters.torch.forms import MOST, SHORT
from river_compile.passes.fx.graph import operation, value_of
from river_compile.passes.fx.pieces import Piece

__all__ = ["attend_by_row", "lower_attention"]

_NAME = "scaled_dot_product_attention"
_OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# What keys pass through from where they are put behind the cached ones.
_MOVES = {"expand", "reshape", "view", "contiguous", "getitem", "repeat_interleave", "unsqueeze", "flatten", "to"}


def lower_attention(piece: Piece) -> int:
    """Compute the 16-bit attention of few rows row by row, each over the keys that a pass of this row alone would have.

    torch's kernel takes rows in blocks and rounds in another order for each number of rows. Attention reads no weights,
    so little is lost.

    Ensures: the same attention up to rounding; a row comes out as in a pass of its own. Returns how many were
    rewritten.
    """
    rewritten = 0
    for node in list(piece.graph.nodes):
        if node.op != "call_function" or operation(node) != _NAME or not _is_of_few_rows(node):
            continue
        given = dict(zip(_OPERANDS, node.args, strict=False)) | dict(node.kwargs)
        if given.get("attn_mask") is None or given.get("dropout_p", 0.0) != 0.0 or given.get("is_causal", False):
            continue
        operands = [given[name] for name in ("query", "key", "value", "attn_mask")]
        with piece.graph.inserting_before(node):
            result = piece.graph.call_function(
                attend_by_row, (*operands, given.get("scale"), given.get("enable_gqa", False), _grows(operands[1]))
            )
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        piece.graph.erase_node(node)
        rewritten += 1
    return rewritten


def _is_of_few_rows(node: fx.Node) -> bool:
    value = value_of(node)
    if value.dtype not in SHORT or value.dim() != 4:
        return False
    rows = value.shape[-2]
    return isinstance(rows, torch.SymInt) or 1 < rows <= MOST


def _grows(key: fx.Node) -> bool:
    """Whether the keys of this pass's tokens were put behind the cached ones, so that the last keys are theirs."""
    while key.op in ("call_function", "call_method") and operation(key) in _MOVES:
        inner = key.args[0]
        if not isinstance(inner, fx.Node):
            return False
        if operation(key) == "getitem" and _ends_with_what_was_written(inner, key.args[1]):
            return True
        key = inner
    return key.op == "call_function" and operation(key) == "cat"


def _ends_with_what_was_written(held: fx.Node, read: Any) -> bool:
    """Whether a slice of a buffer's slots ends where this pass's writing into them ended (`ReservedLayer`)."""
    if not isinstance(read, tuple):
        return False
    slots = value_of(held).dim() - 2
    end = _end(read, slots)
    writes = [user.args[1] for user in held.users if operation(user) == "setitem" and user.args[0] is held]
    return end is not None and any(_end(written, slots) == end for written in writes)


def _end(index: Any, axis: int) -> Any:
    """Where an index ends along an axis; None if it does not say so."""
    along = index[axis] if isinstance(index, tuple) and axis < len(index) else None
    return along.stop if isinstance(along, slice) else None


def attend_by_row(*operands: Any) -> torch.Tensor:
    """The attention of `_attend_by_row`, as one operator: what it does depends on the rows and the mask at hand."""
    result: torch.Tensor = torch.ops.river_compile.attend_by_row(*operands)
    return result


def _attend_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None,
    enable_gqa: bool,
    grows: bool,
) -> torch.Tensor:
    """As torch's scaled dot product attention: query [batch, heads, rows, size], mask [.., rows, keys].

    Args:
        grows: the last keys are those of the rows, in order.
    """
    rows, keys = query.shape[-2], key.shape[-2]
    settings: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if not 1 < rows <= MOST:
        return functional.scaled_dot_product_attention(query, key, value, mask, **settings).contiguous()
    first = keys - rows + 1
    plain = grows and mask.dtype == torch.bool and mask.numel() == rows * keys and _is_causal(mask, rows, keys)
    # Nothing is left out where a row sees those behind it.
    grows = plain or (grows and first > 0 and not bool(_seen(mask[..., 0, first:]).any()))
    parts = []
    for row, one in enumerate(torch.split(query, 1, -2)):
        end = first + row if grows else keys
        mine = None if plain else _unless_all_seen(mask[..., row : row + 1, :end])
        operands = (one, key.narrow(-2, 0, end), value.narrow(-2, 0, end))
        parts.append(functional.scaled_dot_product_attention(*operands, mine, **settings))
    return torch.cat(parts, -2)


def _is_causal(mask: torch.Tensor, rows: int, keys: int) -> bool:
    return torch.equal(mask.reshape(rows, keys), _causal(rows, keys, mask.device))


@functools.lru_cache(maxsize=1)
def _causal(rows: int, keys: int, device: torch.device) -> torch.Tensor:
    """All layers of a pass have the same."""
    return torch.ones((rows, keys), dtype=torch.bool, device=device).tril_(keys - rows)


def _unless_all_seen(mask: torch.Tensor) -> torch.Tensor | None:
    """A pass of one row that sees everything is given no mask."""
    all_seen = bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())
    return None if all_seen else mask


def _seen(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


seam.define_operator(
    "attend_by_row(Tensor query, Tensor key, Tensor value, Tensor mask, float? scale, bool enable_gqa, bool grows)"
    " -> Tensor",
    _attend_by_row,
    lambda query, key, value, mask, scale, enable_gqa, grows: query.new_empty((*query.shape[:-1], value.shape[-1])),
)
