"""What a section writes: checks, tables, notes; on disk at once, so that a crash or a kill loses nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Skip(Exception):
    """A section cannot run here; the text says why."""


class Report:
    """One section's results, as JSON in a file that is rewritten whenever something is added.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, Any] = {"status": "running", "checks": [], "tables": {}, "notes": [], "machine": {}}
        self._write()

    def check(self, name: str, good: bool, **figures: Any) -> None:
        """A claim that held or did not; one that did not makes the whole run fail."""
        self.content["checks"].append({"check": name, "good": bool(good), **figures})
        self._write()

    def row(self, table: str, **cells: Any) -> None:
        self.content["tables"].setdefault(table, []).append(cells)
        self._write()

    def note(self, text: str) -> None:
        self.content["notes"].append(text)
        self._write()

    def machine(self, **facts: Any) -> None:
        self.content["machine"] |= facts
        self._write()

    def end(self, status: str, why: str = "") -> None:
        self.content |= {"status": status, "why": why}
        self._write()

    def _write(self) -> None:
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content))
        os.replace(unfinished, self._path)


def text_of(name: str, result: dict[str, Any]) -> str:
    """A section's results to read."""
    head = f"== {name}: {result['status']}, {result['seconds']:.0f} s"
    lines = [head + (f" ({result['why']})" if result.get("why") else "")]
    if result.get("machine"):
        lines.append(", ".join(f"{name} {fact}" for name, fact in result["machine"].items()))
    checks = result.get("checks", [])
    if checks:
        lines += _table("checks", [{**one, "good": "yes" if one["good"] else "WRONG"} for one in checks])
    for title, rows in result.get("tables", {}).items():
        lines += _table(title, rows)
    return "\n".join([*lines, *(f"note: {note}" for note in result.get("notes", ()))])


def _table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    first, *others = widths
    lines = [
        "  ".join([line[0].ljust(first), *(cell.rjust(w) for cell, w in zip(line[1:], others, strict=True))]).rstrip()
        for line in cells
    ]
    return [f"-- {title}", *lines]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    if isinstance(value, (list, dict)):
        return json.dumps(value).replace('"', "")
    return str(value)
