"""KL divergence between the spectra of layers: the numbers behind Figure 4, its companion and the summary tables."""

import warnings
from typing import Any

import numpy as np
import pandas as pd

from msplora_analysis.compute.measures.divergence import pairwise_kl
from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.tables.checkpoints import at_epoch
from msplora_analysis.tables.matrices import is_msplora, ks, method_labels


def mean_spectra(matrices: pd.DataFrame) -> pd.DataFrame:
    """Mean spectrum of each layer over whatever else `matrices` holds (modules, runs): index layer, columns k.

    Where layers differ in rank, all are cut to the number of values that each of them has.
    """
    by = matrices.groupby("group")
    ranks = by["rank"].max()
    if ranks.nunique() > 1:
        warnings.warn(
            f"{matrices['variant'].iloc[0]}: layers have {ranks.min()} to {ranks.max()} singular values; "
            f"divergences compare the {ranks.min()} largest of each",
            stacklevel=2,
        )
    return by[ks(matrices)[: ranks.min()]].mean()


def layers_of(matrices: pd.DataFrame, stack: str) -> dict[str, tuple[int, ...]]:
    """Label of a method → the layers of a numbered stack that it adapts, for methods that adapt at least two."""
    parts = matrices[(matrices["scale"] == "layer") & (matrices["stack"] == stack)]
    layers = parts.groupby("variant")["group"].unique()
    return {label: tuple(sorted(layers[label])) for label in method_labels(parts) if len(layers[label]) > 1}


def both_methods(matrices: pd.DataFrame, stack: str) -> list[tuple[str, str]]:
    """(MSPLoRA, LoRA) labels that adapt the same two or more layers of a stack."""
    layers = layers_of(matrices, stack)
    return [
        (ours, theirs)
        for ours in layers
        for theirs in layers
        if is_msplora(ours) and not is_msplora(theirs) and layers[ours] == layers[theirs]
    ]


def numbers(matrices: pd.DataFrame, labels: list[str], stack: str, epoch: float | None = None) -> pd.DataFrame:
    """D_KL(i‖j) of each method: one row per method and ordered pair of layers, all methods at one epoch.

    Source: MSPLoRA, arXiv 2503.21838, section on figure 4: spectra are averaged over modules and runs *first*.
    """
    chosen = (matrices["scale"] == "layer") & (matrices["stack"] == stack) & matrices["variant"].isin(labels)
    parts = at_epoch(matrices[chosen], epoch)
    tables = []
    for label in labels:
        part = parts[parts["variant"] == label]
        spectra = mean_spectra(part)
        about = {"variant": label, "stack": stack, "epoch": part["epoch"].iloc[0], "runs": part["run"].nunique()}
        layers = spectra.index.to_numpy()
        pairs = {"layer_i": np.repeat(layers, len(layers)), "layer_j": np.tile(layers, len(layers))}
        tables.append(pd.DataFrame({**about, **pairs, "kl": pairwise_kl(spectra).ravel()}))
    return pd.concat(tables, ignore_index=True)


def intervals(
    matrices: pd.DataFrame, ours: str, theirs: str, stack: str, epoch: float | None = None, confidence: float = 0.95
) -> pd.DataFrame:
    """Intervals over runs of the difference of `numbers` of two methods: layer_i, layer_j, low, high.

    By the jackknife: each run is left out in turn, of one method as of the other, and the quantile is Student's with
    the runs less two as degrees of freedom. Without rows where a method has one run alone.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 11.
    """
    chosen = (matrices["scale"] == "layer") & (matrices["stack"] == stack) & matrices["variant"].isin([ours, theirs])
    parts = at_epoch(matrices[chosen], epoch)
    runs = [list(parts.loc[parts["variant"] == method, "run"].unique()) for method in (ours, theirs)]
    columns = ["layer_i", "layer_j", "low", "high"]
    if min(map(len, runs)) < 2:
        return pd.DataFrame(columns=columns)
    whole, variance = [], 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said where the spectra themselves are compared
        for method, names in zip((ours, theirs), runs, strict=True):
            part = parts[parts["variant"] == method]
            whole.append(pairwise_kl(mean_spectra(part)))
            without = np.stack([pairwise_kl(mean_spectra(part[part["run"] != name])) for name in names])
            n = len(names)
            variance = variance + (n - 1) / n * ((without - without.mean(axis=0)) ** 2).sum(axis=0)
        layers = mean_spectra(part).index.to_numpy()
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    reach = stdtrit(len(runs[0]) + len(runs[1]) - 2, (1 + confidence) / 2) * np.sqrt(variance)
    difference = whole[0] - whole[1]
    ends = {"low": (difference - reach).ravel(), "high": (difference + reach).ravel()}
    pairs = {"layer_i": np.repeat(layers, len(layers)), "layer_j": np.tile(layers, len(layers))}
    return pd.DataFrame(pairs | ends)[columns]


def matrix(numbers: pd.DataFrame, column: str = "kl") -> Array:
    """Rows of pairs → array (layers, layers), i down and j across, in the order of the layers."""
    return numbers.pivot(index="layer_i", columns="layer_j", values=column).to_numpy(dtype=np.float64)


def per_run(matrices: pd.DataFrame, epoch: float | None = None) -> pd.DataFrame:
    """Mean KL between layers of each run, its spectra averaged over modules only. One row per run and stack.

    `kl_all_pairs` is the mean over ordered pairs i ≠ j, `kl_adjacent` that over ordered pairs of neighbours among the
    adapted layers; pairs with an all-zero spectrum are left out, and without any pair the mean is NaN.
    """
    return _means(matrices, ["variant", "stack", "run"], epoch)


def summary(matrices: pd.DataFrame, epoch: float | None = None) -> pd.DataFrame:
    """Mean KL between layers, one row per method and stack.

    `kl_all_pairs` and `kl_adjacent` come from spectra averaged over modules *and runs* first, as in figure 4. That
    average hides how runs differ, so `…_run_mean` and `…_run_std` give the mean and standard deviation (n − 1) of
    `per_run`. All methods stand at one epoch: the one given, or the last that they share.
    """
    key = ["variant", "stack"]
    by_run = per_run(matrices, epoch).groupby(key)
    columns: dict[str, pd.Series[Any]] = {"runs": by_run.size()}
    for kl in ("kl_all_pairs", "kl_adjacent"):
        columns |= {f"{kl}_run_mean": by_run[kl].mean(), f"{kl}_run_std": by_run[kl].std()}
    return _means(matrices, key, epoch).merge(pd.DataFrame(columns).reset_index(), on=key)


def _means(matrices: pd.DataFrame, by: list[str], epoch: float | None) -> pd.DataFrame:
    """Mean KL of each group of `by`, its spectra averaged first."""
    layers = at_epoch(matrices[(matrices["scale"] == "layer") & matrices["stack"].notna()], epoch)
    rows = []
    for label in method_labels(layers):
        for key, part in layers[layers["variant"] == label].groupby(by):
            divergence = pairwise_kl(mean_spectra(part))
            n = len(divergence)
            if n > 1:
                apart = divergence[~np.eye(n, dtype=bool)]
                neighbours = np.concatenate([divergence.diagonal(1), divergence.diagonal(-1)])
                rows.append((*key, part["epoch"].iloc[0], n, _mean(apart), _mean(neighbours)))
    return pd.DataFrame(rows, columns=[*by, "epoch", "layers", "kl_all_pairs", "kl_adjacent"])


def _mean(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
