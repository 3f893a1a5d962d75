"""What was read once is not read again: arrays on disk, by all that they depend on."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from river_compile.errors import InputError

__all__ = ["Readings"]


class Readings:
    """Named arrays in a folder, a file for each reading; each file is there whole or not at all.

    Args:
        folder: None keeps nothing.
        model: all that makes a reading of one model differ from another's.
    """

    def __init__(self, folder: Path | None, model: str) -> None:
        self._folder = folder
        self._model = model

    def load(self, ids: np.ndarray, setting: object) -> dict[str, np.ndarray] | None:
        """The arrays kept for a document, int64 [tokens], and a setting (by its ``repr``); None if there are none."""
        path = self._path(ids, setting)
        if path is None or not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError):
            return None

    def save(self, ids: np.ndarray, setting: object, arrays: dict[str, np.ndarray]) -> None:
        """Keep arrays.

        Raises:
            InputError: the folder cannot be written.
        """
        path = self._path(ids, setting)
        if path is None:
            return
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(buffer.getvalue())
            part.replace(path)
        except OSError as error:
            raise InputError(f"{path.parent}: cannot keep readings there: {error.strerror or error}") from error

    def _path(self, ids: np.ndarray, setting: object) -> Path | None:
        if self._folder is None:
            return None
        key = hashlib.sha256(b"\0".join([self._model.encode(), repr(setting).encode(), ids.tobytes()]))
        return self._folder / f"{key.hexdigest()[:32]}.npz"
