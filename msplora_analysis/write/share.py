"""An adapter as the nearest MSPLoRA: what its layers share, and what they could.

The updates of the layers of one type become a pyramid of given ranks (``compute.sharing``); what that keeps of their
energy stands beside what it keeps of layers with the same singular values in random directions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute.sharing import Part, Pyramid, Ranks, contiguous_groups, nearest_pyramid, turned_at_random
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath, natural_key
from msplora_analysis.formats.names import PREFIX, stack_and_layer
from msplora_analysis.options import NO_MOMENTS, Options, Progress, check_weights
from msplora_analysis.tables.files import FORMATS, write_table
from msplora_analysis.write.directions import Ranked, ranked
from msplora_analysis.write.source import Module, Source, factors, find_adapter, open_source, warn_of
from msplora_analysis.write.write import DTYPES, WEIGHTS_NAME, Array, check_dtype, new_folder, rounded, save_tensors
from msplora_core.names import CONFIG, RANK_DECAY, SCALES

if TYPE_CHECKING:
    import pandas as pd

TABLE, FIGURE = "sharing", "layers_share"
"""The names, before the dot, of the table and of the figure beside the adapter."""
DRAWS = 3  # of random directions

COLUMNS = {
    "stack": "str", "module": "str", "scales": "str", "unit": "str", "group": "Int64", "layer": "Int64", "name": "str",
    "parameters": "Int64", "norm": "float64", "energy": "float64", "chance": "float64", "chance_deviation": "float64",
    "unshared": "float64", "error": "float64",
}  # fmt: skip
TASK_COLUMNS = {"error_weighted": "float64", "task_error": "float64", "task_error_weighted": "float64"}


def share(
    adapter: StrPath,
    out: StrPath,
    *,
    ranks: Sequence[int] | None = None,
    groups: int = 3,
    weights: str = NO_MOMENTS,
    moments: StrPath | None = None,
    format: str = "parquet",
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    semantics: str = "paper",
    ignore_unknown: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Write the MSPLoRA adapter that is nearest to an adapter, and a table of what its layers could share.

    Args:
        adapter: An adapter's folder or file, as ``load_spectra`` takes it; one, not several.
        out: The folder to write: the adapter, and ``sharing.<format>``.
        ranks: Of the scales global, mid and layer; 0 for a scale that is not to be. None: those of an MSPLoRA adapter;
            else r, r/2 and r/4 of the largest rank.
        groups: Of the mid scale: contiguous runs of layers.
        weights: "moments": the written adapter has the fit in which the squared error of a layer counts by what its
            update is worth to the task (task norm against norm); "none": all layers alike.
        moments: See ``load_spectra``.
        format: Of the table: "parquet" or "csv".
        dtype: Of the factors; None: float32.
        seed: Of the random directions.
        overwrite: Replace an adapter that is in ``out``.
        semantics: See ``load_spectra``.
        ignore_unknown: Leave out tensors that no format explains, with a warning.
        progress: Called with the types of modules that are done, and the number of all.

    Returns:
        Rows for each type of module, of three kinds (``unit``): all its layers, each group, each layer; and of three
        fits (``scales``): the global scale alone, global and mid, all three. ``energy``: the share of the squared norm
        that the fit keeps; ``chance``: the same of layers with these singular values in random directions, the mean of
        three draws, with its ``chance_deviation``; ``unshared``: the same of low-rank approximations of each layer, of
        as many parameters in all; ``error``: √(1 - energy). With moments also ``task_error`` (of the fit, in the metric
        of the task), and what weighting layers by the task makes of both errors.

    Raises:
        AnalysisError: the adapter has no low-rank form or no numbered layers, the ranks are none, or ``out`` cannot be
            written.

    Example:
        >>> ma.share("runs/lora/checkpoint-270", "shared", ranks=(8, 4, 2)).query("unit == 'module'")
    """
    options = Options(ignore_unknown, semantics, moments=moments)
    return shared(adapter, out, ranks, groups, weights, format, dtype, seed, overwrite, options, progress).table


class Shared(NamedTuple):
    """The table of ``share``, the ranks of the scales, and the parameters of the factors before and after."""

    table: pd.DataFrame
    ranks: Ranks
    parameters_before: int
    parameters: int


