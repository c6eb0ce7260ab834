"""Singular values of many adapters: in this process, in several, or on a Dask cluster.

Whatever computes them, the results come in the order of the adapters and are the same. The work is
cut by bytes: many small adapters make one task, a large one makes several, so that memory stays flat
and no worker waits for another. What the cache holds is not computed again.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.moments import moments_file
from msplora_analysis.adapters.opening import opened
from msplora_analysis.compute.cache import open_cache
from msplora_analysis.compute.executors import cpus, executor_of
from msplora_analysis.compute.linalg.device import CPU, check_device
from msplora_analysis.compute.linalg.spectra import adapter_spectra
from msplora_analysis.compute.results import Failure, Result, Row, Spectra, T, joined
from msplora_analysis.compute.weighted import task_spectra
from msplora_analysis.errors import AnalysisError, ChangedError, NotFiniteError
from msplora_analysis.formats import is_built_in
from msplora_analysis.formats.updates import Matrix
from msplora_analysis.options import Execution, Options

if TYPE_CHECKING:
    from concurrent.futures import Executor

_TASK = 2**24  # bytes of adapter files in one task
_LOOKS, _PAUSE = 3, 0.2  # how often a file that changes is read, and seconds between
_WORTH_PROCESSES = 2**25  # bytes below which starting processes costs more than it saves


class Piece(NamedTuple):
    """The matrices of one adapter, or part number ``part`` of ``parts`` of them."""

    number: int
    adapter: Adapter
    part: int = 0
    parts: int = 1
    is_cached: bool = False


class Store(Protocol[T]):
    """What keeps results."""

    def get(self, adapter: Adapter, options: Options) -> T | None: ...

    def put(self, adapter: Adapter, options: Options, result: T, /) -> None: ...


Work = Callable[[Piece, Options], T]  # what a worker does with a piece: a function of a module
Results = list[T | Failure]


def compute(adapters: Sequence[Adapter], options: Options, execution: Execution) -> Iterator[Result]:
    """The spectra of each adapter, by way of the user's cache if that may be used; see ``compute_each``."""
    work: Work[Spectra] = _spectra
    if check_device(execution.device) != CPU:
        work, execution = partial(_spectra, device=execution.device), replace(execution, workers=1, dask=None)
    cache = open_cache() if execution.cache else None
    with nullcontext() if cache is None else closing(cache):
        yield from compute_each(work, adapters, options, execution, cache)


def compute_each(
    work: Work[T], adapters: Sequence[Adapter], options: Options, execution: Execution, store: Store[T] | None = None
) -> Iterator[T | Failure]:
    """The result of ``work`` for each adapter, in order, or the Failure that says what is wrong with it.

    Args:
        work: What is done with every piece of an adapter.
        adapters: What to read.
        options: How.
        execution: Who does it. Dask's workers see the same paths.
        store: Where results are looked up and kept.

    Raises:
        AnalysisError: The cluster cannot be reached, or a worker dies.
    """
    workers, progress = execution.workers, execution.progress
    sizes = [_size(adapter) for adapter in adapters]
    if workers is None:
        workers = cpus() if sum(sizes) > _WORTH_PROCESSES else 1
    with executor_of(workers, execution.dask) as executor:
        parts: Results[T] = []
        known = (store.get(adapter, options) if store else None for adapter in adapters)
        tasks = _tasks(adapters, sizes, workers, known)
        for piece, result in _in_order(executor, tasks, options, work):
            parts.append(result)
            if piece.part == piece.parts - 1:
                whole = _joined(parts)
                if whole is None:  # replaced between two parts
                    (whole,) = _compute([Piece(piece.number, piece.adapter)], options, work)
                parts = []
                if store and not piece.is_cached and not isinstance(whole, Failure):
                    store.put(piece.adapter, options, whole)
                yield whole
            if progress:
                progress(piece.number + (piece.part + 1) / piece.parts, len(adapters))


Task = tuple[list[Piece], T | None]  # what to compute, and the result if it is known


