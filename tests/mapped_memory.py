"""How much of a range of this process's memory is resident, as the system tells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_SMAPS = Path("/proc/self/smaps")
_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")

only_where_told = pytest.mark.skipif(not _SMAPS.exists(), reason="this system does not tell what is resident")


def resident(address: int) -> int:
    """Resident bytes of the mapping that an address lies in."""
    inside = False
    for line in _SMAPS.read_text().splitlines():
        if found := _RANGE.match(line):
            first, last = (int(end, 16) for end in found.groups())
            inside = first <= address < last
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"nothing is mapped at {address:#x}")
