"""Checkpoints of the released MSPLoRA code, a fork of PEFT 0.5.0: recognised, not yet read.

They too say ``"peft_type": "MSPLORA"``, but ``r`` is a list and the keys carry the scale's number
(``query.lora_A_0.weight``, 0 = global, the last = layer).
"""

from __future__ import annotations

import re

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.base import Config, Contents
from msplora_analysis.options import Options
from msplora_analysis.tensors import TensorFile

PEFT_TYPE = "MSPLORA"

_FACTOR = re.compile(r".+\.lora_[AB](?:\.[^.]+)?_[0-9]+\.weight")


def matches(config: Config, file: TensorFile) -> bool:
    return config.get("peft_type") == PEFT_TYPE and (
        isinstance(config.get("r"), list) or any(map(_FACTOR.fullmatch, file.shapes))
    )


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    raise AnalysisError(
        "this adapter was written by the released MSPLoRA code (keys like lora_A_0.weight), "
        "whose format is not supported yet; adapters of msplora-train and PEFT are"
    )
