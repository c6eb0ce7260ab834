"""Every notebook runs from top to bottom, shows what is stored in it, and reads well anywhere."""

import math
import re
from base64 import b64decode
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks.execute import FOLDER, METADATA, executed

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?")
TEXT = ("text/plain", "text/html", "text/markdown")
LARGEST = 60_000  # bytes of a picture


def outputs(notebook: NotebookNode) -> list[dict[str, str]]:
    """Of each output its texts, and which other kinds there are."""
    found = []
    for i, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {"text": output.get("text", "")})
            kinds = sorted(data)
            texts = {kind: data[kind] for kind in (*TEXT, "text") if kind in data}
            found.append({"where": f"cell {i + 1}: {output.output_type} {kinds}", **texts})
    return found


def same(stored: str, fresh: str) -> bool:
    """Equal but for the last digits of numbers, in which machines differ, and the white space that aligns them."""
    words = [NUMBER.sub("#", text).split() for text in (stored, fresh)]
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (stored, fresh)]
    if words[0] != words[1] or len(numbers[0]) != len(numbers[1]):
        return False
    return all(math.isclose(a, b, rel_tol=0.02, abs_tol=1e-3) for a, b in zip(*numbers, strict=True))


@pytest.mark.parametrize(
    ("stored", "fresh", "equal"),
    [
        ("a  0.25\nb 1", "a 0.251\nb    1", True),
        ("rank 4", "rank 3", False),
        ("sigma_1 0.25", "sigma_1 0.26", False),
        ("0.0002", "-0.0001", True),
        ("LoRA r=8", "MSPLoRA r=8", False),
        ("1 2", "1", False),
        ("nan", "0.5", False),
    ],
)
def test_a_stale_output_is_seen(stored: str, fresh: str, equal: bool) -> None:
    assert same(stored, fresh) == equal


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem[:2] in ("02", "03", "04") else []) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_fresh_run_shows_what_is_stored(path: Path) -> None:
    stored, fresh = outputs(nbformat.read(path, as_version=4)), outputs(executed(path))
    advice = "run `python notebooks/execute.py`"
    assert [output["where"] for output in stored] == [output["where"] for output in fresh], advice
    for before, now in zip(stored, fresh, strict=True):
        assert before.keys() == now.keys()
        for kind in before:
            assert same(before[kind], now[kind]), f"{path.name}, {before['where']}, {kind}: {advice}\n{now[kind]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_reads_well_anywhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not any(folder in text for folder in ("/home/", "/root/", "/tmp/", "/Users/", "C:\\", "site-packages"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(cell.metadata for cell in cells)
    everything = [output for cell in cells for output in cell.outputs]
    assert everything
    assert {output.output_type for output in everything} == {"execute_result"}  # no warning, error or progress
    pictures = [b64decode(output.data["image/png"]) for output in everything if "image/png" in output.data]
    assert pictures
    assert max(map(len, pictures)) <= LARGEST


def test_there_are_four_and_their_links_lead_somewhere() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                for link in re.findall(r"\]\(([^)]+)\)", cell.source):
                    assert link.startswith("https://") or (FOLDER / link.partition("#")[0]).exists(), link
