"""An adapter as a plain LoRA without loss, for one of several readers.

The update of a module, sum over s of scaling_s B_s A_s, is B A with A the A_s stacked and B the
scaling_s B_s side by side; its rank is the sum of theirs (for MSPLoRA r_g + r_m + r_l,
arXiv 2503.21838, eq. 6). Shared factors are repeated in every module.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from msplora_analysis.adapters.opening import reads_base
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.formats.helpers.parts import is_of_the_base
from msplora_analysis.formats.names import module_of, stack_and_layer
from msplora_analysis.options import Options
from msplora_analysis.write.base_model import read_base
from msplora_analysis.write.source import Module, Source, factors, find_adapter, open_source, warn_of
from msplora_analysis.write.targets import find_target, targets
from msplora_analysis.write.targets.protocol import Target
from msplora_analysis.write.write import Pair, as_pair, check_dtype, finish, new_folder, widest_dtype

if TYPE_CHECKING:
    import pandas as pd


def export(
    adapter: StrPath,
    out: StrPath,
    *,
    to: str = "peft",
    base: StrPath | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    semantics: str = "paper",
    ignore_unknown: bool = False,
) -> pd.DataFrame:
    """Write an adapter as a plain LoRA with the same update of every weight, for PEFT or another reader.

    Args:
        adapter: An adapter's folder or file, as ``load_spectra`` takes it; one, not several.
        out: The folder to write.
        to: The reader: "peft", "diffusers", "kohya", "mlx" or "gguf".
        base: The model that the adapter is for, where names depend on it: its folder (or that of a pipeline), its
            weights, their index, its config.json, or a text file with the name of a module a line.
        dtype: Of the factors, "float32", "float16", "bfloat16" or "float64". None: that of the file where it holds
            the scaled factors exactly, else float32.
        overwrite: Replace an adapter that is in ``out``.
        semantics: See ``load_spectra``.
        ignore_unknown: Leave out, with a warning, tensors that no format explains, and what is trained beside the
            factors where the reader has no place for it.

    Returns:
        One row per module: name, module, layer, rows, cols, rank, parameters.

    Raises:
        AnalysisError: No plain LoRA equals the adapter, the reader cannot hold all of it, or ``out`` cannot be
            written.

    Example:
        >>> ma.export("runs/llama/checkpoint-500", "for-llama.cpp", to="gguf", base="Llama-3.2-1B")
    """
    return exported(adapter, out, to, base, dtype, overwrite, Options(ignore_unknown, semantics))[0]


def exported(
    adapter: StrPath,
    out: StrPath,
    to: str,
    base: StrPath | None,
    dtype: str | None,
    overwrite: bool,
    options: Options,
) -> tuple[pd.DataFrame, Source, str]:
    """``export``, with what it read and the type that it wrote."""
    check_dtype(dtype)
    target = find_target(to)
    if dtype is not None and dtype not in target.dtypes:
        raise AnalysisError(f"dtype={dtype}: {target.what} has one of {', '.join(target.dtypes)}", "dtype")
    found, model = find_adapter(adapter), None if base is None else read_base(base)
    if base is not None and reads_base(found):
        options = replace(options, base=base)
    files = {file for one in targets().values() for file in one.files}
    with (
        new_folder(out, found.file, overwrite, files) as folder,
        open_source(found, options, model, pipeline=target.pipeline) as source,
    ):
        chosen = dtype or widest_dtype(source)
        if dtype is None and not all(_holds(chosen, source, module) for module in source.modules):
            chosen = "float32"
        if chosen not in target.dtypes:
            source.notes.append(f"{target.what} has no {chosen}: its factors are rounded to float32")
            chosen = "float32"
        if not target.rest:
            _leave_out(source, target, options)
        pairs = [as_pair(module, *factors(source, module), chosen) for module in source.modules]
        table = _table(pairs)
        try:
            source.notes.extend(target.write(folder, pairs, chosen, source, model))
        except AnalysisError as error:
            raise AnalysisError(f"{found.file}: {error}", *error.arguments) from None
        finish(folder, table)
    warn_of(source)
    return table, source, chosen


def _leave_out(source: Source, target: Target, options: Options) -> None:
    """Notes of what PEFT's folder alone has a place for. Raises AnalysisError unless it may be left out."""
    if source.config.get("layer_replication"):
        raise AnalysisError(
            f"{source.adapter.file}: adapter_config.json: layer_replication: PEFT makes the model deeper before it "
            f"adapts it, and {target.what} cannot say so; merge it into the model with PEFT's merge_and_unload"
        )
    own = [tensor for tensor in source.copied.values() if is_of_the_base(tensor)]
    trained = [tensor for tensor in source.copied.values() if not is_of_the_base(tensor)]
    if own:
        source.notes.append(f"{_first(own)} of the base model left out; it matters where the vocabulary was changed")
    if trained and not options.ignore_unknown:
        message = (
            f"{source.adapter.file}: {target.what} holds low-rank updates alone, and {_first(trained)} would be lost"
        )
        raise AnalysisError(f"{message}; pass ignore_unknown=True to go on without", "ignore_unknown")
    if trained:
        source.notes.append(f"{_first(trained)} left out, which was trained: {target.what} has no place for it")


def _first(tensors: list[str]) -> str:
    return f"tensor {tensors[0]}" + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")


def _holds(dtype: str, source: Source, module: Module) -> bool:
    """Whether a type holds the scaled factors exactly; float32 always counts as such."""
    if dtype not in ("bfloat16", "float16"):
        return True
    a, b = factors(source, module)
    pair = as_pair(module, a, b, dtype)
    return bool((pair.a.reshape(a.shape) == a).all() and (pair.b.reshape(b.shape) == b).all())


def _table(pairs: list[Pair]) -> pd.DataFrame:
    import pandas as pd

    rows = [
        (name, module_of(name), stack_and_layer(name)[1], update.rows, update.cols, len(a), a.size + b.size)
        for name, update, a, b in ((one.module.name, one.module.update, one.a, one.b) for one in pairs)
    ]
    columns = ["name", "module", "layer", "rows", "cols", "rank", "parameters"]
    return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})
