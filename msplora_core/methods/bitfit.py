"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199), the tuner of :mod:`msplora_core.tuners.bitfit`."""

from msplora_core.methods.base import Method


class BitFit(Method):
    """the biases alone"""

    name = "bitfit"
    spectra = None
    peft_config = "msplora_core.tuners.bitfit:BitFitConfig"
