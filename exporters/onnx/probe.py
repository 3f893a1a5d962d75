"""Tensors inside a model made visible: copies of an ONNX model, in memory, with more outputs."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from river_compile.config import NEVER
from river_compile.errors import InputError, MissingExtra
from river_compile.exporters.onnx.onnx_file import EXTERNAL_ABOVE
from river_compile.exporters.onnx.signature import Signature
from river_compile.passes.onnx.external_data import tensor_bytes

__all__ = ["HiddenStates", "Probe"]

_LAYER = "river/layer."


class Probe:
    """An ONNX decoder that tells named tensors of its outer graph, in ONNX Runtime on the CPU.

    Args:
        model: read without external data, its signature a decoder's with a KV cache; it is changed by this call.
        folder: where its external data lies.
        tensors: names of the tensors to tell.
        open_weights: names of weights that a pass may replace.

    Raises:
        InputError: ONNX Runtime cannot load the model, it is too large to be copied, or an input is not understood.
    """

    def __init__(
        self, model: onnx.ModelProto, folder: Path, tensors: Sequence[str], open_weights: Collection[str] = ()
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra("onnxruntime", "cpu", "looking into a model") from error
        self.tensors = tuple(tensors)
        present = {value.name for value in model.graph.output}
        added = [name for name in self.tensors if name not in present]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
        # An initializer that is a graph input as well is a default.
        for tensor in model.graph.initializer:
            if tensor.name in open_weights:
                value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                model.graph.input.append(value)
        if sum(map(tensor_bytes, (t for t in model.graph.initializer if t.raw_data))) > EXTERNAL_ABOVE:
            raise InputError("the model holds over 1 GB of weights in one file; export it with external data")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # A probe is used between other work: its idle threads should not spin.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        folder = _follow_links(model, folder)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot load it: {' '.join(str(error).split())[:300]}") from error
        self.signature = Signature.of(self._session, lambda: model, folder, added)

    def read(self, ids: np.ndarray, weights: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The tensors of one pass from an empty KV cache.

        Args:
            ids: int64 [tokens], or [batch, tokens].
            weights: replacements for open weights.
        """
        ids = np.atleast_2d(ids)
        batch, length = ids.shape
        feeds: dict[str, Any] = self.signature.feeds(ids, np.ones((batch, length), np.int64))
        feeds |= {slot.past: slot.empty(batch) for slot in self.signature.slots}
        feeds |= self._settings() | dict(weights or {})
        return dict(zip(self.tensors, self._session.run(list(self.tensors), feeds), strict=True))

    def _settings(self) -> dict[str, np.ndarray]:
        overridable = {value.name for value in self._session.get_overridable_initializers()}
        never = np.array(NEVER, np.float32)
        return {"river.tau": never} if "river.tau" in overridable else {}


def _follow_links(model: onnx.ModelProto, folder: Path) -> Path:
    """Let a model name the files that its external data is, not links to them; the folder that it names them in.

    Of a model in memory ONNX Runtime knows no folder but the one it is told, and refuses a link that leads out of it.
    """
    entries = [e for t in model.graph.initializer for e in t.external_data if e.key == "location"]
    files = {entry.value: (folder / entry.value).resolve() for entry in entries}
    if not files:
        return folder
    common = Path(os.path.commonpath([file.parent for file in files.values()]))
    for entry in entries:
        entry.value = str(files[entry.value].relative_to(common))
    return common


class HiddenStates:
    """The hidden states between the decoder layers of a river model, in backbone passes.

    Args:
        path: an exported river model.
    """

    def __init__(self, path: Path) -> None:
        model = onnx.load(str(path), load_external_data=False)
        # The first output of a layer's If is its hidden state: see Layer.outputs.
        self._depths = {
            node.output[0]: int(node.name.removeprefix(_LAYER)) + 1
            for node in model.graph.node
            if node.op_type == "If" and node.name.startswith(_LAYER)
        }
        self._probe = Probe(model, path.parent, list(self._depths))

    def read(self, ids: np.ndarray) -> dict[int, np.ndarray]:
        """By depth: the hidden state after that many layers, float32 [tokens, width]."""
        return {self._depths[name]: value[0].astype(np.float32) for name, value in self._probe.read(ids).items()}