def shared(
    adapter: StrPath,
    out: StrPath,
    ranks: Sequence[int] | None,
    groups: int,
    weights: str,
    format: str,
    dtype: str | None,
    seed: int,
    overwrite: bool,
    options: Options,
    progress: Progress | None = None,
) -> Shared:
    """``share``, with what it chose."""
    check_dtype(dtype)
    check_weights(weights)
    if format not in FORMATS:
        raise AnalysisError(f"format={format}: expected {' or '.join(FORMATS)}", "format")
    if groups < 1:
        raise AnalysisError(f"groups={groups}: expected a whole number of at least 1", "groups")
    dtype = dtype or "float32"
    found = find_adapter(adapter)
    own = [f"{name}.{suffix}" for name in (TABLE, FIGURE) for suffix in (*FORMATS, "pdf", "png", "svg")]
    with new_folder(out, found.file, overwrite, own) as folder, open_source(found, options) as source:
        chosen = _ranks(ranks, source)
        ranking = ranked(source, weights if weights != NO_MOMENTS else None, options).modules
        types = _types(source, ranking)
        _check_sizes(types, chosen)
        before = sum(one.module.update.rank * one.cost for one in ranking)
        rows: list[tuple[Any, ...]] = []
        tensors: dict[str, Array] = {}
        rng = np.random.default_rng(seed)
        for number, layers in enumerate(types, 1):
            written, of_type = _fits(source, layers, groups, chosen, weights != NO_MOMENTS, rng)
            rows += of_type
            tensors |= _tensors(layers, written, chosen, groups, dtype)
            if progress:
                progress(number, len(types))
        table = _table(rows)
        kinds = dict.fromkeys(tensors, DTYPES[dtype])
        parameters = sum(values.size for values in tensors.values())
        for key, tensor in source.copied.items():
            tensors[key], kinds[key] = source.file.read(tensor), source.stored.get(tensor, "")
        save_tensors(tensors, kinds, folder / WEIGHTS_NAME)
        config = _config(source, [one.module.name for layers in types for one in layers], chosen, groups)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_table(table, folder / f"{TABLE}.{format}")
        os.chmod(folder / WEIGHTS_NAME, (folder / CONFIG).stat().st_mode)
    warn_of(source)
    return Shared(table, chosen, before, parameters)


