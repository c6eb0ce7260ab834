"""Figures: one file each, which declares itself (see `drawing.plot.plots_of`), found here by being in this folder.

    import msplora_analysis as ma

    spectra = ma.load_spectra("runs")
    ma.write_figures(spectra, Path("figures"), style="icml")
    ma.plot_figure3(spectra, method="MSPLoRA 8/8/8").savefig("figure3.pdf")

A file has a function of the tidy table, which returns a figure or draws one panel into an `ax`. `draw_figures` returns
all figures, `write_figures` saves them. The figures are plain ones, not pyplot's: nothing else keeps them. `style` is
that of `venues.style_of`: the widths and letters of a venue.

The label of a method is told from the table alone: the scales of a run and the number of values per scale. Any adapter
with the scale `layer` only is a 'LoRA r=8', one with more is an 'MSPLoRA 8/4/2'. Every figure averages over the runs
(tasks, seeds) of a label.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from os import PathLike
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pandas as pd

from msplora_analysis.compute.executors import cpus, executor_of
from msplora_analysis.errors import AnalysisError
from msplora_analysis.options import NO_MOMENTS, Execution, Options, Progress, check_weights
from msplora_analysis.show.drawing.figure import Figures
from msplora_analysis.show.drawing.plot import FORMATS, KINDS, Plot, all_plots, check_formats, weighted_plot
from msplora_analysis.show.drawing.venues import style_of
from msplora_analysis.tables.gather import gather_ablations, gather_redundancy, gather_spectra
from msplora_analysis.tables.matrices import prepare, weighted
from msplora_analysis.tables.prepared_pairs import prepare_pairs
from msplora_core.atomic import remove_left

__all__ = ["FORMATS", "draw_figures", "write_figures"]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")


def __getattr__(name: str) -> Callable[..., Any]:
    """The function of a figure."""
    for kind in KINDS.values():
        if kind.function.__name__ == name:
            return kind.function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(kind.function.__name__ for kind in KINDS.values())])


def draw_figures(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]] | pd.DataFrame,
    style: str | None = None,
    which: str | Sequence[str] | None = None,
    *,
    epoch: float | None = None,
    pairs: pd.DataFrame | None = None,
    scales: pd.DataFrame | None = None,
    ablation: pd.DataFrame | None = None,
    weights: str = "none",
    moments: str | PathLike[str] | None = None,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    base: str | PathLike[str] | None = None,
    top_k: int | None = None,
    workers: int | None = 1,
    dask: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Figures:
    """Name → figure, to be shown, restyled and saved: "figure3: MSPLoRA 8/8/8"; the kind alone finds the only one.

    Keywords that are not listed are those of `load_tables`, for adapters alone.

    Args:
        paths: Adapters, or the folder or file of a spectra table, as `msplora-analyze figures` takes them; or the table
            itself, then with `pairs` and `scales` as for `write_figures`.
        style: See `venues.style_of`.
        which: Only these, by kind ("figure3") or name ("rank_needed: LoRA r=8").
        epoch: See `write_figures`.
        pairs: See `write_figures`.
        scales: See `write_figures`.
        ablation: See `write_figures`; paths need none.
        weights: See `write_figures`.

    Raises:
        AnalysisError: For input that cannot be used, and if there is no figure of a name in `which`.

    Example:
        >>> ma.draw_figures("runs/cola", which="rank_needed")["rank_needed"].savefig("rank_needed.pdf")
    """
    style_of(style)
    wanted = [which] if isinstance(which, str) else which
    spectra: pd.DataFrame | None
    if isinstance(paths, pd.DataFrame):
        spectra = paths
    else:
        ablation, listed = gather_ablations([paths] if isinstance(paths, str | PathLike) else list(paths))
        options = Options(ignore_unknown, semantics, base, top_k, moments)
        execution = Execution(workers, dask, cache, progress)
        spectra = gather_spectra(listed, options, execution) if listed else None
        of_pairs = [kind for kind in KINDS.values() if kind.needs in ("pairs", "scales")]
        needs_pairs = wanted is None or any(_of_kind(name, kind.name) for kind in of_pairs for name in wanted)
        if listed and needs_pairs and check_weights(weights) == NO_MOMENTS:
            pairs, scales = gather_redundancy(listed, options, execution)
    plots = [plot for plot in _plots(spectra, epoch, pairs, scales, ablation, weights) if plot.draw]
    for name in wanted or ():
        if not any(_is(plot, name) for plot in plots):
            names = ", ".join(plot.name for plot in plots) or "none"
            raise AnalysisError(f"no figure {name!r} can be drawn of this: choose from {names}")
    chosen = (plot for plot in plots if wanted is None or any(_is(plot, name) for name in wanted))
    return Figures({plot.name: plot.figure(style) for plot in chosen})


def write_figures(
    spectra: pd.DataFrame | None,
    out_dir: Path,
    formats: Sequence[str] = ("pdf", "png"),
    *,
    epoch: float | None = None,
    pairs: pd.DataFrame | None = None,
    scales: pd.DataFrame | None = None,
    ablation: pd.DataFrame | None = None,
    weights: str = "none",
    style: str | None = None,
    workers: int | None = 1,
) -> list[Path]:
    """Draw all that the table allows, with the numbers of each figure beside it as CSV. Equal tables give equal bytes.

    Args:
        spectra: The tidy table, of `load_spectra`; None: only the ablation is drawn.
        out_dir: Made if it is not there.
        formats: Of "pdf", "png" and "svg".
        epoch: Of the figures of one checkpoint (Figure 4 and others); without it the last epoch that all runs share
            which a figure shows.
        pairs: Of `load_redundancy` for the same runs, drawn too.
        scales: As `pairs`.
        ablation: Of `load_ablation`, drawn too.
        weights: "moments": the figures of spectra alone, of the task-weighted ones; the names end in `_task`.
        style: See `venues.style_of`.
        workers: Processes to draw with; None: one for each CPU.

    Returns:
        The paths of the files, in order.

    Raises:
        AnalysisError: If there is nothing to draw, or no such format or style.

    Example:
        >>> ma.write_figures(ma.load_spectra("runs/cola"), "figures", ["png"])
    """
    formats = check_formats(formats)
    style_of(style)
    plots = _plots(spectra, epoch, pairs, scales, ablation, weights)
    if not plots:
        raise AnalysisError(
            "nothing to draw: figures need checkpoints of two or more epochs, or adapters of numbered layers"
        )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    workers = min(len(plots), cpus() if workers is None else workers)
    try:
        with executor_of(workers, None) as executor:
            write = partial(_write, folder=out_dir, formats=formats, style=style)
            written = map(write, plots) if executor is None else executor.map(write, plots)
            return [path for paths in written for path in paths]
    except BaseException:
        remove_left(out_dir / plots[0].stem)  # workers that were stopped clear nothing away
        raise


def _write(plot: Plot, folder: Path, formats: Sequence[str], style: str | None) -> list[Path]:
    return plot.write(folder, formats, style)


def _plots(
    spectra: pd.DataFrame | None,
    epoch: float | None,
    pairs: pd.DataFrame | None,
    scales: pd.DataFrame | None,
    ablation: pd.DataFrame | None = None,
    weights: str = NO_MOMENTS,
) -> list[Plot]:
    """All that the tables allow, in order."""
    if check_weights(weights) != NO_MOMENTS:
        if spectra is None:
            raise AnalysisError(f"weights={weights}: an ablation has no spectra; give adapters", "weights")
        return [weighted_plot(plot) for plot in all_plots({"spectra": prepare(weighted(spectra, weights))}, epoch)]
    tables = {} if ablation is None else {"ablation": ablation}
    if spectra is not None:
        matrices = tables["spectra"] = prepare(spectra)
        labels = dict(zip(matrices["run"], matrices["variant"], strict=True))
        for needs, table in (("pairs", pairs), ("scales", scales)):
            if table is not None and len(table):
                tables[needs] = prepare_pairs(table[table["run"].isin(labels)], labels)
    return all_plots(tables, epoch)


def _is(plot: Plot, name: str) -> bool:
    """Whether a figure has this name, or its file has, or it is of this kind."""
    return name in (plot.name, plot.kind) or _of_kind(plot.stem, name)


def _of_kind(name: str, kind: str) -> bool:
    return name == kind or name.startswith((f"{kind}_", f"{kind}:"))
