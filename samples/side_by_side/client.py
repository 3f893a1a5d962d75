"""The other end of a worker."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from side_by_side.environments import PeerError, last_words

__all__ = ["Process", "Worker"]

_SAMPLES = Path(__file__).resolve().parents[1]
_STOP_SECONDS = 20


class Process:
    """A process that answers requests, as `side_by_side.worker.serve` does.

    Args:
        command: what starts it.
        log: the file that gets what the process prints.
        patience: seconds to wait for an answer.
        cwd: where it runs; None: where this one does.
    """

    def __init__(self, command: Sequence[str], log: Path, patience: float, cwd: Path | None = None) -> None:
        self._log, self._patience = log, patience
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=cwd
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """What it answers.

        Raises:
            PeerError: it failed, has ended, or does not answer in time.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        if not select.select([self._process.stdout], [], [], self._patience)[0]:
            # The others need the cores.
            self._process.kill()
            raise PeerError(f"no answer in {self._patience:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise PeerError(found["error"])
        return found

    def _ended(self) -> PeerError:
        code = self._process.wait()
        return PeerError(f"ended with status {code}: {last_words(self._log.read_text(errors='replace'))}")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


class Worker(Process):
    """A process that has loaded a model.

    Args:
        python: the interpreter that has the engine's packages.
        log, patience: see `Process`.
        load: the engine's module (``engine``) and what its ``load`` takes.

    Raises:
        PeerError: it cannot be loaded.
    """

    def __init__(self, python: Path, log: Path, patience: float, **load: Any) -> None:
        super().__init__([str(python), "-m", "side_by_side.worker"], log, patience, _SAMPLES)
        try:
            self.ask(do="load", **load)
        except BaseException:
            self.close()
            raise

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        """New tokens, chosen greedily, and the seconds from the first of them to the last."""
        found = self.ask(do="decode", prompt=prompt, tokens=tokens)
        return found["tokens"], found["seconds"]

    def choices(self, ids: list[int], prompt: int) -> list[int]:
        """The token chosen after the first ``prompt`` ids, and after each further one."""
        found: list[int] = self.ask(do="choose", ids=ids, prompt=prompt)["choices"]
        return found

    def status(self) -> tuple[int | None, str]:
        """Bytes of resident memory, if that is told, and what the engine notes."""
        found = self.ask(do="status")
        return found["resident"], found["note"]