def _ranks(ranks: Sequence[int] | None, source: Source) -> Ranks:
    if ranks is None:
        config = source.adapter.config
        explicit = config.get("ranks") if config.get("peft_type") == "MSPLORA" else None
        most = max(module.update.rank for module in source.modules)
        if config.get("peft_type") == "MSPLORA" and isinstance(config.get("r"), int):
            most = config["r"]
        ranks = [(explicit or {}).get(scale, 0) if explicit else most // RANK_DECAY[scale] for scale in SCALES]
        ranks[-1] = max(ranks[-1], 1)
    if len(ranks) != len(SCALES) or min(ranks) < 0 or ranks[-1] < 1 or max(ranks[:-1]) < 1:
        given = ",".join(map(str, ranks))
        raise AnalysisError(
            f"ranks={given}: expected those of the scales global, mid and layer, such as 8,4,2; layer at least 1, and "
            "one of the others",
            "ranks",
        )
    return Ranks(*ranks)


def _types(source: Source, ranking: list[Ranked]) -> list[list[Ranked]]:
    """The modules that share, by stack, type and shape; each in the order of its layers."""
    types: dict[tuple[str, str, int, int], list[Ranked]] = {}
    alone = []
    for one in ranking:
        stack, layer = stack_and_layer(one.module.name)
        if layer is None or one.module.is_embedding or len(one.module.inputs) > 1:
            alone.append(one.module.name)
            continue
        key = stack, one.module.matrix.module, one.module.update.rows, one.module.update.cols
        types.setdefault(key, []).append(one)
    if not types:
        raise AnalysisError(f"{source.adapter.file}: no linear module in a numbered layer: nothing can be shared")
    if alone:
        listed = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
        source.notes.append(f"left out, as MSPLoRA adapts linear modules of numbered layers only: {listed}")
    return [sorted(layers, key=lambda one: natural_key(one.module.name)) for layers in types.values()]


def _check_sizes(types: list[list[Ranked]], ranks: Ranks) -> None:
    """Raises AnalysisError for ranks that MSPLoRA has no module for."""
    for layers in types:
        update = layers[0].module.update
        if max(ranks) > min(update.rows, update.cols):
            raise AnalysisError(
                f"ranks={','.join(map(str, ranks))}: {layers[0].module.name} has {update.rows} x {update.cols} "
                "weights, whose smaller side is the largest rank; give lower ones",
                "ranks",
            )


def _layer(module: Module) -> int:
    layer = stack_and_layer(module.name)[1]
    assert layer is not None
    return layer


# The fits of one type


def _fits(
    source: Source, layers: list[Ranked], groups: int, ranks: Ranks, weighted: bool, rng: np.random.Generator
) -> tuple[Pyramid, list[tuple[Any, ...]]]:
    """The fit to write, and the rows of the table."""
    updates = []
    for one in layers:
        a, b = factors(source, one.module)
        updates.append(Part(b.copy(), a.copy()))
    group_of = contiguous_groups([_layer(one.module) for one in layers], groups)
    random = [[turned_at_random(update, rng) for update in updates] for _ in range(DRAWS)]
    squares = np.array([float(np.sum(one.sigma**2)) for one in layers])
    measured = all(one.weights is not None for one in layers)
    rows: list[tuple[Any, ...]] = []
    for scales, of_scales in _levels(ranks).items():
        fit = nearest_pyramid(updates, group_of, of_scales)
        chance = np.array([nearest_pyramid(one, group_of, of_scales, starts=False).lost for one in random])
        lost = {"lost": fit.lost, **{f"chance {i}": values for i, values in enumerate(chance)}}
        whole = {"square": squares}
        if measured:
            task = _task_weights(layers)
            other = nearest_pyramid(updates, group_of, of_scales, task)
            lost["weighted"] = other.lost
            whole["task"] = np.array([float(np.sum(one.task_sigma**2)) for one in layers])
            lost["task"], lost["task weighted"] = (_task_lost(layers, updates, one, group_of) for one in (fit, other))
        rows += _rows(layers, group_of, scales, of_scales, lost, whole)
    if weighted and measured:
        fit = other
    return fit, rows


def _levels(ranks: Ranks) -> dict[str, Ranks]:
    """Ranks of the fits: with the most shared scale alone, with the next, with all."""
    levels = {}
    for i, last in enumerate(ranks):
        if last:
            names = [name for name, rank in zip(SCALES[: i + 1], ranks, strict=False) if rank]
            levels["+".join(names)] = Ranks(*(rank if j <= i else 0 for j, rank in enumerate(ranks)))
    return levels


def _task_weights(layers: Sequence[Ranked]) -> list[float] | None:
    """How much a unit of each update's energy is worth to the task."""
    worth = [float(np.sum(one.task_sigma**2) / np.sum(one.sigma**2)) if one.sigma.any() else 0.0 for one in layers]
    return [value / max(worth) for value in worth] if any(worth) else None


def _task_lost(layers: list[Ranked], updates: list[Part], fit: Pyramid, group_of: list[int]) -> NDArray[np.float64]:
    """Of each layer, what the fit leaves of its update in the metric of the task, squared.

    Moments are known in the spaces of the update's own factors: what the fit adds outside is not in it.
    """
    lost = []
    for i, (one, update) in enumerate(zip(layers, updates, strict=True)):
        assert one.weights is not None
        parts = (fit.shared, fit.mid[group_of[i]], fit.layer[i])
        b, a = np.linalg.pinv(update.b), np.linalg.pinv(update.a)
        rest = b @ update.b @ update.a @ a - sum((b @ part.b) @ (part.a @ a) for part in parts)
        lost.append(max(0.0, float(np.sum(rest * (one.weights.s_b @ rest @ one.weights.s_a)))))
    return np.array(lost)


def _rows(
    layers: list[Ranked],
    group_of: list[int],
    scales: str,
    ranks: Ranks,
    lost: Mapping[str, NDArray[np.float64]],
    whole: Mapping[str, NDArray[np.float64]],
) -> Iterator[tuple[Any, ...]]:
    """Of all layers together, of each group and of each layer."""
    stack, module = stack_and_layer(layers[0].module.name)[0], layers[0].module.matrix.module
    everything = np.arange(len(layers))
    parameters = layers[0].cost * (ranks.shared + ranks.mid * (max(group_of) + 1) + ranks.layer * len(layers))
    units: list[tuple[str, Any, Any, Any, Any]] = [("module", None, None, None, everything)]
    units += [("group", g, None, None, np.flatnonzero(np.equal(group_of, g))) for g in sorted(set(group_of))]
    units += [("layer", group_of[i], _layer(one.module), one.module.name, [i]) for i, one in enumerate(layers)]
    for unit, group, layer, name, which in units:
        square = float(whole["square"][which].sum())
        share = {key: float(values[which].sum()) / square if square else 0.0 for key, values in lost.items()}
        chance = [1 - value for key, value in share.items() if key.startswith("chance")]
        of_all = unit == "module"
        row = (
            stack, module, scales, unit, group, layer, name, parameters if of_all else None, square**0.5,
            1 - share["lost"], float(np.mean(chance)), float(np.std(chance, ddof=1)),
            _unshared(layers, parameters) if of_all else np.nan, share["lost"] ** 0.5,
        )  # fmt: skip
        if "task" in whole:
            task = float(whole["task"][which].sum())
            of_task = [(lost[key][which].sum() / task) ** 0.5 if task else 0.0 for key in ("task", "task weighted")]
            row = (*row, share["weighted"] ** 0.5, *of_task)
        yield row


def _unshared(layers: Sequence[Ranked], parameters: int) -> float:
    """The share of the energy that the largest singular triples of all layers keep, as many as there are parameters."""
    energy = np.sort(np.concatenate([one.sigma**2 for one in layers]))[::-1]
    return float(energy[: parameters // layers[0].cost].sum() / energy.sum()) if energy.any() else 0.0


def _table(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    import pandas as pd

    columns = {**COLUMNS, **(TASK_COLUMNS if max(map(len, rows)) > len(COLUMNS) else {})}
    table = pd.DataFrame(rows, columns=list(columns))
    return table.astype({name: kind for name, kind in columns.items() if kind != "str"})


# The adapter


def _tensors(layers: list[Ranked], fit: Pyramid, ranks: Ranks, groups: int, dtype: str) -> Iterator[tuple[str, Array]]:
    """Factors by the names that MSPLoRA saves them under: a shared pair once, by the first module that has it."""
    names = [one.module.name for one in layers]
    group_of = contiguous_groups([_layer(one.module) for one in layers], groups)
    parts = [("global", names[0], fit.shared)]
    parts += [("mid", names[group_of.index(group)], part) for group, part in enumerate(fit.mid)]
    parts += [("layer", name, part) for name, part in zip(names, fit.layer, strict=True)]
    rank_of = dict(zip(SCALES, ranks, strict=True))
    for scale, name, part in parts:
        if rank := rank_of[scale]:
            for factor, values in (("A", part.a), ("B", part.b * (rank / max(ranks)))):
                yield f"{PREFIX}{name}.msplora_{scale}.{factor}", rounded(values, dtype)


def _config(source: Source, names: list[str], ranks: Ranks, groups: int) -> dict[str, Any]:
    """adapter_config.json of MSPLoRA; the scaling lora_alpha / r of each scale is taken out of its B."""
    kept = dict(source.config)
    for name in ("trainable_token_indices", "layer_replication"):
        if kept.get(name):
            raise AnalysisError(f"{source.adapter.file}: {name} has no place in an MSPLoRA adapter")
    kept.pop("fan_in_fan_out", None)
    return {
        "peft_type": "MSPLORA",
        "inference_mode": True,
        "lora_dropout": 0.0,
        **kept,
        "bias": "msplora_only" if kept.get("bias") == "lora_only" else kept.get("bias", "none"),
        "r": max(ranks),
        "ranks": {scale: rank for scale, rank in zip(SCALES, ranks, strict=True) if rank},
        "lora_alpha": max(ranks),
        "mid_groups": groups,
        "use_rslora": False,
        "target_modules": sorted(names, key=natural_key),
    }
