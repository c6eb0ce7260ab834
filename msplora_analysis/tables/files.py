"""Tables on disk: written whole or not at all, and read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.tables.columns import KEYS, VALUES
from msplora_core.atomic import replacing
from msplora_core.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

FORMATS = ("parquet", "csv")


class TableWriter:
    """Writes batches of one schema as a Parquet or CSV file."""

    def __init__(self, path: Path, suffix: str) -> None:
        self._path, self._suffix = path, suffix
        self._writer: Any = None

    def write(self, batch: pa.RecordBatch | pa.Table) -> None:
        """Add rows; in a Parquet file they are a row group of their own."""
        if self._writer is None:
            self._writer = self._open(batch.schema)
        self._writer.write(batch)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, schema: pa.Schema) -> Any:
        if self._suffix == ".parquet":
            from pyarrow.parquet import ParquetWriter

            return ParquetWriter(self._path, schema)
        from pyarrow.csv import CSVWriter

        return CSVWriter(self._path, schema)


@contextmanager
def table_writer(path: Path) -> Iterator[TableWriter]:
    """A writer of ``path``, which appears when the block ends without an exception.

    Equal rows in equal batches give equal bytes: a file carries the package's version, but no time
    or path. Raises AnalysisError if the file cannot be written.
    """
    try:
        with replacing(path) as beside:
            writer = TableWriter(beside, path.suffix)
            try:
                yield writer
            finally:
                writer.close()
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as ``path``'s suffix says (.parquet or .csv), whole or not at all.

    Raises AnalysisError if the file cannot be written.
    """
    import pyarrow as pa

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    metadata = {**(arrow.schema.metadata or {}), b"msplora_analysis": __version__.encode()}
    with table_writer(path) as writer:
        writer.write(arrow.replace_schema_metadata(metadata))


def read_spectra(path: StrPath) -> pd.DataFrame:
    """Read a spectra table that ``msplora-analyze spectra`` wrote (.parquet or .csv).

    Raises AnalysisError if the file is something else.
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".csv"):
        raise AnalysisError(f"{path}: not a table; expected a .parquet or .csv file")
    if not path.is_file():
        raise AnalysisError(f"{path}: no such file")
    try:
        table = read_parquet(path) if path.suffix == ".parquet" else read_csv(path, {**KEYS, **VALUES})
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).strip().partition("\n")[0]
        raise AnalysisError(f"{path}: cannot be read as a table: {reason}") from None

    columns = [*KEYS, *VALUES]
    if missing := [name for name in columns if name not in table]:
        raise AnalysisError(
            f"{path}: not a spectra table: no column {', '.join(missing)}; "
            "expected spectra.parquet or spectra.csv of `msplora-analyze spectra`"
        )
    required = ["run", "scale", "module", "name", "k", "sigma"]
    if table.empty or table[required].isna().any(axis=None):
        raise AnalysisError(f"{path}: the table has no rows, or no {', '.join(required)} in some")
    try:
        table = typed(table[columns]).astype(VALUES)
    except (TypeError, ValueError) as error:
        raise AnalysisError(f"{path}: a column is not of its type: {error}") from None
    if (table["sigma"] < 0).any() or (table["k"] < 1).any():
        raise AnalysisError(f"{path}: sigma must be at least 0 and k at least 1")
    return table


def read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(path)


def read_csv(path: Path, types: Mapping[str, str]) -> pd.DataFrame:
    """A CSV table, with those columns that it has of ``types``. Floats are read exactly.

    pandas itself rounds some, or not, by its version.
    """
    from pyarrow import csv

    kinds = {"str": "string", "Int64": "int64", "Float64": "float64"}
    options = csv.ConvertOptions(
        column_types={name: kinds.get(kind, kind) for name, kind in types.items()},
        null_values=[""],  # a run may be called "NA"
    )
    table: pd.DataFrame = csv.read_csv(path, convert_options=options).to_pandas()
    return table


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """Key columns at their types: step and group may be empty, epoch is whole where it can be."""
    return with_whole_epochs(table.astype(KEYS))


def with_whole_epochs(table: pd.DataFrame) -> pd.DataFrame:
    """``epoch`` as Int64 where all are whole numbers."""
    known = table["epoch"].dropna()
    return table.astype({"epoch": "Int64"}) if (known == known.round()).all() else table
