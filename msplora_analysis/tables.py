"""The two tidy tables: spectra (one row per singular value) and metrics (one row per matrix)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files import Adapter, StrPath, discover, replacing
from msplora_analysis.options import Options

if TYPE_CHECKING:
    import pandas as pd

    from msplora_analysis.formats import Matrix

KEYS = {
    "run": "str",
    "step": "Int64",
    "epoch": "Float64",  # Int64 where all are whole numbers
    "scale": "str",
    "group": "Int64",
    "module": "str",
    "name": "str",
}
VALUES = {"k": "int64", "sigma": "float64"}
KS = (1, 2, 4)  # M_eff-k is always given for these
FORMATS = ("parquet", "csv")

Progress = Callable[[int, int], None]  # adapters done, adapters in all


class Tables(NamedTuple):
    """Both tables of the same adapters."""

    spectra: pd.DataFrame
    metrics: pd.DataFrame


def load_spectra(paths: StrPath | Iterable[StrPath], *, ignore_unknown: bool = False) -> pd.DataFrame:
    """Singular values of every adapter at and under ``paths``, one row each.

    paths: run folders, adapter folders or files, or folders of such (see ``files.discover``).
    ignore_unknown: warn of tensors that no format explains, instead of raising.

    Columns: run, step, epoch, scale, group, module, name, k (from 1), sigma (float64, descending in
    k, with the factor alpha/r). Raises AnalysisError for input that cannot be used as given.
    """
    return load_tables(paths, ignore_unknown=ignore_unknown).spectra


def load_metrics(
    paths: StrPath | Iterable[StrPath],
    *,
    ks: Iterable[int] = KS,
    ignore_unknown: bool = False,
) -> pd.DataFrame:
    """Measures of every matrix of every adapter at and under ``paths``, one row each.

    ks: the k of the columns m_eff_<k>. For the other arguments and errors see ``load_spectra``.

    Columns: run, step, epoch, scale, group, module, name, rows, cols, rank (of the factors),
    sigma_1, frobenius, nuclear, stable_rank, effective_rank, participation_ratio, m_eff_<k>; the
    module ``metrics`` defines the last seven.
    """
    return load_tables(paths, ks=ks, ignore_unknown=ignore_unknown).metrics


def load_tables(
    paths: StrPath | Iterable[StrPath],
    *,
    ks: Iterable[int] = KS,
    ignore_unknown: bool = False,
    progress: Progress | None = None,
) -> Tables:
    """Both tables, reading every adapter once. Arguments and errors as in ``load_metrics``.

    progress: called after each adapter with the number done and the number in all.
    """
    adapters = discover(paths)
    matrices: list[tuple[Adapter, Matrix]] = []
    sigma: list[Any] = []
    unknown: dict[Path, list[str]] = {}
    for done, adapter in enumerate(adapters, start=1):
        found, values, names = _read_adapter(adapter, ignore_unknown)
        matrices += [(adapter, matrix) for matrix in found]
        sigma += values
        if names:
            unknown[adapter.file] = names
        if progress:
            progress(done, len(adapters))
    if unknown:
        warnings.warn(_unknown_text(unknown) + " are left out", stacklevel=2)

    import pandas as pd

    if not matrices:  # every tensor was unknown and is left out
        raise AnalysisError(f"{adapters[0].file}: no low-rank factors in this or any other file")
    keys = _keys(matrices)
    measures = _measures([matrix for _, matrix in matrices], sigma, ks)
    return Tables(_spectra(keys, sigma), pd.concat([keys, pd.DataFrame(measures)], axis=1))


def _spectra(keys: pd.DataFrame, sigma: Sequence[Any]) -> pd.DataFrame:
    import numpy as np

    lengths = [len(values) for values in sigma]
    spectra = keys.loc[np.repeat(keys.index, lengths)].reset_index(drop=True)
    spectra["k"] = np.concatenate([np.arange(1, length + 1) for length in lengths])
    spectra["sigma"] = np.concatenate(sigma)
    return spectra.astype(VALUES)


def _measures(matrices: Sequence[Matrix], sigma: Sequence[Any], ks: Iterable[int]) -> dict[str, Any]:
    """The value columns of the metrics table, one entry per matrix."""
    import numpy as np

    from msplora_analysis import metrics

    padded = np.zeros((len(sigma), max(map(len, sigma), default=1)))
    for values, target in zip(sigma, padded, strict=True):
        target[: len(values)] = values
    return {
        "rows": np.array([matrix.update.rows for matrix in matrices], dtype=np.int64),
        "cols": np.array([matrix.update.cols for matrix in matrices], dtype=np.int64),
        "rank": np.array([matrix.update.rank for matrix in matrices], dtype=np.int64),
        "sigma_1": padded[:, 0],
        "frobenius": metrics.frobenius(padded),
        "nuclear": metrics.nuclear(padded),
        "stable_rank": metrics.stable_rank(padded),
        "effective_rank": metrics.effective_rank(padded),
        "participation_ratio": metrics.participation_ratio(padded),
        **{f"m_eff_{k}": metrics.m_eff(padded, k) for k in sorted(set(ks))},
    }


def _read_adapter(adapter: Adapter, ignore_unknown: bool) -> tuple[list[Matrix], list[Any], list[str]]:
    """Matrices of one adapter, their singular values, and the tensor names left out."""
    from msplora_analysis.formats import read_contents
    from msplora_analysis.spectra import adapter_spectra
    from msplora_analysis.tensors import open_tensors

    with open_tensors(adapter.file) as file:
        try:
            matrices, unknown, notes = read_contents(adapter.config, file, Options(ignore_unknown))
        except AnalysisError as error:
            raise AnalysisError(f"{adapter.file}: {error}") from None
        if unknown and not ignore_unknown:
            raise AnalysisError(
                _unknown_text({adapter.file: unknown})
                + "; pass --ignore-unknown (ignore_unknown=True) to leave them out"
            )
        for note in notes:
            warnings.warn(f"{adapter.file}: {note}", stacklevel=3)
        return matrices, adapter_spectra(file, matrices), unknown


def _unknown_text(unknown: dict[Path, list[str]]) -> str:
    (file, names), *others = unknown.items()
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    also = f", and others in {len(others)} more files," if others else ""
    return f"{file}: unknown tensors ({len(names)}): {listed}{also}"


def _keys(matrices: Sequence[tuple[Adapter, Matrix]]) -> pd.DataFrame:
    import pandas as pd

    rows = [(a.run, a.step, a.epoch, m.scale, m.group, m.module, m.name) for a, m in matrices]
    return _typed(pd.DataFrame(rows, columns=list(KEYS), dtype=object))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Key columns at their types: step and group may be empty, epoch is whole where it can be."""
    table = table.astype(KEYS)
    known = table["epoch"].dropna()
    return table.astype({"epoch": "Int64"}) if (known == known.round()).all() else table


