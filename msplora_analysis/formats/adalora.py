"""AdaLoRA as PEFT saves it: ``<name>.lora_A`` (r, in), ``lora_E`` (r, 1) and ``lora_B`` (out, r).

The update is B diag(E) A, the P Λ Q of Zhang et al. 2023 (arXiv 2303.10512, eq. 3), times
lora_alpha / (init_r + 1e-5) as PEFT computes it. ``rank_pattern`` of the config says which of a
module's init_r components were kept; the file has only these, and their scale stays that of init_r.
"""

from __future__ import annotations

import math

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix
from msplora_analysis.formats.helpers.settings import needed_count, needed_number
from msplora_analysis.formats.helpers.structures import rows_scaled
from msplora_analysis.formats.names import PREFIX
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Sum, contents
from msplora_analysis.options import Options


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module that has components left."""
    shapes = file.shapes
    init_rank, alpha = needed_count(config, "init_r"), needed_number(config, "lora_alpha")
    if alpha <= 0:  # PEFT then trains with one scale, and loads with another
        raise AnalysisError(f"adapter_config.json: lora_alpha must be positive for AdaLoRA, got {alpha!r}")
    kept = _kept(config, init_rank)
    modules, unknown = group_parts(shapes, config, ("lora_A", "lora_B", "lora_E"))
    matrices, pruned = [], []
    for name, parts in modules.items():
        a, b, e = (parts[part] for part in ("lora_A", "lora_B", "lora_E"))
        rank = kept.get(name, init_rank)
        if shapes[a][:1] != (rank,):
            raise AnalysisError(
                f"tensor {a} has shape {list(shapes[a])}, adapter_config.json says rank {rank}; "
                "is it the config of another adapter?"
            )
        if rank == 0:
            pruned.append(name)
            continue
        _, cols = expect_shape(shapes, a, rank, None)
        rows, _ = expect_shape(shapes, b, None, rank)
        if math.prod(shapes[e]) != rank:
            raise AnalysisError(f"tensor {e} has shape {list(shapes[e])}; expected [{rank}, 1]; save the adapter again")
        product = Product(Factor((a, e), rank, cols, rows_scaled), Factor((b,), rows, rank), alpha / (init_rank + 1e-5))
        matrices.append(layer_matrix(name, Sum((product,))))
    notes = []
    if pruned:
        notes.append(
            f"AdaLoRA pruned {len(pruned)} modules to rank 0, which have no singular values and no rows: "
            + ", ".join(pruned)
        )
    return contents(matrices, unknown, notes)


def _kept(config: Config, init_rank: int) -> dict[str, int]:
    """How many components of each module ``rank_pattern`` keeps."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise AnalysisError(f"adapter_config.json: rank_pattern must be an object, got {pattern!r}")
    kept = {}
    for key, mask in pattern.items():
        if not isinstance(mask, list) or len(mask) != init_rank or not all(isinstance(one, bool) for one in mask):
            raise AnalysisError(
                f"adapter_config.json: rank_pattern {key} must be a list of {init_rank} (init_r) times true or false"
            )
        # Keys are those of lora_E, with the adapter's name behind it or not.
        kept[key.removeprefix(PREFIX).rpartition(".lora_E")[0]] = sum(mask)
    return kept


FORMAT = Format(name="AdaLoRA", read=read, peft_types=("ADALORA",))
