"""What findings find of planted faults, and how often they speak of healthy runs: the tables of docs/findings.md.

    python study/fault_tables.py --folder runs/faults          # of the rows that study/faults.py left
    python study/fault_tables.py                               # redraws from the published rows, runs.csv.gz

A run counts for a kind of finding only if the check could speak of it: `norm-jump` needs a checkpoint between the first
and the last. A fault in a layer counts as found where that layer is named. Bounds are exact (Clopper and Pearson 1934),
one-sided, at 95 %; they take runs as independent, which seeds of one task are not quite. Healthy means that nothing was
planted: some of these runs learned little, as `metric` in runs.csv.gz shows.

    runs.csv.gz         a row for each run: places that each kind of finding names, and the number behind it
    false_alarms.csv    for each kind: in how many healthy runs it was seen, and the bounds
    detected.csv        for each fault and strength, and the kinds that are there for it: in how many runs it was found,
                        and the bounds
    everywhere.csv      the same for every kind
    fitted.csv          thresholds set on half of the runs so that no healthy run there has the finding, and what they
                        do on the other half; the same of the thresholds that are shipped. A half is of tasks: CoLA,
                        STS-B and SST-2, or MRPC, RTE and QNLI. Without Lily, whose layers share factors by design
    detected.png        everywhere.csv as a picture, for errors and warnings

The table of docs/findings.md is written anew, of false_alarms.csv and detected.csv.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from signs import ASKED, NUMBERLESS, SIGNS

from msplora_analysis.ask.findings import KINDS

ABOUT = ["model", "task", "method", "seed", "fault", "strength", "trained", "checkpoints", "metric", "learning_rate"]
HALVES = {"cola": 0, "stsb": 0, "sst2": 0, "mrpc": 1, "rte": 1, "qnli": 1}
ANY = "an error or a warning"
GRAVE = [kind for kind in ASKED if KINDS[kind].severity in ("error", "warning")]
NAMES = {
    "healthy": "healthy",
    "not finite": "one value is NaN",
    "frozen layer": "a layer as before training",
    "copied layer": "a layer copied from its neighbour",
    "a layer": "a layer × {}",
    "all layers": "all layers × {}",
    "half precision": "gradients in float16 × {}",
    "frozen layers": "layers not trained: {}",
    "tied layers": "layers tied: {}",
    "learning rate": "learning rate × {}",
    "alpha": "alpha × {}",
    "rank": "rank {}",
    "noisy labels": "part of labels shuffled: {}",
}
EXPECTED = {
    "healthy": (),
    "not finite": ("non-finite",),
    "frozen layer": ("no-update",),
    "copied layer": ("identical-update",),
    "a layer": ("norm-outlier", "norm-jump"),
    "all layers": ("large-update",),
    "half precision": ("non-finite",),
    "frozen layers": ("no-update",),
    "tied layers": ("identical-update",),
    "learning rate": ("large-update", "barely-learned"),
    "alpha": ("large-update", "barely-learned"),
    "rank": ("rank-oversized",),
    "noisy labels": ("barely-learned",),
}
"""The findings that are there for a fault."""
FROM = {("learning rate", "large-update"): 1, ("noisy labels", "barely-learned"): 1}
"""From which strength on, where weaker ones cause something else."""


def gathered(folder: Path) -> pd.DataFrame:
    """All rows of a folder of study/faults.py."""
    files = sorted(folder.glob("*/*.csv"))
    planted = [pd.read_csv(path).assign(trained=False) for path in files if path.parent.name == "planted"]
    trained = [pd.read_csv(path).assign(trained=True) for path in files if path.parent.name != "planted"]
    trained = [table.assign(metric=table["last"]) for table in trained]
    table = pd.concat(planted + trained, ignore_index=True)
    columns = [name for kind in ASKED for name in (f"{kind} value", kind) if name in table]
    return table.reindex(columns=ABOUT + columns).drop_duplicates([*ABOUT[:6]], keep="last")


def bounds(count: int, runs: int) -> dict[str, Any]:
    """The one-sided bounds of a rate."""
    if not runs:
        return {"runs": 0, "at_least": 0.0, "at_most": 1.0}
    low, high = (
        getattr(binomtest(count, runs, alternative=side).proportion_ci(0.95, "exact"), end)
        for side, end in (("greater", "low"), ("less", "high"))
    )
    return {"runs": runs, "at_least": round(low, 4), "at_most": round(high, 4)}


def has(runs: pd.DataFrame, kind: str) -> pd.Series:
    """Whether each run has a finding, by the threshold as it is now; without runs that its check cannot speak of."""
    if kind not in SIGNS:
        return runs[kind].dropna() > 0
    sign, value = SIGNS[kind], runs[f"{kind} value"].dropna()
    threshold = getattr(sign.module, sign.threshold)
    return value <= threshold if sign.falls else value >= threshold


def has_grave(runs: pd.DataFrame) -> pd.Series:
    """Whether each run has an error or a warning."""
    return pd.concat([has(runs, kind) for kind in GRAVE], axis="columns").eq(True).any(axis="columns")


def false_alarms(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    healthy = runs[runs["fault"] == "healthy"]
    for kind in ASKED:
        able = has(healthy, kind)
        yield {"id": kind, "severity": KINDS[kind].severity, "seen": able.sum()} | bounds(able.sum(), len(able))


def detected(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row in everywhere(runs):
        is_expected = row["id"] in EXPECTED[row["fault"]]
        if is_expected and row["strength"] >= FROM.get((row["fault"], row["id"]), 0):
            yield row | {"strength": written(row["strength"])}


def written(strength: float) -> str:
    """A strength as it is read: 1/30, 0.1, 2^20."""
    if strength > 1000:
        return f"2^{np.log2(strength):.0f}"
    return f"1/{1 / strength:.0f}" if strength < 0.1 else f"{strength:g}"


def everywhere(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for fault in NAMES:
        for strength, own in runs[runs["fault"] == fault].groupby("strength"):
            of_kinds = {kind: has(own, kind) for kind in ASKED} | {ANY: has_grave(own)}
            for kind, found in of_kinds.items():
                if len(found):
                    about = {"fault": fault, "strength": strength, "id": kind, "found": found.sum()}
                    yield about | bounds(found.sum(), len(found))


def fitted(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Of each kind with a number: thresholds by half, false alarms and detection on the other half."""
    runs = runs[runs["method"] != "lily"]
    half = runs["task"].map(HALVES)
    for kind, sign in SIGNS.items():
        value = runs[f"{kind} value"] * (-1 if sign.falls else 1)
        is_healthy = (runs["fault"] == "healthy") & value.notna()
        shipped = getattr(sign.module, sign.threshold) * (-1 if sign.falls else 1)
        for source in ("shipped", "fitted"):
            seen = pd.Series(np.nan, index=runs.index)
            thresholds = []
            for other in (0, 1):
                known, asked = is_healthy & (half == 1 - other), value.notna() & (half == other)
                if not known.any():
                    continue
                threshold = shipped if source == "shipped" else value[known].max()
                # what is fitted must be passed: the largest healthy number is none
                is_seen = value[asked] >= threshold if source == "shipped" else value[asked] > threshold
                seen[asked] = is_seen.astype(float)
                thresholds.append(abs(threshold))
            for (fault, strength), own in seen.groupby([runs["fault"], runs["strength"]], sort=False):
                able = own.dropna()
                if len(able):
                    about = {"id": kind, "threshold": source, "values": " ".join(f"{x:.3g}" for x in thresholds)}
                    yield (
                        about
                        | {"fault": fault, "strength": strength, "found": int(able.sum())}
                        | bounds(int(able.sum()), len(able))
                    )


