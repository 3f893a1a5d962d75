"""The check of what was written: ONNX's rules, and one tiny pass in ONNX Runtime beside the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx

from river_compile.errors import InputError, PassError
from river_compile.exporters.onnx.cache_forms import NUMPY
from river_compile.exporters.onnx.normal_form import without_weights
from river_compile.exporters.onnx.rewrite import Rewrite
from river_compile.exporters.onnx.signature import Signature
from river_compile.passes.anatomy import Anatomy
from river_compile.passes.onnx.insert_exits import TAU
from river_compile.passes.onnx.share_kv import MAX_DEPTH

__all__ = ["Check"]

_Shapes = dict[str, list[int | str | None]]
_Arrays = dict[str, np.ndarray]

_TOKENS = 2
_PASTS = (0, 3)
_OFF = 1 << 30
# Shares of the range that results may differ by: the graphs are the same but for norms that were taken apart.
_TOLERANCE = {"float16": 2e-2, "float32": 1e-4, "float64": 1e-4}


class Check:
    """The check of a river model by ONNX's checker, and by a pass of two tokens in ONNX Runtime on the CPU.

    With exits off it equals the original, and its river runs, a layer of each kind. What the original cannot do is not
    asked of it.

    The original's pass runs in a thread, beside the passes of the rewriting. The checker gets the model without its
    weights; ONNX Runtime runs a graph as it is, and maps external data instead of reading it.

    Args:
        original: the file that the river model is made from.
        model: what it holds, read without external data.
    """

    def __init__(self, original: Path, model: onnx.ModelProto) -> None:
        self._original, self._outputs = original, _shapes(model.graph.output)
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._thread.shutdown()

    def begin(self, anatomy: Anatomy) -> None:
        """Run the original, whose layers are known, in the thread."""
        self._expected = self._thread.submit(_expected, self._original, self._outputs, anatomy)

    def end(self, written: Path, result: Rewrite) -> list[str]:
        """Look at the river model.

        Requires: the check has begun.

        Args:
            written: the river model's file.
            result: the river model, and how it was made.

        Returns:
            What could not be checked, a line each.

        Raises:
            PassError: the result is not legal, or not the original with exits off; the error names the pass that the
                message points to, or all that ran.
        """
        notes = []
        problem = _checker_problem(without_weights(result.model))
        if problem and _checker_problem(str(self._original)):
            notes.append("ONNX's checker refuses the original, so the form of the result was not checked")
        elif problem:
            raise _blame(f"ONNX's checker refuses the result: {problem}", result)
        try:
            expected, feeds = self._expected.result()
        except InputError as error:
            return [*notes, f"the result was not run: {error}"]
        try:
            session = _session(written)
            # Beyond the reach of thresholds of single layers, too.
            feeds[TAU] = np.array(_OFF, np.float32)
            found = session.run(list(expected), feeds | {MAX_DEPTH: np.array(_OFF)})
            last = {layer.kind: layer.index for layer in result.anatomy.layers if layer.index in result.river.twins}
            # Few layers of the river: products that are not prepacked are slow.
            session.run(None, feeds | {MAX_DEPTH: np.array(min(last.values(), default=0))})
        except Exception as error:
            raise _blame(f"ONNX Runtime refuses the result: {_one_line(error, written)}", result) from error
        for (name, value), ours in zip(expected.items(), found, strict=True):
            difference = _difference(ours, value)
            if difference > _TOLERANCE.get(str(value.dtype), 0.0):
                problem = f"with exits off {name!r} differs from the original by {difference:.1e} of its range"
                raise _blame(problem, result)
        return notes


def _expected(original: Path, outputs: _Shapes, anatomy: Anatomy) -> tuple[_Arrays, _Arrays]:
    """What a tiny pass of the original gives, by name, and what it was fed.

    Raises:
        InputError: it cannot be run here.
    """
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise InputError("onnxruntime is not installed") from None
    return _run_original(original, _cache_shapes(original, outputs, anatomy))


def _one_line(error: BaseException, file: Path | None = None) -> str:
    text = str(error) if file is None else str(error).replace(str(file), file.name)
    return " ".join(text.split())[:400]


def _blame(problem: str, result: Rewrite) -> PassError:
    """The error, its last pass the one that made the node which the message names last; all that ran if there is no
    such node."""
    passes = tuple(result.seconds)
    named = {name: problem.rfind(name) for name in result.made_by if name in problem}
    if named:
        culprit = result.made_by[max(named, key=lambda name: (named[name], len(name)))]
        passes = passes[: passes.index(culprit) + 1]
    return PassError(passes, problem)


def _checker_problem(model: onnx.ModelProto | str) -> str:
    """What ONNX's checker says of a model or a file, types and shapes included; empty if nothing."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        return _one_line(error)
    return ""


def _shapes(values: Iterable[onnx.ValueInfoProto]) -> _Shapes:
    return {
        value.name: [dim.dim_value or dim.dim_param or None for dim in value.type.tensor_type.shape.dim]
        for value in values
    }


