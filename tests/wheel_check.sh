#!/usr/bin/env bash
# Build the wheel, install it into an empty environment with its core dependencies, and use it there.
# Called by `make wheel-check`, which sets BIN (the development environment) and PYTHON.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

root=$PWD
"$BIN/python" -m build --no-isolation --outdir "$work" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
wheel=$(echo "$work"/*.whl)

# Wheel and source distribution hold each module once, and nothing else as a package.
"$BIN/python" - "$wheel" "$work"/*.tar.gz <<'PY'
import pathlib, sys, tarfile, zipfile
wings = {"river_compile": "river_compile", "passes": "river_compile/passes", "exporters": "river_compile/exporters"}
wanted = []
for wing, home in wings.items():
    for path in pathlib.Path(wing).rglob("*.py"):
        inner = path.relative_to(wing)
        if wing != "river_compile" or inner.parts[0] not in wings:
            wanted.append((path.as_posix(), f"{home}/{inner.as_posix()}"))
sources, modules = map(sorted, zip(*wanted))
found = [name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name]
assert {name.split("/")[0] for name in found} == {"river_compile"}, found
assert sorted(name for name in found if name.endswith(".py")) == modules, set(found) ^ set(modules)
names = [name.partition("/")[2] for name in tarfile.open(sys.argv[2]).getnames()]
found = sorted(name for name in names if name.endswith(".py") and name.split("/")[0] in wings)
assert found == sources, set(found) ^ set(sources)
PY

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
"$BIN/python" - "$work/model.onnx" "$root" <<'PY'
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

# In a checkout's root Python finds the checkout first, and all of it through its links. Where links are plain text, as on
# a machine that has none, an editable installation finds the wings.
imports="import river_compile.exporters.onnx.hf, river_compile.passes.fx.graph"
git clone --quiet "$root" "$work/links"
git clone --quiet --config core.symlinks=false "$root" "$work/text"
test -L "$work/links/river_compile/passes" && test ! -d "$work/text/river_compile/passes"
for place in "$work" "$work/links"; do (cd "$place" && "$work/venv/bin/python" -c "$imports"); done
"$work/venv/bin/pip" install --quiet --no-deps --editable "$work/text"
for place in "$work" "$work/text"; do (cd "$place" && "$work/venv/bin/python" -c "$imports"); done
echo "wheel check: ok"
