"""Tables of `msplora-measure ablate`: what a model loses by each cut of its adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from msplora_analysis.adapters.discovery import as_paths
from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.files.addresses import StrPath, natural_key, parse, read_json, walk
from msplora_analysis.tables.files import FORMATS, read_table
from msplora_core.names import ABLATION

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "cut": "str",
    "what": "str",
    "rank": "Int64",
    "parameters": "int64",
    "metric": "float64",
    "metric_change": "float64",
    "low": "float64",
    "high": "float64",
    "kl": "float64",
    "predicted_kl": "float64",
}
"""The columns of the table, and their types in pandas."""
_MORE = {"loss": "float64"}
_TEXTS = {"task": "task", "metric_name": "metric"}


def load_ablation(paths: StrPath | Iterable[StrPath]) -> pd.DataFrame:
    """The table of ``ma.load_ablation``.

    Raises:
        AnalysisError: there is none, or one is something else.
    """
    import pandas as pd

    given = as_paths(paths)
    if not (files := list(ablations_at(given))):
        raise AnalysisError(
            f"{given[0]}: no {ABLATION}.parquet or {ABLATION}.csv in it; `msplora-measure ablate` writes one"
        )
    tables: dict[tuple[str, object], pd.DataFrame] = {}
    for file in files:
        table = _read(file)
        if (table["run"].iloc[0], str(table["step"].iloc[0])) in tables:  # the same adapter measured in two ways
            table["run"] = printable(str(file.parent))
        tables[table["run"].iloc[0], str(table["step"].iloc[0])] = table
    return pd.concat(tables.values(), ignore_index=True)


def ablations_at(paths: Iterable[StrPath]) -> Iterator[Path]:
    """The files of ablations at and under local paths."""
    visited: set[str] = set()
    for given in paths:
        path = parse(given)
        if not isinstance(path, Path):
            continue
        if path.is_dir():
            found = {}
            for folder in walk(path, visited):
                if names := [name for suffix in FORMATS if (name := f"{ABLATION}.{suffix}") in folder.files]:
                    found[folder.parts] = Path(str(folder.place), names[0])
            for parts in sorted(found, key=lambda names: [*map(natural_key, names)]):
                yield found[parts]
        elif path.stem == ABLATION and path.suffix[1:] in FORMATS:
            yield path


def _read(file: Path) -> pd.DataFrame:
    import pandas as pd

    if not file.is_file():
        raise AnalysisError(f"{file}: no such file")
    table = read_table(file, COLUMNS, "table of an ablation", "one of `msplora-measure ablate`", more=_MORE)
    known = [*COLUMNS, *(name for name in _MORE if name in table)]
    needed = ["cut", "what", "kl"]
    if table[needed].isna().any(axis=None) or (table["cut"] == "none").sum() != 1:
        raise AnalysisError(
            f"{file}: expected one row of the whole adapter (none), and {', '.join(needed)} in all rows"
        )
    beside = file.with_suffix(".json")
    found = read_json(beside) if beside.is_file() else {"run": file.parent.name}
    try:
        step = found.get("step")
        about = {
            "run": pd.Series([printable(found["run"])] * len(table), dtype="str"),
            "step": pd.Series([step] * len(table), dtype="Int64"),
            **{to: pd.Series([found.get(name)] * len(table), dtype="str") for to, name in _TEXTS.items()},
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise AnalysisError(f"{beside}: not what `msplora-measure ablate` wrote ({type(error).__name__})") from None
    texts = {name: table[name].map(printable) for name in ("cut", "what")}
    return pd.DataFrame(about).join(table[known].assign(**texts))


def each_adapter(ablation: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each adapter, with what tells it from the others: "", "cola", "cola 268"."""
    runs = ablation["run"].nunique()
    for run, of_run in ablation.groupby("run", sort=False):
        steps = of_run["step"].nunique(dropna=False)
        for step, table in of_run.groupby("step", sort=False, dropna=False):
            names = [str(run)] if runs > 1 or steps > 1 else []
            yield " ".join([*names, *([str(step)] if steps > 1 else [])]), table


def one_adapter(ablation: pd.DataFrame, run: str | None, step: int | None) -> pd.DataFrame:
    """The rows of the adapter of this run and step; either may be left out if there is only one.

    Raises:
        AnalysisError: there are several that fit, or none.
    """
    chosen = ablation
    for name, value in (("run", run), ("step", step)):
        if name not in ablation:
            raise AnalysisError(f"the table has no column {name}; expected one of load_ablation")
        chosen = chosen if value is None else chosen[(chosen[name] == value).fillna(False)]
        if chosen[name].nunique(dropna=False) != 1:
            there = ", ".join(str(each) for each in ablation[name].unique())
            raise AnalysisError(f"{name}={value!r}: choose the {name} to draw: {there or 'none is in the table'}")
    return chosen


def metric_label(ablation: pd.DataFrame) -> str:
    """What the metric of an adapter is called: "matthews correlation"."""
    (name,) = ablation["metric_name"].fillna("metric").iloc[:1]
    return str(name).replace("_", " ")


def kl_label(metric: str) -> str:
    """What the column `kl` is of a task with this metric, as `metric_label` gives it."""
    return "mean squared difference" if metric == "pearson" else "KL (nats an example)"


def adapter_name(ablation: pd.DataFrame) -> str:
    """What the adapter of these rows is called: "cola, step 268"."""
    run, step = ablation["run"].iloc[0], ablation["step"].dropna()
    return f"{run}, step {step.iloc[0]}" if len(step) else str(run)
