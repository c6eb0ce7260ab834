"""One self-contained HTML page about one run, or several beside each other: ``msplora-analyze report``.

    from msplora_analysis import report

    report("runs/cola", "report.html")

The page needs no network: the drawing library (Vega-Lite) is inside it, and a content security policy forbids every
request and every script but the page's own two. Data flow: ``ask.evidence`` reads and computes each thing once,
``about`` says what a run is, ``numbers`` has what charts and tables show, ``charts`` how they are drawn; ``sections``
puts them together, ``page`` writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from msplora_analysis.adapters.discovery import as_paths
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Execution, Options, Progress

__all__ = ["report"]


def report(
    paths: StrPath | Iterable[StrPath],
    out: StrPath = "report.html",
    *,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    base: StrPath | None = None,
    top_k: int | None = None,
    moments: StrPath | None = None,
    workers: int | None = 1,
    dask: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write the report of the adapters, or tables of spectra, at and under ``paths``. Returns the path of the page.

    Keywords that are not listed are those of ``load_tables``.

    Args:
        paths: What ``load_tables`` takes, or tables that `msplora-analyze spectra` wrote.
        out: The HTML file; its folder must exist. A file that is there is replaced, at the end.

    Returns:
        The path of the page. Equal input gives equal bytes.

    Raises:
        AnalysisError: the input cannot be used, or ``out`` cannot be written.

    Example:
        >>> ma.report("runs/cola", "report.html")
    """
    from msplora_analysis.ask.evidence import gather
    from msplora_analysis.show.report.page import check_out, page, write

    file = Path(out)
    check_out(out)
    given = as_paths(paths)
    options = Options(ignore_unknown, semantics, base, top_k, moments)
    execution = Execution(workers, dask, cache, progress)
    evidence = gather(given, options, execution)
    if evidence.spectra.empty:
        first = f"{evidence.adapters[0].file}: no low-rank factors in this or any other file; give other paths"
        raise AnalysisError(evidence.broken[0].message if evidence.broken else first)
    write(page(evidence, given), file)
    return file
