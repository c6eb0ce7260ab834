"""Two adapters added: what that does to the task of one, against what was said of the two before (docs/relate.md).

    python study/relations.py measure --calibration FOLDER --data-dir glue --measured added
    python study/relations.py tables --calibration FOLDER --measured added

`measure` takes the MiniLM runs of study/calibration.py. To each adapter A of LoRA rank 8 it adds the update of every
other adapter B of MEASURED, with the head of A, and measures on the first EXAMPLES validation examples of A's task the
KL of the outputs against those of A alone, and the loss; and it predicts that from the first PREDICTED_ON training
examples, as `msplora-measure added` does. Files of each A are its own, so that a call goes on where another ended.
`tables` joins all that with what `ma.relate` says of the pairs.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from msplora_analysis.show.drawing import text
from msplora_analysis.show.drawing.colours import PALETTE
from msplora_analysis.show.drawing.figure import Figure
from msplora_analysis.show.drawing.style import styled
from msplora_analysis.show.drawing.venues import Style

TASKS = ("cola", "stsb", "mrpc", "rte")
TITLES = {"cola": "CoLA", "stsb": "STS-B", "mrpc": "MRPC", "rte": "RTE"}
MEASURED = ("lora-8", "msplora-8-8-8")
SEEDS = (0, 1, 2)
EXAMPLES, AT_ONCE = 256, 64
PREDICTED_ON = 512  # training examples


def adapters(folder: Path, methods: tuple[str, ...] = MEASURED) -> dict[str, Path]:
    """The last checkpoint of each run, by task/method/seed."""
    found = {}
    for task in TASKS:
        for method in methods:
            for seed in SEEDS:
                run = folder / "runs" / "minilm" / task / method / f"seed-{seed}"
                last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
                found[f"{task}/{method}/seed-{seed}"] = last
    return found


def measure(calibration: Path, data_dir: Path, out: Path, seeds: tuple[int, ...]) -> None:
    import torch

    from msplora_core.measure.adding import record_added
    from msplora_core.measure.loading import load_subject

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    others = {name: factors_of(path) for name, path in adapters(calibration).items()}
    for name, path in adapters(calibration, ("lora-8",)).items():
        rows, prediction = (out / f"{name.replace('/', '_')}.{kind}" for kind in ("csv", "json"))
        if int(name[-1]) not in seeds or (rows.is_file() and prediction.is_file()):
            continue
        subject = load_subject(path, data_dir=data_dir, model=str(calibration / "models" / "minilm"))
        own = {other: of for other, of in others.items() if other != name}
        if not prediction.is_file():
            record_added(subject.model, subject.batches("train", PREDICTED_ON), own).save(prediction)
        if not rows.is_file():
            pd.DataFrame(measured(subject, own)).assign(a=name).to_csv(rows, index=False)
        print(name, flush=True)


def factors_of(path: Path) -> dict[str, tuple[Any, Any]]:
    """A and B of each module, in float32 of torch."""
    import torch

    from msplora_analysis.options import Options
    from msplora_analysis.write.source import factors, find_adapter, open_source

    with open_source(find_adapter(path), Options()) as source, warnings.catch_warnings():
        return {
            module.name: tuple(torch.tensor(of, dtype=torch.float32) for of in factors(source, module))
            for module in source.modules
        }


def measured(subject: Any, others: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> Iterator[dict[str, Any]]:
    """A row for each other adapter: kl, loss and metric with it, and those of A alone."""
    import torch

    from msplora_core.data.evaluation import metric_value
    from msplora_core.measure.ablation import _against

    batches = subject.batches("validation", examples=EXAMPLES, batch_size=AT_ONCE, by_length=True)
    labels = np.concatenate([batch["labels"].numpy() for batch in batches])
    with torch.no_grad():
        compare = [_against(subject.model(**batch).logits, batch["labels"], 1) for batch in batches]

    def outputs(update: Mapping[str, tuple[Any, Any]]) -> tuple[float, float, float]:
        with torch.no_grad(), added(subject.model, update):
            found = [to(subject.model(**batch).logits) for to, batch in zip(compare, batches, strict=True)]
        values, kl, loss = (torch.cat(each).numpy() for each in zip(*found, strict=True))
        metric = metric_value(subject.task.metric, values, labels, np.ones((1, len(labels))))
        return float(kl.mean()), float(loss.mean()), float(np.asarray(metric).ravel()[0])

    _, loss, metric = outputs({})
    for name, update in others.items():
        kl, loss_with, metric_with = outputs(update)
        yield {
            "b": name,
            "kl": kl,
            "loss": loss,
            "loss_with": loss_with,
            "metric": metric,
            "metric_with": metric_with,
        }


def named_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from msplora_core.measure.updates import updates_of

    return ((name, update.layer) for name, update in updates_of(model).items())


@contextmanager
def added(model: Any, update: Mapping[str, tuple[Any, Any]]) -> Iterator[None]:
    """The model with another update of its adapted modules besides its own."""

    def adding(a: Any, b: Any) -> Any:
        return lambda module, inputs, output: output + inputs[0] @ a.T @ b.T

    layers = dict(named_layers(model)) if update else {}
    hooks = [layers[name].register_forward_hook(adding(*of)) for name, of in update.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tables(calibration: Path, measured: Path, out: Path) -> None:
    """pairs.csv (every two runs), added.csv (every two that were added), predictors.csv, and the figures."""
    from scipy.stats import rankdata, spearmanr

    import msplora_analysis as ma

    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads, which are no updates
        table = ma.relate(list(adapters(calibration, (*MEASURED, "msplora-8-4-2")).values()))
        ma.plot_relations(ma.relate(list(adapters(calibration, ("lora-8",)).values()))).savefig(out / "relations.png")
    pairs = table[table["module"] == "all"].drop(columns=["module", "name"])
    tasks = [pairs[side].str.split("/").str[0] for side in "ab"]
    same = (tasks[0] == tasks[1]).to_numpy()
    pairs.assign(same_task=same).round(6).to_csv(out / "pairs.csv", index=False)
    predictors = []
    for name in ("cosine", "overlap_in", "overlap_out", "energy_a_in_b", "norm_sum"):
        ranks, n = rankdata(pairs[name]), same.sum()
        auc = (ranks[same].sum() - n * (n + 1) / 2) / n / (~same).sum()
        predictors.append({"question": "same task (AUC)", "by": name, "pairs": len(pairs), "value": auc})
    added = _joined(pairs, _measured(measured))
    added.round(6).to_csv(out / "added.csv", index=False)
    for what, target in (("KL", added["kl"]), ("change of the loss", added["loss_with"] - added["loss"])):
        for name in ("predicted_kl", "norm_b", "cosine", "overlap_in", "overlap_out", "energy_b_in_a"):
            rows = [spearmanr(of[name], target[of.index])[0] for _, of in added.groupby("a")]
            about = {"question": f"{what} (Spearman within A)", "by": name, "pairs": len(added)}
            predictors.append(about | {"value": np.median(rows), "low": min(rows), "high": max(rows)})
    ratio = added["kl"] / added["predicted_kl"]
    about = {"question": "KL measured / predicted", "by": "predicted_kl", "pairs": len(added), "value": ratio.median()}
    predictors.append(about | {"low": ratio.quantile(0.1), "high": ratio.quantile(0.9)})
    pd.DataFrame(predictors).round(3).to_csv(out / "predictors.csv", index=False)
    _draw(added).savefig(out / "added.png", dpi=200)
    print(pd.DataFrame(predictors).round(3).to_string(index=False))


def _measured(folder: Path) -> pd.DataFrame:
    """What adding costs, measured and predicted."""
    from msplora_core.added import read_added

    rows = pd.concat([pd.read_csv(file) for file in sorted(folder.glob("*.csv"))], ignore_index=True)
    predicted = {
        (a, other.adapter): other.predicted_kl
        for a in rows["a"].unique()
        for other in read_added(folder / f"{a.replace('/', '_')}.json").others
    }
    return rows.assign(predicted_kl=[predicted[pair] for pair in zip(rows["a"], rows["b"], strict=True)])


def _joined(pairs: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """The measured rows with what is said of the two, whichever of them comes first in the table of pairs."""
    swap = {f"{name}_{x}": f"{name}_{y}" for name in ("norm", "rank") for x, y in ("ab", "ba")}
    swap |= {"a": "b", "b": "a", "energy_a_in_b": "energy_b_in_a", "energy_b_in_a": "energy_a_in_b"}
    return measured.merge(pd.concat([pairs, pairs.rename(columns=swap)]), on=["a", "b"])


@styled
def _draw(added: pd.DataFrame, style: Style) -> Figure:
    figure = Figure(figsize=(style.widest, 2.5), layout="constrained")
    panels = {"predicted_kl": "predicted", "norm_b": "norm of B", "cosine": "cosine of A and B"}
    axes = figure.subplots(1, 3, sharey=True)
    tasks = added["a"].str.split("/").str[0]
    marks = [
        Line2D([], [], linestyle="", marker=mark, markersize=4, color=colour)
        for mark, colour in zip("os^D", PALETTE, strict=False)
    ]
    for ax, (name, label) in zip(axes, panels.items(), strict=True):
        for mark, task in zip(marks, TASKS, strict=True):
            of = added[tasks == task]
            ax.plot(of[name], of["kl"], linestyle="", marker=mark.get_marker(), markersize=2.5, color=mark.get_color())
        ax.set(xlabel=label, yscale="log", xscale="log" if name == "predicted_kl" else "linear")
        ax.spines[["top", "right"]].set_visible(False)
    ends = [added["kl"].min(), added["kl"].max()]
    axes[0].plot(ends, ends, color="0.5", linewidth=0.8)
    axes[0].set_ylabel("measured")
    text.title(
        figure, "B added to A: what it costs the task of A", "KL, nats an example; STS-B: mean squared difference"
    )
    text.legend_below(figure, marks, [f"A: {TITLES[task]}" for task in TASKS])
    text.fit(figure)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("measure", "tables"))
    parser.add_argument("--calibration", type=Path, required=True, help="folder of study/calibration.py")
    parser.add_argument("--data-dir", type=Path, help="folder with {task}_validation.jsonl[.gz]")
    parser.add_argument("--measured", type=Path, required=True, help="folder of what is measured")
    parser.add_argument("--out", type=Path, default=Path("figures/relations"), help="folder of tables and figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the adapters A")
    options = parser.parse_args()
    if options.part == "measure":
        measure(options.calibration, options.data_dir, options.measured, tuple(options.seeds))
    else:
        tables(options.calibration, options.measured, options.out)


if __name__ == "__main__":
    main()
