"""The name of the machine's CPU, which stands beside every figure of speed."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["cpu_name"]


def cpu_name() -> str:
    """Model, widest vector instructions, and number of cores, as far as the system tells."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags", "").split()
    widest = next((flag for flag in ("avx512_vnni", "avx512f", "avx2") if flag in flags), "")
    return ", ".join(part for part in (name, widest, f"{os.cpu_count()} cores") if part)
