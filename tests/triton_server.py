"""What Triton Inference Server does with a model of a repository, as its public sources have it, and a client of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.oracle import session

_NUMPY = {
    "TYPE_FP32": np.float32,
    "TYPE_FP16": np.float16,
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
    "TYPE_BOOL": np.bool_,
}


def parsed(text: str) -> Any:
    """A configuration, read by Triton's own schema: a word that is none there is an error."""
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def _dtype(field: Any) -> Any:
    return _NUMPY[model_config_pb2.DataType.Name(field.data_type)]


@dataclass
class Server:
    """Serves a model by its configuration alone.

    The checks of a model that is loaded, and of a request, are those of Triton's core and of the backend. States begin
    with 1 for every size that varies, are kept for each sequence, and are paired in the order of their names.
    """

    config: Any
    session: onnxruntime.InferenceSession
    sequences: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Server:
        config = parsed((folder / "config.pbtxt").read_text())
        assert config.name == folder.name and config.backend == "onnxruntime"
        return cls(config, session(folder / "1" / config.default_model_filename))

    def __post_init__(self) -> None:
        # With batching no input may be optional, and a tensor's first size is not in its dims.
        assert self.config.max_batch_size == 0
        self._states = self.config.sequence_batching.state
        assert all(list(value.dims) and 0 not in value.dims for value in (*self.config.input, *self.config.output))
        self._overridable = {value.name: value for value in self.session.get_overridable_initializers()}
        required = {value.name: value for value in self.session.get_inputs()}
        states = {state.input_name: state for state in self._states}
        optional = {value.name for value in self.config.input if value.optional}
        assert set(required) == states.keys() | {value.name for value in self.config.input if not value.optional}
        assert optional == self._overridable.keys() and (self.config.backend == "onnxruntime" or not optional)
        tensors = required | self._overridable | {value.name: value for value in self.session.get_outputs()}
        for name, dims in [(v.name, v.dims) for v in (*self.config.input, *self.config.output)] + [
            (name, state.dims) for state in self._states for name in (state.input_name, state.output_name)
        ]:
            # Only the onnxruntime backend writes a scalar as one number.
            shape = tensors[name].shape or ([1] if self.config.backend == "onnxruntime" else [])
            assert len(dims) == len(shape), name
            assert all(d == s for d, s in zip(dims, shape, strict=True) if d != -1 and isinstance(s, int)), name
        self._binding = self.session.io_binding()

    def infer(
        self, sequence: int, inputs: dict[str, np.ndarray], *, start: bool = False, end: bool = False
    ) -> dict[str, np.ndarray]:
        declared = {value.name: value for value in self.config.input}
        missing = {name for name, value in declared.items() if not value.optional} - set(inputs)
        assert not missing, missing
        for name, array in inputs.items():
            dims = list(declared[name].dims)
            assert array.dtype == _dtype(declared[name])
            assert len(dims) == array.ndim and all(d in (-1, n) for d, n in zip(dims, array.shape, strict=True))
        assert sequence > 0 and (start or sequence in self.sequences)
        if start:
            self.sequences[sequence] = {state.input_name: self._begun(state) for state in self._states}
            assert len(self.sequences) <= self.config.sequence_batching.oldest.max_candidate_sequences
        made = self._run(inputs | self.sequences[sequence])
        pairs = zip(
            sorted(state.input_name for state in self._states),
            sorted(state.output_name for state in self._states),
            strict=True,
        )
        self.sequences[sequence] = {past: made[present] for past, present in pairs}
        if end:
            del self.sequences[sequence]
        return {value.name: made[value.name] for value in self.config.output}

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As the backend: one binding for all requests, of what a request brings, and emptied after it."""
        for name, array in feeds.items():
            scalar = name in self._overridable and not self._overridable[name].shape
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array.reshape(()) if scalar else array)
            self._binding.bind_ortvalue_input(name, value)
        names = [value.name for value in self.config.output] + [state.output_name for state in self._states]
        for name in names:
            self._binding.bind_output(name)
        self.session.run_with_iobinding(self._binding)
        made = dict(zip(names, self._binding.copy_outputs_to_cpu(), strict=True))
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        return made

    def _begun(self, state: Any) -> np.ndarray:
        first = state.initial_state[0]
        sizes = [1 if size == -1 else size for size in state.dims]
        assert list(first.dims) == sizes and first.name and first.data_type == state.data_type and first.zero_data
        return np.zeros(sizes, _dtype(state))


class Client:
    """One sequence, as a client of the server decodes it."""

    def __init__(self, server: Server, sequence: int, prompt: list[int], **settings: Any) -> None:
        self._server, self._sequence, self._new = server, sequence, prompt
        varying = any(-1 in list(state.dims)[1:] for state in server.config.sequence_batching.state)
        # The place that a cache which grows begins with is masked out for good.
        self._mask = [0] if varying else []
        self._settings = {f"river.{name}": np.array([value]) for name, value in settings.items()}
        self.tokens: list[int] = []
        self.depths: list[int] = []

    def step(self, end: bool = False) -> None:
        self._mask += [1] * len(self._new)
        positions = np.cumsum(self._mask) - 1
        arrays = {
            "input_ids": np.array([self._new], np.int64),
            "attention_mask": np.array([self._mask], np.int64),
            "position_ids": positions[None, -len(self._new) :].astype(np.int64),
        } | self._settings
        declared = {value.name: value for value in self._server.config.input}
        inputs = {name: arrays[name].astype(_dtype(declared[name])) for name in arrays if name in declared}
        made = self._server.infer(self._sequence, inputs, start=not self.tokens, end=end)
        self.depths.append(made["river.exit_depth"].item())
        self._new = [int(made["logits"][0, -1].argmax())]
        self.tokens += self._new


class Remote:
    """A server behind Triton's client, as far as an example of the docs asks."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def infer(
        self, name: str, inputs: list[Any], sequence_id: int, sequence_start: bool, sequence_end: bool
    ) -> SimpleNamespace:
        assert name == self._server.config.name
        arrays = {
            value.name(): np.frombuffer(value._get_content(), _NUMPY[f"TYPE_{value.datatype()}"]).reshape(value.shape())
            for value in inputs
        }
        made = self._server.infer(sequence_id, arrays, start=sequence_start, end=sequence_end)
        return SimpleNamespace(as_numpy=made.__getitem__)
