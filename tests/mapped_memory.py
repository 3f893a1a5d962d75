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
    return 1024 * next(int(line.split()[1]) for line in _told(address) if line.startswith("Rss:"))


def inode(address: int) -> int:
    """Of the file that is mapped at an address."""
    return int(_told(address)[0].split()[4])


def _told(address: int) -> list[str]:
    lines = _SMAPS.read_text().splitlines()
    starts = [place for place, line in enumerate(lines) if _RANGE.match(line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        first, last = (int(number, 16) for number in _RANGE.match(lines[start]).groups())  # type: ignore[union-attr]
        if first <= address < last:
            return lines[start:end]
    raise AssertionError(f"nothing is mapped at {address:#x}")
