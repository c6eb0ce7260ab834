"""The tables of redundancy from any mix of adapters and of folders that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msplora_analysis.adapters.discovery import discover
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Execution, Options
from msplora_analysis.tables.files import FORMATS, read_csv, read_parquet, with_whole_epochs
from msplora_analysis.tables.pairs import DETAILS, PAIRS, SCALES, Tables, redundancy_of, table_of

if TYPE_CHECKING:
    import pandas as pd


def gather_redundancy(paths: Sequence[StrPath], options: Options, execution: Execution) -> Tables:
    """Both tables for the paths that ``tables.load.gather_spectra`` takes.

    For a table of spectra, or its folder, those that ``msplora-analyze redundancy`` wrote beside it are read, if they
    are there; adapters are compared as by ``load_redundancy``, with the columns of ``DETAILS``, but nothing is said
    that reading their spectra says.
    """
    import pandas as pd

    from msplora_analysis.tables.load import table_at

    found: list[Tables] = []
    adapters = []
    for path in paths:
        table = table_at(path)
        if table is None:
            adapters.append(path)
        else:
            found.append(Tables(*(_beside(table, *each) for each in (("pairs", PAIRS), ("scales", SCALES)))))
    if adapters:
        discovered = discover(adapters, full=options.base is not None)
        found.append(redundancy_of(discovered, options, execution, details=True, say=False))
    both = (pd.concat([each for each in of_kind if len(each)] or [of_kind[0]]) for of_kind in zip(*found, strict=True))
    return Tables(*(with_whole_epochs(table.reset_index(drop=True)) for table in both))


def _beside(spectra: Path, name: str, types: dict[str, str]) -> pd.DataFrame:
    """The table ``name`` in the folder of a table of spectra; one without rows if there is none."""
    for suffix in FORMATS:
        file = spectra.parent / f"{name}.{suffix}"
        if file.is_file():
            return read_pairs(file, types)
    return table_of([], types)


def read_pairs(file: Path, types: dict[str, str] = PAIRS) -> pd.DataFrame:
    """Read a table that ``msplora-analyze redundancy`` wrote (.parquet or .csv), with columns of these types.

    Raises AnalysisError if the file is something else.
    """
    known = {**types, **DETAILS}  # the latter are there with --details alone
    try:
        table = read_parquet(file) if file.suffix == ".parquet" else read_csv(file, known)
        if missing := [column for column in types if column not in table]:
            raise AnalysisError(
                f"{file}: no column {', '.join(missing)}; expected a table of `msplora-analyze redundancy`"
            )
        return with_whole_epochs(table.astype({name: kind for name, kind in known.items() if name in table}))
    except AnalysisError:
        raise
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AnalysisError(f"{file}: cannot be read as a table of pairs: {reason}") from None
