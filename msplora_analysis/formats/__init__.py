"""Adapter formats: which tensors of a file make up which matrices.

One module per format, with ``PEFT_TYPE``, ``matches(config, file)`` and ``read(config, file,
options)``; the config is empty for a file that has none. ``read`` may look at the file's ``shapes`` and
``metadata``, and at the values of small tensors; a module whose ``read`` looks at values says
``READS_VALUES = True``. To add a format, write its module and name it in
``FORMATS``.
"""

from __future__ import annotations

from typing import NamedTuple

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats import (
    adalora,
    delora,
    diffusion,
    full,
    gralora,
    loha,
    lokr,
    lora,
    loralib,
    msplora,
    msplora_released,
    vblora,
    vera,
    without_matrix,
)
from msplora_analysis.formats.base import (
    Config,
    Contents,
    Factor,
    Kronecker,
    Matrix,
    Product,
    Shapes,
    Sum,
    Update,
    Whole,
)
from msplora_analysis.formats.diffusion import looks_like_adapter
from msplora_analysis.options import Options

__all__ = [
    "Contents",
    "Factor",
    "Kronecker",
    "Matrix",
    "Product",
    "Sum",
    "Update",
    "Whole",
    "looks_like_adapter",
    "read_contents",
]

FORMATS = (
    lora,
    msplora_released,
    msplora,
    loha,
    lokr,
    diffusion,
    adalora,
    vera,
    vblora,
    delora,
    gralora,
    without_matrix,
    loralib,
    full,
)  # the first that matches is taken


class _Last(NamedTuple):
    shapes: Shapes
    config: Config
    options: Options
    contents: Contents


_last: _Last | None = None  # the checkpoints of a run have one header, one config and so the same contents


def read_contents(config: Config, file: TensorFile, options: Options) -> Contents:
    """The matrices of an adapter file, from its config, the names and shapes of its tensors.

    Raises AnalysisError (without the file's name) for a format or a layout that is not supported,
    and for a file without any matrix.
    """
    global _last
    if _last is not None and _last.shapes is file.shapes and (_last.config, _last.options) == (config, options):
        return _last.contents
    for adapter_format in FORMATS:
        if adapter_format.matches(config, file):
            found = adapter_format.read(config, file, options)
            if not found.matrices and not found.unknown:
                raise AnalysisError("no low-rank factors in the file; was the adapter saved before it was added?")
            if not getattr(adapter_format, "READS_VALUES", False):
                _last = _Last(file.shapes, config, options, found)
            return found
    if not config:
        first = next(iter(file.shapes), "none")
        raise AnalysisError(
            f"no adapter: its tensors ({first}, ...) have no names of low-rank factors that are known; of PEFT's "
            "adapters copy adapter_config.json beside it, and for a whole model give its base with --base (base=...)"
        )
    supported = ", ".join(
        sorted({known.PEFT_TYPE for known in FORMATS if known is not without_matrix and known.PEFT_TYPE.isupper()})
    )
    raise AnalysisError(
        f"adapter_config.json: peft_type {config.get('peft_type')!r} is not supported; supported: {supported}"
    )
