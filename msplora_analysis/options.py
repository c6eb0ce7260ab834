"""What a call is asked for beside its paths: how adapters are read, and how the work is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields

from msplora_analysis.errors import AnalysisError

Progress = Callable[[float, int], None]
"""Called with the adapters that are done, with the share of the one at work; and with the number of all adapters."""

SEMANTICS = ("paper", "as-executed")

NO_MOMENTS = "none"
"""Instead of a file of moments: read none."""

WEIGHTS = ("moments", NO_MOMENTS)
"""What spectra and cuts are weighted by: the task, as moments tell it, or nothing."""


def check_weights(weights: str) -> str:
    """Raises AnalysisError for what is none of WEIGHTS."""
    if weights not in WEIGHTS:
        raise AnalysisError(f"weights={weights}: expected {' or '.join(WEIGHTS)}", "weights")
    return weights


@dataclass(frozen=True)
class Options:
    """How adapters are read: all that changes the numbers. The cache finds results by it.

    Args:
        ignore_unknown: Leave out tensors that no format explains, with a warning, instead of raising.
        semantics: For checkpoints of the released MSPLoRA code, the sharing of the paper ("paper"), or
            what that code really computed ("as-executed").
        base: Folder or file of the model before training. Full checkpoints are read as their
            difference to it.
        top_k: How many singular values of a whole matrix to compute (None: all of a small one, the
            largest of a large one), and the most directions to compare.
        moments: A file of moments; "none": read none. None: moments.safetensors beside each adapter, where it is.

    Raises:
        AnalysisError: ``semantics`` is neither of the two.
    """

    ignore_unknown: bool = False
    semantics: str = "paper"
    base: str | os.PathLike[str] | None = None
    top_k: int | None = None
    moments: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.semantics not in SEMANTICS:
            raise AnalysisError(f"semantics={self.semantics!r}: expected {' or '.join(SEMANTICS)}")


@dataclass(frozen=True)
class Execution:
    """How the work is done: nothing here changes the numbers.

    Args:
        workers: Processes on this machine; None: one for each CPU, if there is enough to do.
        dask: Address of a Dask scheduler, whose workers compute instead. They see the same paths.
        cache: Use what earlier calls computed of the same files, and keep what this one computes.
        progress: Called after each piece of work.
        device: Where whole matrices are computed: "cpu", or a device of torch such as "cuda", in this process alone.
    """

    workers: int | None = 1
    dask: str | None = None
    cache: bool = True
    progress: Progress | None = None
    device: str = "cpu"


def changed(*given: Options | Execution) -> list[str]:
    """The names of the fields that are not at their defaults."""
    return [field.name for one in given for field in fields(one) if getattr(one, field.name) != field.default]
