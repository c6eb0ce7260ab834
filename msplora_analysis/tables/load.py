"""The two tidy tables: spectra (one row per singular value) and metrics (one row per matrix)."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.adapters.moments import have_moments
from msplora_analysis.adapters.opening import unknown_text
from msplora_analysis.compute.measures.metrics import KS
from msplora_analysis.compute.results import Failure, Redundancy, Spectra
from msplora_analysis.compute.tasks import compute
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, StrPath
from msplora_analysis.options import Execution, Options, Progress

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


class Tables(NamedTuple):
    """Both tables of the same adapters."""

    spectra: pd.DataFrame
    metrics: pd.DataFrame


def load_spectra(
    paths: StrPath | Iterable[StrPath],
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
) -> pd.DataFrame:
    """Singular values of every adapter at and under ``paths``, one row each.

    The arguments are those of :func:`load_tables`.

    Returns:
        Columns run, step, epoch, scale, group, module, name, k (from 1), sigma (float64, descending in k, with the
        factor alpha / r); where an adapter has moments, task_sigma (task-weighted, descending in k by itself).

    Raises:
        AnalysisError: the input cannot be used as given.

    Example:
        >>> spectra = ma.load_spectra("runs/cola")
        >>> spectra.groupby("run")["sigma"].max()
    """
    execution = Execution(workers, dask, cache, progress)
    return read_tables(paths, Options(ignore_unknown, semantics, base, top_k, moments), execution).spectra


def load_metrics(
    paths: StrPath | Iterable[StrPath],
    *,
    ks: Iterable[int] = KS,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    base: StrPath | None = None,
    top_k: int | None = None,
    moments: StrPath | None = None,
    workers: int | None = 1,
    dask: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measures of every matrix of every adapter at and under ``paths``, one row each.

    The arguments are those of :func:`load_tables`.

    Returns:
        Columns run, step, epoch, scale, group, module, name, rows, cols, rank (of the factors), sigma_1, frobenius,
        nuclear, stable_rank, effective_rank, participation_ratio, m_eff_<k>. ``compute.measures.metrics`` defines the
        last seven. Where an adapter has moments also task_norm, task_effective_rank.

    Raises:
        AnalysisError: the input cannot be used as given.

    Example:
        >>> metrics = ma.load_metrics("runs/cola", ks=[8])
        >>> metrics.groupby(["run", "scale"])["effective_rank"].mean()
    """
    execution = Execution(workers, dask, cache, progress)
    return read_tables(paths, Options(ignore_unknown, semantics, base, top_k, moments), execution, ks).metrics


def load_tables(
    paths: StrPath | Iterable[StrPath],
    *,
    ks: Iterable[int] = KS,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    base: StrPath | None = None,
    top_k: int | None = None,
    moments: StrPath | None = None,
    workers: int | None = 1,
    dask: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Tables:
    """Both tables, reading every adapter once.

    Args:
        paths: Run folders, adapter folders or files, or folders of such (see ``adapters.discovery.discover``).
        ks: The k of the columns m_eff_<k>.
        ignore_unknown: Leave out tensors that no format explains, with a warning, instead of raising.
        semantics: For checkpoints of the released MSPLoRA code, the sharing of the paper ("paper"), or what that code
            really computed ("as-executed").
        base: Folder or file of the model before training; full checkpoints are read as their difference to it.
        top_k: How many singular values of a whole matrix to compute (None: all of a small one, the largest of a large
            one).
        moments: A file of moments (of one adapter), or "none" to read no moments. None: moments.safetensors beside
            each adapter, where it is.
        workers: Processes to compute with; None: one for each CPU. More than one needs a script whose own work stands
            under ``if __name__ == "__main__":``.
        dask: Address of a Dask scheduler, whose workers compute instead.
        cache: Use what earlier calls computed of the same files.
        progress: Called with the adapters done, and with their number.

    Returns:
        The tables of :func:`load_spectra` and :func:`load_metrics`.

    Raises:
        AnalysisError: the input cannot be used as given.

    Example:
        >>> spectra, metrics = ma.load_tables("runs/cola", workers=4)
    """
    execution = Execution(workers, dask, cache, progress)
    return read_tables(paths, Options(ignore_unknown, semantics, base, top_k, moments), execution, ks)


def read_tables(
    paths: StrPath | Iterable[StrPath], options: Options, execution: Execution, ks: Iterable[int] = KS
) -> Tables:
    """:func:`load_tables`, for options in hand."""
    adapters = discover(paths, full=options.base is not None)
    results = succeeding(spectra_of(adapters, options, execution))
    tables = tables_of(adapters, results, ks, have_moments(adapters, options))
    if tables.metrics.empty:  # every tensor was unknown and is left out
        raise AnalysisError(f"{adapters[0].file}: no low-rank factors in this or any other file")
    return tables


def tables_of(adapters: Sequence[Adapter], results: Iterable[Spectra], ks: Iterable[int], task: bool) -> Tables:
    """Both tables of results of ``adapters``; without rows if there is no matrix.

    task: whether there are columns of task-weighted spectra.
    """
    import pandas as pd
    import pyarrow as pa

    from msplora_analysis.tables.columns import KEYS, VALUES, Columns
    from msplora_analysis.tables.files import typed

    batches = list(Columns(adapters, ks, task).batches(results))
    if not batches:
        empty = pd.DataFrame(columns=[*KEYS, *VALUES]).astype(KEYS | VALUES)
        return Tables(empty, empty)
    spectra, metrics = (pa.Table.from_batches(table).to_pandas() for table in zip(*batches, strict=True))
    return Tables(typed(spectra), typed(metrics))


def spectra_of(
    adapters: Sequence[Adapter], options: Options, execution: Execution
) -> Generator[Spectra | Failure, None, None]:
    """The spectra of each adapter, in order, or what is wrong with it.

    The user's cache is used; what results must be read with is a warning at the end.
    """
    said = Warnings()
    for result in compute(adapters, options, execution):
        if isinstance(result, Spectra):
            said.hear(result)
        yield result
    said.give()


def succeeding(results: Iterable[T | Failure]) -> Iterator[T]:
    """The results, as long as none is a failure: that raises AnalysisError."""
    for result in results:
        if isinstance(result, Failure):
            raise result.error
        yield result


class Warnings:
    """What is noted of many adapters, told once: by its first file and how many others."""

    def __init__(self) -> None:
        self._files: dict[str, list[Place]] = {}

    def hear(self, result: Spectra | Redundancy) -> None:
        notes = list(result.notes)
        if result.unknown:
            notes.append(f"{unknown_text(result.unknown)} are left out")
        for note in notes:
            self._files.setdefault(note, []).append(result.adapter.file)

    def give(self) -> None:
        for note, (first, *others) in self._files.items():
            also = f" (and {len(others)} more files)" if others else ""
            warnings.warn(f"{first}{also}: {note}", stacklevel=3)
