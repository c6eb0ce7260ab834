"""Moments: what a task asks of each update of an adapter. Their file, and the directions that follow from them.

Training and measuring write ``moments.safetensors`` beside an adapter; the analysis reads it. Nothing heavy is
imported here.

For an update ΔW = B A (B with its scaling) a token has the input x and the gradient g at the output. Its moments are
S_a = mean (A x)(A x)ᵀ and S_b = mean (Bᵀ g)(Bᵀ g)ᵀ, r × r each. With C the second moment of x and G that of g,
‖G^½ ΔW C^½‖² is to second order what the update does to the task, if x and g are independent (K-FAC: Martens & Grosse
2015, arXiv 1503.05671). Its singular values follow from S_a and S_b alone: ``directions``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_core import records
from msplora_core.atomic import replacing
from msplora_core.errors import TrainingError

MOMENTS = "moments.safetensors"
"""The file's name beside an adapter."""
VERSION = 1
_HEAD: records.Schema = {
    "modules": {...: {"scales": [str], "ranks": [int]}},
    "about": {"examples?": int, "draws?": int, "loss?": str},
}
_NEEDED = ("s_a", "s_b", "norms")
_TOLERANCE = 1e-2  # half precision moves a norm by less; another checkpoint's factors differ by more

Array = NDArray[np.floating[Any]]


class Directions(NamedTuple):
    """The rank-1 terms of an update in one metric: ΔW = (B left)(right A), ordered by what they are worth.

    ``sigma``: (r,), descending. ``left``: (r, r); its columns times B are the output directions, sigma within.
    ``right``: (r, r); its rows times A are the input directions.
    """

    sigma: Array
    left: Array
    right: Array


def directions(s_a: Array, s_b: Array) -> Directions:
    """The best rank-k updates inside the spaces of the factors, for every k at once.

    With L_a L_aᵀ = S_a and L_b L_bᵀ = S_b, the singular values of L_bᵀ L_a = U Σ Vᵀ are those of G^½ B A C^½, and
    B L_b⁻ᵀ U_k Σ_k V_kᵀ L_a⁻¹ A is nearest to B A of all updates of rank k in that norm. With Gram matrices A Aᵀ and
    Bᵀ B for moments, they are the singular values of B A itself. What neither S_a nor S_b sees is worth nothing, and
    is in no direction.

    Args:
        s_a: (r, r), symmetric and positive semidefinite.
        s_b: (r, r), likewise.

    Example:
        >>> directions(np.diag([4.0, 1.0]), np.eye(2)).sigma
        array([2., 1.])
    """
    (l_a, inverse_a), (l_b, inverse_b) = _root(s_a), _root(s_b)
    u, sigma, vt = np.linalg.svd(l_b.T @ l_a)
    return Directions(sigma, inverse_b.T @ (u * sigma), vt @ inverse_a)


def _root(s: Array) -> tuple[Array, Array]:
    """L with L Lᵀ = S, and its pseudo-inverse; by way of unit diagonal, so that small rows keep their digits."""
    size = np.sqrt(np.maximum(np.diag(s), 0.0))
    size[size == 0] = 1.0
    values, vectors = np.linalg.eigh(s / np.outer(size, size))
    seen = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    root = np.sqrt(np.where(seen, values, 0.0))
    inverse = np.where(seen, 1.0 / np.where(seen, root, 1.0), 0.0)
    return size[:, None] * vectors * root, (inverse[:, None] * vectors.T) / size


@dataclass(frozen=True)
class ModuleMoments:
    """Moments of one module. Its factors are those of its scales side by side; R is the sum of their ranks.

    Attributes:
        scales: The scales, in the order of the factors; ``("layer",)`` where the update has one part.
        ranks: The rank of each.
        s_a: (R, R) float64, mean over tokens of (A x)(A x)ᵀ.
        s_b: (R, R) float64, mean over tokens of (Bᵀ g)(Bᵀ g)ᵀ; B with its scaling, g the gradient of an example's loss.
        norms: (2, scales) float64: ‖A‖² and ‖B‖² of each scale, B with its scaling; they tell whose moments these are.
        scores: Basis to (rows, R) float32: each row's gradient at a gate of 1 on each direction; row = example × draws
            + draw. ``plain`` and ``task``: directions of the whole update; ``scale_plain`` and ``scale_task``: those
            of each scale by itself, side by side (only with several scales). The gates of all directions add up to
            that of the whole.
        cores: (rows, R, R) float32 or None: Σ over tokens (Bᵀ g)(A x)ᵀ, of which every score is ``left_k · core ·
            right_k``.
    """

    scales: tuple[str, ...]
    ranks: tuple[int, ...]
    s_a: Array
    s_b: Array
    norms: Array
    scores: Mapping[str, NDArray[np.float32]]
    cores: NDArray[np.float32] | None = None

    def part(self, scale: str) -> slice:
        """Where a scale's columns stand among the R."""
        at = self.scales.index(scale)
        start = sum(self.ranks[:at])
        return slice(start, start + self.ranks[at])

    def fits(self, norms: Array) -> bool:
        """Whether factors of these squared norms, (2, scales), can be those that were measured."""
        return norms.shape == self.norms.shape and bool(
            np.all(np.abs(norms - self.norms) <= _TOLERANCE * np.maximum(norms, self.norms))
        )


