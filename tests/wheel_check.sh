#!/usr/bin/env bash
# Build the wheel, install it into an empty environment with its core dependencies, and use it there.
# Called by `make wheel-check`, which sets BIN (the development environment) and PYTHON.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$BIN/python" -m build --no-isolation --wheel --outdir "$work" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
wheel=$(echo "$work"/*.whl)

top=$("$BIN/python" - "$wheel" <<'PY'
import sys, zipfile
names = {name.split("/")[0] for name in zipfile.ZipFile(sys.argv[1]).namelist()}
print(*sorted(name for name in names if not name.endswith(".dist-info")))
PY
)
test "$top" = river_compile || { echo "the wheel installs: $top"; exit 1; }

"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --constraint constraints.txt torch "$wheel[cpu]"
"$work/venv/bin/pip" check
cd "$work"
"$work/venv/bin/river-export" --version
"$work/venv/bin/river-eval" --version
"$work/venv/bin/python" - <<'PY'
import importlib.util, pathlib
import river_compile, river_compile.passes.onnx.find_layers, river_compile.exporters.onnx.onnxruntime
assert (pathlib.Path(river_compile.__file__).parent / "py.typed").exists()
from river_compile.measure.fidelity import shipped_texts
assert len(shipped_texts("heldout")) >= 30
assert importlib.util.find_spec("transformers") is None, "not an empty environment"
PY
"$BIN/python" - "$work/model.onnx" "$OLDPWD" <<'PY'
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from tests.contrib_model import ContribDecoder
ContribDecoder().save(pathlib.Path(sys.argv[1]))
PY
"$work/venv/bin/river-export" model.onnx
"$work/venv/bin/python" - <<'PY'
from river_compile.runtime import OnnxDecoder
result = OnnxDecoder("model.river.onnx").generate([[3, 4, 5]], 8)
assert len(result.tokens[0]) == 8, result
PY
echo "wheel check: ok"
