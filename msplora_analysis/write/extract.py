"""The best LoRA of a full fine-tuning: of every linear layer the best approximation of what training changed.

A weight's update is its difference to the base's. Its first k singular triples are the best approximation of rank k
(Eckart & Young 1936), which PHLoRA (arXiv 2509.10971) and others take for an adapter. One tensor is read at a time, and
what is finished is kept, so that a call that was ended goes on (``work``). Whatever a LoRA of linear layers cannot hold
(embeddings, norms, biases, added tokens) is measured and told.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.adapters.opening import opened
from msplora_analysis.compute.choose import Choice
from msplora_analysis.compute.linalg.best import best
from msplora_analysis.compute.linalg.device import CPU, check_device, like, to_device
from msplora_analysis.compute.linalg.spectra import not_finite, whole_matrix
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath, parse
from msplora_analysis.files.opening import BASE
from msplora_analysis.files.tensors import FloatArray, TensorFile
from msplora_analysis.formats.names import PREFIX, module_of, stack_and_layer
from msplora_analysis.formats.updates import Factor, Matrix, Whole
from msplora_analysis.options import Options, Progress
from msplora_analysis.tables.files import write_table
from msplora_analysis.write.extract_plan import Plan, config_of, plan_of, settings_of, tensor_of
from msplora_analysis.write.work import Work, beside
from msplora_analysis.write.write import (
    DTYPES,
    TABLE_NAME,
    WEIGHTS_NAME,
    check_dtype,
    new_folder,
    peft_config,
    rounded,
)
from msplora_core.names import CONFIG
from msplora_core.version import __version__

if TYPE_CHECKING:
    import pandas as pd

LOW_RANK, SAVED, LEFT_OUT, UNCHANGED = "low rank", "whole", "left out", "unchanged"
"""What becomes of a tensor."""

_PIECE = 2**22  # values of a tensor that are held at once where it is only compared
_ROWS = 512  # likewise rows of a product


def extract(
    model: StrPath,
    out: StrPath,
    *,
    base: StrPath,
    rank: int | None = None,
    energy: float | None = None,
    modules_to_save: Sequence[str] = (),
    dtype: str | None = None,
    device: str = CPU,
    overwrite: bool = False,
    ignore_unknown: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Write the best plain PEFT LoRA adapter of a full fine-tuning.

    The error of every module is at most 1 + 1e-6 times that of the best approximation of its rank, or 1e-7 of its
    update's norm where that is more. Beside ``out`` stands ``<out>.unfinished`` until all is done: the same call goes
    on with what is in it.

    Args:
        model: The fine-tuned model: a folder or file, of safetensors or PyTorch, in shards or not.
        out: The folder to write.
        base: The model before training, likewise.
        rank: Of every module; less where its update has less.
        energy: In place of it: of every module the least rank that keeps this share of the sum of sigma², in (0, 1].
        modules_to_save: Names of modules, such as "embed_tokens", whose tensors are saved as they are, as PEFT's
            ``modules_to_save`` has them: all modules whose path ends so. Heads of a task always are.
        dtype: Of the factors, "float32", "float16", "bfloat16" or "float64". None: float32.
        device: "cpu", or a device of torch such as "cuda".
        overwrite: Replace an adapter that is in ``out``.
        ignore_unknown: Leave out tensors that the base does not have, with a warning.
        progress: Called with the tensors that are done, and the number of all.

    Returns:
        One row for each tensor of the model: name, module, layer, rows, cols, kept ("low rank", "whole", "left out",
        "unchanged"), rank, parameters (of what is written), norm (Frobenius, of the update), relative (to the base
        weight's norm), energy (share of the update's squared norm that is kept), error (Frobenius norm of what is not,
        relative to the update's; of the factors as they are written).

    Raises:
        AnalysisError: the two are no model and its base, a tensor holds NaN or Inf, nothing changed, or ``out`` cannot
            be written.

    Example:
        >>> ma.extract("tuned", "adapter", base="model", rank=32).query("kept == 'left out'")
    """
    options = Options(ignore_unknown, base=base)
    done = extracted(
        model, out, Choice(energy, rank), tuple(modules_to_save), dtype, device, overwrite, options, progress
    )
    return done.table


