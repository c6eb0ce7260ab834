"""What ``msplora-analyze watch`` shows of a run: a table of sparklines, and what was found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from msplora_analysis.errors import printable
from msplora_analysis.show.watch.following import Means, Point, Run
from msplora_core.names import method_label
from msplora_core.records import fits

if TYPE_CHECKING:
    import pandas as pd

_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#"
_COLOURS = {"error": "bold red", "warning": "bold yellow", "info": "cyan"}
_COLUMNS_BESIDE = 48  # of a terminal, for all but the names of modules and the two sparklines
_NARROW = 78  # columns of a terminal
_WIDE = 120  # columns of a terminal
_RANGE = 18  # of its columns, for a range
_LINES_BESIDE = 9  # of a terminal, for all but the rows of the table and the findings
_FINDINGS = 4  # shown at least, where there are so many


class Row(NamedTuple):
    """A scale and a module type; of each, its means at every checkpoint that has them."""

    scale: str
    module: str
    means: Sequence[Means]


def render(run: Run, findings: pd.DataFrame | None, console: Console, status: str = "", hint: str = "") -> Group:
    """The whole screen, to fit the console."""
    width, height = console.size
    bars = _ASCII_BARS if console.options.ascii_only else _BARS
    lines: list[RenderableType] = [_title(run), *_progress(run, bars, width)]
    points = dated(run.points)
    kinds = _kinds(findings) if findings is not None else []
    room = height - _LINES_BESIDE - min(len(kinds), _FINDINGS)
    if table_rows := rows(points, most=room):
        lines += [Text(), _table(table_rows, bars, width), Text()]
        lines += _found(kinds, findings is not None, height - _LINES_BESIDE - len(table_rows))
    for name, why in list(run.problems.items())[:2]:
        lines.append(Text(f"{printable(name)} cannot be read: {why}", "red", overflow="ellipsis", no_wrap=True))
    if status or hint:
        lines.append(Text.assemble((status, "dim"), ("   " if status and hint else ""), (hint, "dim")))
    return Group(*lines)


def line(point: Point) -> str:
    """One checkpoint in one line, for output that is no terminal."""
    parts = [when(point)]
    for row in rows([point], most=0):
        (means,) = row.means
        rank = "-" if means.effective_rank is None else f"{means.effective_rank:.4g}"
        parts.append(f"{row.scale}: effective rank {rank} of {means.rank:g}, norm {means.norm:.4g}")
    if not point.means:
        parts.append("holds NaN or Inf: the training diverged")
    return "  ".join(parts)


def when(point: Point) -> str:
    step, epoch = point.adapter.step, point.adapter.epoch
    parts = [f"epoch {epoch:.4g}" if epoch is not None else "", f"step {step}" if step is not None else ""]
    return ", ".join(filter(None, parts)) or "the final adapter"


def dated(points: Sequence[Point]) -> list[Point]:
    """Without the adapter saved once more at the end, where there are checkpoints."""
    return [point for point in points if point.adapter.dated] or list(points)


def rows(points: Sequence[Point], most: int) -> list[Row]:
    """One row per scale and module type, or, where these are more than ``most``, per scale."""
    keys = dict.fromkeys(key for point in points for key in point.means)
    if len(keys) <= most:
        return [Row(*key, [point.means[key] for point in points if key in point.means]) for key in keys]
    found = []
    for scale, of_scale in groupby(sorted(keys, key=lambda key: list(keys).index(key)), key=lambda key: key[0]):
        modules = list(of_scale)
        means = [_mean(known) for p in points if (known := [p.means[key] for key in modules if key in p.means])]
        found.append(Row(scale, modules[0][1] if len(modules) == 1 else f"{len(modules)} modules", means))
    return found


def sparkline(values: Sequence[float | None], width: int, bars: str = _BARS, zero: bool = False) -> str:
    """A bar for each value, the last ones where they do not all fit; a space for None.

    zero: the lowest bar stands for 0, rather than for the smallest value. What is not finite is a space too.
    """
    shown = values[-width:]
    shown = [value if value is not None and math.isfinite(value) else None for value in shown]
    known = [value for value in shown if value is not None]
    if not known:
        return " " * len(shown)
    low, high = 0.0 if zero else min(known), max(known)
    if high <= low:
        return "".join(" " if value is None else bars[0 if zero else len(bars) // 2] for value in shown)
    step = (len(bars) - 1) / (high - low)
    return "".join(" " if value is None else bars[round((value - low) * step)] for value in shown)


def _mean(known: Sequence[Means]) -> Means:
    """Weighted by the numbers of matrices."""
    counts = [means.matrices for means in known]
    ranked = [(means.effective_rank, means.matrices) for means in known if means.effective_rank is not None]
    norm, rank = np.average([(means.norm, means.rank) for means in known], axis=0, weights=counts).tolist()
    effective = sum(value * n for value, n in ranked) / sum(n for _, n in ranked) if ranked else None
    return Means(effective, norm, rank, sum(counts))


def _title(run: Run) -> Text:
    settings = run.settings
    method = str(settings.get("method", ""))
    ranks = settings.get("ranks") if method == "msplora" else settings.get("rank")
    about = [method_label(method, ranks or None)]
    about += [f"of {settings['model']}" if "model" in settings else ""]
    about += [f"on {settings['task']}" if "task" in settings else ""]
    text = printable(" ".join(filter(None, about)))
    return Text.assemble((printable(run.name), "bold"), f"  {text}", overflow="ellipsis", no_wrap=True)


def _progress(run: Run, bars: str, width: int) -> list[Text]:
    """How far the run is, and its loss and metrics."""
    points = dated(run.points)
    epochs = run.settings.get("epochs", run.epochs)
    parts = []
    if points:
        adapter = points[-1].adapter
        total = "" if epochs is None else f" of {epochs:g}"
        parts.append(when(points[-1]).replace(",", f"{total},", 1) if adapter.epoch is not None else when(points[-1]))
        parts.append(f"{len(points)} checkpoint{'s' if len(points) > 1 else ''}")
    if run.deleted:
        parts.append(f"{run.deleted} deleted since")
    if run.finished:
        parts.append("finished")
    parts += [f"{printable(name)} is being written" for name in run.writing[:2]]
    lines = [Text(", ".join(parts), overflow="ellipsis", no_wrap=True)] if parts else []
    values_of = {name: [e[name] for e in run.history if fits(e.get(name), float)] for name in _logged(run.history)}
    logged = {name: [float(value) for value in values] for name, values in values_of.items() if values}
    texts = {name: f"{values[-1]:.4g}" for name, values in logged.items()}
    beside = sum(len(name) + len(text) + 5 for name, text in texts.items())
    room = max(4, min(12, (width - beside) // max(len(texts), 1)))
    metrics = Text(overflow="ellipsis", no_wrap=True)
    for name, values in logged.items():
        metrics.append(f"{'   ' if metrics else ''}{printable(name)} {sparkline(values, room, bars)} ")
        metrics.append(texts[name], "bold")
    return [*lines, metrics] if metrics else lines


def _logged(history: Iterable[dict[str, object]]) -> list[str]:
    """Names of the losses, and of what evaluation measures, but for its speed."""
    names = dict.fromkeys(name for entry in history for name in entry)
    speed = ("runtime", "per_second", "_tokens", "_time")
    measured = [name for name in names if name.startswith("eval_") and not name.endswith(speed) and name != "eval_loss"]
    return [*(name for name in ("loss", "eval_loss") if name in names), *measured[:2]]


def _table(table_rows: Sequence[Row], bars: str, width: int) -> Table:
    """A terminal narrower than ``_NARROW`` shows no changes, and no ranks beside the effective ones.

    From ``_WIDE`` on each sparkline has its range beside it, as each row has a scale of its own.
    """
    names = max(len(row.module) for row in table_rows)
    narrow, wide = width < _NARROW, width >= _WIDE
    beside = 28 if narrow else _COLUMNS_BESIDE + (2 * _RANGE if wide else 0)
    room = max(6, min(60 if wide else 40, (width - beside - names) // 2))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    more = () if narrow else ("change", "range")[: 1 + wide]
    for header in ("scale", "module", "effective rank", "now", *more, "norm", "now", *more):
        table.add_column(header, justify="right" if header in ("now", "change", "range") else "left", no_wrap=True)
    for row in table_rows:
        ranks = [means.effective_rank for means in row.means]
        norms: list[float | None] = [means.norm for means in row.means]
        of = "" if narrow else f" of {row.means[-1].rank:.3g}"
        table.add_row(
            row.scale,
            Text(printable(row.module)),
            Text(sparkline(ranks, room, bars), "cyan"),
            f"{_number(ranks[-1])}{of}",
            *(_change(ranks), _range(ranks))[: len(more)],
            Text(sparkline(norms, room, bars, zero=True), "green"),
            _number(norms[-1]),
            *(_change(norms), _range(norms))[: len(more)],
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.{_decimals(value)}f}"


def _change(values: Sequence[float | None]) -> str:
    """Since the checkpoint before, to the digits that the value is shown with."""
    if len(values) < 2 or values[-1] is None or values[-2] is None:
        return "-"
    return f"{values[-1] - values[-2]:+.{_decimals(values[-1])}f}"


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{_number(min(known))} to {_number(max(known))}" if known else "-"


def _decimals(value: float) -> int:
    """So many that there are three digits, of numbers that are not tiny."""
    return max(0, min(4, 2 - math.floor(math.log10(abs(value))))) if value else 2


def _kinds(findings: pd.DataFrame) -> list[tuple[str, str, int]]:
    """Severity, kind and number of places, the most severe first."""
    grouped = findings.groupby(["severity", "id"], sort=False).size()
    return [
        (str(severity), str(kind), int(count)) for (severity, kind), count in zip(grouped.index, grouped, strict=True)
    ]


def _found(kinds: Sequence[tuple[str, str, int]], known: bool, room: int) -> list[Text]:
    from msplora_analysis.ask.findings import KINDS

    if not known:
        return []
    if not kinds:
        return [Text("No findings.", "dim")]
    shown = len(kinds) if len(kinds) <= room else max(room - 1, 1)
    lines = [
        Text.assemble(
            (severity, _COLOURS[severity]),
            f" {kind}: {KINDS[kind].title} ({count} place{'s' if count > 1 else ''})",
            overflow="ellipsis",
            no_wrap=True,
        )
        for severity, kind, count in kinds[:shown]
    ]
    if shown < len(kinds):
        lines.append(Text(f"and {len(kinds) - shown} more: msplora-analyze diagnose", "dim"))
    return lines
