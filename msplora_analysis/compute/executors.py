"""What tasks are given to: processes of this machine, or a Dask cluster; None for this process alone."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msplora_analysis.errors import AnalysisError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from distributed import Client

_PATIENCE = 10  # seconds to reach a Dask scheduler


def cpus() -> int:
    """How many this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux tells what this process may use
        return os.cpu_count() or 1


@contextmanager
def executor_of(workers: int, dask: str | None) -> Iterator[Executor | None]:
    """An executor as long as the context lasts; at its end, what is not done is dropped.

    Args:
        workers: Processes on this machine; None is the executor of one.
        dask: Address of a Dask scheduler, instead.

    Raises:
        AnalysisError: The scheduler cannot be reached.
    """
    if dask is not None:
        with _dask_client(dask) as client:
            executor = client.get_executor(pure=False)
            try:
                yield executor
            finally:
                executor.shutdown(wait=False)  # the cluster forgets what is not done
    elif workers > 1:
        import multiprocessing  # one process needs none of it
        from concurrent.futures import ProcessPoolExecutor

        # A copy of this process starts at once, but only one without threads may be copied.
        method = "fork" if threading.active_count() == 1 and hasattr(os, "fork") else "spawn"
        context = multiprocessing.get_context(method)
        try:
            pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
        except OSError:  # no room for what processes share: one does all
            yield None
            return
        with _one_blas_thread(), pool as executor:
            try:
                yield executor
            except BaseException:  # nobody waits for what they still compute
                if sys.version_info >= (3, 11, 5):  # older ones may wait for ever for a pool that dies
                    for process in list((executor._processes or {}).values()):
                        process.kill()
                executor.shutdown(cancel_futures=True)
                raise
    else:
        yield None


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """For processes started meanwhile: together they would run more threads than there are CPUs."""
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal: the one that waits for the workers ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What the first process does when it is to end, a copy of it must not.
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # a collection would write to, and so copy, all that is shared with the first process


def _end_with_parent() -> None:
    """However the first process ends, ``kill -9`` included, its workers do, and what they hold open is closed."""
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _dask_client(address: str) -> Iterator[Client]:
    import logging

    try:
        from distributed import Client  # takes a second
    except ImportError:
        raise AnalysisError("dask= needs Dask; run `pip install 'msplora[dask]'`", "dask") from None
    try:
        client = Client(address, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AnalysisError(f"dask={address}: no scheduler can be reached there: {reason}", "dask") from None
    try:
        yield client
    finally:
        loggers = [logging.getLogger(name) for name in ("distributed", "tornado.application")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:  # they tell at length of results that come while the client leaves
            logger.setLevel(logging.CRITICAL + 1)
        client.close()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