def gather_spectra(
    paths: Sequence[StrPath], *, ignore_unknown: bool = False, progress: Progress | None = None
) -> pd.DataFrame:
    """One spectra table from any mix of adapters and of tables written before.

    A path that is a .parquet or .csv file, or a folder with spectra.parquet or spectra.csv at its
    top, is read as a table; all others as ``load_spectra`` does. Raises AnalysisError also if two
    of these hold a run of the same name.
    """
    import pandas as pd

    files = {Path(path): _table_at(Path(path)) for path in paths}
    adapters = [path for path, file in files.items() if file is None]
    sources = {str(file): read_spectra(file) for file in files.values() if file is not None}
    if adapters:
        loaded = load_tables(adapters, ignore_unknown=ignore_unknown, progress=progress)
        sources[", ".join(map(str, adapters))] = loaded.spectra
    owners: dict[str, str] = {}
    for source, table in sources.items():
        for run in table["run"].unique():
            if owners.setdefault(run, source) != source:
                raise AnalysisError(
                    f"{source}: run {run} is also in {owners[run]}; give the run folders together "
                    "instead, so that each gets its own name"
                )
    return _typed(pd.concat(sources.values(), ignore_index=True))


def _table_at(path: Path) -> Path | None:
    """The spectra table that ``path`` is or has at its top."""
    if path.suffix in (".parquet", ".csv") and not path.is_dir():
        return path
    candidates = [path / f"spectra.{suffix}" for suffix in FORMATS]
    return next((file for file in candidates if file.is_file()), None)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as ``path``'s suffix says (.parquet or .csv), whole or not at all.

    Equal tables give equal bytes: a Parquet file carries the package's version, but no time or
    path. Raises AnalysisError if the file cannot be written.
    """
    try:
        with replacing(path) as beside:
            if path.suffix == ".parquet":
                _write_parquet(table, beside)
            else:
                table.to_csv(beside, index=False, lineterminator="\n")
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be written: {error.strerror}") from None


def _write_parquet(table: pd.DataFrame, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from msplora_analysis import __version__

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    metadata = {**(arrow.schema.metadata or {}), b"msplora_analysis": __version__.encode()}
    pq.write_table(arrow.replace_schema_metadata(metadata), path)


def read_spectra(path: StrPath) -> pd.DataFrame:
    """Read a spectra table that ``msplora-analyze spectra`` wrote (.parquet or .csv).

    Raises AnalysisError if the file is something else.
    """
    path = Path(path)
    readers = {".parquet": _read_parquet, ".csv": _read_csv}
    if path.suffix not in readers:
        raise AnalysisError(f"{path}: not a table; expected a .parquet or .csv file")
    if not path.is_file():
        raise AnalysisError(f"{path}: no such file")
    try:
        table = readers[path.suffix](path)
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
        table = _typed(table[columns]).astype(VALUES)
    except (TypeError, ValueError) as error:
        raise AnalysisError(f"{path}: a column is not of its type: {error}") from None
    if (table["sigma"] < 0).any() or (table["k"] < 1).any():
        raise AnalysisError(f"{path}: sigma must be at least 0 and k at least 1")
    return table


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(path)


def _read_csv(path: Path) -> pd.DataFrame:
    # pyarrow reads floats exactly; pandas rounds some, or not, by its version.
    from pyarrow import csv

    kinds = {"str": "string", "Int64": "int64", "Float64": "float64"}
    options = csv.ConvertOptions(
        column_types={name: kinds.get(kind, kind) for name, kind in {**KEYS, **VALUES}.items()},
        null_values=[""],  # a run may be called "NA"
    )
    table: pd.DataFrame = csv.read_csv(path, convert_options=options).to_pandas()
    return table
