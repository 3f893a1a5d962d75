"""An engine's side file: all that one must know to bind it, in JSON, readable without TensorRT or a GPU."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from river_compile.errors import ConfigError, InputError

__all__ = ["EngineInfo", "Profile", "Tensor", "side_file"]

FORMAT = 1


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, type ("float16", "int64") and shape, -1 where it varies."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """An optimization profile: for each input whose shape varies the least, usual and largest shape."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class EngineInfo:
    """What the side file says.

    Fields:
        runtime, version: what built the engine; another version does not load it.
        compute_capabilities: what it was built for; empty: the runtime's default.
        onnx: the ONNX kept of it, if it was asked for or is needed.
        weights_sha256: of the weights that were handed to TensorRT, the external data of that ONNX.
        seconds, network_layers: what building took, the total last; layers of TensorRT's network.
        nbytes, weightless: size of the engine file; whether its weights must be refitted from the ONNX file ``onnx``.
        layers, river_layers, exit_points, quantizer, weights_sha256, config: the river (none: a plain engine).
        dtype, kv_cache, max_batch, max_length: limits that its profiles set, and the form of its KV cache.
        caches: pairs of a cache input and the output that continues it; with a static cache both are one address,
            with a scattered one two of one shape.
        defaults: what to feed inputs that are settings (``river.tau``, ``river.max_depth``) when nothing is asked for.
    """

    runtime: str
    version: str
    compute_capabilities: tuple[str, ...]
    nbytes: int
    weightless: bool
    onnx: str | None
    layers: int
    river_layers: int
    exit_points: tuple[int, ...]
    quantizer: str
    weights_sha256: str
    config: dict[str, Any]
    dtype: str
    kv_cache: str
    max_batch: int
    max_length: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    caches: tuple[tuple[str, str], ...]
    profiles: tuple[Profile, ...]
    defaults: dict[str, Any]
    seconds: dict[str, float]
    network_layers: int
    format: int = FORMAT

    def to_json(self) -> str:
        """The side file's text: one line an entry, lists of numbers on one line each."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        return re.sub(
            r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text
        )

    @classmethod
    def load(cls, engine: str | Path) -> EngineInfo:
        """The side file of an engine, checked against the engine's size.

        Raises:
            InputError: engine or side file is missing, or they do not belong together (truncated, replaced).
        """
        engine = Path(engine)
        path = side_file(engine)
        if not engine.is_file():
            raise InputError(f"{engine}: no such file")
        if not path.is_file():
            raise InputError(f"{path}: no such file; it is the engine's side file, and must lie beside it")
        try:
            fields = json.loads(path.read_text())
            if fields["format"] != FORMAT:
                raise InputError(f"{path}: of format {fields['format']}, which this version does not read")
            info = cls(
                **fields
                | {
                    "inputs": tuple(_tensor(value) for value in fields["inputs"]),
                    "outputs": tuple(_tensor(value) for value in fields["outputs"]),
                    "profiles": tuple(_profile(value) for value in fields["profiles"]),
                    "caches": tuple((past, present) for past, present in fields["caches"]),
                    "exit_points": tuple(fields["exit_points"]),
                    "compute_capabilities": tuple(fields["compute_capabilities"]),
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not an engine's side file ({' '.join(str(error).split())[:80]})") from error
        size = engine.stat().st_size
        if size != info.nbytes:
            what = "truncated" if size < info.nbytes else "not the engine that its side file describes"
            raise InputError(f"{engine}: {what} ({size} bytes instead of {info.nbytes})")
        return info

    def check_request(self, batch: int, length: int) -> None:
        """Whether ``batch`` sequences of ``length`` tokens in all, prompt and new ones, lie within the profiles.

        Raises:
            ConfigError: they do not.
        """
        if not 1 <= batch <= self.max_batch:
            raise ConfigError("max_batch", f"this engine takes 1 to {self.max_batch} sequences, not {batch}")
        if length > self.max_length:
            raise ConfigError("max_length", f"this engine's KV cache holds {self.max_length} tokens, not {length}")

    def shapes(self, batch: int, tokens: int, past: int) -> dict[str, tuple[int, ...]]:
        """The shape of every input and output in a pass of ``tokens`` new tokens a sequence behind ``past`` others."""
        pasts, presents = {past for past, _ in self.caches}, {present for _, present in self.caches}
        found = {}
        for tensor in (*self.inputs, *self.outputs):
            if tensor.name in pasts | presents:
                length = past if tensor.name in pasts else past + tokens
                sizes = iter((batch, length))
                found[tensor.name] = tuple(next(sizes) if size == -1 else size for size in tensor.shape)
            else:
                varying = iter((batch, past + tokens if tensor.name == "attention_mask" else tokens))
                found[tensor.name] = tuple(next(varying) if size == -1 else size for size in tensor.shape)
        return found

    def profile_for(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """The index of the first profile that all shapes lie in, the decode profile before the prefill one.

        Raises:
            ConfigError: none has them.
        """
        order = sorted(range(len(self.profiles)), key=lambda index: self.profiles[index].name != "decode")
        for index in order:
            if all(
                _within(shapes[name], bounds) for name, bounds in self.profiles[index].shapes.items() if name in shapes
            ):
                return index
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items() if name in _SHOWN)
        raise ConfigError("max_length", f"no profile of this engine takes {given}")


_SHOWN = ("input_ids", "attention_mask")


def side_file(engine: Path) -> Path:
    """Where the side file of an engine lies: ``model.engine.json`` beside ``model.engine``."""
    return engine.with_name(engine.name + ".json")


def _within(shape: tuple[int, ...], bounds: tuple[tuple[int, ...], ...]) -> bool:
    return all(least <= size <= most for least, size, most in zip(bounds[0], shape, bounds[2], strict=True))


def _tensor(fields: dict[str, Any]) -> Tensor:
    return Tensor(fields["name"], fields["dtype"], tuple(fields["shape"]))


def _profile(fields: dict[str, Any]) -> Profile:
    return Profile(
        fields["name"],
        {name: (tuple(a), tuple(b), tuple(c)) for name, (a, b, c) in fields["shapes"].items()},
    )
