from msplora_core.methods.base import Method


class BitFit(Method):
    """the biases alone (arXiv 2106.10199)"""

    name = "bitfit"
    spectra = None
    peft_config = "msplora_core.tuners.bitfit:BitFitConfig"
