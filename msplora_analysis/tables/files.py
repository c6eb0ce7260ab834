"""Tables on disk: written whole or not at all, and read back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.formats.updates import SCALES
from msplora_analysis.tables.columns import KEYS, TASK, VALUES
from msplora_core.atomic import replacing
from msplora_core.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from pyarrow.csv import CSVWriter
    from pyarrow.parquet import ParquetWriter

FORMATS = ("parquet", "csv")
_MARK = "'"  # before a text in a CSV file that begins as a formula does; reading takes it off
_FORMULA = rf"^({_MARK}*[=+\-@\t\r])"
_MARKED = rf"^{_MARK}({_MARK}*[=+\-@\t\r])"


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[ParquetWriter | CSVWriter]:
    """A writer of ``path`` (.parquet or .csv), which appears when the block ends without an exception.

    Equal rows in equal batches give equal bytes: a file carries the package's version, but no time or path. In a
    Parquet file a batch is a row group of its own.

    Raises:
        AnalysisError: the file cannot be written.
    """
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetWriter as Writer
    else:
        Writer = _csv_writer()
    try:
        # An open file, for pyarrow takes no path that is not UTF-8.
        with replacing(path) as beside, open(beside, "wb") as file, Writer(file, schema) as writer:
            yield writer
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be written: {error.strerror or error}") from None


def _csv_writer() -> type[CSVWriter]:
    """pyarrow's writer, but for the mark before texts that a spreadsheet would take for a formula."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow.csv import CSVWriter

    class Marking(CSVWriter):
        def write(self, batch: pa.RecordBatch | pa.Table) -> None:
            columns = list(batch.columns)
            for i, field in enumerate(batch.schema):
                if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
                    columns[i] = pc.replace_substring_regex(columns[i], _FORMULA, rf"{_MARK}\1")
            super().write(type(batch).from_arrays(columns, schema=batch.schema))

    return Marking


def marked(table: pd.DataFrame) -> pd.DataFrame:
    """A table for a CSV file: its texts with the mark before what a spreadsheet would take for a formula."""
    return _texts_mapped(table, lambda text: re.sub(_FORMULA, rf"{_MARK}\1", text))


def _texts_mapped(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """A table with each of its texts changed; each different one once."""
    changed = {}
    for name in table.columns[[kind.kind == "O" for kind in table.dtypes]]:
        texts = {text: change(text) for text in table[name].unique() if isinstance(text, str)}
        if any(text != new for text, new in texts.items()):
            changed[name] = table[name].map(lambda cell, texts=texts: texts.get(cell, cell))
    return table.assign(**changed)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as ``path``'s suffix says (.parquet or .csv), whole or not at all.

    Raises:
        AnalysisError: the file cannot be written.
    """
    import pyarrow as pa

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    metadata = {**(arrow.schema.metadata or {}), b"msplora_analysis": __version__.encode()}
    arrow = arrow.replace_schema_metadata(metadata)
    with table_writer(path, arrow.schema) as writer:
        writer.write(arrow)


def read_spectra(path: StrPath) -> pd.DataFrame:
    """Read a spectra table that ``msplora-analyze spectra`` wrote.

    Args:
        path: A .parquet or .csv file.

    Returns:
        The table of ``load_spectra``.

    Raises:
        AnalysisError: the file is something else.

    Example:
        >>> spectra = ma.read_spectra("tables/spectra.parquet")
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".csv"):
        raise AnalysisError(f"{path}: not a table; expected a .parquet or .csv file")
    if not path.is_file():
        raise AnalysisError(f"{path}: no such file")
    types, expected = KEYS | VALUES, "spectra.parquet or spectra.csv of `msplora-analyze spectra`"
    table = read_table(path, types, "spectra table", expected, more=TASK)
    required = ["run", "scale", "module", "name", "sigma"]
    if table.empty or table[required].isna().any(axis=None):
        raise AnalysisError(f"{path}: the table has no rows, or no {', '.join(required)} in some")
    if not (known := table["scale"].isin(SCALES)).all():
        scale = table["scale"][~known].iloc[0][:100]
        raise AnalysisError(f"{path}: scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if (table["sigma"] < 0).any() or (table["k"] < 1).any():
        raise AnalysisError(f"{path}: sigma must be at least 0 and k at least 1")
    return table[[*types, *(name for name in TASK if name in table)]]


def read_table(
    path: Path, types: Mapping[str, str], kind: str, expected: str, *, more: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Read a table that was written before, its columns at their types. Floats are read exactly.

    Args:
        path: A .parquet or .csv file.
        types: Column -> type of those that must be there.
        kind: What the table is called in errors, and ``expected``: what file it should be.
        more: Those that may be there.

    Raises:
        AnalysisError: the file is something else.
    """
    known = dict(types) | dict(more or {})
    try:
        table = _parquet(path) if path.suffix == ".parquet" else _csv(path, known)
        if twice := list(table.columns[table.columns.duplicated()]):
            raise ValueError(f"column {twice[0]} occurs twice")
        if path.suffix == ".csv":
            table = _texts_mapped(table, lambda text: re.sub(_MARKED, r"\1", text))
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).strip().partition("\n")[0]
        raise AnalysisError(f"{path}: cannot be read as a table: {reason}") from None
    if missing := [name for name in types if name not in table]:
        raise AnalysisError(f"{path}: not a {kind}: no column {', '.join(missing)}; expected {expected}")
    try:
        typed_table = table.astype({name: kind for name, kind in known.items() if name in table})
        return with_whole_epochs(_texts_mapped(typed_table, printable))
    except (TypeError, ValueError) as error:
        raise AnalysisError(f"{path}: a column is not of its type: {error}") from None


def _parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    with open(path, "rb") as file:
        return pd.read_parquet(file)


def _csv(path: Path, types: Mapping[str, str]) -> pd.DataFrame:
    from pyarrow import csv  # pandas itself rounds some floats, or not, by its version

    kinds = {"str": "string", "Int64": "int64", "Float64": "float64"}
    options = csv.ConvertOptions(
        column_types={name: kinds.get(kind, kind) for name, kind in types.items()},
        null_values=[""],  # a run may be called "NA"
    )
    with open(path, "rb") as file:  # pyarrow takes no path that is not UTF-8
        return csv.read_csv(file, convert_options=options).to_pandas()


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """Key columns at their types: step and group may be empty, epoch is whole where it can be."""
    return with_whole_epochs(table.astype(KEYS))


def with_whole_epochs(table: pd.DataFrame) -> pd.DataFrame:
    """``epoch``, if it is there, as Int64 where all are whole numbers."""
    if "epoch" not in table:
        return table
    known = table["epoch"].dropna()
    return table.astype({"epoch": "Int64"}) if (known == known.round()).all() else table
