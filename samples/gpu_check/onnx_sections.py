"""The sections that take the model through ONNX: ONNX Runtime on CUDA, and TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import Place, median_ms, random_model
from report import Report, Skip

from river_compile.config import NEVER, RiverConfig
from river_compile.errors import MissingExtra, RiverError
from river_compile.exporters.tensorrt.engine import EngineInfo
from river_compile.exporters.tensorrt.runtime import load_runtime
from river_compile.runtime import Decoder, OnnxDecoder, TensorRTDecoder

PROMPT, NEW, ROUNDS = 32, 64, 5
LENGTH = 512
EXACT, HALF = 1e-3, 2e-2
"""Of the logits' range: float32 on two devices, and float16, which rounds at 1e-3 some tens of times on the way."""


@dataclass(frozen=True)
class Wanted:
    """What the command line says of these sections.

    Fields:
        model: a plain ONNX decoder, or a Hugging Face folder, in place of the random model.
        exit_every, keep_first: of the river; the first ``keep_first`` layers get no twin.
    """

    model: Path | None = None
    exit_every: int = 1
    keep_first: int = 0


def onnxruntime(place: Place, report: Report, wanted: Wanted) -> None:
    """ONNX Runtime on CUDA: each depth against its CPU, and tokens a second."""
    _require("onnxruntime", "onnx_graphsurgeon")
    import onnxruntime as ort

    device = "cpu" if place.rehearsal else "cuda"
    if f"{device.upper()}ExecutionProvider" not in ort.get_available_providers():
        raise Skip(f"this onnxruntime {ort.__version__} has no CUDA")
    from river_compile.api import export

    with _source(place, "small", wanted) as (source, folder):
        river = folder / "river.onnx"
        export(source, river, RiverConfig(tau=NEVER, activations="float"), check=False)
        judge, decoder, plain = OnnxDecoder(river), OnnxDecoder(river, device), OnnxDecoder(source, device)
        ids = _ids(decoder.vocabulary)
        for depth in range((decoder.layers or 0) + 1):
            found, exit_depth = decoder.forward(ids, decoder.start(1), max_depth=depth)
            expected, _ = judge.forward(ids, judge.start(1), max_depth=depth)
            _check(report, f"depth {depth}", found, expected, EXACT, exit_depth == depth)
        _speed(report, {"plain": plain}, decoder)


def tensorrt(place: Place, report: Report, wanted: Wanted) -> None:
    """TensorRT-RTX: engines built; on a GPU each depth against ONNX Runtime, exact mode, and tokens a second."""
    _require("onnxruntime", "onnx_graphsurgeon")
    try:
        load_runtime("auto")
    except MissingExtra as error:
        raise Skip(str(error)) from None
    from river_compile.exporters.tensorrt.build import default_config

    with _source(place, "engine", wanted) as (source, folder):
        keep = tuple(range(wanted.keep_first))
        config = default_config(tau=NEVER, exit_every=wanted.exit_every, keep_layers=keep)
        engines = {
            "plain": _build(report, source, folder / "plain.engine", None),
            "plain, attention layer": _build(report, source, folder / "attention.engine", None, attention_layer=True),
            "river": _build(report, source, folder / "river.engine", config),
        }
        built = {name: engine for name, engine in engines.items() if engine is not None}
        report.check("plain and river build", {"plain", "river"} <= set(built))
        if place.rehearsal:
            report.note("engines were built and not run: there is no GPU")
        elif "river" in built:
            _run_engines(report, built, folder)


def _run_engines(report: Report, engines: dict[str, Path], folder: Path) -> None:
    river = TensorRTDecoder(engines.pop("river"))
    judge = _OnnxReference(river.info, folder)
    ids = _ids(next(tensor.shape[-1] for tensor in river.info.outputs if tensor.name == "logits"))
    for depth in range(river.layers + 1):
        found, exit_depth = river.forward(ids, river.start(1), tau=NEVER, max_depth=depth)
        expected, expected_depth = judge.logits(ids, depth)
        _check(report, f"depth {depth}", found, expected, HALF, exit_depth == expected_depth)
    plain = {name: TensorRTDecoder(engine) for name, engine in engines.items()}
    _speed(report, plain, river)
    prompt = ids[0].tolist()
    expected = river.generate([prompt], NEW, tau=NEVER).tokens[0]
    made = [river.generate([prompt], NEW, exact=True) for _ in range(2)][-1]
    differing = sum(a != b for a, b in zip(made.tokens[0], expected, strict=True))
    report.check("exact", not differing, tokens=NEW, differing=differing)
    report.row("exact", tokens_s=made.tokens_per_second)
    # The decode profile takes one token: exact mode verifies by the prefill profile.
    _pass_costs(report, river, ids)


def _pass_costs(report: Report, river: Decoder, ids: np.ndarray) -> None:
    state = river.start(1)
    river.backbone(ids, state)
    mark = river.mark(state)

    def ms(run: Callable[[], object]) -> float:
        def once() -> None:
            run()
            river.back(state, mark)

        return median_ms(Place(torch.device("cuda")), once, 10)

    costs = {f"{rows} rows": ms(lambda rows=rows: river.backbone(ids[:, :rows], state)) for rows in range(1, 17)}
    draft = ms(lambda: river.forward(ids[:, :1], state, max_depth=0))
    report.row("milliseconds of a pass", draft=draft, **costs)