def _tasks(
    adapters: Sequence[Adapter], sizes: Sequence[int], workers: int, known: Iterable[T | None]
) -> Iterator[Task[T]]:
    """Pieces of about equal work, in order."""
    most = min(_TASK, max(sum(sizes) // (4 * workers), 1))
    batch: list[Piece] = []
    filled = 0
    for index, (adapter, size, result) in enumerate(zip(adapters, sizes, known, strict=True)):
        if batch and (result is not None or filled + size > most):
            yield batch, None
            batch, filled = [], 0
        if result is not None:
            yield [Piece(index, adapter, is_cached=True)], result
        elif (parts := -(-size // _TASK)) > 1:
            for part in range(parts):
                yield [Piece(index, adapter, part, parts)], None
        else:
            batch.append(Piece(index, adapter))
            filled += size
    if batch:
        yield batch, None


def _in_order(
    executor: Executor | None, tasks: Iterable[Task[T]], options: Options, work: Work[T]
) -> Iterator[tuple[Piece, T | Failure]]:
    """The result of every piece. Tasks are given out ahead, but only so far that memory stays flat."""
    ahead = 4 * getattr(executor, "_max_workers", 16) if executor is not None else 0
    pending: deque[tuple[list[Piece], Callable[[], Results[T]]]] = deque()
    for pieces, known in tasks:
        if known is None and executor is not None:
            pending.append((pieces, executor.submit(_compute, pieces, options, work).result))
        else:
            done: Results[T] = _compute(pieces, options, work) if known is None else [known]
            pending.append((pieces, done.copy))
        while len(pending) > ahead:
            yield from _result(*pending.popleft())
    while pending:
        yield from _result(*pending.popleft())


def _result(pieces: list[Piece], wait: Callable[[], Results[T]]) -> Iterator[tuple[Piece, T | Failure]]:
    try:
        yield from zip(pieces, wait(), strict=True)
    except RuntimeError as error:
        from concurrent.futures import BrokenExecutor

        if not isinstance(error, BrokenExecutor):
            raise
        message = "a worker process died (out of memory?); workers=1 needs the least memory"
        raise AnalysisError(message, "workers") from None


def _compute(pieces: Sequence[Piece], options: Options, work: Work[T]) -> Results[T]:
    """What a worker does."""
    results: Results[T] = []
    for piece in pieces:
        try:
            results.append(_read(piece, options, work))
        except AnalysisError as error:
            results.append(Failure(piece.adapter, str(error), isinstance(error, NotFiniteError), error.arguments))
        except MemoryError:
            results.append(Failure(piece.adapter, f"{piece.adapter.file}: a tensor is larger than the memory there is"))
        except OSError as error:
            results.append(Failure(piece.adapter, f"{piece.adapter.file}: cannot be read: {error.strerror or error}"))
    return results


def _read(piece: Piece, options: Options, work: Work[T]) -> T:
    """The result of ``work``, of one moment: a file that changes meanwhile is read again, but not for ever."""
    for _ in range(_LOOKS - 1):
        try:
            return work(piece, options)
        except ChangedError:
            time.sleep(_PAUSE)
    return work(piece, options)


def _spectra(piece: Piece, options: Options, device: str = CPU) -> Spectra:
    with opened(piece.adapter, options, base_notes=piece.part == 0) as (file, contents):
        matrices = _share(contents.matrices, piece.part, piece.parts)
        spectra = adapter_spectra(file, matrices, options.top_k, device)
        built_in = is_built_in(piece.adapter.config, file)
        notes = list(contents.notes)
        moments = moments_file(piece.adapter, options)
        task = task_spectra(file, moments, contents.matrices, matrices, notes) if moments else []
    if any(found.frobenius is not None for found in spectra):
        notes.append(
            "only the largest singular values of large matrices are computed (--top-k); "
            "measures that need all of them are empty"
        )
    rows = [
        Row(m.scale, m.group, m.module, m.name, m.update.rows, m.update.cols, m.update.rank, found.frobenius)
        for m, found in zip(matrices, spectra, strict=True)
    ]
    files, sigma = frozenset(file.states.values()), [found.sigma for found in spectra]
    return Spectra(piece.adapter, rows, sigma, contents.unknown, notes, files, built_in, task)


def _share(matrices: Sequence[Matrix], part: int, parts: int) -> Sequence[Matrix]:
    """The matrices that begin in the part's share of all factors, in order."""
    if parts == 1:
        return matrices
    costs = [(m.update.rows + m.update.cols) * m.update.rank for m in matrices]
    starts = accumulate(costs, initial=0)
    total = sum(costs)
    return [m for m, start in zip(matrices, starts, strict=False) if start * parts // total == part]


def _joined(parts: Results[T]) -> T | Failure | None:
    """The result of an adapter from those of its parts, or the first failure; None if they are of different files."""
    good: list[T] = []
    for part in parts:
        if isinstance(part, Failure):
            return part
        good.append(part)
    if not all(part.files <= good[0].files for part in good):  # the first may have read the base model too
        return None
    return joined(good)


def _size(adapter: Adapter) -> int:
    try:
        return os.stat(adapter.file).st_size
    except OSError:  # a remote one: its size is not worth a question
        return 0
