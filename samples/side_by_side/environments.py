"""A virtual environment for each tool, on top of the one that runs this."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

__all__ = ["CACHE", "OURS", "Environment", "PeerError", "last_words", "run"]

CACHE = Path(__file__).resolve().parents[2] / ".cache"
_VENVS = CACHE / "venvs"
_WORDS = 120


class PeerError(Exception):
    """A peer cannot take part; says why in one line."""


@dataclass(frozen=True)
class Environment:
    """Packages with their versions, in a virtual environment that is made on first use.

    It stands on the running interpreter's packages: what is there already (torch is gigabytes) is not fetched again,
    and another version of it goes before it. Without packages it is the running interpreter itself.
    """

    name: str = ""
    packages: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256("\n".join((*self.packages, sys.version, sys.prefix)).encode()).hexdigest()[:12]
        return _VENVS / f"peers-{self.name}-{digest}"

    def python(self) -> Path:
        """Its interpreter.

        Raises:
            PeerError: its packages cannot be installed.
        """
        if not self.packages:
            return Path(sys.executable)
        python, ready = self.folder / "bin" / "python", self.folder / ".ready"
        _VENVS.mkdir(parents=True, exist_ok=True)
        with FileLock(_VENVS / f"peers-{self.name}.lock"):
            if not ready.exists():
                run([sys.executable, "-m", "venv", "--clear", self.folder], "no environment")
                own = sysconfig.get_path("purelib", vars={"base": str(self.folder)})
                # Not the folder alone: what is installed there to be edited is named by files of its own.
                below = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
                (Path(own) / "below.pth").write_text(below)
                run([python, "-m", "pip", "install", "--quiet", *self.packages], "does not install")
                ready.touch()
        return python


OURS = Environment()


def run(command: Sequence[object], problem: str, cwd: Path | None = None) -> None:
    """Run a command to its end.

    Raises:
        PeerError: it fails; ``problem`` and the last line that it wrote.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode:
        raise PeerError(f"{problem}: {last_words(done.stderr) or last_words(done.stdout)}")


def last_words(text: str) -> str:
    """The last line of a text, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_WORDS] if lines else ""
