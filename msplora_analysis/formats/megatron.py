"""LoRA of Megatron-Bridge and NeMo: ``<module>.adapter.linear_in.weight`` (r, in), ``.linear_out.weight`` (out, r).

The update is alpha / dim * linear_out linear_in. Fused weights, such as ``linear_qkv``, are one matrix: its rows have
the heads' queries, keys and values by turns, and the order of rows changes no singular value. Distributed checkpoints
may have all layers in one tensor, (layers, r, in). ``adapter_q``, ``adapter_gate``, ... are parts with own factors.
alpha and dim stand under ``peft`` in the run_config.yaml of a checkpoint. Source: megatron/bridge/peft/lora.py,
canonical_lora.py and lora_layers.py, training/utils/config_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.several import METADATA
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import Parts, add_part, dora_note, expect_shape, layer_matrix, required
from msplora_analysis.formats.helpers.settings import check_rank, needed_count, needed_number
from msplora_analysis.formats.helpers.structures import expert_matrices
from msplora_analysis.formats.names import any_named, stack_and_layer
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Matrix, Product, Shapes, Sum, contents
from msplora_analysis.options import Options

_FACTOR = re.compile(r"(?:module\.)*(?P<name>.+)\.adapter(?:_(?P<part>\w+))?\.linear_(?P<way>in|out)\.weight")
_MAGNITUDE = ".adapter.weight_magnitude"
_RUN = "run_config.yaml"
_FUSED = (
    "linear_qkv and linear_fc1 are fused weights: a spectrum is of queries, keys and values, or gate and up, together"
)
_has_factors = any_named(_FACTOR)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, fused ones whole, and layer."""
    rank, alpha = _settings(config)
    modules: dict[str, Parts] = {}
    unknown, decomposed = [], False
    for key in file.shapes:
        if match := _FACTOR.fullmatch(key):
            name = f"{match['name']}.{match['part']}" if match["part"] else match["name"]
            add_part(modules, name, match["way"], key)
        elif key.endswith(_MAGNITUDE):
            decomposed = True
        elif "adapter" in key:
            unknown.append(key)
    matrices: list[Matrix] = []
    for name, parts in modules.items():
        a, b = required(parts, "in", "out")
        matrices += _matrices(name, a, b, rank, alpha / rank, file.shapes)
    fused = any(re.search(r"linear_(qkv|fc1)$", name) for name in modules)
    notes = [*([_FUSED] if fused else []), *([dora_note("alpha / dim")] if decomposed else [])]
    return contents(matrices, unknown, notes)


def _settings(config: Config) -> tuple[int, float]:
    """Rank and alpha: of run_config.yaml, or of an adapter_config.json that the user wrote."""
    of_run = config.get(_RUN, {}).get("peft")
    if isinstance(of_run, dict) and {"dim", "alpha"} <= of_run.keys():
        config = {"r": of_run["dim"], "lora_alpha": of_run["alpha"]}
    if not {"r", "lora_alpha"} <= config.keys():
        raise AnalysisError(
            f"its scale, alpha / dim of the trainer's peft settings, is not in the file; copy the checkpoint's {_RUN} "
            'beside it, put {"r": <dim>, "lora_alpha": <alpha>} into an adapter_config.json there, or convert it with '
            "Megatron-Bridge's export to PEFT"
        )
    return needed_count(config, "r"), needed_number(config, "lora_alpha")


def _matrices(name: str, a: str, b: str, rank: int, scaling: float, shapes: Shapes) -> Iterator[Matrix]:
    if len(shapes[a]) == 3:
        check_rank(a, shapes[a][1], rank)
        for layer, matrix in enumerate(expert_matrices(name, a, b, scaling, shapes)):
            own = _of_layer(name, layer)
            yield replace(matrix, name=own, group=stack_and_layer(own)[1])
        return
    found, cols = expect_shape(shapes, a, None, None)
    check_rank(a, found, rank)
    rows, _ = expect_shape(shapes, b, None, rank)
    yield layer_matrix(name, Sum((Product(Factor((a,), rank, cols), Factor((b,), rows, rank), scaling),)))


def _of_layer(name: str, layer: int) -> str:
    """``decoder.layers.3.mlp.linear_fc2`` of ``decoder.layers.mlp.linear_fc2``."""
    before, layers, after = name.partition("layers.")
    return f"{before}{layers}{layer}.{after}" if layers else f"{name}.{layer}"


FORMAT = Format(
    name="Megatron-Bridge, NeMo",
    read=read,
    lone=_has_factors,
    recognises=lambda config, file: config.get("peft_type") in (None, "LORA") and _has_factors(file.shapes),
    config_files={METADATA: (_RUN,)},
    why_no_lora="its modules have Megatron's names and fused weights; Megatron-Bridge exports them to PEFT",
    priority=1,
)
