"""The files that docs/extending.md shows add what the page says.

The page itself runs the format. A toy measure is in analysis/test_metrics.py, a toy figure in analysis/test_figures.py,
a toy method in core/test_new_method.py.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis import cli, commands
from msplora_analysis.ask.evidence import of_tables

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "examples" / "runs" / "lora-8"


def of_the_page(title: str) -> str:
    """The file of that name, as docs/extending.md shows it."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.search(rf'```python title="{title}"\n(.*?)```', text, re.DOTALL)[1]  # type: ignore[index]


def test_a_finding_is_found() -> None:
    namespace: dict[str, Any] = {}
    exec(of_the_page("narrow.py"), namespace)
    evidence = of_tables(ma.load_spectra(RUN, cache=False))
    found = list(namespace["narrow"](evidence))
    low = ma.load_metrics(RUN, cache=False).query("effective_rank < 1.1")
    assert len(found) == len(low)
    one_direction = ma.load_spectra(RUN, cache=False).query("k == 1 and sigma > 0")
    found = list(namespace["narrow"](of_tables(one_direction)))
    assert len(found) == len(one_direction) > 0
    assert {finding.kind.id for finding in found} == {"narrow"}
    assert found[0].value == pytest.approx(1)


def test_the_command_of_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(of_the_page("count.py"), encoding="utf-8")
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    result = CliRunner().invoke(cli.make_app(), shlex.split(f"count {RUN}"))
    assert (result.exit_code, result.output) == (0, "7\n")
