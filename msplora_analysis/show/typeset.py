"""A results table as a paper or a README shows it: LaTeX (booktabs) and Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msplora_analysis.ask.results.summary import AVERAGE

if TYPE_CHECKING:
    import pandas as pd

_TITLES = {
    "cola": "CoLA", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE", "sst2": "SST-2", "qnli": "QNLI", "alpaca": "Alpaca",
    AVERAGE: "Avg.",
}  # fmt: skip
_METRICS = {"matthews_correlation": "Mcc", "accuracy": "Acc", "pearson": "Pcc", "perplexity": "PPL"}
_LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
                                                            "\\": r"\textbackslash{}"})  # fmt: skip
# Letters that begin a link, code, emphasis or HTML; an underscore within a word does not.
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*[]|~$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


@dataclass(frozen=True)
class Cell:
    """A mean and its deviation, in the units shown; ``best`` of its column."""

    mean: float
    deviation: float
    best: bool

    @property
    def text(self) -> str:
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.1f}" if math.isnan(self.deviation) else f"{self.mean:.1f} ± {self.deviation:.1f}"


_NONE = Cell(math.nan, math.nan, best=False)


@dataclass(frozen=True)
class Grid:
    """The table of one model: headers, and per method its name, parameters and a cell per task (NaN: no results)."""

    model: str
    headers: list[str]
    rows: list[tuple[str, str, list[Cell]]]


def grids(table: pd.DataFrame) -> list[Grid]:
    """One grid per model, in the table's order. Scores are times 100 (perplexities as they are)."""
    result = []
    for model, of_model in table.groupby("model", sort=False):
        tasks = [task for task in dict.fromkeys(of_model["task"]) if task != AVERAGE]
        tasks += [AVERAGE] if AVERAGE in set(of_model["task"]) else []
        metrics = dict(zip(of_model["task"], of_model["metric"], strict=True))
        headers = [_header(task, metrics[task]) for task in tasks]
        best = {task: _best(of_model[of_model["task"] == task]) for task in tasks}
        rows = []
        for method, of_method in of_model.groupby("method", sort=False):
            by_task = {row.task: row for row in of_method.itertuples()}
            cells = [_cell(by_task[task], best[task]) if task in by_task else _NONE for task in tasks]
            rows.append((str(method), _parameters(of_method["parameters"]), cells))
        result.append(Grid(str(model), headers, rows))
    return result


def markdown(table: pd.DataFrame, caption: str) -> str:
    """GitHub's tables, one per model; the best of a column in bold."""
    parts = []
    for grid in grids(table):
        lines = [f"**{plain(grid.model)}**: {caption}", ""]
        lines.append("| " + " | ".join(["method", "parameters", *map(plain, grid.headers)]) + " |")
        lines.append("|---|" + "---:|" * (1 + len(grid.headers)))
        for method, parameters, cells in grid.rows:
            texts = [f"**{cell.text}**" if cell.best else cell.text for cell in cells]
            lines.append("| " + " | ".join([plain(method), parameters, *texts]) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def latex(table: pd.DataFrame, caption: str) -> str:
    """``table`` environments with booktabs rules, one per model; the best of a column in bold."""
    parts = []
    for grid in grids(table):
        lines = [
            "\\begin{table}",
            f"\\caption{{{_tex(f'{grid.model}: {caption}')}}}",
            "\\centering",
            f"\\begin{{tabular}}{{lr{'r' * len(grid.headers)}}}",
            "\\toprule",
            " & ".join(["Method", "Parameters", *map(_tex, grid.headers)]) + r" \\",
            "\\midrule",
        ]
        for method, parameters, cells in grid.rows:
            lines.append(" & ".join([_tex(method), parameters, *map(_tex_cell, cells)]) + r" \\")
        lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}"]
        parts.append("\n".join(lines) + "\n")
    return "% \\usepackage{booktabs}\n" + "\n".join(parts)


def _best(column: pd.DataFrame) -> float:
    """The best mean of a task's column; NaN where nothing can be compared."""
    if len(column) < 2:
        return float("nan")
    return float(column["mean"].min() if column["metric"].iloc[0] == "perplexity" else column["mean"].max())


def _cell(row: Any, best: float) -> Cell:
    unit = 1 if row.metric == "perplexity" else 100
    return Cell(row.mean * unit, row.deviation * unit, best=row.mean == best)


def _header(task: str, metric: str) -> str:
    title = _TITLES.get(task, task)
    return title if task == AVERAGE else f"{title} ({_METRICS.get(metric, metric)})"


def _parameters(values: pd.Series) -> str:
    """``0.135M``: the same over tasks; a range where the tasks' heads do not explain a difference."""
    low, high = (f"{value / 1e6:.3g}M" for value in (values.min(), values.max()))
    return low if low == high else f"{low}–{high}"


def plain(text: str) -> str:
    return text.replace("\n", " ").translate(_MARKDOWN)


def _tex(text: str) -> str:
    return text.replace("\n", " ").translate(_LATEX)


def _tex_cell(cell: Cell) -> str:
    text = cell.text.replace("±", r"$\pm$").replace("–", "--")
    return f"\\textbf{{{text}}}" if cell.best else text
