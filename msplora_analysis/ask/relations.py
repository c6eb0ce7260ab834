"""What a table of relations says, in words: are these adapters alike, and what happens where they are added?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from msplora_analysis.tables.added import SIDES
from msplora_analysis.tables.relations import ALL
from msplora_analysis.tables.rows import rows_of

if TYPE_CHECKING:
    import pandas as pd

ALIKE = 0.05
"""A cosine from here on is one of adapters of the same task: our choice, by the runs of docs/relate.md."""
LITTLE = 0.05
"""Nats an example, up to which predictions hold (docs/calibration.md)."""
_INSIDE = 3.0  # so many times what chance gives counts as shared directions


def sentences(table: pd.DataFrame) -> list[str]:
    """Of two adapters how they relate; of more, the most alike two and the groups. Then what adding costs, if known.

    Args:
        table: Of ``relate``.
    """
    whole = table[table["module"] == ALL]
    if len(whole) == 1:
        return [_of_two(rows_of(whole)[0]), *_costs(table)]
    return [*(_of_one_run(whole) if table.attrs.get("one_run") else _of_many(whole)), *_costs(table)]


def _of_one_run(whole: pd.DataFrame) -> list[str]:
    """How far it moved between each two checkpoints that follow each other, the last ones first."""
    labels = list(dict.fromkeys([*whole["a"], *whole["b"]]))
    norms = whole.set_index(["a", "b"])[["norm_difference", "norm_b"]]
    found = []
    for a, b in zip(labels[-2::-1], labels[:0:-1], strict=True):
        moved, norm = norms.loc[(a, b)]
        if norm > 0:
            found.append(f"{moved / norm:.1%} of its norm from {a} to {b.rpartition(' ')[2]}")
    if not found:
        return ["it did not move: every update is zero"]
    return [f"the update moved by {', before that '.join(found[:3])}"]


def _of_many(whole: pd.DataFrame) -> list[str]:
    known = whole.dropna(subset=["cosine"])
    if known.empty:
        return ["nothing can be said: all updates but one are zero, or only parts of them are known"]
    found = []
    most, least = (rows_of(known.loc[[at]])[0] for at in (known["cosine"].idxmax(), known["cosine"].idxmin()))
    found.append(f"most alike: {most['a']} and {most['b']} (cosine {most['cosine']:.2f})")
    if least["cosine"] <= -ALIKE:
        found.append(f"most opposed: {least['a']} and {least['b']} (cosine {least['cosine']:.2f})")
    together = groups(whole)
    several = [group for group in together if len(group) > 1]
    if len(together) > 1 and several:
        listed = "; ".join(", ".join(group[:6]) + (", ..." if len(group) > 6 else "") for group in several[:6])
        found.append(f"these belong together, by a mean cosine above {ALIKE:g}: {listed}")
    elif not several:
        found.append(f"no two have a cosine above {ALIKE:g}: none is like another")
    else:
        n = len(matrix(whole)[0])
        inner = (whole["cosine"] * whole["norm_a"] * whole["norm_b"]).sum()
        squares = (whole["norm_a"] ** 2 + whole["norm_b"] ** 2).sum() / (n - 1)
        found.append(
            f"all belong together, by mean cosines above {ALIKE:g}: what they have in common, their mean, has "
            f"{(1 + 2 * inner / squares) / n:.0%} of the squared norm (of unrelated ones {1 / n:.0%})"
        )
    return found


def _of_two(row: dict[str, Any]) -> str:
    cosine, a, b, both = (float(row[name]) for name in ("cosine", "norm_a", "norm_b", "norm_sum"))
    if np.isnan(cosine):
        empty = [str(row[side]) for side, norm in (("a", a), ("b", b)) if norm == 0]
        return f"the update of {' and of '.join(empty)} is zero" if empty else "only parts of the updates are known"
    ways = {"add to each other": cosine >= ALIKE, "fight: each takes back a part of the other": cosine <= -ALIKE}
    verdict = next((way for way, holds in ways.items() if holds), "hardly touch each other's weights")
    text = f"{row['a']} and {row['b']} {verdict}: cosine {cosine:.3f}, norms {a:.3g} and {b:.3g}, of the sum {both:.3g}"
    if cosine >= ALIKE:
        text += "; together they are a larger dose of what they share, so lower the weights"
    overlaps = [(side, float(row[f"overlap_{side}"]), float(row[f"expected_{side}"])) for side in ("in", "out")]
    shared = [f"{side}puts {overlap:.2g} (chance {chance:.2g})" for side, overlap, chance in overlaps]
    more = any(overlap > _INSIDE * chance for _, overlap, chance in overlaps)
    return f"{text}. Overlap of {' and '.join(shared)}: {'more than' if more else 'about'} what unrelated ones have"


def _costs(table: pd.DataFrame) -> list[str]:
    """What adding one to another is predicted to cost the task of that; of many, the least and the most."""
    losses = table.attrs.get("losses", {})
    found = []
    for label, loss in losses.items():
        costs = {
            (row[other], row["name"]): float(row[f"predicted_kl_{side}"])
            for side, other in SIDES
            for row in rows_of(table[table[side] == label].dropna(subset=[f"predicted_kl_{side}"]))
        }
        of_all = {other: cost for (other, name), cost in costs.items() if not name}
        if not of_all:
            continue
        unit = "mean squared difference" if loss == "regression" else "nats an example"
        least, most = min(of_all, key=lambda o: of_all[o]), max(of_all, key=lambda o: of_all[o])
        if len(of_all) > 1:
            found.append(
                f"added to {label}, by prediction: {least} costs its task least ({of_all[least]:.2g} {unit}), {most} "
                f"most ({of_all[most]:.2g})"
            )
            continue
        where = max((cost, name) for (_, name), cost in costs.items() if name)[1]
        text = (
            f"added to {label}, {most} is predicted to change its outputs by {of_all[most]:.2g} {unit}, most by {where}"
        )
        if loss != "regression" and of_all[most] > LITTLE:
            text += f"; at a weight of {(LITTLE / of_all[most]) ** 0.5:.2g} by {LITTLE:g}"
        found.append(text)
    return found


def linkage(whole: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """The labels, and the tree of average linkage by 1 - cosine, as scipy has it; what is not known counts as 1.

    Args:
        whole: The rows "all" of three adapters or more.
    """
    from scipy.cluster.hierarchy import linkage as tree

    labels, cosine = matrix(whole)
    i, j = np.triu_indices(len(labels), 1)
    return labels, tree(1 - np.nan_to_num(cosine[i, j]), "average", optimal_ordering=True)


def matrix(whole: pd.DataFrame, column: str = "cosine") -> tuple[list[str], np.ndarray]:
    """The labels, and a symmetric column of the rows "all" as a square, 1 on the diagonal; NaN for no common module."""
    labels = list(dict.fromkeys([*whole["a"], *whole["b"]]))
    place = {label: i for i, label in enumerate(labels)}
    square = np.full((len(labels), len(labels)), np.nan)
    np.fill_diagonal(square, 1.0)
    i, j = whole["a"].map(place).to_numpy(), whole["b"].map(place).to_numpy()
    square[i, j] = square[j, i] = whole[column].to_numpy(np.float64)
    return labels, square


def groups(whole: pd.DataFrame) -> list[list[str]]:
    """Adapters that average linkage joins at a mean cosine above ALIKE."""
    from scipy.cluster.hierarchy import fcluster

    labels, tree = linkage(whole)
    numbers = fcluster(tree, 1 - ALIKE, "distance")
    return [[label for label, own in zip(labels, numbers, strict=True) if own == n] for n in dict.fromkeys(numbers)]
