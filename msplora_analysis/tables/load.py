"""The two tidy tables: spectra (one row per singular value) and metrics (one row per matrix)."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.adapters.opening import unknown_text
from msplora_analysis.compute.cache import open_cache
from msplora_analysis.compute.measures.metrics import KS
from msplora_analysis.compute.results import Failure, Spectra
from msplora_analysis.compute.tasks import Progress, compute
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, StrPath, parse
from msplora_analysis.options import Options

if TYPE_CHECKING:
    import pandas as pd


class Tables(NamedTuple):
    """Both tables of the same adapters."""

    spectra: pd.DataFrame
    metrics: pd.DataFrame


def load_spectra(paths: StrPath | Iterable[StrPath], **how: Any) -> pd.DataFrame:
    """Singular values of every adapter at and under ``paths``, one row each.

    paths: run folders, adapter folders or files, or folders of such (see ``sources.discovery.discover``).
    how: options of ``load_tables``.

    Columns: run, step, epoch, scale, group, module, name, k (from 1), sigma (float64, descending in
    k, with the factor alpha/r). Raises AnalysisError for input that cannot be used as given.
    """
    return load_tables(paths, **how).spectra


def load_metrics(paths: StrPath | Iterable[StrPath], **how: Any) -> pd.DataFrame:
    """Measures of every matrix of every adapter at and under ``paths``, one row each.

    For the arguments and errors see ``load_tables``.

    Columns: run, step, epoch, scale, group, module, name, rows, cols, rank (of the factors),
    sigma_1, frobenius, nuclear, stable_rank, effective_rank, participation_ratio, m_eff_<k>; the
    module ``metrics`` defines the last seven.
    """
    return load_tables(paths, **how).metrics


def load_tables(
    paths: StrPath | Iterable[StrPath],
    *,
    ks: Iterable[int] = KS,
    workers: int | None = 1,
    dask: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Tables:
    """Both tables, reading every adapter once.

    ks: the k of the columns m_eff_<k>.
    workers, dask, progress: see ``engine.compute.compute_each``. More than one worker needs a script whose
        own work stands under ``if __name__ == "__main__":``.
    cache: use what earlier calls computed (see ``engine.cache``).
    options: fields of ``options.Options``: ignore_unknown, semantics, base, top_k.

    Raises AnalysisError for input that cannot be used as given.
    """
    reading = Options(**options)
    adapters = discover(paths, full=reading.base is not None)
    tables = tables_of(adapters, succeeding(spectra_of(adapters, reading, workers, dask, cache, progress)), ks)
    if tables.metrics.empty:  # every tensor was unknown and is left out
        raise AnalysisError(f"{adapters[0].file}: no low-rank factors in this or any other file")
    return tables


def tables_of(adapters: Sequence[Adapter], results: Iterable[Spectra], ks: Iterable[int]) -> Tables:
    """Both tables of results of ``adapters``; without rows if there is no matrix."""
    import pandas as pd
    import pyarrow as pa

    from msplora_analysis.tables.columns import KEYS, VALUES, Columns
    from msplora_analysis.tables.files import typed

    batches = list(Columns(adapters, ks).batches(results))
    if not batches:
        empty = pd.DataFrame(columns=[*KEYS, *VALUES]).astype(KEYS | VALUES)
        return Tables(empty, empty)
    spectra, metrics = (pa.Table.from_batches(table).to_pandas() for table in zip(*batches, strict=True))
    return Tables(typed(spectra), typed(metrics))


def spectra_of(
    adapters: Sequence[Adapter],
    options: Options,
    workers: int | None = None,
    dask: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Generator[Spectra | Failure, None, None]:
    """``engine.compute.compute`` with the user's cache, and a warning for what its results must be read with."""
    said = Warnings()
    with ExitStack() as stack:
        opened = open_cache() if cache else None
        if opened is not None:
            stack.enter_context(closing(opened))
        results = compute(adapters, options, workers=workers, dask=dask, cache=opened, progress=progress)
        for result in results:
            if isinstance(result, Spectra):
                said.hear(result)
            yield result
    said.give()


def succeeding(results: Iterable[Spectra | Failure]) -> Iterator[Spectra]:
    """The results, as long as none is a failure: that raises AnalysisError."""
    for result in results:
        if isinstance(result, Failure):
            raise AnalysisError(result.message)
        yield result


class Warnings:
    """What is noted of many adapters, told once: by its first file and how many others."""

    def __init__(self) -> None:
        self._files: dict[str, list[Place]] = {}

    def hear(self, result: Spectra) -> None:
        notes = list(result.notes)
        if result.unknown:
            notes.append(f"{unknown_text(result.unknown)} are left out")
        for note in notes:
            self._files.setdefault(note, []).append(result.adapter.file)

    def give(self) -> None:
        for note, (first, *others) in self._files.items():
            also = f" (and {len(others)} more files)" if others else ""
            warnings.warn(f"{first}{also}: {note}", stacklevel=3)


def gather_spectra(paths: Sequence[StrPath], **how: Any) -> pd.DataFrame:
    """One spectra table from any mix of adapters and of tables written before.

    A path that is a .parquet or .csv file, or a folder with spectra.parquet or spectra.csv at its
    top, is read as a table; all others as ``load_spectra`` does, with options ``how``. Raises
    AnalysisError also if two of these hold a run of the same name.
    """
    import pandas as pd

    from msplora_analysis.tables.files import read_spectra, typed

    files = {path: table_at(path) for path in paths}
    adapters = [path for path, file in files.items() if file is None]
    sources = {str(file): read_spectra(file) for file in files.values() if file is not None}
    if adapters:
        loaded = load_tables(adapters, **how)
        sources[", ".join(map(str, adapters))] = loaded.spectra
    owners: dict[str, str] = {}
    for source, table in sources.items():
        for run in table["run"].unique():
            if owners.setdefault(run, source) != source:
                raise AnalysisError(
                    f"{source}: run {run} is also in {owners[run]}; give the run folders together "
                    "instead, so that each gets its own name"
                )
    return typed(pd.concat(sources.values(), ignore_index=True))


def table_at(given: StrPath) -> Path | None:
    """The spectra table that a local path is or has at its top."""
    path = parse(given)
    if not isinstance(path, Path):
        return None
    if path.suffix in (".parquet", ".csv") and not path.is_dir():
        return path
    from msplora_analysis.tables.files import FORMATS

    candidates = [path / f"spectra.{suffix}" for suffix in FORMATS]
    return next((file for file in candidates if file.is_file()), None)
