"""Parse and build, in a process of its own: TensorRT's builder can crash, and must not take the caller with it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from river_compile.errors import ConfigError, InputError, RiverError
from river_compile.exporters.tensorrt.engine import Profile, Tensor
from river_compile.exporters.tensorrt.runtime import TensorRT, load_runtime

__all__ = ["Built", "Job", "build", "run"]

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_WATCH_SECONDS = 0.5
_ERRORS: dict[str, type[RiverError]] = {"InputError": InputError}


@dataclass(frozen=True)
class Job:
    """What to build: the ONNX file, the engine file, and the settings that TensorRT sees."""

    onnx: str
    engine: str
    runtime: str
    profiles: tuple[Profile, ...]
    compute_capabilities: tuple[str, ...]
    weightless: bool


@dataclass(frozen=True)
class Built:
    """What was built: runtime and version, the network's inputs and outputs as TensorRT has them, and time."""

    runtime: str
    version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: int
    seconds: dict[str, float]


def run(job: Job) -> Built:
    """Build in a child process.

    Raises:
        RiverError: as `build`, or the builder crashed.
    """
    child = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(dataclasses.asdict(job)),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(child.stdout.rpartition("\n\n")[2])
    except ValueError:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        how = f"by signal {-child.returncode}" if child.returncode < 0 else f"with status {child.returncode}"
        raise RiverError(f"TensorRT's builder ended {how}: {last[:300]}") from None
    if "error" in answer:
        if answer["kind"] == "ConfigError":
            field, _, problem = answer["error"].partition(": ")
            raise ConfigError(field, problem)
        raise _ERRORS.get(answer["kind"], RiverError)(answer["error"])
    return Built(
        answer["runtime"],
        answer["version"],
        tuple(Tensor(t["name"], t["dtype"], tuple(t["shape"])) for t in answer["inputs"]),
        tuple(Tensor(t["name"], t["dtype"], tuple(t["shape"])) for t in answer["outputs"]),
        answer["layers"],
        answer["seconds"],
    )


def build(job: Job) -> Built:
    """Parse the ONNX file and write the engine.

    Raises:
        MissingExtra: the runtime is not installed.
        ConfigError: it cannot build for a wanted compute capability.
        InputError: it does not take a node of the model.
        RiverError: it could not build.
    """
    runtime = load_runtime(job.runtime)
    targets = runtime.targets(job.compute_capabilities)
    trt = runtime.module
    builder = trt.Builder(runtime.logger)
    if builder is None:
        raise RiverError(f"{runtime.name} cannot build here: {runtime.complaint() or 'no GPU'}")
    started = time.perf_counter()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = _parse(runtime, network, job.onnx)
    parsed = time.perf_counter()
    config = builder.create_builder_config()
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(target, index)
    if job.weightless:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    for profile in job.profiles:
        config.add_optimization_profile(_profile(builder, profile))
    layers, inputs, outputs = network.num_layers, _tensors(network, "input"), _tensors(network, "output")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        # TensorRT-RTX 1.7.1 compiles a refittable engine's kernels when it is built, on the GPU.
        hint = " (a weightless one needs a GPU to be built)" if job.weightless else ""
        raise RiverError(f"{runtime.name} could not build the engine{hint}: {runtime.complaint()}")
    Path(job.engine).write_bytes(plan)
    seconds = {"parse": parsed - started, "build": time.perf_counter() - parsed}
    del parser
    return Built(runtime.name, runtime.version, inputs, outputs, layers, seconds)


def _parse(runtime: TensorRT, network: Any, path: str) -> Any:
    parser = runtime.module.OnnxParser(network, runtime.logger)
    if not parser.parse_from_file(path):
        error = parser.get_error(0)
        why = " ".join(error.desc().split())[:300]
        where = f"node {error.node_name()!r} ({error.node_operator()})" if error.node_name() else "the model"
        raise InputError(f"{runtime.name} does not take {where}: {why}")
    return parser


def _profile(builder: Any, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for name, bounds in profile.shapes.items():
        made.set_shape(name, *bounds)
    return made


def _tensors(network: Any, kind: str) -> tuple[Tensor, ...]:
    get = getattr(network, f"get_{kind}")
    found = [get(index) for index in range(getattr(network, f"num_{kind}s"))]
    return tuple(Tensor(t.name, _dtype(t.dtype), tuple(t.shape)) for t in found)


def _dtype(dtype: Any) -> str:
    name = str(dtype).rpartition(".")[2]
    return _DTYPES.get(name, name.lower())


def _end_with_parent() -> None:
    """End this process soon after the one that started it has: a build takes minutes, and its result would be lost."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _main() -> None:
    _end_with_parent()
    fields = json.load(sys.stdin)
    profiles = tuple(
        Profile(p["name"], {n: (tuple(a), tuple(b), tuple(c)) for n, (a, b, c) in p["shapes"].items()})
        for p in fields["profiles"]
    )
    job = Job(**fields | {"profiles": profiles, "compute_capabilities": tuple(fields["compute_capabilities"])})
    try:
        answer = dataclasses.asdict(build(job))
    except RiverError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    except OSError as error:
        answer = {"error": f"{job.engine}: cannot be written: {error.strerror}", "kind": "RiverError"}
    print(f"\n\n{json.dumps(answer)}")


if __name__ == "__main__":
    _main()
