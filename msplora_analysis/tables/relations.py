"""One table of how adapters relate: a row for each module that two of them share, and one for each two in all.

    table = relate("style-a", "style-b")
    table.query("module == 'all'")          # each two as one
    table.sort_values("cosine").head()      # where they pull against each other

Names of modules are matched across trainers (``formats.matching``). The rows "all" are of the block-diagonal matrix of
all modules that the two share: norms add in squares, cosines and energies by norm, overlaps by directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from msplora_analysis.adapters.discovery import Adapter, as_paths, discover
from msplora_analysis.adapters.opening import opened
from msplora_analysis.compute.linalg.directions import directions
from msplora_analysis.compute.relations import relations
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath, identity, parse
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.matching import matched
from msplora_analysis.formats.names import module_of
from msplora_analysis.formats.updates import Matrix
from msplora_analysis.options import Options, Progress
from msplora_analysis.tables.added import added_beside, predicted
from msplora_analysis.tables.checkpoints import newest
from msplora_analysis.tables.labels import when

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"
"""In the column ``module``: the row of two adapters as one; its ``name`` is empty."""
_TEXTS = ("a", "b", "module", "name")
_FLOATS = (
    *("norm_a", "norm_b", "cosine", "overlap_in", "overlap_out", "expected_in", "expected_out"),
    *("energy_a_in_b", "energy_b_in_a", "norm_sum", "norm_difference"),
)
_COUNTS = ("k", "rank_a", "rank_b", "rank_sum")
_SIDES = ("in", "out")
_ORDER = (
    *_TEXTS, "norm_a", "norm_b", "cosine", "overlap_in", "overlap_out", "expected_in", "expected_out", "k",
    "energy_a_in_b", "energy_b_in_a", "norm_sum", "norm_difference", "rank_a", "rank_b", "rank_sum",
)  # fmt: skip


class Named(NamedTuple):
    """An adapter that is compared, and what tables call it."""

    adapter: Adapter
    label: str


def relate(
    *adapters: StrPath | Iterable[StrPath],
    top_k: int | None = None,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    base: StrPath | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How adapters relate, every two of them: how alike, how large together, and who works in whose space.

    Args:
        adapters: Two or more adapters of one base model, in any formats: folders or files, run folders (of several
            runs the last checkpoint each; of one run alone all), or lists of them.
        top_k: The most directions that overlaps compare. None: the smaller rank of the two.
        ignore_unknown: See ``load_spectra``.
        semantics: See ``load_spectra``.
        base: Read full checkpoints as their difference to this model.
        progress: Called after each module.

    Returns:
        Columns a, b (labels), module, name, norm_a, norm_b (Frobenius), cosine (of the updates as vectors),
        overlap_in, overlap_out (of the first k input and output directions), expected_in, expected_out (of random
        spaces), k, energy_a_in_b (share of a's squared norm in the column and row spaces of b), energy_b_in_a,
        norm_sum, norm_difference (of a + b, a - b), rank_a, rank_b, rank_sum. Rows with the module "all" are of each
        two as one; ``attrs["unmatched"]``: label to the modules that no other adapter has; ``attrs["one_run"]``:
        whether all are checkpoints of one run. Where ``msplora-measure
        added`` has left its file beside an adapter, also predicted_kl_a (what adding b costs the task of a: nats an
        example, of a regression the mean squared difference) and predicted_kl_b; ``attrs["losses"]``: label to the
        loss of the task.

    Raises:
        AnalysisError: There are fewer than two adapters, they share no module, or sizes differ.

    Example:
        >>> ma.relate("style", "subject").query("module == 'all'")[["cosine", "norm_a", "norm_b", "norm_sum"]]
    """
    options = Options(ignore_unknown, semantics, base, top_k)
    return related(labelled(adapters, full=base is not None), options, progress)


def labelled(given: Iterable[StrPath | Iterable[StrPath]], *, full: bool = False) -> list[Named]:
    """The adapters at some paths, in the order of these: of several runs the last checkpoint each, of one run all.

    A checkpoint that is named by its own path is taken whatever else its run has.

    Raises:
        AnalysisError: a path has no adapter, or there are fewer than two in all.
    """
    paths = [path for one in given for path in as_paths(one)]
    if not paths:
        raise AnalysisError("no path is given; expected two adapters or more")
    everything = discover(paths, full=full)
    several = len({adapter.run for adapter in everything}) > 1
    chosen: dict[str, Adapter] = {}
    for path in paths:
        top = identity(parse(path)).rstrip("/")
        below = [adapter for adapter in everything if f"{identity(adapter.file)}/".startswith(f"{top}/")]
        chosen.update({str(adapter.file): adapter for adapter in (newest(below) if several else below)})
    if len(chosen) < 2:
        raise AnalysisError(f"{paths[0]}: one adapter alone; give another one to relate it to")
    runs = [adapter.run for adapter in chosen.values()]
    return [Named(one, one.run if runs.count(one.run) == 1 else _dated(one)) for one in chosen.values()]


def _dated(adapter: Adapter) -> str:
    at = when({"step": adapter.step}) or when({"epoch": adapter.epoch}, "last")
    return f"{adapter.run} {at}"


