"""A model repository of Triton Inference Server: ``REPOSITORY/NAME/config.pbtxt`` and ``REPOSITORY/NAME/1/...``.

What is written follows the sources of Triton's core and of its onnxruntime and tensorrt backends: optional inputs are
the overridable initializers of a model without batching (``max_batch_size: 0``), a KV cache is a state of the sequence
batcher, and a state's variable sizes are 1 in the first request of a sequence.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError, RiverError
from river_compile.export_file import export_file
from river_compile.exporters.onnx.onnx_file import staging
from river_compile.reports import ExportReport, Progress, QualityTexts, TuningTexts

if TYPE_CHECKING:
    import torch

    from river_compile.exporters.tensorrt.engine import EngineInfo
    from river_compile.runtime import OnnxDecoder

__all__ = [
    "KV_CACHE",
    "SEQUENCES",
    "check_kv_cache",
    "check_repository",
    "check_runtime",
    "config_of_engine",
    "config_of_onnx",
    "export_repository",
    "name_of",
    "staging_place",
    "write_engine",
    "write_onnx",
]

SEQUENCES = 16
"""Sequences that are served at once, each with a cache of its own, where it is not told."""

KV_CACHE = "scattered"
"""The form of an engine's KV cache that Triton can serve."""

_CONFIG, _ONNX, _ENGINE, _VERSION = "config.pbtxt", "model.onnx", "model.plan", "1"
# Triton forgets a sequence whose last request came more than a second ago, answered or not, if it is told nothing else:
# a long prompt on a CPU takes longer than that.
_IDLE_MICROSECONDS = 60_000_000
_NOT_SERVED = {
    "static": "is written in place, where Triton gives a state's input and output a buffer each",
    "concatenated": "grows, and Triton begins it with one token, behind which such an engine takes no prompt",
}
_TYPES = {
    "float": "FP32",
    "float32": "FP32",
    "float16": "FP16",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class _Tensor:
    """An input or output; sizes that vary are -1."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class _State:
    """A tensor of the KV cache and the output that continues it."""

    past: _Tensor
    present: str


def _check_name(name: str) -> str:
    """A model's name, which is a folder's.

    Raises:
        ConfigError: it cannot be one.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ConfigError("output", f"{name!r} is no name of a model: letters, digits, '_', '-' and '.'")
    return name


def write_onnx(model: Path, repository: Path, name: str, sequences: int = SEQUENCES) -> Path:
    """Move a river model's files into a repository, with its configuration for the onnxruntime backend.

    A model of that name is replaced, with all its versions; others are left alone.

    Returns:
        The model's folder.

    Raises:
        InputError: see `config_of_onnx`.
        RiverError: the repository cannot be written.
    """
    from river_compile.runtime import OnnxDecoder

    config = config_of_onnx(OnnxDecoder(model), name, sequences)
    with _replaced(repository / _check_name(name)) as stage:
        (stage / _VERSION).mkdir()
        (stage / _CONFIG).write_text(config, encoding="utf-8")
        for file in sorted(model.parent.glob(f"{model.name}*")):
            # External data keeps its name, which the model holds.
            shutil.move(file, stage / _VERSION / (_ONNX if file == model else file.name))
    return repository / name


def write_engine(engine: Path, repository: Path, name: str, sequences: int = SEQUENCES) -> Path:
    """As `write_onnx`, for an engine with its side file; both are copied.

    Raises:
        InputError: see `config_of_engine`, or the engine and its side file do not belong together.
    """
    from river_compile.exporters.tensorrt.engine import EngineInfo, side_file

    config = config_of_engine(EngineInfo.load(engine), name, sequences)
    with _replaced(repository / _check_name(name)) as stage:
        (stage / _VERSION).mkdir()
        (stage / _CONFIG).write_text(config, encoding="utf-8")
        shutil.copyfile(engine, stage / _VERSION / _ENGINE)
        shutil.copyfile(side_file(engine), stage / _VERSION / (_ENGINE + ".json"))
    return repository / name


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the target's place as a whole when all went well; else it is gone.

    Nothing of what stood there stays: of several versions Triton serves the highest, by the one configuration.

    Raises:
        RiverError: it cannot be written.
    """
    with staging(target, staging_place(check_repository(target.parent))) as stage:
        yield stage
        old = stage.with_name(f"{stage.name}.old")
        try:
            if target.exists():
                target.rename(old)
            stage.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def staging_place(repository: Path) -> Path:
    """Where to make what is to be moved into a repository: beside it if that can be, since a server that polls it takes
    every folder in it for a model."""
    parent = repository.resolve().parent
    apart = os.access(parent, os.W_OK) and parent.stat().st_dev == repository.stat().st_dev
    return parent if apart else repository


def export_repository(
    model: str | Path | torch.nn.Module,
    repository: Path | None,
    config: RiverConfig,
    *,
    tuning: TuningTexts | None,
    quality: QualityTexts | None,
    progress: Progress | None,
    check: bool,
) -> ExportReport:
    """`river_compile.export` into a model repository, with arguments as there; the model is named by `name_of`.

    Raises:
        ConfigError: no repository is named, or the model's name can be none in it.
    """
    repository, name = check_repository(repository), name_of(model)
    with tempfile.TemporaryDirectory(prefix=".river-", dir=staging_place(repository)) as folder:
        file = Path(folder) / _ONNX
        report = export_file(
            model, file, config, tuning=tuning, quality=quality, progress=progress, check=check, beside=None
        )
        made = write_onnx(file, repository, name)
    return replace(report, output=str(made))


def check_repository(repository: Path | None) -> Path:
    """The folder to write models into; it is made if it is not there.

    Raises:
        ConfigError: none is named.
        InputError: it is a file.
        RiverError: it cannot be made or written to.
    """
    if repository is None or repository.suffix == ".onnx":
        raise ConfigError("output", "name the model repository to write into, a folder")
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"{repository}: is a file; name a model repository, a folder") from error
    except OSError as error:
        raise RiverError(f"{repository}: cannot be written: {error.strerror}") from error
    if not os.access(repository, os.W_OK):
        raise RiverError(f"{repository}: cannot be written to")
    return repository


def check_runtime(runtime: str) -> None:
    """
    Raises:
        InputError: Triton's backend does not load what it builds.
    """
    if "rtx" in runtime:
        raise InputError("Triton's backend loads engines of TensorRT, not of TensorRT-RTX: give --runtime tensorrt")


def check_kv_cache(kv_cache: str) -> None:
    """
    Raises:
        InputError: an engine with such a KV cache cannot be served.
    """
    if kv_cache != KV_CACHE:
        raise InputError(f"a {kv_cache} KV cache {_NOT_SERVED[kv_cache]}: give --kv-cache {KV_CACHE}")


def name_of(model: object) -> str:
    """What Triton is to call a model: as its file or folder.

    Raises:
        ConfigError: that can be no name there.
    """
    if not isinstance(model, (str, Path)):
        return _check_name(type(model).__name__)
    path = Path(model).resolve() if Path(model).exists() else Path(model)
    return _check_name(path.stem if path.suffix == ".onnx" else path.name)


def config_of_onnx(decoder: OnnxDecoder, name: str, sequences: int = SEQUENCES) -> str:
    """The configuration of a model for Triton's onnxruntime backend.

    In a sequence's first request a cache that grows holds one token, all zeros, where a program would give an empty
    one: the attention mask begins with a 0 for that place.

    Args:
        decoder: the model; ``name``, as Triton lists it; ``sequences``, how many it serves at once.

    Raises:
        InputError: it cannot be served so: its cache grows and it has no attention mask, or an operator that takes no
            padding on the left; or a tensor is of a type that Triton does not know.
    """
    slots = decoder.signature.slots
    if any(not slot.static for slot in slots) and not decoder.takes_padding:
        raise InputError(
            "Triton begins a growing KV cache with one token, to be masked out, and this model takes no padding on the "
            "left; start from a model without GroupQueryAttention, or with a static cache"
        )
    session = decoder.session
    shapes = {value.name: value for value in session.get_inputs()}
    states = [
        _State(
            _tensor(shapes[slot.past], dims=tuple(size or -1 for size in slot.sizes)),
            slot.present,
        )
        for slot in slots
    ]
    kept = {name for state in states for name in (state.past.name, state.present)}
    inputs = [_tensor(value) for value in session.get_inputs() if value.name not in kept]
    inputs += [_tensor(value, optional=True) for value in session.get_overridable_initializers()]
    outputs = [_tensor(value) for value in session.get_outputs() if value.name not in kept]
    return _config(name, "onnxruntime", _ONNX, inputs, outputs, states, sequences)


def config_of_engine(info: EngineInfo, name: str, sequences: int = SEQUENCES) -> str:
    """The configuration of an engine for Triton's tensorrt backend. Its settings (``river.tau``) are inputs that each
    request has to give.

    Raises:
        InputError: TensorRT-RTX built it, which Triton's backend does not load; its KV cache is of another form than
            `KV_CACHE`; or it is of an earlier version, whose settings were scalars.
    """
    check_runtime(info.runtime)
    check_kv_cache(info.kv_cache)
    for tensor in info.inputs:
        if not tensor.shape:
            raise InputError(f"{tensor.name!r} is a scalar, and Triton serves no engine with one: build it anew")
    known = {tensor.name: _Tensor(tensor.name, tensor.dtype, tensor.shape) for tensor in (*info.inputs, *info.outputs)}
    states = [_State(known[past], present) for past, present in info.caches]
    kept = {name for pair in info.caches for name in pair}
    inputs = [known[tensor.name] for tensor in info.inputs if tensor.name not in kept]
    outputs = [known[tensor.name] for tensor in info.outputs if tensor.name not in kept]
    return _config(name, "tensorrt", _ENGINE, inputs, outputs, states, sequences, len(info.profiles))


def _tensor(value: Any, dims: tuple[int, ...] | None = None, optional: bool = False) -> _Tensor:
    """A value of an ONNX Runtime session."""
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return _Tensor(value.name, value.type.removeprefix("tensor(").removesuffix(")"), dims or shape, optional)


def _config(
    name: str,
    backend: str,
    file: str,
    inputs: Iterable[_Tensor],
    outputs: Iterable[_Tensor],
    states: Iterable[_State],
    sequences: int,
    profiles: int = 0,
) -> str:
    """The text of Triton's message ``inference.ModelConfig``.

    Raises:
        InputError: Triton would take a state for another's, or it has no word for a type.
    """
    states = list(states)
    _check_order(states)
    lines = [f'name: "{_check_name(name)}"', f'backend: "{backend}"', f'default_model_filename: "{file}"']
    lines.append("max_batch_size: 0")
    # Of its own accord Triton loads a model for the CPU twice, and knows the first profile of an engine only.
    names = ", ".join(f'"{index}"' for index in range(profiles))
    on = f" kind: KIND_GPU profile: [{names}]" if profiles else ""
    lines.append(f"instance_group {{ count: 1{on} }}")
    lines += [f"input {{ {_io(tensor)}{' optional: true' if tensor.optional else ''} }}" for tensor in inputs]
    lines += [f"output {{ {_io(tensor)} }}" for tensor in outputs]
    lines += ["sequence_batching {", f"  max_sequence_idle_microseconds: {_IDLE_MICROSECONDS}"]
    lines.append(f"  oldest {{ max_candidate_sequences: {sequences} }}")
    # The tensorrt backend copies a state into a buffer of its own before a pass, and out of another after it.
    buffer = " use_same_buffer_for_input_output: true" if profiles else ""
    for state in states:
        first = [1 if size == -1 else size for size in state.past.dims]
        begun = f'name: "{state.past.name}" data_type: {_type(state.past)} dims: {first} zero_data: true'
        names = f'input_name: "{state.past.name}" output_name: "{state.present}"'
        kind = f"data_type: {_type(state.past)} dims: {list(state.past.dims)}"
        lines.append(f"  state {{ {names} {kind} initial_state {{ {begun} }}{buffer} }}")
    return "\n".join([*lines, "}", ""])


def _check_order(states: list[_State]) -> None:
    """
    Raises:
        InputError: sorted by name, inputs and outputs of the cache do not come in one order. Triton's core pairs them
            so, whatever a configuration says (its issue 8586), and would hand one layer's cache to another.
    """
    by_past = sorted(states, key=lambda state: state.past.name)
    for state, present in zip(by_past, sorted(state.present for state in states), strict=True):
        if state.present != present:
            raise InputError(
                "Triton pairs inputs and outputs of a KV cache in the order of their names, which would continue "
                f"{state.past.name!r} with {present!r} instead of {state.present!r}; give them names of one order"
            )


def _io(tensor: _Tensor) -> str:
    """A scalar is one number to Triton; its onnxruntime backend knows both."""
    return f'name: "{tensor.name}" data_type: {_type(tensor)} dims: {list(tensor.dims or (1,))}'


def _type(tensor: _Tensor) -> str:
    if tensor.dtype not in _TYPES:
        raise InputError(f"{tensor.name!r} is of type {tensor.dtype}, which Triton's configuration has no word for")
    return f"TYPE_{_TYPES[tensor.dtype]}"
