"""A comparison in sentences that a paper could quote, one for each row of the table of ``compare``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from msplora_analysis.tables.rows import rows_of

if TYPE_CHECKING:
    import pandas as pd

FEW = 5  # runs of a task: a bootstrap of fewer claims too much

_WHAT = {
    "kl": "mean D_KL between the spectra of {pairs} (as in Figure 4)",
    "kl_matched": "mean D_KL between the spectra of {pairs} (cut to {k} values each)",
    "overlap_in": "mean overlap beyond chance of the input directions of {pairs}",
    "overlap_out": "mean overlap beyond chance of the output directions of {pairs}",
}
_PAIRS = {"all": "all pairs of layers", "adjacent": "adjacent layers"}
_MORE = {"kl": ("differ more", "differ less"), "overlap": ("overlap more", "overlap less")}


def sentences(table: pd.DataFrame) -> Iterator[str]:
    """One sentence or two per question; a rank-matched row that repeats the one before it is left out."""
    for row in rows_of(table):
        if row["question"] == "difference":
            if not (row["measure"] == "kl_matched" and _same_as_plain(row, table)):
                yield _difference(row)
        else:
            yield _adjacent(row)


def _difference(row: dict[str, Any]) -> str:
    unit = " nats" if row["measure"].startswith("kl") else ""
    what = _WHAT[row["measure"]].format(pairs=_PAIRS[row["pairs"]], k=row["k_a"])
    said = (
        f"The {what} is {row['value_a']:.3g}{unit} under {row['a']} and {row['value_b']:.3g}{unit} under {row['b']}, "
        f"a difference of {row['estimate']:+.3g}"
    )
    if row["low"] != row["low"]:
        return f"{said}. {_runs(row)}: the data do not decide whether it is more than chance."
    said += f" ({row['confidence']:.0%} interval {row['low']:+.3g} to {row['high']:+.3g}; {_runs(row)})."
    if not row["decided"] and (row["low"] > 0 or row["high"] < 0):
        return f"{said} So few runs do not decide which is greater."
    if not row["decided"]:
        return f"{said} The data do not decide which is greater."
    if min(row["n_a"], row["n_b"]) < FEW * row["tasks"]:
        said += " With so few runs an interval is narrower than it should be."
    more, less = _MORE["kl" if row["measure"].startswith("kl") else "overlap"]
    subject = {"all": "Layers", "adjacent": "Adjacent layers"}[row["pairs"]]
    return f"{said} {subject} {more if row['estimate'] > 0 else less} under {row['a']}."


def _adjacent(row: dict[str, Any]) -> str:
    what = _WHAT[row["measure"]].format(pairs="layers", k=row["k_a"])
    said = (
        f"Under {row['a']}, the {what} is {row['value_a']:.3g} for adjacent layers and {row['value_b']:.3g} for others"
    )
    if row["p_value"] != row["p_value"]:
        return f"{said}; too few layers to test that."
    runs = f"{row['n_a']} run{'s' if row['n_a'] > 1 else ''}"
    said += f" (permutation of layers, p = {row['p_value']:.2g}; {runs})"
    if row["decided"]:
        return f"{said}: neighbours {'differ' if row['measure'].startswith('kl') else 'overlap'} " + (
            f"{'more' if row['estimate'] > 0 else 'less'} than distant layers."
        )
    return f"{said}: the data do not decide whether neighbours differ from distant layers."


def _runs(row: dict[str, Any]) -> str:
    if row["n_a"] == row["n_b"] == 1:
        return "One run of each"
    count = f"{row['n_a']}" if row["n_a"] == row["n_b"] else f"{row['n_a']} and {row['n_b']}"
    kind = "pairs of runs" if row["paired"] else "runs each" if row["n_a"] == row["n_b"] else "runs"
    tasks = f" on {row['tasks']} tasks" if row["tasks"] > 1 else ""
    drawn = f", {row['resampled']} resampled" if row["resampled"] == row["resampled"] and row["resampled"] else ""
    return f"{count} {kind}{tasks}{drawn}"


def _same_as_plain(row: dict[str, Any], table: pd.DataFrame) -> bool:
    plain = table[(table["question"] == row["question"]) & (table["measure"] == "kl")]
    return bool((plain["k_a"].eq(row["k_a"]) & plain["k_b"].eq(row["k_b"])).any())
