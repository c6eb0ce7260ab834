"""Several adapters of one base model as one plain LoRA: the methods are those of ``compute.merging``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from msplora_analysis.compute.choose import Cut
from msplora_analysis.compute.linalg.core_space import Array, core_space
from msplora_analysis.compute.measures.rank_needed import energy_rank
from msplora_analysis.compute.merging import find_method
from msplora_analysis.compute.merging.protocol import Part, Settings
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.formats.matching import matched
from msplora_analysis.formats.names import module_of, stack_and_layer
from msplora_analysis.options import Options, Progress
from msplora_analysis.write.directions import Ranked, chosen_by_kl, cut, ranked
from msplora_analysis.write.names import Module
from msplora_analysis.write.source import Source, factors, find_adapter, open_source, warn_of
from msplora_analysis.write.write import Pair, as_pair, check_dtype, finish, new_folder, write_peft

if TYPE_CHECKING:
    import pandas as pd


def merge(
    adapters: Sequence[StrPath],
    out: StrPath,
    *,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    kl: float | None = None,
    density: float = 0.5,
    seed: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
    semantics: str = "paper",
    ignore_unknown: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Write several adapters of one base model as one plain PEFT LoRA.

    Args:
        adapters: Two or more, each as ``export`` takes it. What is saved beside the factors, such as a head, is that of
            the first.
        out: The folder to write.
        method: "cat", "svd", "linear", "ties", "dare", "knots", "tsv", "iso" or "lego" (see docs/merge.md).
        weights: Of each adapter; None: 1 each.
        rank: The rank of the result, at most. None: what the method gives.
        energy: In its place, the share of the sum of sigma² of the result that is kept, in (0, 1].
        kl: In their place, of "cat": the fewest parameters whose predicted KL from the exact sum stays below so many
            nats an example, on the task of each adapter; each needs moments with scores.
        density: Of ties, dare and knots: the share of entries that is kept.
        seed: Of dare and lego.
        dtype: Of the factors, as for ``export``; None: float32.
        overwrite: Replace an adapter that is in ``out``.
        semantics: See ``load_spectra``.
        ignore_unknown: Leave out tensors that no format explains, with a warning.
        progress: Called after each module.

    Returns:
        One row per module: name, module, layer, rows, cols, adapters (that have it), rank, norm, parameters. With
        ``kl``, ``attrs["predicted_kl"]``: what is predicted of each adapter's task, in their order.

    Raises:
        AnalysisError: The adapters have no low-rank form or do not fit each other, nothing is left of them, or ``out``
            cannot be written.

    Example:
        >>> ma.merge(["style", "subject"], "both", method="svd", weights=[1.0, 0.7], rank=32)
    """
    settings = Settings(rank, energy, density, seed, kl)
    options = Options(ignore_unknown, semantics)
    return merged(adapters, out, method, weights, settings, dtype, overwrite, options, progress).table


class Merged(NamedTuple):
    """The table of ``merge``, and what was read, the first adapter first."""

    table: pd.DataFrame
    sources: list[Source]


def merged(
    adapters: Sequence[StrPath],
    out: StrPath,
    method: str,
    weights: Sequence[float] | None,
    settings: Settings,
    dtype: str | None,
    overwrite: bool,
    options: Options,
    progress: Progress | None = None,
) -> Merged:
    """``merge``, with what it read."""
    check_dtype(dtype)
    chosen, known = dtype or "float32", find_method(method)
    shares = [1.0] * len(adapters) if weights is None else list(weights)
    _check(adapters, shares, method, settings)
    found = [find_adapter(path) for path in adapters]
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(out, found[0].file, overwrite))
        sources = [stack.enter_context(open_source(one, options)) for one in found]
        modules = _modules(sources)
        if not any(len(of) > 1 for of in modules.values()):
            raise AnalysisError(
                f"{found[1].file}: shares no module with {found[0].file}; expected adapters of one base model"
            )
        cuts = [_cut_by_kl(*each, settings.kl, options) for each in zip(sources, shares, strict=True)]
        rows: list[tuple[Any, ...]] = []

        def pairs() -> Iterator[Pair]:
            for done, (name, of) in enumerate(modules.items(), 1):
                parts = [_part(sources[i], module, shares[i], cuts[i]) for i, module in of.items()]
                a, b = known.merge(parts, settings)
                if not known.cuts and (settings.rank or settings.energy):
                    a, b = _cut(a, b, settings)
                module = replace(next(iter(of.values())), name=name)
                norm = float(np.sqrt(max(0.0, np.sum((a @ a.T) * (b.T @ b)))))
                update, rank = module.update, len(a) if norm else 0
                about = (name, module_of(name), stack_and_layer(name)[1], update.rows, update.cols)
                rows.append((*about, len(of), rank, norm, rank * (update.rows + update.cols)))
                if rank:
                    yield as_pair(module, a, b, chosen)
                if progress:
                    progress(done * len(found) / len(modules), len(found))
            if not any(row[6] for row in rows):
                raise AnalysisError(f"{found[0].file}: nothing is left of the merged adapters: every update is zero")

        write_peft(folder, pairs(), chosen, sources[0])
        table = _table(rows)
        if settings.kl is not None:
            table.attrs["predicted_kl"] = [cut_.by_kl.predicted for cut_ in cuts if cut_]
        _tell_of_heads(sources)
        finish(folder, table)
    for source in sources:
        warn_of(source)
    return Merged(table, sources)


