"""Read ``.bin`` and ``.pt`` files with PyTorch, as tensors and nothing else."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from msplora_analysis.errors import AnalysisError
from msplora_analysis.tensors import FloatArray, Shape


class TorchFile:
    """A ``.bin`` or ``.pt`` file of tensors, opened by PyTorch with ``weights_only=True``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import torch
        except ImportError:
            raise AnalysisError(
                f"{path}: reading it needs PyTorch; run `pip install torch`, or save the adapter as safetensors"
            ) from None
        try:
            # Only the zip layout (PyTorch >= 1.6) can be mapped.
            mapped = zipfile.is_zipfile(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # pickle, zip and torch each raise their own kinds
            reason = str(error).strip().partition("\n")[0]
            raise AnalysisError(f"{path}: PyTorch cannot open it: {reason}; save or copy it again") from None
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
        ):
            raise AnalysisError(f"{path}: expected a dictionary of named tensors")
        self._tensors: dict[str, Any] = loaded
        self.shapes: dict[str, Shape] = {n: tuple(t.shape) for n, t in loaded.items()}
        self.metadata: dict[str, str] = {}

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors = {}

    def read(self, name: str) -> FloatArray:
        tensor = self._tensors[name].detach()
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in ("float64", "float32", "float16", "bfloat16"):
            raise AnalysisError(
                f"{self.path}: tensor {name} is of type {kind}; expected float64, float32, float16 or bfloat16"
            )
        array: FloatArray = (tensor.float() if kind == "bfloat16" else tensor).numpy()
        return array
