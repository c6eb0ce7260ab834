"""What neighbouring layers share, of one run and of two, and one layer of two runs: tables of adapters' factors.

What is compared, the column ``part``:

- ``update``: all of B A;
- ``learned``: B (A − A₀), with A₀ of the run's checkpoint at step 0: what training added to the random directions that
  A began with;
- ``task``: where there are moments, the update cut to the task directions that hold 99 % of its task energy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.moments import moments_file, open_moments
from msplora_analysis.adapters.opening import opened
from msplora_analysis.compute.linalg.spectra import load_factors
from msplora_analysis.compute.measures.rank_needed import energy_rank
from msplora_analysis.compute.nulls import joint, pairs, stacked
from msplora_analysis.compute.weighted import Weights, fitting, weights_of
from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.names import stack_and_layer
from msplora_analysis.formats.updates import Matrix, Sum
from msplora_analysis.options import Options
from msplora_core.moments import directions
from msplora_core.names import SCALES, method_label

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("update", "learned", "task")
MEASURES = ("overlap_in", "overlap_out", "shared_in", "shared_out")
PAIRS = {
    "method": "str", "task": "str", "part": "str", "module": "str", "run_i": "str", "run_j": "str", "group_i": "Int64",
    "group_j": "Int64", "k": "Int64",
} | dict.fromkeys(
    (*MEASURES, "expected_in", "expected_out", "shared_expected_in", "shared_expected_out"), "float64"
)  # fmt: skip
JOINT = {
    "method": "str", "task": "str", "part": "str", "module": "str", "run": "str", "layers": "Int64",
    "energy": "float64", "joint": "Int64", "rotated": "float64", "separate": "Int64",
}  # fmt: skip

Factors = tuple[NDArray[np.float64], NDArray[np.float64]]
_Place = tuple[str, tuple[Any, ...]]


class Run(NamedTuple):
    """What is read of a run. factors: (part, a module at one place of a stack) -> layer -> A (r, in) and B (out, r)."""

    name: str
    method: str
    factors: dict[_Place, dict[int, Factors]]


def read_run(adapter: Adapter, start: Adapter | None, options: Options) -> Run:
    """The layers' own parts of an adapter.

    start: the adapter of the same run at step 0, if it is there.
    """
    with ExitStack() as stack:
        file, contents = stack.enter_context(opened(adapter, options, base_notes=False))
        first: dict[str, tuple[Any, Matrix]] = {}
        if start is not None and start.file != adapter.file:
            before, at_first = stack.enter_context(opened(start, options, base_notes=False))
            first = {m.name: (before, m) for m in at_first.matrices if m.scale == "layer"}
        weights: dict[Matrix, Weights] = {}
        if path := moments_file(adapter, options):
            matrices = contents.matrices
            known = fitting(file, path, open_moments(path, file.states).modules, matrices, matrices, [])
            weights = weights_of(matrices, known)
        found: dict[_Place, dict[int, Factors]] = {}
        for matrix in contents.matrices:
            if matrix.scale != "layer" or matrix.group is None:
                continue
            a, b = _factors(file, matrix)
            if not a.any() or not b.any():
                continue  # an update of zero has no directions
            name, layer = stack_and_layer(matrix.name)
            place = (matrix.module, matrix.name.removeprefix(f"{name}.{layer}."), name, len(b), a.shape[1])
            found.setdefault(("update", place), {})[matrix.group] = a, b
            if matrix.name in first:
                a_0, _ = _factors(*first[matrix.name])
                if a_0.shape == a.shape and (a != a_0).any():
                    found.setdefault(("learned", place), {})[matrix.group] = a - a_0, b
            if matrix in weights:
                task = directions(*weights[matrix])
                k = int(np.nan_to_num(energy_rank(task.sigma)))
                if k:
                    found.setdefault(("task", place), {})[matrix.group] = task.right[:k] @ a, b @ task.left[:, :k]
        ranks = {m.scale: m.update.rank for m in contents.matrices if m.scale in SCALES}
    label = method_label("msplora", ranks) if len(ranks) > 1 else method_label("lora", ranks.get("layer"))
    return Run(adapter.run, label, found)


def _factors(file: Any, matrix: Matrix) -> Factors:
    if not isinstance(matrix.update, Sum):
        raise AnalysisError(f"{file.path}: the update of {matrix.name} is no product of factors; expected a LoRA")
    a, b, scaling = load_factors(file, [matrix.update])
    return a[0].copy(), b[0] * scaling[0]


def tables_of(
    runs: Mapping[tuple[str, str], Sequence[Run]], top_k: int | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables ``PAIRS`` and ``JOINT`` of runs by method and task."""
    import pandas as pd

    of_pairs, of_joint = [], []
    for (method, task), members in runs.items():
        for (part, place), units in _places(members):
            about = {"method": method, "task": task, "part": part, "module": place[0]}
            found = stacked([factors for _, _, factors in units])
            i, j = _compared(units)
            sides: dict[str, Any] = {}
            for side, index in (("i", i), ("j", j)):
                sides |= {f"run_{side}": [units[x][0] for x in index], f"group_{side}": [units[x][1] for x in index]}
            if len(i):
                of_pairs.append(pd.DataFrame(about | sides | pairs(found, i, j, top_k)))
            for run in dict.fromkeys(run for run, *_ in units):
                mine = [number for number, (name, *_) in enumerate(units) if name == run]
                if len(mine) > 1:
                    one = found.of(mine)
                    of_joint.append(pd.DataFrame(about | {"run": run, "layers": len(mine)} | joint(one)))
    return _table(of_pairs, PAIRS), _table(of_joint, JOINT)


def _table(blocks: Sequence[pd.DataFrame], types: dict[str, str]) -> pd.DataFrame:
    import pandas as pd

    table = pd.concat(blocks, ignore_index=True) if blocks else pd.DataFrame(columns=list(types))
    return table[list(types)].astype(types)


def same_layer(runs: Sequence[Run], top_k: int | None = None) -> dict[str, float]:
    """Mean overlap less chance of one layer's update in two runs, on either side; empty for a single run."""
    found: dict[str, list[float]] = {"overlap_in": [], "overlap_out": []}
    for (part, _), units in _places(runs):
        for layer in dict.fromkeys(layer for _, layer, _ in units) if part == "update" else ():
            one = [factors for _, number, factors in units if number == layer]
            if len(one) > 1:
                table = pairs(stacked(one), *np.triu_indices(len(one), 1), top_k)
                for name, values in found.items():
                    values.extend(table[name] - table[name.replace("overlap", "expected")])
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def _places(runs: Sequence[Run]) -> Iterator[tuple[_Place, list[tuple[str, int, Factors]]]]:
    """(run, layer, factors) of all units that may be held against each other."""
    for key in dict.fromkeys(key for part in PARTS for run in runs for key in run.factors if key[0] == part):
        units = [(run.name, layer, factors) for run in runs for layer, factors in run.factors.get(key, {}).items()]
        if len(units) > 1:
            yield key, units


def _compared(units: Sequence[tuple[str, int, Factors]]) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Indices of neighbours, of one run and of two, and of one layer of two runs."""
    number = {layer: at for at, layer in enumerate(sorted({layer for _, layer, _ in units}))}
    chosen = [
        (x, y)
        for (x, (run, layer, _)), (y, (other, there, _)) in combinations(enumerate(units), 2)
        if (apart := abs(number[layer] - number[there])) == 1 or (apart == 0 and run != other)
    ]
    both = np.array(chosen, dtype=int).reshape(-1, 2)
    return both[:, 0], both[:, 1]
