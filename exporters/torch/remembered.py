"""What was measured on this machine, kept for the next process: it chooses the same, and need not measure."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from river_compile.exporters.torch import seam
from river_compile.exporters.torch.few_rows import Times

__all__ = ["Remembered"]


class Remembered(MutableMapping[str, Times]):
    """Times by key, in a file among Inductor's caches that belongs to this CPU and this torch.

    A file that cannot be read or written is as none: then the next process measures again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[str, Times] | None = None

    @property
    def path(self) -> Path:
        name = hashlib.sha256(seam.describe_machine().encode()).hexdigest()[:16]
        return (self._folder or seam.cache_folder()) / "river" / f"products-{name}.json"

    def _known(self) -> dict[str, Times]:
        if self._held is None:
            try:
                self._held = {key: Times(**value) for key, value in json.loads(self.path.read_text()).items()}
            except (OSError, ValueError, TypeError, AttributeError):
                self._held = {}
        return self._held

    def __getitem__(self, key: str) -> Times:
        return self._known()[key]

    def __setitem__(self, key: str, times: Times) -> None:
        self._known()[key] = times
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({key: dataclasses.asdict(times) for key, times in self._known().items()}, indent=1)
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
