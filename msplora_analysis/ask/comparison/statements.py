"""A comparison in words: one verdict, a forest plot in text, and a sentence for each row that a paper could quote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from msplora_analysis.ask.comparison.uncertainty import LEVEL
from msplora_analysis.tables.rows import rows_of

if TYPE_CHECKING:
    import pandas as pd

SHORT = {
    "kl": "KL, as Figure 4",
    "kl_matched": "KL, matched",
    "js": "JS of spectra",
    "overlap_in": "overlap, inputs",
    "overlap_out": "overlap, outputs",
}
"""What forest plots call the measures."""

_WHAT = {
    "kl": "mean D_KL between the spectra of {pairs} (as in Figure 4)",
    "kl_matched": "mean D_KL between the spectra of {pairs} (cut to {k} values each)",
    "js": "mean Jensen–Shannon divergence between the spectra of {pairs} ({k} values each)",
    "overlap_in": "mean overlap beyond chance of the input directions of {pairs}",
    "overlap_out": "mean overlap beyond chance of the output directions of {pairs}",
}
_PAIRS = {"all": "all pairs of layers", "adjacent": "adjacent layers"}
_SUBJECTS = {"all": "layers", "adjacent": "adjacent layers"}
_SHORT_PAIRS = {"all": "all pairs", "adjacent": "neighbours"}
_MORE = {
    "kl": "differ {way} in their spectra (by KL)",
    "kl_matched": "differ {way} in their spectra (by KL)",
    "js": "differ {way} in their spectra",
    "overlap_in": "overlap {way} in their input directions",
    "overlap_out": "overlap {way} in their output directions",
}
_WIDTH = 23  # of the axis of a forest plot; odd, so that 0 has a place of its own


def verdict(table: pd.DataFrame) -> str:
    """What the comparison decides, in one paragraph."""
    rows = _shown(table)
    first = rows[0]
    head = f"{first['a']} − {first['b']}, {_runs(first)}: "
    if first["least_p"] > LEVEL:
        return head + f"so few cannot decide. {_needed(first)}"
    decided: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        if row["decided"]:
            decided.setdefault((row["measure"], row["estimate"] > 0), []).append(row)
    said = [_decision(of) for of in decided.values()]
    if same := [row for row in rows if row["equivalent"]]:
        named = ", ".join(f"{SHORT[row['measure']]} of {_PAIRS[row['pairs']]} (± {row['margin']:g})" for row in same)
        said.append(f"below the margin are the differences of {named}")
    judged = sum(row["p_value"] == row["p_value"] for row in rows)
    if said:
        rest = judged - sum(map(len, decided.values()))
        head += "; ".join(said) + (f". The other {rest} differences are not decided." if rest else ".")
    else:
        head += (
            f"nothing is decided. None of {judged} differences is more than chance gives, and none is shown to be 0."
        )
    unlike = dict.fromkeys(SHORT[row["measure"]] for row in rows if _unlike(row))
    return head + (f" Not judged, since the numbers of values differ: {'; '.join(unlike)}." if unlike else "")


def forest(table: pd.DataFrame) -> list[str]:
    """A forest plot in lines of text, 80 wide: differences with their intervals; ● is decided, ○ is not."""
    rows = _shown(table)
    confidence = f"{rows[0]['confidence']:.0%}"
    lines = [f"{'':29}{'A':>8}{'B':>8}{'A − B':>10}  {confidence + ' interval':^{_WIDTH}}"]
    for family in dict.fromkeys(row["measure"].split("_")[0] for row in rows):
        inside = [row for row in rows if row["measure"].split("_")[0] == family]
        ends = [abs(row[name]) for row in inside for name in ("estimate", "low", "high") if row[name] == row[name]]
        reach = max(ends, default=0.0) or 1.0
        for row in inside:
            label = f"{SHORT[row['measure']] if row['pairs'] == 'all' else '':18}{_SHORT_PAIRS[row['pairs']]:11}"
            values = f"{row['value_a']:8.4f}{row['value_b']:8.4f}{row['estimate']:+10.4f}"
            axis = f"{row['k_a']} against {row['k_b']} values" if _unlike(row) else _axis(row, reach)
            lines.append(f"{label}{values}  {axis}".rstrip())
        half = _WIDTH // 2
        lines.append(f"{'':57}{f'{-reach:.2g}':{half}}0{f'{reach:.2g}':>{half}}")
    return [*lines, "● decided, ○ not; all pairs of layers, and neighbours"]


def sentences(table: pd.DataFrame) -> Iterator[str]:
    """One sentence or two per question; a rank-matched row that repeats the one before it is left out."""
    yield from map(_difference, _shown(table))
    yield from map(_adjacent, rows_of(table[table["question"] != "difference"]))


def _shown(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The differences; a matched KL that is the plain one is left out."""
    rows = rows_of(table[table["question"] == "difference"])
    return [row for row in rows if row["measure"] != "kl_matched" or any(map(_unlike, rows))]


