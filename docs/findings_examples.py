"""The examples and the pictures of docs/findings.md: faults planted into the runs of examples/.

python docs/findings_examples.py docs/pictures      # writes findings_*.png, prints what diagnose says of each fault
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image
from safetensors.numpy import load_file, save_file

import msplora_analysis as ma
from msplora_analysis.ask.findings import KINDS
from msplora_analysis.ask.findings.pairs import OVERLAP, SAME
from msplora_analysis.ask.findings.spectrum import FINAL, SETTLED
from msplora_analysis.ask.findings.update import FACTOR, RMS
from msplora_analysis.commands.diagnose import print_findings

RUNS = Path(__file__).resolve().parents[1] / "examples" / "runs"
STUDY = RUNS.parents[1] / "figures" / "study" / "minilm" / "spectra.parquet"
WITHOUT_PICTURE = {"large-relative-update", "intruder-dimensions", "barely-learned"}
Tensors = dict[str, Any]


def key(layer: int, module: str, factor: str, scale: str = "lora") -> str:
    return f"base_model.model.bert.encoder.layer.{layer}.attention.self.{module}.{scale}_{factor}.weight"


def broken(folder: Path, edit: Callable[[Tensors], None], run: str = "lora-8", only: str = "*") -> Path:
    """A copy of a run, with every checkpoint edited, or those that ``only`` matches."""
    copy = Path(tempfile.mkdtemp(dir=folder)) / run
    shutil.copytree(RUNS / run, copy)
    for file in copy.glob(f"checkpoint-{only}/adapter_model.safetensors"):
        tensors = {name: values.copy() for name, values in load_file(file).items()}
        edit(tensors)
        save_file(tensors, file)
    return copy


def times(factor: float, layer: int = 2) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key(layer, "query", "B"): tensors[key(layer, "query", "B")] * factor})


def all_times_40(tensors: Tensors) -> None:
    tensors.update({name: values * 40 for name, values in tensors.items() if "lora_B" in name})


def not_a_number(tensors: Tensors) -> None:
    tensors[key(3, "value", "A")][0, 0] = np.nan


def copied(tensors: Tensors) -> None:
    tensors.update({key(3, "value", factor): tensors[key(2, "value", factor)] for factor in "AB"})


def half_shared(tensors: Tensors) -> None:
    """Layer 3 takes the directions of layer 2, in other proportions."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    tensors[key(3, "query", "A")] = tensors[key(2, "query", "A")]
    tensors[key(3, "query", "B")] = (tensors[key(2, "query", "B")] @ turn).astype("f2")