def _cache_shapes(original: Path, outputs: _Shapes, anatomy: Anatomy) -> _Shapes:
    """By the name of an input, the shape of the cache that comes out for it; where the signature tells more than two of
    its sizes by name only, as far as ONNX can infer it for two tokens."""
    slots = [slot for layer in anatomy.layers for slot in layer.caches]
    if any(sum(not isinstance(size, int) for size in outputs[slot.present]) > 2 for slot in slots):
        bare = without_weights(onnx.load(str(original), load_external_data=False))
        for value in bare.graph.input:
            if value.type.tensor_type.elem_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
                for dim in value.type.tensor_type.shape.dim:
                    dim.dim_value = dim.dim_value or _TOKENS
        with suppress(onnx.shape_inference.InferenceError):
            outputs = outputs | _shapes(onnx.shape_inference.infer_shapes(bare, data_prop=True).graph.output)
    return {slot.past: outputs[slot.present] for slot in slots}


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # What takes time and memory serves many passes: this is one.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # By default a half-precision model's weights are all made float32 before the first of them is used.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run_original(path: Path, caches: _Shapes) -> tuple[_Arrays, _Arrays]:
    """Results of a tiny pass of the original, by name, and what it was fed.

    Raises:
        InputError: ONNX Runtime cannot load it, or no way to feed it is known here.
    """
    try:
        session = _session(path)
    except Exception as error:
        raise InputError(f"ONNX Runtime's CPU cannot load the original: {_one_line(error)}") from error
    names = [value.name for value in session.get_outputs()]
    problem = ""
    ways: tuple[Callable[[], _Shapes], ...] = (lambda: caches, cache(partial(_measured_shapes, session, path)))
    for shapes in ways:
        for past in _PASTS:
            try:
                feeds = dict(_feeds(session.get_inputs(), shapes(), past))
                return dict(zip(names, session.run(names, feeds), strict=True)), feeds
            except Exception as error:
                problem = problem or _one_line(error)
    raise InputError(f"the original does not run with what its signature asks for: {problem}")


def _measured_shapes(session: Any, path: Path) -> _Shapes:
    """Shapes of caches as `Signature` finds them, by short runs where it must: operators that ONNX does not know, such
    as GenAI's, leave inference without an answer."""
    signature = Signature.of(session, partial(onnx.load, str(path), load_external_data=False), path.parent)
    return {
        slot.past: [None if axis == slot.axis and not slot.static else size for axis, size in enumerate(slot.sizes)]
        for slot in signature.slots
    }


def _feeds(inputs: Sequence[Any], caches: _Shapes, past: int) -> Iterator[tuple[str, np.ndarray]]:
    """A pass of two tokens as the signature asks for it. Sizes that it leaves open are two, but for caches."""
    rng = np.random.default_rng(0)
    tokens = [*next((value.shape for value in inputs if value.name == "input_ids"), ()), None, None]
    batch, length = (size if isinstance(size, int) else _TOKENS for size in tokens[:2])
    for value in inputs:
        after = caches.get(value.name)
        grows = _length_axis(value.shape, after) if after is not None else None
        sizes = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                sizes.append(size)
            elif axis == grows:
                sizes.append(past)
            elif after is not None and isinstance(told := dict(enumerate(after)).get(axis), int):
                sizes.append(told)
            elif axis == 0 or after is not None:
                sizes.append(batch if axis == 0 else _TOKENS)
            else:
                sizes.append(length if size == tokens[1] or "position" in value.name else past + length)
        yield value.name, _values(value.name, value.type, sizes, rng, past)


def _length_axis(before: Sequence[int | str | None], after: Sequence[int | str | None]) -> int | None:
    """The axis along which a cache grows: one that neither side tells in numbers, best one that differs; None if the
    signature tells all sizes."""
    free = [axis for axis, size in enumerate(before) if axis > 0 and axis < len(after) and not isinstance(size, int)]
    untold = [axis for axis in free if not isinstance(after[axis], int)] or free
    return next((axis for axis in untold if before[axis] != after[axis]), next(iter(untold), None))


def _values(name: str, kind: str, sizes: Sequence[int], rng: np.random.Generator, past: int) -> np.ndarray:
    """Ones for masks, places for positions, small numbers for the rest."""
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise InputError(f"input {name!r} is of type {kind}")
    kind_of = dtype.kind
    if kind_of == "f":
        values = np.zeros(sizes) if "mask" in name else rng.standard_normal(sizes) * 0.1
    elif kind_of == "b" or "mask" in name:
        values = np.ones(sizes)
    elif "position" in name and sizes:
        values = np.zeros(sizes) + past + np.arange(sizes[-1])
    else:
        values = np.resize([1.0, 2.0], sizes)
    return values.astype(dtype)


# Caches and tokens are of NUMPY; other inputs may be of these as well.
_DTYPES = NUMPY | {f"tensor({name})": np.dtype(name) for name in ("double", "int16", "int8", "uint8")}


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The greatest difference as a share of the range; infinite if shapes differ, or what is not a number."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.size or np.array_equal(found, expected, equal_nan=expected.dtype.kind == "f"):
        return 0.0
    wide, ours = expected.astype(np.float64), found.astype(np.float64)
    known = np.isfinite(wide)
    if not np.array_equal(known, np.isfinite(ours)):
        return float("inf")
    return float(np.abs(wide - ours)[known].max(initial=0) / max(np.ptp(wide[known]) if known.any() else 0, 1e-30))
