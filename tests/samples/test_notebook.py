"""The notebook runs from its first cell to its last, and what is kept of a run has no error in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.words import save_word_model

SAMPLES = Path(__file__).parents[2] / "samples"
NOTEBOOK = SAMPLES / "river.ipynb"


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_run_that_is_kept_is_whole() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in _code(notebook)] == list(range(1, len(_code(notebook)) + 1))
    kinds = [output.output_type for cell in _code(notebook) for output in cell.outputs]
    assert "error" not in kinds and kinds.count("display_data") == 2
    assert NOTEBOOK.stat().st_size < 500_000


@pytest.mark.slow
def test_it_runs_on_another_model(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if "FOLDER = smollm2()" in cell.source)
    cell.source = cell.source.replace("smollm2()", repr(str(save_word_model(tmp_path / "hf"))))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(SAMPLES)}}).execute()
    printed = "".join(output.get("text", "") for cell in _code(notebook) for output in cell.outputs)
    assert printed.count("the same tokens") == 3 and "DIFFER" not in printed
