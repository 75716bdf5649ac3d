"""The notebooks run from first to last cell, in a kernel of their own, and are kept without outputs, which go stale."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture
def notebook(request, monkeypatch):
    """A notebook, with the console script of this environment first on the kernel's path."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return nbformat.read(request.param, as_version=4)


def each():
    return pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem, indirect=True)


@each()
def test_runs(notebook, tmp_path):
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert [cell for cell in notebook.cells if cell.get("outputs")]


@each()
def test_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 4
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
