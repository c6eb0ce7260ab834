"""Every notebook runs from top to bottom, and is kept with outputs that read well anywhere."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    kept = [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(FOLDER)}}).execute()
    run = [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]
    assert run == kept


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shows_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert NOTEBOOKS
    assert not any(folder in text for folder in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages"))
