"""What only a GPU can tell, in one command: is it right there, and how fast is it? Nothing is fetched from anywhere.

    python samples/gpu_check [--sections a,b] [--minutes 9] [--out FOLDER] [--wheels FOLDER] [--rehearse [inductor]]

It needs torch with CUDA and transformers, this folder, and a wheel of river-compile (``python -m build --wheel``):
copy ``samples/gpu_check`` and the wheel to the machine, the wheel into a folder "wheels", and there run

    python gpu_check --wheels wheels --out gpu

The TensorRT section, and that of ONNX Runtime, want these wheels too, else they are skipped: onnx-graphsurgeon,
tensorrt-rtx-cu13-bindings, tensorrt-rtx-cu13-libs. One that is too large to carry in one piece may come in parts
(``split -b 48M X.whl X.whl.part-``), which are put together there.

Sections, each in a process and with a budget of its own:
    depths          every exit depth against eager mode, float32 and bfloat16, on a small random model
    int4            torch's kernel for 4-bit weights against the product with the dequantized ones, and its time
    graphs          CUDA graphs against none
    llama-3.2-1b    that shape: eager, Inductor's reduce-overhead and max-autotune, the river at forced depths
    exact           exact mode: the same tokens or not; what a draft and a verification of 1 to 16 rows cost
    llama-3.1-8b    as llama-3.2-1b
    onnxruntime     ONNX Runtime on CUDA, each depth against its CPU
    tensorrt        TensorRT-RTX engines, plain and with a river: each depth against ONNX Runtime, exact mode, speed

In the folder that --out names: gpu_check.json, all of it, and gpu_check.txt, the tables, rewritten after each section.
One that crashes or runs out of memory or time costs nothing but itself. The exit status is 1 if a check was wrong or a
section broke. Weights are random, so speeds are real and texts, acceptance of drafts included, mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Report, Skip, text_of

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A section and the seconds it is given at least; time that is left over is shared out to all still to come."""

    name: str
    seconds: float


SECTIONS = (
    Section("depths", 55),
    Section("int4", 30),
    Section("graphs", 45),
    Section("llama-3.2-1b", 100),
    Section("exact", 85),
    Section("llama-3.1-8b", 115),
    Section("onnxruntime", 25),
    Section("tensorrt", 80),
)


def main() -> int:
    options = _options()
    if options.run is not None:
        return _run_here(options)
    # Sections would outlive a parent that is simply ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    chosen = [section for section in SECTIONS if section.name in options.sections]
    options.out.mkdir(parents=True, exist_ok=True)
    started, results = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        environment = {"HF_HUB_OFFLINE": "1", **os.environ}
        if options.wheels is not None:
            site = _unpack(options.wheels, Path(scratch))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), environment.get("PYTHONPATH"))))
        for place, section in enumerate(chosen):
            left = started + 60 * options.minutes - time.monotonic()
            limit = section.seconds * max(1, left / sum(other.seconds for other in chosen[place:]))
            if section.seconds > left:
                why = f"it may take {section.seconds:.0f} s, and {max(left, 0):.0f} s are left"
                results[section.name] = {"status": "skipped", "why": why, "seconds": 0.0}
            else:
                results[section.name] = run_section(section.name, limit, sys.argv[1:], environment, Path(scratch))
            print(text_of(section.name, results[section.name]), flush=True)
            _write(options.out, results)
    return _summary(results)


def _options() -> argparse.Namespace:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", type=lambda text: text.split(","), default=names, help="some of them, by commas")
    parser.add_argument("--minutes", type=float, default=9.0, help="the most it takes in all (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("gpu_check_out"), help="folder for what was measured")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels to import from, whole or in parts")
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const="plain",
        choices=("plain", "inductor"),
        help="on a CPU, with toys for models, where no figure means anything; what runs compiled if it says inductor",
    )
    parser.add_argument("--model", type=Path, help="for onnxruntime and tensorrt: a plain ONNX decoder, or a folder")
    parser.add_argument("--exit-every", type=int, default=1, metavar="N", help="of tensorrt's river")
    parser.add_argument("--keep-first", type=int, default=0, metavar="N", help="its first N layers get no twin")
    # How a section is started in its own process.
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.sections) - set(names)):
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(names)}")
    return options