def related(adapters: Sequence[Named], options: Options, progress: Progress | None = None) -> pd.DataFrame:
    """``relate``, of adapters that are found already."""
    import pandas as pd

    with ExitStack() as stack:
        places = _places(adapters, options, stack)
        shared = {name: of for name, of in places.items() if len(of) > 1}
        if not shared:
            first, second = (next(n for n, of in places.items() if i in of) for i in (0, 1))
            raise AnalysisError(
                f"{adapters[1].adapter.file}: shares no module with {adapters[0].adapter.file} ({second} against "
                f"{first}); are both for one base model?"
            )
        tables = []
        for done, (name, of) in enumerate(shared.items()):
            _check_sizes(adapters, name, of)
            found = [directions(file, [matrix], dtype=np.float64) for file, matrix in of.values()]
            labels = [adapters[i].label for i in of]
            i, j = np.triu_indices(len(labels), 1)
            keys: dict[str, Any] = {side: [labels[x] for x in index] for side, index in (("a", i), ("b", j))}
            tables.append(
                pd.DataFrame(keys | {"module": module_of(name), "name": name} | relations(found, options.top_k))
            )
            if progress:
                progress((done + 1) * len(adapters) / len(shared), len(adapters))
    table = pd.concat(tables, ignore_index=True)
    whole = _in_all(table)
    order = {label: number for number, (_, label) in enumerate(adapters)}
    table = pd.concat([table, whole], ignore_index=True)
    table = table.sort_values(["a", "b"], key=lambda column: column.map(order), kind="stable")
    types: dict[str, Any] = dict.fromkeys(_FLOATS, "float64") | dict.fromkeys(_COUNTS, "Int64")
    table = table[list(_ORDER)].astype(types).reset_index(drop=True)
    table.attrs["one_run"] = len({adapter.run for adapter, _ in adapters}) == 1
    files = {label: (one.file.parent, added) for one, label in adapters if (added := added_beside(one))}
    if files:
        names = {
            label: {name: of[i][1].name for name, of in shared.items() if i in of}
            for i, (_, label) in enumerate(adapters)
        }
        table = table.assign(**predicted(table, files, names))
        table.attrs["losses"] = {label: of.about.get("loss") for label, (_, of) in files.items()}
    table.attrs["unmatched"] = {
        label: alone
        for i, (_, label) in enumerate(adapters)
        if (alone := [n for n, of in places.items() if [*of] == [i]])
    }
    return table


def _places(
    adapters: Sequence[Named], options: Options, stack: ExitStack
) -> dict[str, dict[int, tuple[TensorFile, Matrix]]]:
    """Module -> number of each adapter that has it -> its open file and the whole update there."""
    contents = []
    notes: dict[str, list[Any]] = {}
    for adapter, _ in adapters:
        file, content = stack.enter_context(opened(adapter, options, base_notes=False))
        contents.append(
            (file, {m.name: m for scale in ("layer", "total") for m in content.matrices if m.scale == scale})
        )
        for note in content.notes:
            notes.setdefault(note, []).append(adapter.file)
        if not contents[-1][1]:
            raise AnalysisError(f"{adapter.file}: which modules its shared scales adapt is not in the file")
    for note, (first, *others) in notes.items():
        also = f" (and {len(others)} more files)" if others else ""
        warnings.warn(f"{first}{also}: {note}", stacklevel=5)
    places: dict[str, dict[int, tuple[TensorFile, Matrix]]] = {}
    common = matched([list(matrices) for _, matrices in contents])
    for number, ((file, matrices), names) in enumerate(zip(contents, common, strict=True)):
        for name, matrix in matrices.items():
            places.setdefault(names[name], {})[number] = file, matrix
    return places


def _check_sizes(adapters: Sequence[Named], name: str, of: dict[int, tuple[TensorFile, Matrix]]) -> None:
    sizes = {i: (matrix.update.rows, matrix.update.cols) for i, (_, matrix) in of.items()}
    first = next(iter(sizes))
    for i, size in sizes.items():
        if size != sizes[first]:
            (rows, cols), known = size, sizes[first]
            raise AnalysisError(
                f"{adapters[i].adapter.file}: the update of {name} is {rows} × {cols}, in "
                f"{adapters[first].adapter.file} {known[0]} × {known[1]}; expected adapters of one base model"
            )


def _in_all(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of two adapters as one: of the block-diagonal matrix of the modules that they share."""
    import pandas as pd

    groups = table.groupby(["a", "b"], sort=False)
    group = groups.ngroup().to_numpy()

    def total(values: pd.Series) -> pd.Series:  # pandas would pass over what is not known
        return pd.Series(np.bincount(group, values.to_numpy(np.float64)))

    def mean(name: str, weight: pd.Series) -> pd.Series:
        """The mean over modules; where the weight is 0 nothing counts."""
        of_all = total(weight)
        return total((weight * table[name]).where(weight > 0, 0.0)) / of_all.where(of_all > 0)

    a, b = table["norm_a"], table["norm_b"]
    squares, inner = total(a**2 + b**2), total((table["cosine"] * a * b).where(a * b > 0, 0.0))
    norms = {name: np.sqrt(total(table[name] ** 2)) for name in ("norm_a", "norm_b")}
    both = norms["norm_a"] * norms["norm_b"]
    whole = {
        **norms,
        "cosine": (inner / both.where(both > 0)).clip(-1, 1),
        **{f"{what}_{side}": mean(f"{what}_{side}", table["k"]) for what in ("overlap", "expected") for side in _SIDES},
        "energy_a_in_b": mean("energy_a_in_b", a**2),
        "energy_b_in_a": mean("energy_b_in_a", b**2),
        "norm_sum": np.sqrt(np.maximum(squares + 2 * inner, 0)),
        "norm_difference": np.sqrt(np.maximum(squares - 2 * inner, 0)),
        **{name: total(table[name]) for name in _COUNTS},
    }
    return groups[["a", "b"]].head(1).reset_index(drop=True).assign(module=ALL, name="", **whole)
