"""A river model without its river."""

from __future__ import annotations

import onnx

from river_compile.passes.onnx.only_river import take_branches

__all__ = ["only_backbone"]


def only_backbone(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model that a river was made for, as far as the river model tells.

    What passes wrote otherwise before the river was grown stays so: fused residual adds and norms are apart (see
    `unfuse_skip_norms`), and quantized float16 products compute in float32 (see `widen_products`).

    Requires: a river model, its weights in it or outside.
    Ensures: the signature of the original and its function; no weight is read or changed, and none is left that no node
    reads.
    """
    return take_branches(model, river=False)
