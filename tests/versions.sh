#!/usr/bin/env bash
# Test with the oldest releases that pyproject.toml allows and with the newest there are, each in an environment of its own.
# Called by `make test-versions`, which sets PYTHON, OLDEST_PYTHON and NEWEST_PYTHON. It fetches several gigabytes once;
# `make clean` removes them.
set -euo pipefail
venvs=.cache/venvs
tests="tests/exporters tests/passes tests/runtime tests/test_backend.py tests/test_api.py"
# By Inductor itself, with the cache whose sizes are symbolic: what a torch release changes first.
inductor=tests/exporters/torch/test_dispatch.py::test_inductor_compiles_each_kind_of_piece_once

test -x $venvs/tools/bin/uv || { "$PYTHON" -m venv $venvs/tools; $venvs/tools/bin/pip install --quiet uv; }
failed=""
for which in oldest newest; do
    python=$OLDEST_PYTHON resolution=lowest-direct
    test $which = oldest || { python=$NEWEST_PYTHON resolution=highest; }
    test -x $venvs/$which/bin/python || $venvs/tools/bin/uv venv --quiet --python "$python" $venvs/$which
    $venvs/tools/bin/uv pip install --quiet --python $venvs/$which/bin/python --upgrade --resolution $resolution \
        --editable '.[test]'
    # Entry points are looked up in the working folder first, and would stay as they were.
    rm -rf ./*.egg-info build
    $venvs/tools/bin/uv pip list --quiet --python $venvs/$which/bin/python \
        | grep -iE '^(torch|transformers|onnx|onnxscript|onnxruntime|numpy) ' || true
    OMP_NUM_THREADS=1 $venvs/$which/bin/python -m pytest -n 2 -m 'not slow' $tests || failed="$failed $which"
    OMP_NUM_THREADS=1 $venvs/$which/bin/python -m pytest $inductor || failed="$failed $which/inductor"
done
test -z "$failed" || { echo "failed with:$failed"; exit 1; }