@dataclass(frozen=True)
class Moments:
    """Moments of an adapter on a task.

    Attributes:
        modules: Of each module, by its dotted path in the base model.
        about: What they were measured on: ``examples``, ``draws``, ``tokens``, ``labels`` (sampled or given), ``loss``
            (classification, regression or causal), ``model``, ``task``, ``data`` (fingerprint), ``seed``, ``versions``.
    """

    modules: Mapping[str, ModuleMoments]
    about: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the file; what stood there is replaced only by a whole one.

        Args:
            path: A file, such as ``adapter/moments.safetensors``.

        Raises:
            OSError: it cannot be written.
        """
        from safetensors.numpy import save

        tensors: dict[str, Array] = {}
        shapes = {}
        for name, module in self.modules.items():
            shapes[name] = {"scales": list(module.scales), "ranks": list(module.ranks)}
            arrays = {"s_a": module.s_a, "s_b": module.s_b, "norms": module.norms, **module.scores}
            if module.cores is not None:
                arrays["cores"] = module.cores
            tensors |= {f"{name}/{key}": np.ascontiguousarray(array) for key, array in arrays.items()}
        about = json.dumps({"version": VERSION, "modules": shapes, "about": dict(self.about)}, sort_keys=True)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_bytes(save(tensors, metadata={"msplora_moments": about}))
        return path

    @property
    def is_regression(self) -> bool:
        """Whether the task's outputs are numbers: then a predicted KL is half of a mean squared difference."""
        return self.about.get("loss") == "regression"

    @staticmethod
    def predicted_kl(scores: Array) -> float:
        """The KL that a cut costs to second order: ½ mean (sum of its gates' scores)², in nats an example.

        The exact Fisher form, with no fitted constant; interactions between directions, modules and layers count. For
        regression it is half of the mean squared difference of the outputs.

        Args:
            scores: (rows,), the scores of the gates that close, summed.
        """
        return 0.5 * float(np.mean(np.square(scores, dtype=np.float64)))


def read_moments(path: str | Path, *, scores: Collection[str] | None = None) -> Moments:
    """Read a moments file.

    Args:
        path: The file.
        scores: Of which bases to read the scores, such as ``("task",)``: they are nearly all of the file, and spectra
            need none. None: all scores, and the cores.

    Raises:
        TrainingError: it is no moments file, or broken; the message names file and tensor.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, "numpy") as file:
            head = records.parse((file.metadata() or {})["msplora_moments"].encode())
            records.check(head, {"version": int})
            if head["version"] != VERSION:
                raise TrainingError(
                    f"{path}: moments of version {head['version']}, expected {VERSION}; record them anew"
                )
            records.check(head, _HEAD)
            wanted = [name for name in file.keys() if scores is None or name.rpartition("/")[2] in {*_NEEDED, *scores}]  # noqa: SIM118
            tensors: dict[str, dict[str, Array]] = {}
            for name in wanted:
                module, _, key = name.rpartition("/")
                tensors.setdefault(module, {})[key] = file.get_tensor(name)
        modules = {}
        for name, shape in head["modules"].items():
            modules[name] = _module(path, name, tuple(shape["scales"]), tuple(shape["ranks"]), tensors.get(name, {}))
        about = dict(head["about"])
        if (draws := about.get("draws", 1)) < 1:
            raise TrainingError(f"{path}: draws must be at least 1, got {draws}; record it anew")
        return Moments(modules, about)
    except TrainingError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        what = str(error) if isinstance(error, records.RecordError) else type(error).__name__
        raise TrainingError(f"{path}: not a moments file ({what}); record it with msplora-measure moments") from None


def _module(
    path: Path, name: str, scales: tuple[str, ...], ranks: tuple[int, ...], arrays: dict[str, Array]
) -> ModuleMoments:
    r = sum(ranks)
    expected = dict(zip(_NEEDED, ((r, r), (r, r), (2, len(scales))), strict=True))
    cores = arrays.pop("cores", None)
    for key, shape in expected.items():
        if key not in arrays or arrays[key].shape != shape or not np.isfinite(arrays[key]).all():
            raise TrainingError(f"{path}: {name}/{key}: expected finite numbers of shape {shape}; record it anew")
    s_a, s_b, norms = (arrays.pop(key).astype(np.float64) for key in expected)
    for key, array in arrays.items():
        if array.ndim != 2 or array.shape[1] != r:
            raise TrainingError(f"{path}: {name}/{key}: expected shape (rows, {r}), found {array.shape}")
    scores = {key: array.astype(np.float32, copy=False) for key, array in arrays.items()}
    return ModuleMoments(scales, ranks, s_a, s_b, norms, scores, None if cores is None else cores.astype(np.float32))
