"""Both tables written as the results come, so that memory does not grow with the number of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.compute.results import Failure, Spectra
from msplora_analysis.errors import AnalysisError
from msplora_analysis.tables.load import succeeding

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.csv import CSVWriter
    from pyarrow.parquet import ParquetWriter


@dataclass
class Written:
    """What became of the adapters: how many are in the tables, which failed, and the files."""

    done: int = 0
    failures: list[Failure] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)


def write_tables(
    adapters: Sequence[Adapter],
    results: Iterable[Spectra | Failure],
    folder: Path,
    suffix: str,
    ks: Iterable[int],
    *,
    task: bool = False,
    keep_going: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    seen: Callable[[pa.RecordBatch], None] = lambda batch: None,
) -> Written:
    """Write ``spectra.<suffix>`` and ``metrics.<suffix>`` into ``folder``, each whole or not at all.

    results: of ``adapters``, in their order (``tables.load.spectra_of``).
    task: whether there are columns of task-weighted spectra, as where any adapter has moments.
    keep_going: leave adapters out that cannot be read, instead of raising.
    stopped: asked after each adapter; once true, the tables end there.
    seen: called with every batch of the metrics table.

    Raises AnalysisError, and leaves the folder as it was, if an adapter cannot be read, if no
    matrix was found, or if a file cannot be written.
    """
    written = Written()

    def wanted() -> Iterator[Spectra]:
        for result in results if keep_going else succeeding(results):
            if stopped():
                return
            if isinstance(result, Failure):
                written.failures.append(result)
            else:
                written.done += 1
                yield result

    paths = [folder / f"{name}.{suffix}" for name in ("spectra", "metrics")]
    wanted_results = wanted()
    first = list(islice(wanted_results, 1))
    # Imported only now, while the workers are at work.
    from msplora_analysis.tables.columns import Columns
    from msplora_analysis.tables.files import table_writer

    with ExitStack() as stack:
        writers: list[ParquetWriter | CSVWriter] = []
        for batch in Columns(adapters, ks, task).batches(chain(first, wanted_results)):
            if not writers:  # files appear only if there is something in them
                opening = zip(paths, batch, strict=True)
                writers = [stack.enter_context(table_writer(path, table.schema)) for path, table in opening]
            for writer, table in zip(writers, batch, strict=True):
                writer.write(table)
            seen(batch.metrics)
        if writers:
            written.paths = paths
        elif written.done:  # every tensor was unknown and is left out
            raise AnalysisError(f"{adapters[0].file}: no low-rank factors in this or any other file")
    return written
