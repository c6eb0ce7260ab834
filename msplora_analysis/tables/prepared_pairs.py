"""The tables of redundancy as figures start from them: methods named, stacks told, epochs aligned."""

from collections.abc import Mapping

import pandas as pd

from msplora_analysis.errors import AnalysisError
from msplora_analysis.tables.checkpoints import align, one_per_epoch
from msplora_analysis.tables.matrices import stacks_of
from msplora_analysis.tables.pairs import MEASURES
from msplora_core.names import method_label


def prepare_pairs(table: pd.DataFrame, labels: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The table with `variant` and `stack`, all runs of a method at the same epochs (see `checkpoints.align`).

    Args:
        table: What `load_pairs` or `load_scale_pairs` returns.
        labels: The label of the method of each run; None: told from the table by method and, where there is a column
            `k` (`details=True`), the rank of the layers' own factors.

    Returns:
        `stack` is empty where the table has no names. Added too: `chance_in` and `chance_out`, what random subspaces
        give on either side, or where the table lacks these details the mean of both.
    """
    required = ["run", "step", "epoch", "module", "group_i", "group_j", *MEASURES]
    if missing := [column for column in required if column not in table.columns]:
        raise AnalysisError(
            f"the table lacks the column {', '.join(missing)}: pass what load_pairs or load_scale_pairs returns"
        )
    names = table.get("name_i", pd.Series("", index=table.index))
    # By way of Float64, which takes NA in a column of objects too.
    when = {name: table[name].astype("Float64").astype("float64") for name in ("step", "epoch")}
    labels = _labels(table) if labels is None else labels
    if unknown := sorted(set(table["run"]) - set(labels)):
        raise AnalysisError(f"run {unknown[0]} has pairs, but no spectra: pass tables of the same runs")
    chance = {side: table.get(f"expected_{side}", table["overlap_expected"]) for side in ("in", "out")}
    when |= {f"chance_{side}": values for side, values in chance.items()}
    prepared = table.assign(**when, stack=stacks_of(names), variant=table["run"].map(labels).astype(object))
    return align(one_per_epoch(prepared)) if len(prepared) else prepared


def _labels(table: pd.DataFrame) -> dict[str, str]:
    """Run → 'LoRA r=8' or 'MSPLoRA layer r=2'."""
    labels = {}
    for run, rows in table.groupby("run", sort=False):
        between_scales = "scale_j" in rows
        layers = rows[rows["scale_j" if between_scales else "scale"] == "layer"]
        is_msplora = between_scales or len(layers) < len(rows)
        rank = f"{layers['k'].max()}" if "k" in rows and len(layers) else None
        of_layers = f" layer r={rank}" if rank else ""
        labels[str(run)] = method_label("msplora") + of_layers if is_msplora else method_label("lora", rank)
    return labels
