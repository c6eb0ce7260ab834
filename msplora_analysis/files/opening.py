"""Open a file of tensors by its suffix."""

from __future__ import annotations

from msplora_analysis.files.addresses import Place
from msplora_analysis.files.safetensors import SafetensorsFile
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.files.torch_file import TorchFile


def open_tensors(path: Place) -> TensorFile:
    """Open a file of tensors by its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