def _check(adapters: Sequence[StrPath], weights: Sequence[float], method: str, settings: Settings) -> None:
    if isinstance(adapters, str) or len(adapters) < 2:
        raise AnalysisError("expected two adapters or more to merge, as a list")
    if len(weights) != len(adapters):
        raise AnalysisError(
            f"weights={list(weights)}: expected one for each of the {len(adapters)} adapters", "weights"
        )
    if not np.isfinite(weights).all() or not any(weights):
        raise AnalysisError(f"weights={list(weights)}: expected finite numbers, not all 0", "weights")
    if sum(choice is not None for choice in (settings.rank, settings.energy, settings.kl)) > 1:
        raise AnalysisError("give one of rank=, energy= and kl=", "rank", "energy", "kl")
    if settings.kl is not None and method != "cat":
        raise AnalysisError(f"kl={settings.kl:g} is of the exact sum: give method=cat with it", "kl", "method")
    if settings.kl is not None and not 0 < settings.kl < np.inf:
        raise AnalysisError(f"kl={settings.kl:g}: expected a number of nats above 0", "kl")
    if settings.rank is not None and settings.rank < 1:
        raise AnalysisError(f"rank={settings.rank}: expected a whole number of at least 1", "rank")
    for name in ("energy", "density"):
        value = getattr(settings, name)
        if value is not None and not 0 < value <= 1:
            raise AnalysisError(f"{name}={value:g}: expected a share above 0 and at most 1", name)


def _modules(sources: Sequence[Source]) -> dict[str, dict[int, Module]]:
    """Module, as the first that has it calls it -> number of each adapter that has it -> its module there."""
    found: dict[str, dict[int, Module]] = {}
    names = matched([[module.name for module in source.modules] for source in sources])
    for i, (source, common) in enumerate(zip(sources, names, strict=True)):
        for module in source.modules:
            of = found.setdefault(common[module.name], {})
            first = next(iter(of.values()), module)
            size, expected = ((*one.inputs, one.update.rows) for one in (module, first))
            if size != expected or module.is_embedding != first.is_embedding:
                raise AnalysisError(
                    f"{source.adapter.file}: {module.name} adapts a weight of {size[-1]} × {size[:-1]}, where another "
                    f"has {expected[-1]} × {expected[:-1]}; expected adapters of one base model"
                )
            of[i] = module
    return found


class _CutByKl(NamedTuple):
    """What is kept of an adapter: the directions and the rank of each module, by name."""

    by_kl: Cut
    kept: dict[str, tuple[Ranked, int]]


def _cut_by_kl(source: Source, weight: float, kl: float | None, options: Options) -> _CutByKl | None:
    if kl is None:
        return None
    ranking = ranked(source, None, options)
    by_kl = chosen_by_kl(ranking, kl, source, weight)
    kept = {one.module.name: (one, k) for one, k in zip(ranking.modules, by_kl.ranks, strict=True)}
    return _CutByKl(by_kl, kept)


def _part(source: Source, module: Module, weight: float, cuts: _CutByKl | None) -> Part:
    a, b = (of.copy() for of in factors(source, module))
    if cuts:
        one, k = cuts.kept[module.name]
        a, b, *_ = cut(one, a, b, k, by_task=True)
        return Part(a, b, weight, np.ones(len(a)))
    products = module.update.products
    return Part(a, b, weight, np.repeat([one.scaling for one in products], [one.rank for one in products]))


def _cut(a: Array, b: Array, settings: Settings) -> tuple[Array, Array]:
    space = core_space([(a, b)])
    core = space.cores[0]
    if settings.energy is not None:
        kept = energy_rank(np.linalg.svd(core, compute_uv=False), settings.energy)
        return space.factors(core, 0 if np.isnan(kept) else int(kept))
    return space.factors(core, settings.rank)


def _tell_of_heads(sources: Sequence[Source]) -> None:
    """A note where what is saved beside the factors differs: only that of the first is kept."""
    others = [source for source in sources[1:] if source.copied]
    if others:
        lost = next(iter(others[0].copied.values()))
        sources[0].notes.append(
            f"what is trained whole is that of the first adapter; that of others, such as {lost}, is left out"
        )


def _table(rows: Sequence[tuple[Any, ...]]) -> pd.DataFrame:
    import pandas as pd

    columns = ["name", "module", "layer", "rows", "cols", "adapters", "rank", "norm", "parameters"]
    return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})
