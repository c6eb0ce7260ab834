"""The scale of formats whose files do not hold it, in the way of loralib: by what the user says beside the file."""

from __future__ import annotations

from collections.abc import Iterable

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.helpers.settings import number
from msplora_analysis.formats.updates import Config, Matrix, Shapes

_REMEDY = 'put {"lora_alpha": ..., "r": ...} into an adapter_config.json beside it'
UNSCALED = (
    f"the file does not hold lora_alpha: the spectra are of the update without the factor of it; to have it, {_REMEDY}"
)


def alpha_over(config: Config, rank: int, tensor: str) -> float:
    """lora_alpha / r where the config says lora_alpha, else 1; ``rank`` is that of ``tensor``, which r must be."""
    if number(config, "r", rank) != rank:
        raise AnalysisError(
            f"tensor {tensor} has rank {rank}, adapter_config.json says {config['r']:g}; is it the config of another "
            "adapter?"
        )
    return number(config, "lora_alpha") / rank if "lora_alpha" in config else 1.0


def why_unscaled(config: Config, shapes: Shapes, matrices: Iterable[Matrix]) -> str | None:
    """Why an adapter without its scale cannot be written as a plain LoRA."""
    if "lora_alpha" in config:
        return None
    return f"the file does not hold lora_alpha, on which the update depends; {_REMEDY}"
