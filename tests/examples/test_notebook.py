"""The notebook of the tutorial runs from beginning to end in a kernel of its own."""

import base64
from pathlib import Path
from typing import Any

import pytest

import iqareward

FILE = Path(iqareward.__file__).parents[1] / "docs" / "tutorial" / "first-steps.ipynb"


def pictures(notebook: Any) -> list[bytes]:
    """The figures among the outputs."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [base64.b64decode(data["image/jpeg"]) for each in outputs if "image/jpeg" in (data := each.get("data", {}))]


@pytest.mark.slow
def test_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, in the folder that Jupyter starts in; readers without Jupyter see the figure that is committed."""
    nbformat = pytest.importorskip("nbformat", reason="the development group has nbclient")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(FILE, as_version=4)
    assert [len(picture) < 200_000 for picture in pictures(notebook)] == [True]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(FILE.parent)}}).execute()
    assert [len(picture) < 200_000 for picture in pictures(notebook)] == [True]
