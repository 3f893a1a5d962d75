"""Who takes part: each tool's packages, how it makes its model, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from side_by_side.environments import OURS, Environment
from side_by_side.models import Commands

__all__ = ["PEERS", "RECIPES", "REFERENCE", "TAU", "Peer", "chosen"]

TAU = 0.95
DEPTH = 4

GENAI = Environment("genai", ("onnxruntime-genai==0.18.0",))
OPENVINO = Environment("openvino", ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0"))
LLAMA_CPP = Environment("llama-cpp", ("cyllama==0.2.18",))
TORCHAO = Environment("torchao", ("torchao==0.18.0",))


@dataclass(frozen=True)
class Peer:
    """A row of the table.

    Fields:
        name: for ``--peers``.
        title: what it is.
        engine: its module in `side_by_side.engines`; ``settings`` go there.
        model, file: the recipe that makes its model, the float model's folder if empty, and what of it is loaded.
        judged_by_text: it says nothing that random weights would not make meaningless.
    """

    name: str
    title: str
    engine: str
    environment: Environment = OURS
    model: str = ""
    file: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    judged_by_text: bool = False


def _onnx(name: str, title: str, model: str, file: str, judged_by_text: bool = False, **settings: Any) -> Peer:
    return Peer(name, title, "onnx", OURS, model, file, settings, judged_by_text)


def _torch(name: str, title: str, environment: Environment = OURS, judged_by_text: bool = False, **how: Any) -> Peer:
    return Peer(name, title, "pytorch", environment, settings=how, judged_by_text=judged_by_text)


REFERENCE = "onnxruntime"
PEERS = (
    _onnx(REFERENCE, "ONNX Runtime, float32", "onnx", "original.onnx"),
    Peer("genai-fp32", "ONNX Runtime GenAI, float32", "genai", GENAI, "genai-fp32"),
    Peer("genai-int4", "ONNX Runtime GenAI, int4", "genai", GENAI, "genai-int4"),
    Peer("openvino-int8", "OpenVINO GenAI, int8", "openvino_genai", OPENVINO, "openvino-int8"),
    Peer("openvino-int4", "OpenVINO GenAI, int4", "openvino_genai", OPENVINO, "openvino-int4"),
    Peer("llama-cpp-q8", "llama.cpp, Q8_0", "llama_cpp", LLAMA_CPP, "gguf-q8", "model.gguf"),
    Peer("llama-cpp-q4", "llama.cpp, Q4_0", "llama_cpp", LLAMA_CPP, "gguf-q4", "model.gguf"),
    _torch("inductor-fp32", "Inductor, float32", dtype="float32"),
    _torch("inductor-bf16", "Inductor, bfloat16"),
    _torch("torchao-int4", "torchao int4 weights, bfloat16", TORCHAO, how="int4"),
    _torch("river-torch-tau", f"**river**, PyTorch bfloat16, tau {TAU}", how="river", tau=TAU, judged_by_text=True),
    _torch(
        "river-torch-depth", f"**river**, PyTorch bfloat16, exit depth {DEPTH}", how="river", tau=2.0, max_depth=DEPTH
    ),
    _onnx("river-depth", f"**river**, ONNX, exit depth {DEPTH}", "onnx", "model.onnx", tau=2.0, max_depth=DEPTH),
    _onnx("river-all", "**river**, ONNX, all river", "onnx", "model.onnx", tau=2.0, max_depth=0),
    _onnx("river-exact", "**river**, ONNX, exact", "exact", "model.onnx", judged_by_text=True, exact=True),
)


def _ours(source: Path, made: Callable[[str], Path], out: Path) -> Sequence[Sequence[object]]:
    kept = ("--keep-original", "--head-bits", 8, "--no-quality", "--quiet")
    return [("river_compile", "export", source, "-o", out, *kept)]


def _exact(source: Path, made: Callable[[str], Path], out: Path) -> Sequence[Sequence[object]]:
    given = (made("onnx") / "original.onnx", "-o", out / "model.onnx", "--exact", "--tokenizer", source, "--quiet")
    return [("river_compile", "export", *given)]


def _genai(precision: str) -> Commands:
    def commands(source: Path, made: Callable[[str], Path], out: Path) -> Sequence[Sequence[object]]:
        given = ("-i", source, "-o", out, "-p", precision, "-e", "cpu", "-c", out / "cache")
        return [("onnxruntime_genai.models.builder", *given)]

    return commands


def _openvino(weights: str, *groups: str) -> Commands:
    def commands(source: Path, made: Callable[[str], Path], out: Path) -> Sequence[Sequence[object]]:
        # Groups of 128 are its own choice, and an error where they do not divide a layer's width.
        given = ("-m", source, "--task", "text-generation-with-past", "--weight-format", weights, *groups, out)
        return [("optimum.commands.optimum_cli", "export", "openvino", *given)]

    return commands


def _gguf(kind: str) -> Commands:
    def commands(source: Path, made: Callable[[str], Path], out: Path) -> Sequence[Sequence[object]]:
        return [("side_by_side.gguf_file", source, out / "model.gguf", kind)]

    return commands


RECIPES: dict[str, tuple[Environment, Commands]] = {
    "onnx": (OURS, _ours),
    "exact": (OURS, _exact),
    "genai-fp32": (GENAI, _genai("fp32")),
    "genai-int4": (GENAI, _genai("int4")),
    "openvino-int8": (OPENVINO, _openvino("int8")),
    "openvino-int4": (OPENVINO, _openvino("int4", "--group-size-fallback", "adjust")),
    "gguf-q8": (OURS, _gguf("Q8_0")),
    "gguf-q4": (OURS, _gguf("Q4_0")),
}


def chosen(names: str | None, random_weights: bool) -> list[Peer]:
    """The peers that are named, the reference first in any case; all that mean something if None.

    Raises:
        ValueError: there is no such peer.
    """
    able = [peer for peer in PEERS if not (random_weights and peer.judged_by_text)]
    if names is None:
        return able
    wanted = {REFERENCE, *(name.strip() for name in names.split(",") if name.strip())}
    if unknown := wanted - {peer.name for peer in able}:
        raise ValueError(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in able)}")
    return [peer for peer in able if peer.name in wanted]