class _OnnxReference:
    """The ONNX that was handed to TensorRT, in ONNX Runtime on the CPU."""

    def __init__(self, info: EngineInfo, folder: Path) -> None:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
        path = folder / (info.onnx or "")
        self._session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        self._info = info

    def logits(self, ids: np.ndarray, depth: int) -> tuple[np.ndarray, int]:
        """Logits of a prompt, float [batch, tokens, vocabulary], and the exit depth."""
        batch, count = ids.shape
        shapes = self._info.shapes(batch, count, 0)
        kinds = {tensor.name: tensor.dtype for tensor in self._info.inputs}
        feeds: dict[str, Any] = {past: np.zeros(shapes[past], kinds[past]) for past, _ in self._info.caches}
        feeds |= {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(count), ids.shape),
            "river.tau": np.array([NEVER], np.float32),
            "river.max_depth": np.array([depth], np.int64),
        }
        taken = {value.name for value in self._session.get_inputs()}
        feeds = {name: value for name, value in feeds.items() if name in taken}
        logits, exit_depth = self._session.run(["logits", "river.exit_depth"], feeds)
        return logits, int(exit_depth.item())


def _build(
    report: Report, source: Path, engine: Path, config: RiverConfig | None, attention_layer: bool = False
) -> Path | None:
    """An engine, plain if there is no config; None if TensorRT does not build it."""
    from river_compile.exporters.tensorrt.build import EngineOptions, build

    options = EngineOptions(
        max_length=LENGTH,
        river=config is not None,
        attention_layer=attention_layer,
        compute_capabilities=_capability_here(),
    )
    before = _builder_seconds()
    try:
        info = build(source, engine, config, options, onnx_output=engine.with_suffix(".onnx"))
    except RiverError as error:
        report.note(f"{engine.name}: not built: {error}")
        return None
    report.row(
        "engines",
        engine=engine.name,
        parse_s=info.seconds["parse"],
        build_s=info.seconds["build"],
        builder_cpu_s=_builder_seconds() - before,
        MB=info.nbytes / 1e6,
        layers=info.network_layers,
        by=f"{info.runtime} {info.version}",
    )
    return engine


def _capability_here() -> tuple[str, ...]:
    """The GPU's, if it is one that the runtime can be told to build for; else what it builds for by itself."""
    if not torch.cuda.is_available():
        return ()
    here = "{}.{}".format(*torch.cuda.get_device_capability())
    return (here,) if here in load_runtime("auto").compute_capabilities else ()


def _builder_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _speed(report: Report, plain: dict[str, Any], river: Decoder) -> None:
    """Greedy tokens a second of all ways, interleaved, the first round to warm up; ratios to the fastest plain one."""
    layers = river.layers or 0  # type: ignore[attr-defined]
    prompt = _ids(100)[0].tolist()
    ways: list[tuple[str, Decoder, dict[str, Any]]] = [(name, decoder, {}) for name, decoder in plain.items()]
    for depth in sorted({layers, layers // 2, layers // 4, 1, 0}, reverse=True):
        ways.append((f"river, exit depth {depth}", river, {"tau": NEVER, "max_depth": depth}))
    speeds: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for turn in range(ROUNDS + 1):
        for name, decoder, settings in ways:
            result = decoder.generate([prompt], NEW, **settings)
            speeds[name] += [result.tokens_per_second] if turn else []
    base = max((speeds[name] for name in plain), key=statistics.median)
    for name, found in speeds.items():
        ratios = [own / reference for own, reference in zip(found, base, strict=True)]
        cells = {"tokens_s": statistics.median(found), "ratio": statistics.median(ratios)}
        report.row("decode", way=name, **cells, least=min(ratios), most=max(ratios))


def _check(
    report: Report, name: str, found: np.ndarray, expected: np.ndarray, tolerance: float, same_exit: bool
) -> None:
    found, expected = (np.asarray(one[:, -1], np.float32) for one in (found, expected))
    off = float(np.abs(found - expected).max() / np.ptp(expected))
    report.check(name, off <= tolerance and same_exit, difference=off, tolerance=tolerance)


def _ids(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocabulary, (1, PROMPT))


@contextmanager
def _source(place: Place, name: str, wanted: Wanted) -> Iterator[tuple[Path, Path]]:
    """A plain ONNX decoder, and a folder to write to."""
    from river_compile.exporters.onnx.hf import export_decoder, load_decoder

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        path = Path(folder) / "source" / "plain.onnx"
        path.parent.mkdir()
        if wanted.model is None:
            export_decoder(random_model(place, name, torch.float32).cpu(), path)
        elif wanted.model.is_dir():
            export_decoder(load_decoder(wanted.model, torch.float32), path)
        else:
            path = wanted.model
        yield path, Path(folder)


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} is not installed")
