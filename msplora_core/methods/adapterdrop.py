from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msplora_core.methods.base import TargetedMethod, Training, draw
from msplora_core.options import COUNT, COUNT_OR_0, Option

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class AdapterDrop(TargetedMethod):
    """bottleneck adapters, dropped from lower layers (arXiv 2010.11918)"""

    name = "adapterdrop"
    spectra = None
    peft_config = "msplora_core.tuners.bottleneck:BottleneckConfig"
    skips_parameters = True

    bottleneck: Annotated[int, Option("Width of bottleneck adapters.", COUNT)] = 16
    dropped_layers: Annotated[
        int | None,
        Option(
            "Lowest layers without a bottleneck adapter.  [default: none, and a random number in every step]",
            COUNT_OR_0,
        ),
    ] = None

    def training(self, model: nn.Module, seed: int) -> Training:
        return LayerDropper(model, seed) if self.dropped_layers is None else Training()


class LayerDropper(Training):
    """Leaves out the adapters of the n lowest layers in every training step, n drawn from 0 to all but one.

    Rücklé et al. 2021 (arXiv 2010.11918, section 3.1, robust AdapterDrop). Evaluation uses all adapters.

    Args:
        model: A model with bottleneck adapters.
        seed: Seed of the numbers drawn.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        from msplora_core.tuners.bottleneck import BottleneckLinear  # PEFT takes seconds to import

        self.seed = seed
        self.adapted = [module for module in model.modules() if isinstance(module, BottleneckLinear)]
        self.layers = 1 + max(layer.number for layer in self.adapted)

    def before_step(self, step: int) -> None:
        dropped = draw(self.seed, step, 0, self.layers - 1)
        for layer in self.adapted:
            layer.is_dropped = layer.number < dropped
