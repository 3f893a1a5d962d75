"""TensorRT as a destination: a decoder in, an engine with an exit river out, built on the CPU where the runtime can."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError, RiverError
from river_compile.exporters.onnx import onnx_file, rewrite
from river_compile.exporters.onnx.moments import Moments
from river_compile.exporters.onnx.normal_form import raise_opset
from river_compile.exporters.quantizers import quantizer
from river_compile.exporters.tensorrt import builder
from river_compile.exporters.tensorrt.engine import EngineInfo, Profile, side_file
from river_compile.exporters.tensorrt.linear import OPSET as LINEAR_OPSET
from river_compile.exporters.tensorrt.linear import DequantizedMatMul
from river_compile.exporters.tensorrt.runtime import RUNTIMES, load_runtime
from river_compile.exporters.tensorrt.settings import make_inputs_ordinary
from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.flatten_tokens import flatten_tokens
from river_compile.passes.onnx.graph import export_model
from river_compile.passes.onnx.join_linears import join_linears
from river_compile.passes.onnx.lower_attention import lower_attention
from river_compile.passes.onnx.lower_flags import lower_flags
from river_compile.passes.onnx.narrow_floats import FLOATS, narrow_floats
from river_compile.passes.onnx.share_attention import share_attention
from river_compile.passes.onnx.static_cache import OPSET as CACHE_OPSET
from river_compile.passes.onnx.static_cache import static_cache
from river_compile.passes.quantizer import ActivationAware

__all__ = ["DTYPES", "GROUP_SIZES", "KV_CACHES", "QUANTIZER", "EngineOptions", "build", "default_config", "write_onnx"]

KV_CACHES = ("static", "scattered", "concatenated")
DTYPES = tuple(FLOATS)
GROUP_SIZES = (64, 128)
QUANTIZER = "rtn-symmetric"

_ENGINE_DATA = ".onnx"
_CHUNK = 1 << 24
_MOST = (1 << 31) - 1


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built, apart from its river. Immutable and valid by construction.

    Raises:
        ConfigError: a field has a value it cannot have; the error names the field.

    Fields:
        max_batch: most sequences in a forward pass.
        max_length: most tokens of a sequence, prompt and new ones: the length of a static KV cache.
        dtype: float type of backbone and KV cache; None: float16 for a float32 model, otherwise the model's own.
        kv_cache: "static", one buffer a slot, bound as input and output at one address and written in place by
            TensorRT's layer for it; "scattered", two such buffers in turn, written by a scatter, which "static" becomes
            where the runtime has no such layer; or "concatenated", past in and present out, as the source model has it.
        runtime: "auto", "tensorrt" or "tensorrt-rtx".
        compute_capabilities: GPUs to build for, such as ("8.9",); empty: the runtime's default.
        weightless: leave the weights out of the engine; they are refitted from the ONNX file kept beside it. With
            TensorRT-RTX 1.7.1 such an engine needs a GPU to be built.
        river: False builds the plain model, to compare with.
        attention_layer: keep the model's ``Attention`` nodes, for TensorRT's own layer; for plain engines only, see
            `lower_attention`.
    """

    max_batch: int = 4
    max_length: int = 2048
    dtype: str | None = None
    kv_cache: str = "static"
    runtime: str = "auto"
    compute_capabilities: tuple[str, ...] = ()
    weightless: bool = False
    river: bool = True
    attention_layer: bool = False

    def __post_init__(self) -> None:
        capabilities = self.compute_capabilities
        if not isinstance(capabilities, (tuple, list)) or not all(isinstance(one, str) for one in capabilities):
            raise ConfigError("compute_capabilities", f'must be texts such as ("8.9",), not {capabilities!r}')
        object.__setattr__(self, "compute_capabilities", tuple(dict.fromkeys(capabilities)))
        for field, least in (("max_batch", 1), ("max_length", 2)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(field, f"must be a whole number, {least} or more, not {value!r}")
            if value > _MOST:
                raise ConfigError(field, f"must be {_MOST} or less, not {value}")
        if self.attention_layer and self.river:
            raise ConfigError("attention_layer", "TensorRT's attention layer does not build between a river's branches")
        choices: dict[str, tuple[Any, ...]] = {"dtype": (None, *DTYPES), "kv_cache": KV_CACHES, "runtime": RUNTIMES}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ConfigError(
                    field, f"{getattr(self, field)!r} is none of {', '.join(map(str, filter(None, known)))}"
                )


def default_config(**fields: Any) -> RiverConfig:
    """A config with the defaults of this destination: symmetric grids in groups of 64."""
    return RiverConfig(**{"group_size": GROUP_SIZES[0], "quantizer": QUANTIZER, "activations": "float", **fields})


def build(
    model: Path,
    engine: Path,
    config: RiverConfig | None = None,
    options: EngineOptions | None = None,
    *,
    tuning_ids: Sequence[np.ndarray] = (),
    onnx_output: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> EngineInfo:
    """Build an engine from an ONNX decoder; with TensorRT-RTX no GPU is needed.

    Writes the engine and its side file (``<engine>.json``), both or neither.

    Args:
        model: an ONNX file with a KV cache in its signature.
        config: the river's settings; `default_config` if None. Its river always computes in the engine's float type.
        tuning_ids: token ids of texts, int64 [tokens] each, for an activation-aware quantizer ("gptq-symmetric").
        engine: the file to write.
        options: how it is built; `EngineOptions` as it is if None.
        onnx_output: keep what was handed to TensorRT as this file; a weightless engine always keeps it, as
            ``<engine>.onnx``.
        progress: is told the step and how much of how much of it is done.

    Raises:
        InputError: the model cannot be used, or TensorRT does not take one of its nodes, which the error names.
        ConfigError: the settings do not fit the model, or the runtime cannot build for a compute capability.
        MissingExtra: TensorRT or onnxruntime (the quantizer) is not installed.
        RiverError: TensorRT could not build the engine.
    """
    options = options or EngineOptions()
    config = dataclasses.replace(config or default_config(), activations="float")
    started = time.perf_counter()
    engine, model = Path(engine), Path(model)
    runtime = load_runtime(options.runtime)
    runtime.targets(options.compute_capabilities)
    if options.kv_cache == "static" and not runtime.updates_caches:
        options = dataclasses.replace(options, kv_cache="scattered")
    if options.weightless and onnx_output is None:
        onnx_output = engine.with_name(engine.name + _ENGINE_DATA)
    _check_files(model, engine, onnx_output)
    try:
        for target in filter(None, (engine, onnx_output)):
            target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{engine.name}.", dir=engine.parent) as stage:
            name = (onnx_output or Path("model.onnx")).name
            made = write_onnx(model, Path(stage) / name, config, options, progress, tuning_ids=tuning_ids)
            written = time.perf_counter()
            progress("build engine", 0, 1)
            built = builder.run(
                builder.Job(
                    str(made.path),
                    str(Path(stage) / engine.name),
                    options.runtime,
                    profiles(made.proto, made.caches, options),
                    options.compute_capabilities,
                    options.weightless,
                )
            )
            progress("build engine", 1, 1)
            seconds = {"onnx": written - started, **built.seconds, "total": time.perf_counter() - started}
            info = _info(made, built, Path(stage) / engine.name, config, options, onnx_output, seconds)
            (Path(stage) / side_file(engine).name).write_text(info.to_json())
            if onnx_output is not None:
                for file in made.files:
                    os.replace(file, onnx_output.parent / file.name)
            for name in (side_file(engine).name, engine.name):
                os.replace(Path(stage) / name, engine.parent / name)
    except OSError as error:
        raise RiverError(f"{engine}: cannot be written: {error.strerror or error}") from error
    return info


def _check_files(model: Path, engine: Path, onnx_output: Path | None) -> None:
    """What will be written can be, and is neither part of the model nor one file twice.

    Raises:
        InputError: it is not so.
    """
    targets = [target for target in (engine, side_file(engine), onnx_output) if target is not None]
    for target in targets:
        onnx_file.check_target(target)
    if len({target.resolve() for target in targets}) < len(targets):
        raise InputError(f"{onnx_output}: the engine, its side file and the ONNX need three names")
    proto = onnx_file.load(model)
    for target in targets:
        onnx_file.check_apart(target, model, proto)


@dataclass(frozen=True)
class RiverOnnx:
    """What is handed to TensorRT: its files (the model first), the model without weights, and what the passes found."""

    files: list[Path]
    proto: onnx.ModelProto
    caches: list[tuple[str, str]]
    anatomy: Anatomy
    result: rewrite.Rewrite | None
    dtype: str
    defaults: dict[str, Any]
    weights_sha256: str

    @property
    def path(self) -> Path:
        return self.files[0]


def write_onnx(
    model: Path,
    output: Path,
    config: RiverConfig,
    options: EngineOptions,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
    *,
    tuning_ids: Sequence[np.ndarray] = (),
) -> RiverOnnx:
    """Write the ONNX form that TensorRT takes: ``river.tau`` and ``river.max_depth`` are ordinary inputs there.

    It runs in ONNX Runtime as well (with its option ``session.disable_quant_qdq``), which is how it is tested.

    Raises: as `build`, as far as the model and the settings are concerned.
    """
    proto = onnx_file.load(model)
    # What the passes of this destination write: blocked dequantization, and the operator for a cache update.
    opset = CACHE_OPSET if options.kv_cache == "static" else LINEAR_OPSET if options.river else 0
    proto = raise_opset(proto, opset, model)
    own, dtype = _float_types(proto, options, model)
    prepare: list[rewrite.Preparation] = []
    if own != dtype:
        prepare.append(partial(narrow_floats, dtype=dtype))
    if options.kv_cache != "concatenated":
        scatter = options.kv_cache == "scattered"
        prepare.append(partial(static_cache, max_length=options.max_length, scatter=scatter))
    if not options.attention_layer:
        prepare.append(lower_attention)
    result = None
    if options.river:
        prepare.append(partial(join_linears, config=config))
        result = rewrite.rewrite(
            proto,
            model.parent,
            config,
            quantizer(config.quantizer),
            DequantizedMatMul(),
            lambda done, total: progress("quantize", done, total),
            _moments(model, config, tuning_ids, progress),
            prepare=prepare,
            finish=[share_attention, flatten_tokens, lower_flags],
        )
        written, anatomy = result.model, result.anatomy
    else:
        graph, anatomy = rewrite.dissect(proto, model.parent, prepare)
        written = export_model(graph)
    defaults = make_inputs_ordinary(written)
    files = onnx_file.save(written, output, model.parent, True, lambda done, total: progress("write", done, total))
    caches = [(slot.past, slot.present) for layer in anatomy.layers for slot in layer.caches]
    return RiverOnnx(files, written, caches, anatomy, result, dtype, defaults, _sha256(files[1:] or files))


def _moments(
    model: Path, config: RiverConfig, ids: Sequence[np.ndarray], progress: Callable[[str, int, int], None]
) -> Moments | None:
    """What the linear layers are multiplied with, measured on the model as it came: the passes that prepare it for
    TensorRT keep the names of those tensors."""
    if not ids or not isinstance(quantizer(config.quantizer), ActivationAware):
        return None
    linears = rewrite.survey(onnx_file.load(model), model.parent, config)[1].quantized
    return Moments(model, linears, ids, lambda done, total: progress("read tuning texts", done, total))


def _float_types(proto: onnx.ModelProto, options: EngineOptions, model: Path) -> tuple[str, str]:
    """The model's own float type, by its KV cache, and the one to build in."""
    names = {kind: name for name, kind in FLOATS.items()}
    kinds = [value.type.tensor_type for value in proto.graph.input if len(value.type.tensor_type.shape.dim) >= 3]
    own = names.get(kinds[0].elem_type, "") if kinds else "float32"
    wanted = options.dtype or ("float16" if own == "float32" else own)
    if own not in (wanted, "float32"):
        raise ConfigError("dtype", f"{model} computes in {own or 'another type'}; it cannot be built in {wanted}")
    return own, wanted


def profiles(proto: onnx.ModelProto, caches: list[tuple[str, str]], options: EngineOptions) -> tuple[Profile, Profile]:
    """The prefill and the decode profile: for every input that varies in shape its least, usual and largest shape.

    Prefill takes any number of tokens; with a concatenated cache, only onto an empty one. Decode takes one token.

    Raises:
        InputError: an input varies in a way that is not known here.
    """
    length, static = options.max_length, options.kv_cache != "concatenated"
    usual = min(256, length)
    # (tokens, past) of the least, usual and largest pass.
    prefill = ((1, 0), (usual, 0), (length, 0))
    decode = ((1, 0), (1, usual - 1), (1, length - 1))
    batches = (1, 1, options.max_batch)
    made = []
    for name, passes in (("prefill", prefill), ("decode", decode)):
        shapes = {}
        for value in proto.graph.input:
            dims = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
            if -1 in dims:
                is_cache = value.name in {past for past, _ in caches}
                bounds = [
                    _shape(value.name, dims, is_cache, static, batch, *sizes)
                    for batch, sizes in zip(batches, passes, strict=True)
                ]
                shapes[value.name] = (bounds[0], bounds[1], bounds[2])
        made.append(Profile(name, shapes))
    return made[0], made[1]


def _shape(
    name: str, dims: list[int], is_cache: bool, static: bool, batch: int, tokens: int, past: int
) -> tuple[int, ...]:
    if is_cache:
        free = [axis for axis, size in enumerate(dims) if size == -1]
        sizes = dict(zip(free, (batch,) if static else (batch, past), strict=True))
        return tuple(sizes.get(axis, size) for axis, size in enumerate(dims))
    if len(dims) != 2:
        raise InputError(f"input {name!r} of shape {dims} is not known here: TensorRT must be told its bounds")
    return (batch, past + tokens if name == "attention_mask" else tokens)


def _info(
    made: RiverOnnx,
    built: builder.Built,
    engine: Path,
    config: RiverConfig,
    options: EngineOptions,
    kept: Path | None,
    seconds: dict[str, float],
) -> EngineInfo:
    result = made.result
    return EngineInfo(
        runtime=built.runtime,
        version=built.version,
        compute_capabilities=options.compute_capabilities,
        nbytes=engine.stat().st_size,
        weightless=options.weightless,
        onnx=kept.name if kept is not None else None,
        layers=len(made.anatomy.layers),
        river_layers=len(result.river.twins) if result else 0,
        exit_points=result.exit_points if result else (),
        quantizer=config.quantizer if result else "",
        weights_sha256=made.weights_sha256,
        config=json.loads(config.to_json()) if result else {},
        dtype=made.dtype,
        kv_cache=options.kv_cache,
        max_batch=options.max_batch,
        max_length=options.max_length,
        inputs=built.inputs,
        outputs=built.outputs,
        caches=tuple(made.caches),
        profiles=profiles(made.proto, made.caches, options),
        defaults=made.defaults,
        seconds={name: round(value, 2) for name, value in seconds.items()},
        network_layers=built.layers,
    )


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as source:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