class Extracted(NamedTuple):
    """The table of ``extract``, the type that was written, how many tensors an earlier call had finished."""

    table: pd.DataFrame
    dtype: str
    resumed: int


def extracted(
    model: StrPath,
    out: StrPath,
    choice: Choice,
    modules_to_save: Sequence[str],
    dtype: str | None,
    device: str,
    overwrite: bool,
    options: Options,
    progress: Progress | None = None,
) -> Extracted:
    """``extract``, with what it found."""
    if (choice.rank is None) == (choice.energy is None):
        raise AnalysisError("give one of rank= and energy=", "rank", "energy")
    choice.check()
    check_dtype(dtype)
    check_device(device)
    dtype = dtype or "float32"
    found = _find_model(model)
    with ExitStack() as stack:
        with (
            new_folder(out, found.file, overwrite) as folder,
            opened(found, options, base_notes=False) as (file, contents),
        ):
            try:
                settings = settings_of(found)
                plan = plan_of(file, contents, modules_to_save, settings)
                job = {
                    "job": "extract", "version": __version__, "choice": choice, "dtype": dtype, "whole": plan.saved,
                    "files": sorted([str(path), *map(str, state)] for path, state in file.states.items()),
                    "model": str(found.file), "base": str(options.base), "tensors": sorted(file.shapes.items()),
                }  # fmt: skip
                work = stack.enter_context(Work(beside(out), json.loads(json.dumps(job))))
                resumed = len(work.found)
                rows = list(_rows(file, plan, choice, dtype, device, work, progress))
            except AnalysisError as error:
                raise AnalysisError(f"{found.file}: {error}", *error.arguments) from None
            table = _table(rows)
            low = table.loc[table["kept"] == LOW_RANK, ["name", "rank"]]
            ranks = {name: int(rank) for name, rank in low.values}
            if not ranks:
                work.remove()
                raise AnalysisError(
                    f"{found.file}: no linear layer differs from the base's: there is nothing to extract"
                )
            config = peft_config(ranks, config_of(settings, plan, options))
            work.join(folder / WEIGHTS_NAME)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_table(table, folder / TABLE_NAME)
        work.remove()
    for note in plan.notes:
        warnings.warn(f"{found.file}: {note}", stacklevel=3)
    return Extracted(table, dtype, resumed)


def _find_model(model: StrPath) -> Adapter:
    found = discover(model, full=True)
    place = parse(model)
    here = [one for one in found if place in (one.file, one.file.parent)] or found
    if len(here) > 1:
        raise AnalysisError(f"{model}: {len(here)} models; give one of them, such as {here[-1].file.parent}")
    if here[0].config:
        raise AnalysisError(f"{here[0].file}: an adapter already, not a fully trained model; to shrink it, compress it")
    return here[0]


class _Row(NamedTuple):
    """A row of the table. ``base``: the norm of the base's weight; NaN where it has none."""

    name: str
    module: str
    layer: int | None
    rows: int
    cols: int
    kept: str
    rank: int
    parameters: int
    norm: float
    base: float
    error: float


def _rows(
    file: TensorFile,
    plan: Plan,
    choice: Choice,
    dtype: str,
    device: str,
    work: Work,
    progress: Progress | None,
) -> Iterator[_Row]:
    steps: list[tuple[str, Callable[[], _Row]]] = [
        *((m.name, lambda m=m: _low_rank(file, m, plan, choice, dtype, device, work)) for m in plan.low),
        *((name, lambda name=name: _saved(file, name, plan, work)) for name in plan.saved),
        *((name, lambda name=name, other=other: _left_out(file, name, other)) for name, other in plan.left.items()),
    ]
    for number, (name, step) in enumerate(steps, 1):
        yield _Row(**work.found[name]) if name in work.found else step()
        if progress:
            progress(number, len(steps))