def draw(runs: pd.DataFrame, path: Path) -> None:
    """A row for each fault and strength, a column for each error and warning: in how many runs of a hundred."""
    from matplotlib.figure import Figure

    order = [(fault, x) for fault in NAMES for x in sorted(runs.loc[runs["fault"] == fault, "strength"].unique())]
    columns = [*GRAVE, ANY]
    shares, names = [], []
    for fault, strength in order:
        own = runs[(runs["fault"] == fault) & (runs["strength"] == strength)]
        shares.append([(has_grave(own) if kind == ANY else has(own, kind)).mean() for kind in columns])
        names.append(f"{NAMES[fault].format(written(strength))}  ({len(own)})")
    values = np.array(shares, dtype=float)
    figure = Figure(figsize=(7, 0.6 + 0.22 * len(names) + 1), layout="constrained")
    ax = figure.subplots()
    ax.imshow(values, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    for (row, column), share in np.ndenumerate(values):
        if not np.isnan(share):
            text = "·" if share == 0 else "<1" if share < 0.005 else f"{100 * share:.0f}"
            ax.text(column, row, text, ha="center", va="center", fontsize=7, color="0.6" if share == 0 else "black")
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.axhline(0.5, color="0.4", linewidth=0.8)
    ax.axvline(len(columns) - 1.5, color="0.4", linewidth=0.8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("runs of a hundred that have the finding; in brackets how many runs", fontsize=8, loc="left")
    figure.savefig(path, dpi=150)


def write_page(runs: pd.DataFrame, page: Path) -> None:
    """Put the rates into the table of the page."""
    found, lines = pd.DataFrame(detected(runs)), []
    for seen in false_alarms(runs):
        own = found[found["id"] == seen["id"]]
        planted = "; ".join(_rates(fault, rows) for fault, rows in own.groupby("fault", sort=False)) or "not measured"
        rate = f"{seen['seen']} of {seen['runs']} | {100 * seen['at_most']:.1f} %"
        lines.append(f"| [`{seen['id']}`](#{seen['id']}) | {seen['severity']} | {rate} | {planted} |")
    for kind in NUMBERLESS:
        lines.append(f"| [`{kind}`](#{kind}) | {KINDS[kind].severity} | not counted |  | not measured |")
    text = page.read_text(encoding="utf-8")
    head = "|---|---|---:|---:|---|\n"
    page.write_text(re.sub(rf"({re.escape(head)})(\|.*\n)+", lambda m: m[1] + "\n".join(lines) + "\n", text))


def _rates(fault: str, rows: pd.DataFrame) -> str:
    """A fault with what was found of it: "a layer × 2: 5 of 160, × 4: 61 of 160"."""
    is_factor = NAMES[fault].endswith("× {}")
    first, *others = rows.itertuples()
    found = [f"{NAMES[fault].format(first.strength)}: {first.found} of {first.runs}"]
    found += [f"{'× ' * is_factor}{row.strength}: {row.found} of {row.runs}" for row in others]
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).parents[1]
    parser.add_argument("--folder", type=Path, help="of study/faults.py; default: the published runs.csv.gz of --out")
    parser.add_argument("--out", type=Path, default=root / "figures" / "findings", help="default: figures/findings")
    parser.add_argument("--page", type=Path, default=root / "docs" / "findings.md", help="default: docs/findings.md")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.csv.gz"
    if options.folder:
        compressed = {"method": "gzip", "mtime": 0}
        gathered(options.folder).to_csv(
            path, index=False, float_format="%.5g", lineterminator="\n", compression=compressed
        )
    runs = pd.read_csv(path)
    for table in (false_alarms, detected, everywhere, fitted):
        pd.DataFrame(table(runs)).to_csv(options.out / f"{table.__name__}.csv", index=False, lineterminator="\n")
    if options.page.is_file():
        write_page(runs, options.page)
    draw(runs, options.out / "detected.png")


if __name__ == "__main__":
    main()
