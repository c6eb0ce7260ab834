"""FourierFT as PEFT saves it: ``<module>.fourierft_spectrum`` (n), the update at n places of its Fourier transform.

The places are the first n of a permutation of all, drawn from ``random_loc_seed`` for the sizes of the weight, and the
update is scaling times the real part of the inverse transform (Gao et al. 2024, arXiv 2405.03003;
peft/tuners/fourierft/layer.py): a matrix of full rank. The sizes are known from the base alone. The permutation is
PyTorch's, which draws it again.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.base import base_shape, needed_base
from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix
from msplora_analysis.formats.helpers.settings import needed_number
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Whole, contents
from msplora_analysis.options import Options

_PART = "fourierft_spectrum"


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module."""
    modules, unknown = group_parts(file.shapes, config, (_PART,))
    bases = needed_base(file, modules, "FourierFT draws its places for the sizes of the weights")
    scaling, seed = needed_number(config, "scaling"), int(needed_number(config, "random_loc_seed"))
    matrices = []
    for name, parts in modules.items():
        spectrum = parts[_PART]
        stored = base_shape(file, bases[name])
        rows, cols = stored[::-1] if config.get("fan_in_fan_out") else stored
        (places,) = expect_shape(file.shapes, spectrum, None)
        if places > rows * cols:
            raise AnalysisError(
                f"tensor {spectrum} has {places} values, the base's weight {[rows, cols]}; is it another model?", "base"
            )
        make = partial(_transformed, rows=rows, cols=cols, seed=seed)
        matrices.append(layer_matrix(name, Whole(Factor((spectrum,), rows, cols, make), scaling)))
    return contents(matrices, unknown)


def _transformed(values: NDArray[Any], rows: int, cols: int, seed: int) -> NDArray[np.float64]:
    dense = np.zeros(rows * cols)
    dense[_places(rows * cols, seed, len(values))] = values
    return np.ascontiguousarray(np.fft.ifft2(dense.reshape(rows, cols)).real)


@lru_cache(maxsize=4)  # the modules of a model have few sizes
def _places(size: int, seed: int, count: int) -> NDArray[np.int64]:
    import torch

    found: NDArray[np.int64] = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].numpy()
    return found


FORMAT = Format(
    name="FourierFT",
    read=read,
    peft_types=("FOURIERFT",),
    takes_base=lambda config: True,
    why_no_lora="its update is sparse in frequencies, and of full rank",
)
