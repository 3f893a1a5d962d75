"""Choose an exit threshold by evidence, and show what it does.

    python samples/calibrate.py MODEL.river.onnx TOKENIZER_FOLDER MAX_RISK [TEXTS...]

TEXTS are files of your own (text, or JSONL with a document a line); without any, the calibration texts that come with
the package are used. The result goes into calibration.json: `river-export model.onnx --calibration calibration.json`
takes it. Interrupt it as you like: what was read is kept in .cache/readings.
"""

from __future__ import annotations

import sys
from pathlib import Path

import river_compile
from river_compile.measure.fidelity import load_tokenizer


def main(model: str, tokenizer_folder: str, max_risk: str, *texts: str, output: str = "calibration.json") -> None:
    calibration = river_compile.calibrate(
        model,
        texts or None,
        load_tokenizer(tokenizer_folder),
        max_risk=float(max_risk),
        confidence=0.95,
        cache=Path(".cache/readings"),
        progress=lambda step, done, total: print(f"\r{step}: {done}/{total}  ", end="", file=sys.stderr),
    )
    print(f"\n{'tau':>7} {'risk':>8} {'p':>9} {'exit depth':>11}")
    for tested in calibration.curve:
        print(f"{tested.tau:7g} {tested.risk:8.4f} {tested.p_value:9.2g} {tested.exit_depth:11.1f}")
    print(calibration.verdict())
    calibration.save(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