def coupled(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layer.0." in name and "query.msplora_layer" in name]:
        tensors[name] = tensors[name.replace("msplora_layer", "msplora_mid")]


def reshaped(spectra: pd.DataFrame, change: Callable[[pd.DataFrame], Any], rows: Any = True) -> pd.DataFrame:
    """Spectra whose sigma is changed in layer 2 query, or in all."""
    rows = np.ones(len(spectra), bool) if rows is True else (spectra["group"] == 2) & (spectra["module"] == "query")
    return spectra.assign(sigma=np.where(rows, change(spectra), spectra["sigma"]))


def main(out: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        healthy = ma.load_spectra(RUNS / "lora-8")
        study = ma.read_spectra(STUDY)
        long = study[study["run"] == "cola/lora-8/seed-1"]
        late = long["epoch"].clip(lower=10) - 10
        runs = {
            "no-update": broken(folder, times(0)),
            "non-finite": broken(folder, not_a_number, only="270"),
            "large-update": broken(folder, all_times_40),
            "norm-outlier": broken(folder, times(10)),
            "norm-jump": broken(folder, times(10), only="270"),
            "identical-update": broken(folder, copied),
            "adjacent-redundant": broken(folder, half_shared, only="270"),
            "scales-coupled": broken(folder, coupled, run="msplora-8-8-8", only="270"),
            "dominance-growing": reshaped(
                long, lambda table: table["sigma"] * np.where(table["k"] == 1, 1.25**late, 1), rows="one"
            ),
            "dominant-direction": reshaped(
                healthy, lambda table: table["sigma"] * np.where(table["k"] == 1, 20, 1), rows="one"
            ),
            "rank-oversized": reshaped(healthy, lambda table: table["sigma"] * np.where(table["k"] == 1, 1, 0.01)),
            "rank-unused": healthy,
            "rank-saturated": reshaped(
                healthy, lambda table: table["sigma"].groupby([table["epoch"], table["name"]]).transform("mean"), "one"
            ),
            "spectra-converged": reshaped(long, lambda table: _frozen(table, 12)),
        }
        for kind, source in runs.items():
            print(f"\n== {kind}")
            found = ma.diagnose(source, cache=False) if isinstance(source, Path) else ma.diagnose(source)
            print_findings(found[found["id"] == kind])
        draw(runs, healthy, long, Path(out))


def _frozen(table: pd.DataFrame, epoch: int) -> Any:
    """From an epoch on, the values of that epoch."""
    at = table[table["epoch"] == epoch].set_index(["scale", "name", "k"])["sigma"]
    kept = pd.MultiIndex.from_frame(table[["scale", "name", "k"]]).map(at)
    return np.where(table["epoch"] >= epoch, kept, table["sigma"])


# Pictures: grey is the run as it is, red the copy with the fault, the dashed line the threshold


def draw(runs: dict[str, Any], healthy: pd.DataFrame, long: pd.DataFrame, out: Path) -> None:
    sound = ma.load_metrics(RUNS / "lora-8")
    figure, axes = panels(4, "no-update", "norm-outlier", "norm-jump", "large-update", rows=2)
    for ax, kind in zip(axes[:2], ("no-update", "norm-outlier"), strict=True):
        over_layers(ax, sound, ma.load_metrics(runs[kind], cache=False), "frobenius", "norm of the update")
    # The threshold follows the trend over depth; here the median of the layers is near enough to show it.
    axes[1].axhline(FACTOR * at_last(sound)["frobenius"].median(), **DASHED)
    jump = ma.load_metrics(runs["norm-jump"], cache=False)
    for table, style in ((sound, GREY), (jump[(jump["group"] == 2) & (jump["module"] == "query")], RED)):
        for _, one in table.groupby("name"):
            axes[2].plot(one["epoch"], one["frobenius"], **style)
    axes[2].set(xlabel="epoch", ylabel="norm of the update")
    large = ma.load_metrics(runs["large-update"], cache=False)
    rms = [table.assign(rms=table["frobenius"] / np.sqrt(table["rows"] * table["cols"])) for table in (sound, large)]
    over_layers(axes[3], *rms, "rms", "root mean square entry", only=None)
    axes[3].set_yscale("log")
    axes[3].axhline(RMS, **DASHED)
    save(figure, out / "findings_updates.png")

    figure, axes = panels(3, "identical-update", "adjacent-redundant", "scales-coupled")
    neighbours = ma.load_pairs(RUNS / "lora-8")
    for ax, kind, line in ((axes[0], "identical-update", SAME), (axes[1], "adjacent-redundant", OVERLAP)):
        column = "cosine" if kind == "identical-update" else "overlap"
        for table, style in ((neighbours, GREY), (ma.load_pairs(runs[kind]), RED)):
            last = table[(table["epoch"] == 6) & (table["group_j"] - table["group_i"] == 1)]
            last = last.assign(overlap=np.minimum(last["overlap_in"], last["overlap_out"]))
            last = last if style is GREY else last[(last["group_i"] == 2) & (last[column] > line)]
            ax.plot(last["group_i"] + 0.5, last[column], "o", **style)
        ax.axhline(line, **DASHED)
        ax.set(xlabel="between layers", ylabel=column if column == "cosine" else "overlap, the smaller side")
    parts = ma.load_scale_pairs(RUNS / "msplora-8-8-8")
    for table, style in ((parts, GREY), (ma.load_scale_pairs(runs["scales-coupled"]), RED)):
        last = table[table["epoch"] == 6]
        last = last.assign(overlap=np.minimum(last["overlap_in"], last["overlap_out"]))
        last = last if style is GREY else last[last["overlap"] > OVERLAP]
        axes[2].plot(last["group"], last["overlap"], "o", **style)
    axes[2].axhline(OVERLAP, **DASHED)
    axes[2].set(xlabel="layer", ylabel="overlap of two scales")
    save(figure, out / "findings_pairs.png")

    figure, axes = panels(
        6,
        "dominant-direction",
        "dominance-growing",
        "rank-unused",
        "rank-oversized",
        "rank-saturated",
        "spectra-converged",
        rows=2,
    )
    for ax, kind in zip(
        axes[[0, 2, 3, 4]], ("dominant-direction", "rank-unused", "rank-oversized", "rank-saturated"), strict=True
    ):
        found = ma.diagnose(runs[kind]).query(f"id == '{kind}'")["name"]
        for table, style in ((healthy, GREY), (runs[kind], RED)):
            last = table[table["epoch"] == 6]
            last = last if style is GREY or kind == "rank-oversized" else last[last["name"].isin(found)]
            for _, one in last.groupby("name"):
                ax.plot(one["k"], one["sigma"] / one["sigma"].max(), **style)
        ax.set(xlabel="k", ylabel=r"$\sigma_k / \sigma_1$", yscale="log")
    for table, style in ((long, GREY), (runs["dominance-growing"], RED)):
        table = table[table["epoch"] > 0]
        table = table if style is GREY else table[(table["group"] == 2) & (table["module"] == "query")]
        for _, one in table.groupby("name"):
            sigma = one.pivot(index="epoch", columns="k", values="sigma")
            axes[1].plot(sigma.index, sigma[1] / sigma.sum(axis=1), **style)
    axes[1].axhline(FINAL, **DASHED)
    axes[1].set(xlabel="epoch", ylabel="M_eff-1")
    for table, style in ((long, GREY), (runs["spectra-converged"], RED)):
        distance = []
        for _, one in table.groupby("name"):
            sigma = one.pivot(index="epoch", columns="k", values="sigma")
            last = sigma.iloc[-1]
            distance.append(np.sqrt(((sigma - last) ** 2).sum(axis=1) / (last**2).sum()))
        farthest = pd.concat(distance, axis=1).max(axis=1)
        axes[5].plot(farthest.index, farthest, **style)
    axes[5].axhline(SETTLED, **DASHED)
    axes[5].set(xlabel="epoch", ylabel="distance to the last spectrum")
    save(figure, out / "findings_spectra.png")
    assert {*runs} | WITHOUT_PICTURE == {*KINDS}


GREY = {"color": "0.6", "zorder": 1}
RED = {"color": "tab:red", "zorder": 2}
DASHED = {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 0}


def panels(number: int, *titles: str, rows: int = 1) -> tuple[Any, Any]:
    columns = number // rows
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.7 * rows), layout="constrained")
    for ax, title in zip(axes.flat, titles, strict=True):
        ax.set_title(title, fontsize=11)
    return figure, axes.ravel()


def save(figure: Any, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)


def at_last(metrics: pd.DataFrame) -> pd.DataFrame:
    return metrics[metrics["epoch"] == metrics["epoch"].max()]


def over_layers(ax: Any, sound: pd.DataFrame, faulty: pd.DataFrame, column: str, label: str, only: Any = 2) -> None:
    faulty = at_last(faulty)
    if only is not None:
        faulty = faulty[(faulty["group"] == only) & (faulty["module"] == "query")]
    for table, style in ((at_last(sound), GREY), (faulty, RED)):
        ax.plot(table["group"], table[column], "o", **style)
    ax.set(xlabel="layer", ylabel=label)


if __name__ == "__main__":
    main(sys.argv[1])
