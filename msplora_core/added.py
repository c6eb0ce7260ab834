"""What adding other adapters costs the task of one: ``added.json`` beside it. Measuring writes, the analysis reads it.

Nothing heavy is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msplora_core import records
from msplora_core.atomic import replacing
from msplora_core.errors import TrainingError

ADDED = "added.json"
"""The file's name beside an adapter."""
VERSION = 1
_OTHER: records.Schema = {"adapter": str, "predicted_kl": float, "modules": {...: float}, "norms": {...: float}}
_SCHEMA: records.Schema = {"version": int, "norms": {...: float}, "others": [_OTHER], "about": {"loss?": str}}
_TOLERANCE = 1e-3  # half precision moves a norm by less; another checkpoint's differs by more


@dataclass(frozen=True)
class Other:
    """An adapter that is added at full weight, and what that is predicted to cost.

    Attributes:
        adapter: Where it was.
        predicted_kl: Nats an example; of a regression the mean squared difference of the outputs.
        modules: The same for the update of one module alone, by its dotted path.
        norms: The Frobenius norm of each module's update; they tell whose prediction this is.
    """

    adapter: str
    predicted_kl: float
    modules: Mapping[str, float]
    norms: Mapping[str, float]


@dataclass(frozen=True)
class Added:
    """What adding others costs the task of one adapter.

    Attributes:
        norms: The Frobenius norm of each of its own updates.
        others: Those that are added.
        about: What it was measured on, as in the file of moments.
    """

    norms: Mapping[str, float]
    others: tuple[Other, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        """Write the file; what stood there is replaced only by a whole one.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(f"{records.text_of({'version': VERSION} | asdict(self))}\n", encoding="utf-8")
        return path

    def of(self, norms: Mapping[str, float]) -> Other | None:
        """The prediction for an adapter whose updates have these norms: the newest, if several fit."""
        return next((other for other in reversed(self.others) if same(norms, other.norms)), None)


def same(norms: Mapping[str, float], measured: Mapping[str, float]) -> bool:
    """Whether updates of these norms are among those that were measured."""
    return all(math.isclose(norm, measured.get(name, math.inf), rel_tol=_TOLERANCE) for name, norm in norms.items())


def read_added(path: Path) -> Added:
    """Read the file.

    Raises:
        TrainingError: it is no such file, or broken.
        OSError: it cannot be read.
    """
    try:
        found = records.read(path, _SCHEMA)
    except records.RecordError as error:
        raise TrainingError(f"{path}: {error}; measure it anew with msplora-measure added") from None
    if found["version"] != VERSION:
        raise TrainingError(f"{path}: of version {found['version']}, expected {VERSION}; measure it anew")
    others = (Other(**{name: other[name] for name in _OTHER}) for other in found["others"])
    return Added(found["norms"], tuple(others), found["about"])