def _low_rank(
    file: TensorFile, matrix: Matrix, plan: Plan, choice: Choice, dtype: str, device: str, work: Work
) -> _Row:
    update, tensor = matrix.update, tensor_of(matrix)
    assert isinstance(update, Whole)
    difference = to_device(whole_matrix(file, update, tensor), device)
    found = best(difference, rank=choice.rank, energy=choice.energy)
    root = np.sqrt(found.sigma)
    b, a = rounded(found.left * root, dtype), rounded(root[:, None] * found.right, dtype)
    norm, error = _norms(difference, b, a)
    rank = len(root)
    row = _Row(
        matrix.name, matrix.module, matrix.group, update.rows, update.cols, LOW_RANK if rank else UNCHANGED, rank,
        a.size + b.size, norm, _norm(file, update.factor.tensors[1]), error / norm if norm else 0.0,
    )  # fmt: skip
    if rank:
        if tensor in plan.transposed:
            a, b = b.T, a.T
        inputs = file.shapes[tensor][1:]
        if len(inputs) > 1:  # a convolution
            a, b = a.reshape(rank, *inputs), b.reshape(len(b), rank, *(1,) * (len(inputs) - 1))
        keys = [f"{PREFIX}{matrix.name}.lora_{factor}.weight" for factor in "AB"]
        work.put(dict(zip(keys, (a, b), strict=True)), dict.fromkeys(keys, DTYPES[dtype]), row._asdict())
    return row


def _norms(difference: Any, b: NDArray[Any], a: NDArray[Any]) -> tuple[float, float]:
    """The Frobenius norms of a matrix, and of what ``b @ a`` leaves of it."""
    squares = np.zeros(2)
    right = like(a.astype(np.float64), difference)
    for start in range(0, len(difference), _ROWS):
        rows = difference[start : start + _ROWS]
        rest = rows - like(b[start : start + _ROWS].astype(np.float64), difference) @ right
        squares += float((rows * rows).sum()), float((rest * rest).sum())
    norm, error = np.sqrt(squares)
    return float(norm), float(error)


def _saved(file: TensorFile, name: str, plan: Plan, work: Work) -> _Row:
    values = file.read(name)
    row = _row(file, name, SAVED, values.size, math.nan, math.nan, 0.0)
    work.put({PREFIX + name: np.ascontiguousarray(values)}, {}, row._asdict())
    return row


def _left_out(file: TensorFile, name: str, other: str | None) -> _Row:
    shape = file.shapes[name]
    base = file.shapes[BASE + other] if other else None
    if other is None or base is None or shape[1:] != base[1:]:
        return _row(file, name, LEFT_OUT, 0, math.nan, math.nan, 1.0)
    norm, of_base = _changed(file, name, BASE + other)
    same = norm == 0 and shape == base
    return _row(file, name, UNCHANGED if same else LEFT_OUT, 0, norm, of_base, 0.0 if same else 1.0)


def _row(file: TensorFile, name: str, kept: str, parameters: int, norm: float, base: float, error: float) -> _Row:
    shape = file.shapes[name]
    rows = shape[0] if shape else 1
    module = module_of(name.rpartition(".")[0] or name)
    layer = stack_and_layer(name)[1]
    return _Row(name, module, layer, rows, math.prod(shape[1:]), kept, 0, parameters, norm, base, error)


def _changed(file: TensorFile, name: str, other: str) -> tuple[float, float]:
    """The norms of the difference of two tensors, of the rows that both have, and of the second."""
    size = min(math.prod(file.shapes[one]) for one in (name, other))
    squares = np.zeros(2)
    for start in range(0, size, _PIECE):
        one, two = (
            file.read_part(of, start, min(start + _PIECE, size)).astype(np.float64, copy=False) for of in (name, other)
        )
        squares += np.sum((one - two) ** 2), np.sum(two**2)
    norm, of_base = np.sqrt(squares)
    if not np.isfinite(norm):
        raise not_finite(file, Whole(Factor((name, other), 1, size)), name)
    return float(norm), float(of_base)


def _norm(file: TensorFile, name: str) -> float:
    size, square = math.prod(file.shapes[name]), 0.0
    for start in range(0, size, _PIECE):
        part: FloatArray = file.read_part(name, start, min(start + _PIECE, size))
        square += float(np.sum(np.square(part, dtype=np.float64)))
    return math.sqrt(square)


def _table(rows: Sequence[_Row]) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    table["relative"] = table["norm"] / table.pop("base").replace(0, math.nan)
    table["energy"] = 1 - table["error"] ** 2
    return table[[*(name for name in table if name != "error"), "error"]]
