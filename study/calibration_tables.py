"""Tables and figures of what study/calibration.py measured; docs/calibration.md says what they show.

python study/calibration_tables.py --folder runs/calibration --out figures/calibration
python study/calibration_tables.py                  # redraws the published ones from measured.parquet
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from msplora_analysis.show.drawing.colours import PALETTE
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.plot import Plot
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style

RUN = ["model", "task", "method", "seed"]
CUT = ["cut", "what", "rank"]
MEASURES = {
    "energy": "energy ‖ΔW‖²",
    "effective_rank": "effective rank",
    "m_eff_1": "M_eff-1",
    "input_energy": "input-weighted energy",
    "output_energy": "output-weighted energy",
    "task_energy": "task-weighted energy",
    "predicted_alone": "gates, each module alone",
    "predicted_kl": "KL predicted by gates",
}
NAMES = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}
SMALL = 0.05
"""Nats, or squared units: what counts as a small cut."""
REGRESSIONS = ("stsb",)


def main() -> None:
    options = _options()
    tables = {name: _all(options, name) for name in ("measured", "examples", "cores", "steps")}
    runs = options.folder / "runs"
    if runs.is_dir():
        scores(runs).to_csv(options.out / "runs.csv", index=False, float_format="%.6g", lineterminator="\n")
    for plot in plots(**tables):
        plot.write(options.out, options.formats)


def plots(measured: pd.DataFrame, examples: pd.DataFrame, cores: pd.DataFrame, steps: pd.DataFrame) -> Iterator[Plot]:
    """Every table, with its figure if it has one."""
    yield Plot("correlations", correlations(measured), draw_correlations)
    yield Plot("ratios", ratios(measured))
    yield Plot("ratios_by_cut", ratios_by_cut(measured))
    yield Plot("predicted_against_measured", points(measured), draw_predicted)
    yield Plot("compression", compression(measured), draw_compression)
    yield Plot("limits", limits(measured))
    yield Plot("scales", scales(measured), draw_scales)
    yield Plot("examples", by_examples(measured, examples))
    yield Plot("cores", by_cores(cores))
    yield Plot("steps", by_steps(measured, steps))


def cuts(measured: pd.DataFrame) -> pd.DataFrame:
    """The rows of cuts that cut something, with measured over predicted."""
    cut = measured[(measured["predicted_kl"] > 0) & (measured["kl"] > 0) & (measured["cut"] != "noise")]
    return cut.assign(ratio=cut["kl"] / cut["predicted_kl"])


def points(measured: pd.DataFrame) -> pd.DataFrame:
    """Every cut's predicted and measured cost, to four digits."""
    table = cuts(measured)[[*RUN, *CUT, "predicted_kl", "kl"]]
    return table.assign(
        **{name: table[name].map(lambda value: float(f"{value:.4g}")) for name in ("predicted_kl", "kl")}
    )


