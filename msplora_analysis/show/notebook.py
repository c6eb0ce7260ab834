"""What Jupyter shows: findings by kind, a comparison in sentences, advice as answers, an ablation cut by cut,
moments by module, what readers do; and a terminal, of findings, comparisons and advice.

The tables are pandas DataFrames. A selection of rows shows itself in the same way; one of columns as any table does.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from msplora_analysis.ask.advice.advise import RunAdvice
from msplora_analysis.ask.advice.subject import Answer
from msplora_analysis.ask.advice.tell import RANK_HEADERS, rank_cells, title
from msplora_analysis.errors import printable
from msplora_analysis.tables.ablation import each_adapter
from msplora_analysis.tables.labels import when, where
from msplora_analysis.tables.rows import rows_of

if TYPE_CHECKING:
    from msplora_analysis.ask.readers.base import Fault

_PLACES = 3  # of each kind of finding, that are shown
_CUTS = 6  # of each kind, that are shown
_OF_MODULES = ("task_norm", "task_effective_rank", "predicted_kl")
_SYMBOLS = {"error": "✖", "warning": "⚠", "info": "ℹ"}


class _Table(pd.DataFrame):
    """A DataFrame with a view of its own, as long as it has the columns for it."""

    _shown: ClassVar[frozenset[str]]

    @property
    def _constructor(self) -> Callable[..., pd.DataFrame]:
        return type(self)

    def _repr_html_(self) -> str | None:
        if not self._shown <= set(self.columns):
            html: str | None = super()._repr_html_()  # type: ignore[misc]  # the stubs leave it out
            return html
        return _text_alone(self._view())

    def __repr__(self) -> str:
        lines = self._said() if self._shown <= set(self.columns) else []
        return "\n".join(map(printable, lines)) if lines else super().__repr__()

    def _view(self) -> str:
        raise NotImplementedError

    def _said(self) -> list[str]:
        """The same in lines for a terminal; none: as pandas shows it."""
        return []


class Findings(_Table):
    """The findings of ``diagnose``."""

    _shown = frozenset({"id", "severity", "run", "step", "epoch", "scale", "group", "module", "name"}) | {
        "evidence",
        "source",
        "advice",
    }

    def _view(self) -> str:
        """One row per kind of finding, the most severe first, with the first of its places."""
        from msplora_analysis.ask.findings import KINDS

        rows = []
        for (severity, kind), found in self.groupby(["severity", "id"], sort=False):
            title = KINDS[kind].title if kind in KINDS else ""
            places = [f"{_text(_place(row))}: {_text(row['evidence'])}" for row in rows_of(found.head(_PLACES))]
            if (more := len(found) - _PLACES) > 0:
                places.append(f"and {more} more")
            rows.append(
                (
                    f"{_SYMBOLS.get(str(severity), '')} {_text(severity)}",
                    f"<b>{_text(kind)}</b><br>{_text(title)}",
                    "<br>".join(places),
                    f"{_text(found['advice'].iloc[0])}<br><i>threshold: {_text(found['source'].iloc[0])}</i>",
                )
            )
        table = _grid(("severity", "finding", "evidence", "what to try"), rows) if rows else ""
        return f"{table}<p>{self._counts()}</p>"

    def _said(self) -> list[str]:
        from msplora_analysis.ask.findings import KINDS

        lines = []
        for (severity, kind), found in self.groupby(["severity", "id"], sort=False):
            title = f": {KINDS[kind].title}" if kind in KINDS else ""
            lines.append(f"{_SYMBOLS.get(str(severity), '')} {severity} {kind}{title}")
            lines += [f"    {_place(row)}: {row['evidence']}" for row in rows_of(found.head(_PLACES))]
            lines += [f"    and {len(found) - _PLACES} more"] * (len(found) > _PLACES)
            lines += [f"  try: {found['advice'].iloc[0]}"]
        return [*lines, self._counts()]

    def _counts(self) -> str:
        from msplora_analysis.ask.findings import SEVERITIES

        counts = self["severity"].value_counts()
        return ", ".join(f"{counts[one]} {one}" for one in SEVERITIES if one in counts) or "no findings"


class Comparison(_Table):
    """The comparison of ``compare``."""

    _shown = frozenset({"question", "measure", "pairs", "a", "b", "value_a", "value_b", "estimate", "low", "high"}) | {
        *("confidence", "p_value", "decided", "n_a", "n_b", "tasks", "paired", "k_a", "k_b")
    }

    @property
    def verdict(self) -> str:
        """What is decided, of all rows at once."""
        from msplora_analysis.ask.comparison.statements import verdict

        return verdict(self)

    @property
    def sentences(self) -> list[str]:
        """What each row says, as a paper could quote it."""
        from msplora_analysis.ask.comparison.statements import sentences

        return list(sentences(self))

    def _view(self) -> str:
        """The verdict, the numbers of the differences, and a sentence for each row."""
        said = "".join(f"<li>{_text(sentence)}</li>" for sentence in self.sentences)
        differences = self[self["question"] == "difference"]
        rows = [
            (
                *(_text(row[name]) for name in ("measure", "pairs")),
                *(f"{row[name]:.3g}" for name in ("value_a", "value_b")),
                f"{row['estimate']:+.3g}",
                f"{row['low']:+.3g} to {row['high']:+.3g}" if row["low"] == row["low"] else "too few runs",
                "yes" if row["decided"] else "no" if row["p_value"] == row["p_value"] else "not judged",
            )
            for row in rows_of(differences)
        ]
        if not rows:
            return f"<ul>{said}</ul>"
        first = differences.iloc[0]
        head = ("measure", "pairs of layers", _text(first["a"]), _text(first["b"]), "difference")
        table = _grid((*head, f"{first['confidence']:.0%} interval", "decided"), rows)
        return f"<p>{_text(self.verdict)}</p>{table}<details><summary>in sentences</summary><ul>{said}</ul></details>"

    def _said(self) -> list[str]:
        from msplora_analysis.ask.comparison.statements import forest

        if not (self["question"] == "difference").any():
            return self.sentences
        return [*textwrap.wrap(self.verdict, 80), "", *forest(self)]


class Ablation(_Table):
    """The ablations of ``load_ablation``."""

    _shown = frozenset(
        {"run", "step", "metric_name", "cut", "what", "rank", "parameters", "metric", "metric_change"}
    ) | {*("low", "high", "kl", "predicted_kl")}

    def _view(self) -> str:
        """Of each adapter the cuts of every kind that cost most; bold where the metric changes beyond chance."""
        return "".join(self._of_one(name, table) for name, table in each_adapter(self))

    @staticmethod
    def _of_one(name: str, table: pd.DataFrame) -> str:
        known = table["metric_name"].iloc[0]
        metric = "metric" if pd.isna(known) else str(known).replace("_", " ")
        rows = []
        for kind, cuts in table[table["cut"] != "none"].groupby("cut", sort=False):
            most = cuts if str(kind).startswith("rank") else cuts.sort_values("kl", ascending=False)
            for row in rows_of(most.head(_CUTS)):
                what = row["what"] if pd.isna(row["rank"]) else f"every module to rank {row['rank']}"
                change = f"{row['metric_change']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
                sure = f"<b>{change}</b>" if row["low"] > 0 or row["high"] < 0 else change
                numbers = (f"{row['parameters']:,}", sure, *(_number(row[kl]) for kl in ("kl", "predicted_kl")))
                rows.append((_text(str(kind).replace("_", " ")), _text(what), *numbers))
            if (more := len(cuts) - _CUTS) > 0:
                rows.append((_text(kind), f"and {more} more that cost less", "", "", "", ""))
        head = ("cut", "what", "parameters left", f"{_text(metric)}: change", "KL", "predicted KL")
        whole = [
            f"{_text(metric)} {_number(value)} with all of it" for value in table[table["cut"] == "none"]["metric"]
        ]
        said = ": ".join([f"<b>{_text(name)}</b>"] * bool(name) + whole)
        return f"<p>{said}</p>" + (_grid(head, rows) if rows else "")


class Moments(_Table):
    """The table of ``load_moments``."""

    _shown = frozenset({"run", "step", "epoch", "name", "rank", "task_norm", "task_effective_rank"}) | {
        *("predicted_kl", "whole_kl", "task", "loss", "labels", "examples", "tokens")
    }

    def _view(self) -> str:
        """Of each adapter what was measured, and the modules that carry most."""
        groups = self.groupby(["run", "step", "epoch"], sort=False, dropna=False)
        return "".join(self._of_one(table) for _, table in groups)

    @staticmethod
    def _of_one(table: pd.DataFrame) -> str:
        first = rows_of(table.head(1))[0]
        known = [_text(name) for name in (first["run"], when(first), first["task"]) if name and not pd.isna(name)]
        unit = "mean squared difference" if first["loss"] == "regression" else "KL, nats an example"
        counts = [f"{first[name]:,} {name}" for name in ("examples", "tokens") if not pd.isna(first[name])]
        counts += [f"labels {_text(first['labels'])}"] if first["labels"] else []
        said = f"<b>{', '.join(known)}</b>: {', '.join(counts)}. "
        said += f"Predicted without the adapter: {_number(first['whole_kl'])} ({unit})."
        rows = [
            (_text(row["name"]), f"{row['rank']}", *(_number(row[name]) for name in _OF_MODULES))
            for row in rows_of(table.sort_values("predicted_kl", ascending=False).head(_CUTS))
        ]
        if (more := len(table) - _CUTS) > 0:
            rows.append((f"and {more} more that carry less", "", "", "", ""))
        head = ("module", "rank", "task-weighted norm", "its effective rank", f"predicted without it ({unit})")
        return f"<p>{said}</p>{_grid(head, rows)}"


class Advice(list[RunAdvice]):
    """The advice of ``advise``, one for each run."""

    def __repr__(self) -> str:
        said = ([title(of), *(f"{one.question} {one.answer}" for one in of.answers)] for of in self)
        return "\n\n".join("\n".join(map(printable, lines)) for lines in said)

    def _repr_html_(self) -> str:
        return _text_alone("".join(map(_advice, self)))


def _advice(advice: RunAdvice) -> str:
    """The answers with their evidence, and the table of ranks."""
    headers = [header.replace("\n", " ") for header in RANK_HEADERS]
    ranks = _grid(headers, ([_text(cell) for cell in row] for row in rank_cells(advice.ranks)))
    return f"<p><b>{_text(title(advice))}</b></p>" + "".join(map(_answer, advice.answers)) + ranks


def _answer(answer: Answer) -> str:
    said = [f"{_text(answer.question)} <b>{_text(answer.answer)}</b>"]
    said += [_text(line) for line in (answer.evidence, answer.sure) if line]
    said += [f"<code>{_text(answer.command)}</code>"] if answer.command else []
    return f"<p>{'<br>'.join(said)}</p>"


def _text_alone(html: str) -> str:
    """The classes keep MathJax from a name that holds dollar signs."""
    return f'<div class="tex2jax_ignore mathjax_ignore">{html}</div>'


class Checks(_Table):
    """What ``check`` found."""

    _shown = frozenset({"reader", "id", "severity", "effect", "title", "evidence", "source", "remedy"})
    _metadata: ClassVar[list[str]] = ["outcomes"]
    outcomes: dict[str, str]
    """What comes of it with each reader."""

    @classmethod
    def of(cls, found: Sequence[Fault], outcomes: dict[str, str]) -> Checks:
        """The table of what ``ask.readers.check`` gave."""
        names = ["reader", "id", "severity", "effect", "title", "evidence", "source", "remedy"]
        table = cls(pd.DataFrame([one._asdict() for one in found], columns=names, dtype="str"))
        table.outcomes = outcomes
        return table

    def _view(self) -> str:
        """What comes of it with each reader, then each finding."""
        rows = [
            (
                f"{_SYMBOLS.get(row['severity'], '')} {_text(row['severity'])}",
                _text(row["reader"] or "every reader"),
                f"<b>{_text(row['title'])}</b><br>{_text(row['evidence'])}",
                f"{_text(row['remedy'])}<br><i>source: {_text(row['source'])}</i>",
            )
            for row in rows_of(self)
        ]
        words = getattr(self, "outcomes", {}).items()  # several tables in one have none
        outcomes = _grid(("reader", "outcome"), [(_text(name), _text(word)) for name, word in words])
        findings = _grid(("severity", "reader", "finding", "what to do"), rows) if rows else "<p>no findings</p>"
        return f"{outcomes}{findings}"


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; text is aligned left, which Jupyter does not do by itself."""
    left = 'style="text-align: left; vertical-align: top"'
    titles = "".join(f"<th {left}>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td {left}>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.3g}"


def _place(row: dict[str, Any]) -> str:
    """'cola/lora, epoch 3, layer 3 query'."""
    return ", ".join(filter(None, (row["run"], when(row), where(row))))
