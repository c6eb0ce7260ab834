"""The tidy spectra table as every figure starts from it: one row per matrix, methods named, epochs aligned."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from msplora_analysis.compute.measures.metrics import Array
from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.names import stack_and_layer
from msplora_analysis.options import NO_MOMENTS, check_weights
from msplora_analysis.tables.checkpoints import align, one_per_epoch
from msplora_analysis.tables.columns import KEYS, TASK
from msplora_core.names import method_label

_AS_NUMBERS = {name: kind if kind == "str" else "Float64" for name, kind in KEYS.items()}


class Matrices(NamedTuple):
    """The spectra table, one row per matrix.

    Args:
        keys: The key columns, and ``rank``: the number of singular values.
        sigma: Singular values (matrices, R), float64, in the same order; zeros beyond the rank.
        task: The task-weighted ones, likewise, NaN of a matrix without; None where no matrix has them.
    """

    keys: pd.DataFrame
    sigma: Array
    task: Array | None = None

    def where(self, chosen: ArrayLike) -> "Matrices":
        """Those that a mask or indices choose."""
        chosen = np.asarray(chosen)
        rows = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        task = None if self.task is None else self.task[rows]
        return Matrices(self.keys.iloc[rows].reset_index(drop=True), self.sigma[rows], task)

    def parts(self) -> "Matrices":
        """Without the totals of layers that have several scales: what is wrong is in one of these."""
        return self.where(self.keys["scale"] != "total")

    def groups(self, *by: str) -> Iterator["Matrices"]:
        for index in self.keys.groupby(list(by), sort=False, dropna=False).indices.values():
            yield self.where(np.sort(index))

    def place(self, row: int) -> dict[str, Any]:
        """The key columns of one matrix."""
        return {name: self.keys[name].iloc[row] for name in KEYS}


def pivot(spectra: pd.DataFrame) -> Matrices:
    """The tidy spectra table as one row per matrix. step and epoch are float64, group is Int64.

    Raises:
        AnalysisError: the table lacks a column or has no rows, or holds a matrix twice.
    """
    if missing := [column for column in (*KEYS, "k", "sigma") if column not in spectra.columns]:
        raise AnalysisError(f"the spectra table lacks the column {', '.join(missing)}: pass what load_spectra returns")
    if spectra.empty:
        raise AnalysisError("the spectra table is empty: pass the spectra of at least one adapter")
    keys = as_keys(spectra).reset_index(drop=True)
    matrix = keys.groupby(list(KEYS), dropna=False, sort=False).ngroup().to_numpy()
    k = spectra["k"].to_numpy(dtype=np.int64)
    n, r = matrix.max() + 1, k.max()
    if np.bincount(matrix * r + k - 1).max() > 1:
        twice = keys.iloc[np.flatnonzero(pd.Series(matrix * r + k).duplicated())[0]]
        raise AnalysisError(
            f"run {twice['run']} holds {twice['name']} ({twice['scale']}) twice: pass each adapter once"
        )
    values = {}
    for name in ("sigma", *(name for name in TASK if name in spectra)):
        values[name] = np.zeros((n, r))
        values[name][matrix, k - 1] = spectra[name].to_numpy(dtype=np.float64)
    task = values.get("task_sigma")
    if task is not None:
        task[np.isnan(task).any(axis=1)] = np.nan
        task = None if np.isnan(task).all() else task
    first = np.unique(matrix, return_index=True)[1]
    keys = keys.iloc[first].reset_index(drop=True).assign(rank=np.bincount(matrix))
    return Matrices(keys, values["sigma"], task)


def weighted(spectra: pd.DataFrame, weights: str) -> pd.DataFrame:
    """The spectra table; weighted by "moments": ``task_sigma`` in the place of ``sigma``, of the matrices that have it.

    Raises:
        AnalysisError: none has it.
    """
    if check_weights(weights) == NO_MOMENTS:
        return spectra
    known = spectra[spectra["task_sigma"].notna()] if "task_sigma" in spectra else spectra[:0]
    if known.empty:
        raise AnalysisError(
            f"weights={weights}: no adapter has moments; record them with `msplora-measure moments`", "weights"
        )
    return known.assign(sigma=known["task_sigma"])


def as_keys(table: pd.DataFrame) -> pd.DataFrame:
    """The key columns, at types that compare and merge: step and epoch float64 (NaN where empty), group Int64."""
    keys = table[list(KEYS)].astype(_AS_NUMBERS)  # Float64 takes NA in a column of objects too
    return keys.astype({"step": "float64", "epoch": "float64", "group": "Int64"})


def stacks_of(names: pd.Series) -> pd.Series:
    """The numbered stack of each module: its dotted path before the first all-digit part, or the whole without one."""
    return names.map({name: stack_and_layer(name)[0] for name in names.unique()})


def prepare(spectra: pd.DataFrame) -> pd.DataFrame:
    """One row per matrix of the tidy table: its key columns, `rank`, `variant`, `stack`, and sigma in columns 1 … R.

    A spectrum shorter than R is filled with zeros: a rank-r update has no more than r non-zero singular values, so a
    mean over matrices of several ranks stays the mean of their spectra.

    `variant` is the label of the run's method, such as 'LoRA r=8'. `stack` is the dotted path of `name` before its
    first all-digit part (`roberta.encoder.layer`), None for a module outside the numbered layers. All runs of a method
    keep the same epochs (see `checkpoints.align`).
    """
    keys, values, _ = pivot(spectra)
    matrices = pd.concat([keys, pd.DataFrame(values, columns=range(1, values.shape[1] + 1))], axis=1)
    matrices["stack"] = stacks_of(matrices["name"]).where(matrices["group"].notna(), None)
    matrices["variant"] = matrices["run"].map(_labels(matrices))
    return align(one_per_epoch(matrices))


def ks(matrices: pd.DataFrame) -> list[int]:
    """The columns that hold singular values."""
    names: list[object] = list(matrices.columns)
    return [name for name in names if isinstance(name, int)]


def sigma(matrices: pd.DataFrame) -> Array:
    """Singular values, shape (matrices, R)."""
    return matrices[ks(matrices)].to_numpy(dtype=np.float64)


def method_labels(matrices: pd.DataFrame) -> list[str]:
    """The labels of the methods, in reading order: LoRA first, ranks in the order of numbers."""
    return sorted(matrices["variant"].unique(), key=_reading_order)


def stacks(matrices: pd.DataFrame) -> list[str]:
    """Numbered stacks that hold `layer` parts."""
    return sorted(matrices.loc[matrices["scale"] == "layer", "stack"].dropna().unique())


def is_msplora(label: str) -> bool:
    return label.startswith("MSPLoRA")


def choose(kind: str, value: str | None, candidates: list[str]) -> str:
    """The method or stack that was asked for, or the only one there is."""
    if value is None and len(candidates) == 1:
        return candidates[0]
    if value in candidates:
        return str(value)
    given = "none was given" if value is None else f"not {value!r}"
    raise AnalysisError(
        f"choose the {kind} to draw ({given}): {', '.join(candidates) or 'the table has none that fits'}"
    )


def slug(label: str) -> str:
    """A label as part of a file name: 'MSPLoRA 8/4/2' → 'msplora-8-4-2', 'LoRA r=2–8' → 'lora-2to8'."""
    text = label.lower().replace("r=", "").replace("–", "to")
    return re.sub(r"[^a-z0-9_]+", "-", text).strip("-")


def _labels(matrices: pd.DataFrame) -> dict[str, str]:
    """Run → label from its scales and ranks: 'LoRA r=8', 'MSPLoRA 8/4/2'.

    Runs of one label that adapt other stacks, layers or modules are told apart by what differs, as in
    'LoRA r=8 (12 layers)': a mean over different models would mean nothing.
    """
    parts = matrices[matrices["scale"] != "total"]
    if parts.empty:
        raise AnalysisError(
            "the spectra table has only the scale total: pass the parts (layer, or global, mid and layer) too"
        )
    labels = {str(run): _label(rows) for run, rows in parts.groupby("run", sort=False)}
    traits = {str(run): _traits(rows) for run, rows in parts.groupby("run", sort=False)}
    told_apart: dict[str, str] = {}
    for run, label in labels.items():
        rivals = [traits[other] for other in labels if labels[other] == label]
        differing = [own for own, *others in zip(traits[run], *rivals, strict=True) if len(set(others)) > 1]
        told_apart[run] = f"{label} ({', '.join(differing)})" if differing else label
    return told_apart


def _label(parts: pd.DataFrame) -> str:
    ranks = parts.groupby("scale")["rank"].agg(["min", "max"])
    texts = {scale: f"{low}" if low == high else f"{low}–{high}" for scale, low, high in ranks.itertuples()}
    return method_label("lora", texts["layer"]) if list(texts) == ["layer"] else method_label("msplora", texts)


def _traits(parts: pd.DataFrame) -> tuple[str, str, str]:
    layers = parts[parts["scale"] == "layer"]
    modules = sorted(layers["module"].unique())
    return (
        "+".join(sorted(layers["stack"].dropna().unique())),
        f"{len(layers[['stack', 'group']].drop_duplicates())} layers",
        "+".join(modules) if len(modules) <= 3 else f"{len(modules)} modules",
    )


def _reading_order(label: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", label)]
