"""What was measured on this machine, kept for the next process: it chooses the same, and need not measure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from river_compile.exporters.torch import seam

__all__ = ["Remembered"]


class Remembered(MutableMapping[str, Mapping[str, float]]):
    """Numbers by name, by key, in a file among Inductor's caches that belongs to this CPU and this torch.

    A file that cannot be read or written is as none: then the next process measures again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[str, Mapping[str, float]] | None = None

    @property
    def path(self) -> Path:
        name = hashlib.sha256(seam.describe_machine().encode()).hexdigest()[:16]
        return (self._folder or seam.cache_folder()) / "river" / f"forms-{name}.json"

    def _known(self) -> dict[str, Mapping[str, float]]:
        if self._held is None:
            try:
                self._held = {
                    key: {name: float(number) for name, number in found.items()}
                    for key, found in json.loads(self.path.read_text()).items()
                }
            except (OSError, ValueError, TypeError, AttributeError):
                self._held = {}
        return self._held

    def __getitem__(self, key: str) -> Mapping[str, float]:
        return self._known()[key]

    def __setitem__(self, key: str, found: Mapping[str, float]) -> None:
        self._known()[key] = found
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({key: dict(found) for key, found in self._known().items()}, indent=1)
        handle, part = tempfile.mkstemp(dir=self.path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(part, self.path)

    def __delitem__(self, key: str) -> None:
        del self._known()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())
