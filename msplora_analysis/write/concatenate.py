"""An adapter as a plain LoRA without loss: the factors of all its products, one after another.

The update of a module, sum over s of scaling_s B_s A_s, is B A with A the A_s stacked and B the
scaling_s B_s side by side; its rank is the sum of theirs (for MSPLoRA r_g + r_m + r_l,
arXiv 2503.21838, eq. 6). Shared factors are repeated in every module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Options
from msplora_analysis.write.source import Module, Source, factors, find_adapter, open_source, warn_of
from msplora_analysis.write.write import (
    Pair,
    as_pair,
    check_dtype,
    new_folder,
    widest_dtype,
    write_adapter,
)

if TYPE_CHECKING:
    import pandas as pd


def export(
    adapter: StrPath,
    out: StrPath,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    semantics: str = "paper",
    ignore_unknown: bool = False,
) -> pd.DataFrame:
    """Write an adapter as a plain PEFT LoRA adapter with the same update of every weight.

    Args:
        adapter: An adapter's folder or file, as ``load_spectra`` takes it; one, not several.
        out: The folder to write.
        dtype: Of the factors, "float32", "float16", "bfloat16" or "float64". None: that of the file where it holds
            the scaled factors exactly, else float32.
        overwrite: Replace an adapter that is in ``out``.
        semantics: See ``load_spectra``.
        ignore_unknown: Leave out tensors that no format explains, with a warning.

    Returns:
        One row per module: name, module, layer, rows, cols, rank, parameters.

    Raises:
        AnalysisError: No plain LoRA equals the adapter, or ``out`` cannot be written.
    """
    return exported(adapter, out, dtype, overwrite, Options(ignore_unknown, semantics))[0]


def exported(
    adapter: StrPath, out: StrPath, dtype: str | None, overwrite: bool, options: Options
) -> tuple[pd.DataFrame, Source, str]:
    """``export``, with what it read and the type that it wrote."""
    check_dtype(dtype)
    found = find_adapter(adapter)
    with new_folder(out, found.file, overwrite) as folder, open_source(found, options) as source:
        chosen = dtype or widest_dtype(source)
        if dtype is None and not all(_holds(chosen, source, module) for module in source.modules):
            chosen = "float32"
        pairs = [as_pair(module, *factors(source, module), chosen) for module in source.modules]
        table = _table(source, pairs)
        write_adapter(folder, pairs, chosen, source, table)
    warn_of(source)
    return table, source, chosen


def _holds(dtype: str, source: Source, module: Module) -> bool:
    """Whether a type holds the scaled factors exactly; float32 always counts as such."""
    if dtype not in ("bfloat16", "float16"):
        return True
    a, b = factors(source, module)
    pair = as_pair(module, a, b, dtype)
    return bool((pair.a.reshape(a.shape) == a).all() and (pair.b.reshape(b.shape) == b).all())


def _table(source: Source, pairs: list[Pair]) -> pd.DataFrame:
    import pandas as pd

    rows = [
        (m.name, m.matrix.module, m.matrix.group, m.update.rows, m.update.cols, len(pair.a), pair.a.size + pair.b.size)
        for m, pair in zip(source.modules, pairs, strict=True)
    ]
    columns = ["name", "module", "layer", "rows", "cols", "rank", "parameters"]
    return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})