def _unlike(row: dict[str, Any]) -> bool:
    """Whether unequal numbers of values are compared."""
    return bool(row["k_a"] == row["k_a"] and row["k_a"] != row["k_b"])


def _decision(rows: list[dict[str, Any]]) -> str:
    """'under A layers overlap less in their input directions, by 0.002 (all pairs) and ..., on a scale where ...'."""
    first = rows[0]
    more = _MORE[first["measure"]].format(way="more" if first["estimate"] > 0 else "less")
    unit = _unit(first)
    sizes = [f"{abs(row['estimate']):.2g}{unit} ({_SHORT_PAIRS[row['pairs']]})" for row in rows]
    theirs = " and ".join(f"{row['value_b']:.2g}" for row in rows)
    said = f"under {first['a']} layers {more}, by {' and '.join(sizes)} where {first['b']} has {theirs}"
    known = first["same_layer"] == first["same_layer"]
    return said + (f" and the same layer of two runs {first['same_layer']:.2g}" if known else "")


def _axis(row: dict[str, Any], reach: float) -> str:
    def place(value: float) -> int:
        return round((_WIDTH - 1) / 2 * (1 + value / reach))

    axis = [" "] * _WIDTH
    axis[_WIDTH // 2] = "│"
    if row["low"] == row["low"]:
        for at in range(place(row["low"]), place(row["high"]) + 1):
            axis[at] = "─" if axis[at] == " " else "┼"
    if row["estimate"] == row["estimate"]:
        axis[place(row["estimate"])] = "●" if row["decided"] else "○"
    return "".join(axis)


def _difference(row: dict[str, Any]) -> str:
    what = _WHAT[row["measure"]].format(pairs=_PAIRS[row["pairs"]], k=row["k_a"])
    unit = _unit(row)
    said = (
        f"The {what} is {row['value_a']:.3g}{unit} under {row['a']} and {row['value_b']:.3g}{unit} under {row['b']}, "
        f"a difference of {row['estimate']:+.3g}"
    )
    if row["low"] == row["low"]:
        said += f" ({row['confidence']:.0%} interval {row['low']:+.3g} to {row['high']:+.3g}; {_runs(row)})"
    if _unlike(row):
        return f"{said}. {row['k_a']} values against {row['k_b']} allow no verdict."
    if row["least_p"] > LEVEL:
        return f"{said}. {_runs(row).capitalize()} cannot decide whether it is more than chance."
    if row["p_value"] != row["p_value"]:
        return f"{said}. Updates of zero leave it open."
    p = f"p = {row['p_value']:.2g} for all rows"
    if row["equivalent"]:
        return f"{said}: it is below {row['margin']:g}."
    if not row["decided"]:
        return f"{said}: the data do not decide which is greater ({p})."
    more = _MORE[row["measure"]].format(way="more" if row["estimate"] > 0 else "less")
    return f"{said}: {_SUBJECTS[row['pairs']]} {more} under {row['a']} ({p})."


def _adjacent(row: dict[str, Any]) -> str:
    what = _WHAT[row["measure"]].format(pairs="layers", k=row["k_a"])
    said = (
        f"Under {row['a']}, the {what} is {row['value_a']:.3g} for adjacent layers and {row['value_b']:.3g} for others"
    )
    if row["p_value"] != row["p_value"]:
        return f"{said}; too few layers to test that."
    runs = f"{row['n_a']} run{'s' if row['n_a'] > 1 else ''}"
    said += f" (permutation of layers, p = {row['p_value']:.2g} for all rows; {runs})"
    if row["decided"]:
        return f"{said}: neighbours {'overlap' if row['measure'].startswith('overlap') else 'differ'} " + (
            f"{'more' if row['estimate'] > 0 else 'less'} than distant layers."
        )
    return f"{said}: the data do not decide whether neighbours differ from distant layers."


def _runs(row: dict[str, Any]) -> str:
    if row["n_a"] == row["n_b"] == 1:
        return "one run of each"
    count = f"{row['n_a']}" if row["n_a"] == row["n_b"] else f"{row['n_a']} and {row['n_b']}"
    kind = "pairs of runs" if row["paired"] else "runs each" if row["n_a"] == row["n_b"] else "runs"
    return f"{count} {kind}" + (f" on {row['tasks']} tasks" if row["tasks"] > 1 else "")


def _needed(row: dict[str, Any]) -> str:
    """What would be enough."""
    if row["paired"]:
        return "Six pairs of runs can: train more seeds of both."
    return "Six pairs of runs can (equal task and seed), or four runs of each without pairs: train more seeds of both."


def _unit(row: dict[str, Any]) -> str:
    return "" if row["measure"].startswith("overlap") else " nats"