def correlations(measured: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of every measure with what cuts cost, within a run; its quartiles over the runs of a task.

    ``against``: the KL (for regression the squared difference), or the loss of the metric. ``task`` "all": all runs.
    """
    rows = []
    for kind in ("module", "layer", "random"):
        for run, of_run in measured[measured["cut"] == kind].groupby(RUN):
            costs = {"kl": of_run["kl"], "metric": -of_run["metric_change"]}
            for against, cost in costs.items():
                for measure in MEASURES:
                    value = of_run[measure].corr(cost, method="spearman")
                    about = dict(zip(RUN, run, strict=True)) | {"cut": kind, "against": against, "measure": measure}
                    rows += [about | {"task": task, "value": value} for task in (about["task"], "all")]
    grouped = pd.DataFrame(rows).groupby(["cut", "against", "model", "task", "measure"], sort=False)["value"]
    return grouped.agg(runs="count", **_quantiles(25, 50, 75)).round(3).reset_index()


def ratios(measured: pd.DataFrame) -> pd.DataFrame:
    """Measured over predicted KL: quantiles by what was predicted, and by what was measured; no constant is fitted."""
    table = cuts(measured)
    rows = []
    edges = [1e-5, 1e-3, 1e-2, SMALL, 0.2, 1.0, np.inf]
    for by in ("predicted_kl", "kl"):
        labels = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        size = pd.cut(table[by], edges, labels=labels).astype("string")
        small = table[by].between(edges[0], SMALL)
        sized = pd.concat([table.assign(size=size), table[small].assign(size=f"all below {SMALL}")])
        sized = pd.concat([sized, sized[~sized["task"].isin(REGRESSIONS)].assign(task="all but stsb")])
        grouped = sized.dropna(subset="size").groupby(["model", "task", "size"])["ratio"]
        within = grouped.agg(lambda ratio: ratio.between(0.5, 2).mean()).rename("within_factor_2")
        rows.append(grouped.agg(cuts="count", **_quantiles(10, 50, 90)).join(within).reset_index().assign(by=by))
    return pd.concat(rows).round(3).set_index("by").reset_index()


def ratios_by_cut(measured: pd.DataFrame) -> pd.DataFrame:
    """Measured over predicted KL of cuts predicted to be small, by kind; and of MiniLM's modules, by name."""
    table = cuts(measured)
    table = table[table["predicted_kl"].between(1e-5, SMALL) & ~table["task"].isin(REGRESSIONS)]
    kinds = table.assign(what="")
    modules = table[(table["cut"] == "module") & (table["model"] == "minilm")]
    both = pd.concat([kinds.assign(cut="all"), kinds, modules])
    grouped = both.groupby(["model", "cut", "what"])["ratio"]
    within = grouped.agg(lambda ratio: ratio.between(0.5, 2).mean()).rename("within_factor_2")
    return grouped.agg(cuts="count", **_quantiles(10, 50, 90)).join(within).round(3).reset_index()


def compression(measured: pd.DataFrame) -> pd.DataFrame:
    """What every module cut to so many directions costs, by the plain and by the task-weighted spectrum: medians.

    ``worse_``: in how many runs the metric fell beyond its interval (95 %, paired bootstrap over examples).
    """
    keep = measured[measured["cut"].isin(["rank", "rank_task"])]
    keep = keep.assign(worse=keep["high"] < 0)
    pairs = keep.pivot(index=[*RUN, "rank"], columns="cut", values=["kl", "metric_change", "worse"])
    table = pd.DataFrame(
        {
            "kl_plain": pairs["kl", "rank"],
            "kl_weighted": pairs["kl", "rank_task"],
            "ratio": pairs["kl", "rank_task"] / pairs["kl", "rank"],
            "metric_change_plain": pairs["metric_change", "rank"],
            "metric_change_weighted": pairs["metric_change", "rank_task"],
            "worse_plain": pairs["worse", "rank"],
            "worse_weighted": pairs["worse", "rank_task"],
        }
    )
    table = table.astype(float).reset_index()
    table = pd.concat([table, table.assign(task="all")])
    grouped = table.groupby(["model", "task", "rank"])
    medians = grouped[["kl_plain", "kl_weighted", "metric_change_plain", "metric_change_weighted"]].median()
    quantiles = grouped["ratio"].agg(runs="count", **_quantiles(25, 50, 75)).add_prefix("ratio_")
    mean = grouped["ratio"].agg(lambda ratio: np.exp(np.log(ratio).mean())).rename("ratio_geometric_mean")
    worse = grouped[["worse_plain", "worse_weighted"]].sum()
    found = medians.join([quantiles, mean, worse]).rename(columns={"ratio_runs": "runs"}).reset_index()
    found.loc[found["task"] == "all", list(medians)] = np.nan  # nats and squares of points have no common median
    return found.astype({"rank": int}).round(6)


def limits(measured: pd.DataFrame) -> pd.DataFrame:
    """The least rank of each classifier whose predicted KL is within a limit, and what it does to the metric."""
    cut = measured[(measured["cut"] == "rank_task") & ~measured["task"].isin(REGRESSIONS)]
    rows = []
    for limit in (0.001, 0.002, 0.003, 0.004, 0.005, 0.01):
        chosen = cut[cut["predicted_kl"] <= limit].sort_values("rank").groupby(RUN).first().reset_index()
        for part, of in (("seed 0", chosen["seed"] == 0), ("other seeds", chosen["seed"] != 0)):
            change = chosen.loc[of, "metric_change"]
            counts = {f"lost_more_than_{loss:g}": int((change < -loss).sum()) for loss in (0.01, 0.02)}
            row = {"limit": limit, "part": part, "adapters": len(change), **counts}
            rows.append(row | {"mean_change": change.mean(), "mean_rank": chosen.loc[of, "rank"].mean()})
    return pd.DataFrame(rows)


def scales(measured: pd.DataFrame) -> pd.DataFrame:
    """Of each scale: its spectrum, what leaving it out costs, what it does alone, and what cutting it to 2 costs.

    Medians over the runs of cola, mrpc and rte, whose KL is in nats; ``largest_``: in how many of all runs it is the
    largest of the three scales.
    """
    of = measured[measured["cut"].isin(["scale", "only_scale", "scale_rank"]) & (measured["what"] != "total")]
    of = of[of["method"] != "lora-8"]
    without, alone = (of[of["cut"] == kind].set_index([*RUN, "what"]) for kind in ("scale", "only_scale"))
    to_2 = of[(of["cut"] == "scale_rank") & (of["rank"] == 2)].set_index([*RUN, "what"])["kl"]
    spectrum = ["effective_rank", "task_effective_rank", "m_eff_1", "energy", "task_energy"]
    table = without[[*spectrum, "kl", "predicted_kl", "metric_change"]].join(alone["kl"].rename("kl_alone"))
    table = table.join(to_2.rename("kl_cut_to_2")).reset_index().rename(columns={"what": "scale"})
    for column in ("effective_rank", "task_effective_rank", "energy", "task_energy", "kl"):
        table[f"largest_{column}"] = table[column] == table.groupby(RUN)[column].transform("max")
    number = table.groupby(["model", "method", "scale"]).size().rename("runs")
    columns = [*spectrum, "kl", "predicted_kl", "metric_change", "kl_alone", "kl_cut_to_2"]
    largest = [name for name in table if name.startswith("largest_")]
    grouped = table.groupby(["model", "method", "scale"])
    order = {"global": 0, "mid": 1, "layer": 2}
    classes = table[~table["task"].isin(REGRESSIONS)].groupby(["model", "method", "scale"])
    found = classes[columns].median().join([grouped[largest].sum(), number]).reset_index()
    return found.sort_values(
        ["model", "method", "scale"], key=lambda c: c.map(order) if c.name == "scale" else c
    ).round(5)


def by_examples(measured: pd.DataFrame, examples: pd.DataFrame) -> pd.DataFrame:
    """Predictions from so many examples: their ratio for small cuts, their correlation; and what cuts they choose.

    ``chosen_rank_2``: KL of every module cut to 2 directions that these examples chose, over that of 512 sampled ones.
    """
    true = measured[[*RUN, *CUT, "kl"]].rename(columns={"kl": "measured_kl"})
    joined = examples.merge(true, on=[*RUN, *CUT])
    joined = joined[(joined["cut"] != "rank_task") & (joined["cut"] != "noise") & (joined["predicted_kl"] > 1e-6)]
    small = joined[joined["measured_kl"].between(1e-6, SMALL)]
    key = ["labels", "examples"]
    ratio = (small["measured_kl"] / small["predicted_kl"]).groupby([small[name] for name in key])
    found = ratio.agg(cuts="count", **_quantiles(10, 50, 90))
    modules = joined[joined["cut"] == "module"]
    for name in ("predicted_kl", "task_energy"):
        of_runs = modules.groupby([*key, *RUN])[[name, "measured_kl"]].apply(
            lambda run, name=name: run[name].corr(run["measured_kl"], method="spearman")
        )
        found[f"spearman_{name}"] = of_runs.groupby(key).median()
    chosen = examples[(examples["cut"] == "rank_task") & (examples["rank"] == 2)].set_index([*key, *RUN])["kl"]
    usual = chosen.xs(("sampled", 512), level=key)
    relative = chosen / usual.reindex(chosen.index.droplevel(key)).to_numpy()
    found["chosen_rank_2"] = relative.groupby(key).median()
    found["runs"] = relative.groupby(key).size()
    return found.round(3).reset_index()


def by_cores(cores: pd.DataFrame) -> pd.DataFrame:
    """KL of every module cut to so many directions that are chosen in one way, over that of the task-weighted ones.

    ``cut``: the way; see calibration_cores.py. ``median``, ``least``, ``most``: over the runs; ``predicted``: measured
    over predicted KL, the median over runs but those of a regression.
    """
    of = cores[~cores["cut"].isin(["none", "kl"])].astype({"rank": int})
    task = of[of["cut"] == "task"].set_index([*RUN, "rank"])["kl"].rename("task_kl")
    of = of.join(task, on=[*RUN, "rank"])
    classes = ~of["task"].isin(REGRESSIONS)
    of = of.assign(relative=of["kl"] / of["task_kl"], predicted=(of["kl"] / of["predicted_kl"]).where(classes))
    grouped = of.groupby(["model", "cut", "rank"])
    found = grouped["relative"].agg(runs="count", median="median", least="min", most="max")
    return found.join(grouped["predicted"].median()).round(3).reset_index()


def by_steps(measured: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Predictions from 32 to 4,096 examples: their ratio and correlation, and what the cut to 2 that they choose costs.

    ``chosen_rank_2``: what all examples predict of that cut, over what they predict of the one that all of them choose.
    """
    true = measured[[*RUN, *CUT, "kl"]].drop_duplicates([*RUN, *CUT])
    joined = steps[steps["cut"] != "rank_task"].merge(true, on=[*RUN, *CUT])
    joined = joined.assign(ratio=joined["kl"] / joined["predicted_kl"])
    keys = ["task", "labels", "examples"]
    found = joined[joined["kl"].between(1e-6, SMALL)].groupby(keys)["ratio"].agg(cuts="count", **_quantiles(10, 50, 90))
    modules = joined[joined["cut"] == "module"].groupby([*keys, *RUN[:1], *RUN[2:]])[["predicted_kl", "kl"]]
    found["spearman"] = modules.apply(lambda of: of.corr("spearman").iloc[0, 1]).groupby(keys).median()
    chosen = steps[(steps["cut"] == "rank_task") & (steps["rank"] == 2)]
    best = chosen[chosen["labels"] == "sampled"].sort_values("examples").groupby(RUN)["priced_kl"].last().rename("best")
    chosen = chosen.join(best, on=RUN)
    found["chosen_rank_2"] = (chosen["priced_kl"] / chosen["best"]).groupby([chosen[name] for name in keys]).median()
    return found.round(3).reset_index()


def scores(runs: Path) -> pd.DataFrame:
    """One row for each run, from its run.json."""
    rows = []
    for file in sorted(runs.glob("*/*/*/*/run.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        model, task, method, _ = file.parent.relative_to(runs).parts
        settings, results = record["settings"], record["results"]
        rows.append(
            {"model": model, "task": task, "method": method, "seed": settings["seed"], "epochs": settings["epochs"]}
            | {"learning_rate": settings["learning_rate"], "metric": record["metric"]["name"]}
            | {"before": results[0]["metric"], "last": results[-1]["metric"]}
            | {"last_validation_loss": results[-1]["validation_loss"], "device": record["device"]}
            | {library: record["versions"][library] for library in ("torch", "transformers", "peft")}
        )
    return pd.DataFrame(rows)


def _quantiles(*percents: int) -> dict[str, object]:
    return {f"p{percent}": lambda values, q=percent / 100: values.quantile(q) for percent in percents}


@styled
def draw_correlations(table: pd.DataFrame, style: Style) -> Figure:
    figure = Figure(figsize=(style.widest, 2.9), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    table = table[(table["against"] == "kl") & (table["task"] == "all")]
    for ax, kind in zip(axes, ("module", "layer", "random"), strict=True):
        for place, model in enumerate(NAMES):
            own = table[(table["cut"] == kind) & (table["model"] == model)].set_index("measure").loc[list(MEASURES)]
            y = np.arange(len(own)) + 0.35 * place
            ax.barh(y, own["p50"], height=0.33, color=PALETTE[place], label=NAMES[model])
            ax.hlines(y, own["p25"], own["p75"], color="0.2", linewidth=0.8)
        ax.axvline(0, color="0.5", linewidth=0.6)
        ax.set(title={"module": "leaving out a module", "layer": "leaving out a layer", "random": "random cuts"}[kind])
        ax.set(xlim=(-1, 1), xlabel="Spearman's correlation with the KL")
    axes[0].set_yticks(np.arange(len(MEASURES)) + 0.17, list(MEASURES.values()))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def draw_predicted(table: pd.DataFrame, style: Style) -> Figure:
    figure = Figure(figsize=(style.widest, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, model in zip(axes, NAMES, strict=True):
        for colour, (task, own) in zip(PALETTE, table[table["model"] == model].groupby("task"), strict=False):
            ax.plot(own["predicted_kl"], own["kl"], ".", ms=1.6, color=colour, label=task, rasterized=True)
        line = np.array([1e-6, 20])
        ax.plot(line, line, color="0.2", linewidth=0.8)
        ax.fill_between(line, line / 2, line * 2, color="0.85", zorder=0)
        ax.set(xscale="log", yscale="log", xlim=(1e-6, 20), ylim=(1e-6, 20), title=NAMES[model], xlabel="predicted")
    axes[0].set(ylabel="measured KL, nats an example\n(stsb: mean squared difference)")
    axes[0].legend(loc="upper left", markerscale=5)
    return figure


@styled
def draw_compression(table: pd.DataFrame, style: Style) -> Figure:
    tasks = sorted(set(table["task"]) - {"all"})
    figure = Figure(figsize=(style.widest, 3.2), layout="constrained")
    axes = figure.subplots(len(NAMES), len(tasks), sharex=True, squeeze=False)
    for row, model in zip(axes, NAMES, strict=True):
        for ax, task in zip(row, tasks, strict=True):
            own = table[(table["model"] == model) & (table["task"] == task)]
            ax.plot(own["rank"], own["kl_plain"], "o--", ms=3, color=PALETTE[0], label="plain")
            ax.plot(own["rank"], own["kl_weighted"], "s-", ms=3, color=PALETTE[1], label="task-weighted")
            ax.set(yscale="log", title=f"{NAMES[model]}, {task}", xticks=[1, 2, 3, 4])
        row[0].set_ylabel("KL, nats\n(stsb: squared)")
    for ax in axes[-1]:
        ax.set_xlabel("directions a module")
    axes[0, 0].legend(loc="lower left")
    return figure


@styled
def draw_scales(table: pd.DataFrame, style: Style) -> Figure:
    figure = Figure(figsize=(style.widest, 2.4), layout="constrained")
    shown = {
        "effective_rank": "effective rank",
        "task_effective_rank": "task-weighted effective rank",
        "kl": "KL without it",
        "kl_cut_to_2": "KL with it cut to 2",
    }
    for ax, (column, title) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        for colour, ((model, method), own) in zip(PALETTE, table.groupby(["model", "method"]), strict=False):
            ranks = method.removeprefix("msplora-").replace("-", "/")
            ax.plot(own["scale"], own[column], "o-", ms=3, color=colour, label=f"{NAMES[model]}, {ranks}")
        ax.set(title=title, ylim=(0, None))
        if "kl" in column:
            ax.set(yscale="log", ylim=(1e-4, 1))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _all(options: argparse.Namespace, name: str) -> pd.DataFrame:
    """The rows of all runs, kept as one file; without runs, what was kept."""
    kept = options.out / f"{name}.parquet"
    files = sorted((options.folder / name).glob("*/*/*/*.csv"))
    if files:
        table = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        table.astype(dict.fromkeys(table.select_dtypes("float64"), "float32")).to_parquet(kept, index=False)
    return pd.read_parquet(kept)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/calibration"), help="default: runs/calibration")
    parser.add_argument("--out", type=Path, default=Path("figures/calibration"), help="default: figures/calibration")
    parser.add_argument("--formats", nargs="+", choices=("png", "pdf", "svg"), default=["png", "pdf"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
