"""Means of the tables of ``redundancy``: what stands out at the last checkpoint of each run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msplora_analysis.tables.checkpoints import last_checkpoints
from msplora_core.names import SCALES

if TYPE_CHECKING:
    import pandas as pd

MEANS = ["overlap_in", "overlap_out", "overlap_expected", "cosine", "js"]


def adjacent(pairs: pd.DataFrame) -> pd.Series:
    """Which pairs are of neighbours: no other compared layer (or mid group) of the run, scale and module between."""
    import pandas as pd

    key = ["run", "scale", "module"]
    ends = [pairs[[*key, side]].rename(columns={side: "group"}) for side in ("group_i", "group_j")]
    groups = pd.concat(ends).drop_duplicates().sort_values("group", kind="stable")
    groups["after"] = groups.groupby(key, dropna=False)["group"].shift(-1)
    low, high = pairs[["group_i", "group_j"]].min(axis=1), pairs[["group_i", "group_j"]].max(axis=1)
    merged = pairs[key].assign(group=low).merge(groups, on=[*key, "group"], how="left")
    return pd.Series((merged["after"].to_numpy() == high.to_numpy()).astype(bool), index=pairs.index)


def summary(pairs: pd.DataFrame, scales: pd.DataFrame) -> pd.DataFrame:
    """Means over modules and pairs at the last checkpoint of each run, a row for each comparison.

    Columns: run, step, epoch, between ("layer, adjacent", "layer, all", "global-mid", ...), pairs (how many), and the
    means of overlap_in, overlap_out, overlap_expected, cosine and js, leaving out updates of zero. Totals are left out:
    they share parts by design.
    """
    import pandas as pd

    layers = last_checkpoints(pairs[pairs["scale"] != "total"])
    near = adjacent(layers)
    between = last_checkpoints(scales)
    parts = [
        layers[near].assign(between=layers["scale"] + ", adjacent"),
        layers.assign(between=layers["scale"] + ", all"),
        between.assign(between=between["scale_i"] + "-" + between["scale_j"]),
    ]
    rows = pd.concat(parts, ignore_index=True)
    order = [
        *dict.fromkeys(parts[-1]["between"]),
        *(f"{scale}, {which}" for scale in SCALES for which in ("adjacent", "all")),
    ]
    rows["between"] = pd.Categorical(rows["between"], order)
    rows["run"] = pd.Categorical(rows["run"], pd.unique(pd.concat([pairs["run"], scales["run"]])))
    by = rows.groupby(["run", "between"], sort=True, observed=True)
    means = by[["step", "epoch"]].first().join(by.size().rename("pairs")).join(by[MEANS].mean())
    return means.reset_index().astype({"run": "str", "between": "str"})
