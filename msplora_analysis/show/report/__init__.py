"""One self-contained HTML page about one run, or several beside each other: ``msplora-analyze report``.

    from msplora_analysis import report

    report("runs/cola", "report.html")

The page needs no network: the drawing library (Vega-Lite) is inside it, and a content security policy forbids every
request and every script but the page's own two. Data flow: ``gather`` reads and computes each thing once, ``about``
says what a run is, ``numbers`` has what charts and tables show, ``charts`` how they are drawn; ``sections`` puts them
together, ``page`` writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msplora_analysis.files.addresses import StrPath

__all__ = ["report"]


def report(paths: StrPath | Iterable[StrPath], out: StrPath = "report.html", **how: Any) -> Path:
    """Write the report of the adapters, or tables of spectra, at and under ``paths``. Returns the path of the page.

    paths: what ``load_tables`` takes, or tables that `msplora-analyze spectra` wrote.
    out: the HTML file; its folder must exist. A file that is there is replaced, at the end.
    how: workers, cache, progress as in ``load_tables``, and fields of ``options.Options``.

    Equal input gives equal bytes. Raises AnalysisError for input that cannot be used, or if ``out`` cannot be written.
    """
    from msplora_analysis.ask.gather import gather
    from msplora_analysis.show.report.page import check_out, page, write

    file = Path(out)
    check_out(file)
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    write(page(gather(given, **how)), file)
    return file