def _unpack(wheels: Path, scratch: Path) -> Path:
    """The wheels of a folder, whole or in parts, unpacked into one folder: to import from, they need no more."""
    whole, site = scratch / "wheels", scratch / "site"
    whole.mkdir()
    for file in [*sorted(wheels.glob("*.whl")), *sorted(wheels.glob("*.whl.part*"))]:
        with open(whole / f"{file.name.partition('.whl')[0]}.whl", "ab") as target:
            target.write(file.read_bytes())
    for wheel in sorted(whole.iterdir()):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        wheel.unlink()
    return site


def run_section(
    name: str, limit: float, arguments: list[str], environment: dict[str, str], scratch: Path
) -> dict[str, Any]:
    """A section in a process of its own, which is stopped after ``limit`` seconds with all that it has started."""
    file, log = scratch / f"{name}.json", scratch / f"{name}.log"
    command = [sys.executable, str(HERE), *arguments, "--run", name, str(file)]
    started = time.monotonic()
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _stop(child)
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"status": "running"}
    result["seconds"] = time.monotonic() - started
    if result["status"] == "running":
        result["status"] = "out of time" if status is None else "broken"
        result["why"] = f"stopped after {limit:.0f} s" if status is None else _how(status)
    if result["status"] in ("broken", "out of time"):
        result["log"] = log.read_text(errors="replace")[-4000:]
    return result


def _stop(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _how(status: int) -> str:
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


def _write(folder: Path, results: dict[str, Any]) -> None:
    (folder / "gpu_check.json").write_text(json.dumps(results, indent=1))
    texts = [text_of(name, result) for name, result in results.items()]
    (folder / "gpu_check.txt").write_text("\n\n".join(texts) + "\n")


def _summary(results: dict[str, Any]) -> int:
    """Print what became of each section; the exit status."""
    print()
    for name, result in results.items():
        checks = result.get("checks", [])
        wrong = [one["check"] for one in checks if not one["good"]]
        told = f"{len(checks) - len(wrong)} of {len(checks)} checks hold" if checks else ""
        print(f"{name:14} {result['status']:12} {result['seconds']:5.0f} s  {told or result.get('why', '')}")
        for one in wrong:
            print(f"{'':14} WRONG: {one}")
    bad = [name for name, result in results.items() if result["status"] in ("wrong", "broken")]
    print(f"not right: {', '.join(bad)}" if bad else "nothing wrong was found")
    return 1 if bad else 0


def _run_here(options: argparse.Namespace) -> int:
    """This is a section's own process."""
    name, file = options.run
    report = Report(Path(file))
    try:
        _section(name, options, report)
    except Skip as skip:
        report.end("skipped", str(skip))
    except Exception as error:
        traceback.print_exc()
        report.end("broken", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    else:
        report.end("right" if all(one["good"] for one in report.content["checks"]) else "wrong")
    return 0


def _section(name: str, options: argparse.Namespace, report: Report) -> None:
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        raise Skip("torch finds no GPU (--rehearse does without)")
    import transformers
    from models import Place

    device = torch.device("cpu" if options.rehearse else "cuda")
    report.machine(
        device=str(device) if options.rehearse else torch.cuda.get_device_name(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    # All ways of a section share the model's code, and with it Dynamo's count of what was compiled for it.
    torch._dynamo.config.recompile_limit = 64
    place = Place(device, options.rehearse != "plain")
    if name in ("onnxruntime", "tensorrt"):
        onnx_sections = importlib.import_module("onnx_sections")
        wanted = onnx_sections.Wanted(options.model, options.exit_every, options.keep_first)
        getattr(onnx_sections, name)(place, report, wanted)
        return
    torch_sections = importlib.import_module("torch_sections")
    section = torch_sections.llama(name) if name.startswith("llama") else getattr(torch_sections, name)
    section(place, report)


if __name__ == "__main__":
    sys.exit(main())
