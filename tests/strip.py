"""The same graph as exporters that leave fewer traces would have written it."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"


def with_scoped_names(source: Path, target: Path) -> Path:
    """Metadata gone; each node named by its module's path, ``/model/layers.3/mlp/down_proj/MatMul``."""
    model = onnx.load(source)
    taken: Counter[str] = Counter()
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "[]")
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
        path = "/" + (modules[-1].replace(".layers.", "/layers.") + "/" if modules else "") + node.op_type
        node.name = f"{path}_{taken[path]}" if taken[path] else path
        taken[path] += 1
    _forget(model)
    onnx.save(model, target)
    return target


def without_names(source: Path, target: Path) -> Path:
    """Metadata gone, nodes unnamed, every inner tensor and weight called t0, t1, ..."""
    model = onnx.load(source)
    signature = {value.name for value in [*model.graph.input, *model.graph.output]}
    renamed: dict[str, str] = {"": ""}

    def rename(name: str) -> str:
        if name in signature:
            return name
        return renamed.setdefault(name, f"t{len(renamed)}")

    def strip(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            tensor.name = rename(tensor.name)
        for node in graph.node:
            node.name = ""
            node.input[:] = [rename(name) for name in node.input]
            node.output[:] = [rename(name) for name in node.output]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    strip(attribute.g)
        del graph.value_info[:]

    strip(model.graph)
    _forget(model)
    onnx.save(model, target)
    return target


def _forget(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
