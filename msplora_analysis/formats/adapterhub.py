"""LoRA of AdapterHub's library adapters: ``<module>.loras.<name>.lora_A`` (r, in) and ``.lora_B`` (out, r).

The update is alpha / r * B A, with alpha and r in ``config`` of adapter_config.json. One weight of several parts
(GPT-2's c_attn) is loralib's MergedLinear. ``.m`` are the magnitudes of DoRA. Source: adapters/methods/lora.py.
"""

from __future__ import annotations

import re

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import dora_note, pair_factors
from msplora_analysis.formats.helpers.settings import needed_count, needed_number
from msplora_analysis.formats.loralib import part_matrices
from msplora_analysis.formats.names import any_named
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.loras\.(?P<scale>[^.]+)\.lora_(?P<factor>[AB])"
_MAGNITUDE = r".+\.loras\.[^.]+\.m\.weight"
_DORA = dora_note("alpha / r")
_REFUSED = {
    "use_gating": "a gate scales its update as the input says; there is no one update",
    "vera_d": "VeRA of this library draws its projections anew, and they are not in the file",
    "n_up_projection": "its update is a mixture of several; it is not supported",
}
_has_factors = any_named(_FACTOR)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, or part of one, all of scale "layer"."""
    about = config.get("config")
    if not isinstance(about, dict):
        raise AnalysisError(
            "an adapter of AdapterHub without its adapter_config.json, in which its scale is; copy it beside the file"
        )
    for key, reason in _REFUSED.items():
        if about.get(key):
            raise AnalysisError(f"adapter_config.json: {key}: {reason}")
    if (mode := about.get("composition_mode", "add")) != "add":
        raise AnalysisError(f"adapter_config.json: composition_mode is {mode!r}: it scales weights; expected 'add'")
    settings = {"lora_alpha": needed_number(about, "alpha"), "r": needed_count(about, "r")}
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    if len(names := sorted({name for _, name in pairs})) > 1:
        raise AnalysisError(f"the adapters {' and '.join(names)} are in the file; save one adapter per file")
    matrices = [
        matrix for (name, _), (a, b) in pairs.items() for matrix in part_matrices(name, a, b, file.shapes, settings)
    ]
    magnitudes = {key for key in unknown if re.fullmatch(_MAGNITUDE, key)}
    return contents(matrices, (key for key in unknown if key not in magnitudes), [_DORA] if magnitudes else [])


FORMAT = Format(
    name="AdapterHub",
    read=read,
    lone=_has_factors,
    recognises=lambda config, file: _has_factors(file.shapes),
    why_no_lora="its modules have other names than PEFT's; load it in adapters and save it with PEFT",
    priority=1,  # before loralib, whose names are as theirs
)
