"""The products on a CPU without AVX-512, as any x86 CPU can be told to be one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
NARROW = """
import sys
import pytest, torch
torch._inductor.config.cpp.simdlen = 256
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
sys.exit(pytest.main(["-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no AVX-512 to do without")
@pytest.mark.parametrize(
    "tests",
    [
        ("test_linear.py", "test_few_rows.py", "-k", "not says_what_it_said and not fastest_form"),
        pytest.param(("test_dispatch.py", "-k", "inductor"), marks=pytest.mark.slow),
    ],
    ids=("products", "compiled pieces"),
)
def test_without_avx512_all_of_it_holds_too(tests: tuple[str, ...]) -> None:
    chosen = [str(HERE / name) if name.endswith(".py") else name for name in tests]
    done = subprocess.run(
        [sys.executable, "-c", NARROW, *chosen, "-m", "not slow"],
        check=False,
        env={**os.environ, **AVX2},
        capture_output=True,
        text=True,
        cwd=HERE.parents[2],
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
