"""Several graphs on one file of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

from river_compile.passes.onnx.external_data import chunks, make_inline, tensor_bytes

__all__ = ["save_sharing", "shared_tensors"]


def save_sharing(model: onnx.ModelProto, folder: Path, path: Path, owner: Path) -> int:
    """Write a graph whose weights lie in the external data of another one beside it.

    Args:
        model: its external tensors point into ``folder``. It is changed by this call.
        path: the file to write, in the owner's folder.
        owner: an ONNX file with external data. A weight of the model is taken from there if name, type, shape and bytes
            are the same; all others go into the file itself.

    Returns:
        Bytes of weights that are shared.
    """
    theirs = {tensor.name: tensor for tensor in shared_tensors(onnx.load(str(owner), load_external_data=False))}
    shared = 0
    for tensor in model.graph.initializer:
        other = theirs.get(tensor.name)
        if other is not None and _same(tensor, folder, other, owner.parent):
            shared += tensor_bytes(tensor)
            tensor.CopyFrom(other)
        else:
            make_inline(tensor, folder)
    path.write_bytes(model.SerializeToString())
    return shared


def shared_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The initializers that lie outside of a model."""
    return [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]


def _same(a: onnx.TensorProto, folder_a: Path, b: onnx.TensorProto, folder_b: Path) -> bool:
    if (a.data_type, list(a.dims)) != (b.data_type, list(b.dims)):
        return False
    return _digest(a, folder_a) == _digest(b, folder_b)


def _digest(tensor: onnx.TensorProto, folder: Path) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks(tensor, folder):
        digest.update(chunk)
    return digest.digest()
