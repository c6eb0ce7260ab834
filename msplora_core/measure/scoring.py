"""From what was recorded to moments: sums of all processes, directions, and each example's scores along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from msplora_core.measure.hooks import exact
from msplora_core.measure.recorder import Recorder
from msplora_core.measure.updates import Update
from msplora_core.moments import Array, Directions, ModuleMoments, directions
from msplora_core.run import distributed

_AT_ONCE = 256
"""Rows whose cores are on the device at once."""


class _Bases(NamedTuple):
    """A module's moments, and the directions of each basis: of the whole update, or of each scale by itself."""

    moments: ModuleMoments
    directions: dict[str, list[tuple[slice, Directions]]]


def scored(updates: Mapping[str, Update], recorder: Recorder, *, keep_cores: bool) -> dict[str, ModuleMoments]:
    """Moments and scores of every module, of what all processes recorded; the same in each of them."""
    sums = {name: (_array(of.s_a), _array(of.s_b), of.tokens) for name, of in recorder.sums.items()}
    shares: list[dict[str, Any]] = gathered(sums)

    def bases(update: Update) -> _Bases:
        return _bases(update, [share[update.name] for share in shares if update.name in share])

    # LAPACK lets go of Python's lock; its own threads, inside of these, would wait for one another
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor() as pool:
        based = dict(zip(updates, pool.map(bases, updates.values()), strict=True))
    rows: dict[str, dict[str, Array]] = {}
    for name, of in based.items():
        own = recorder.sums.get(name)
        r = sum(of.moments.ranks)
        cores = np.zeros((len(recorder.rows), r, r), np.float32) if own is None else own.cores
        device = torch.device("cpu") if own is None else own.s_a.device
        rows[name] = _scores(cores, of.directions, device)
        if keep_cores:
            rows[name]["cores"] = cores
    found = {}
    for name, arrays in _in_order(gathered((recorder.rows, rows))).items():
        one = based[name].moments
        scores = {basis: arrays[basis] for basis in based[name].directions}
        found[name] = ModuleMoments(one.scales, one.ranks, one.s_a, one.s_b, one.norms, scores, arrays.get("cores"))
    return found


def gathered(own: Any) -> list[Any]:
    """What each process has, in all of them."""
    return gather_object([own]) if distributed.process_count() > 1 else [own]


def _bases(update: Update, sums: Sequence[tuple[Array, Array, int]]) -> _Bases:
    tokens = max(sum(count for _, _, count in sums), 1)
    zeros = np.zeros((update.rank, update.rank))
    s_a = np.sum([zeros, *(a for a, _, _ in sums)], axis=0) / tokens
    s_b = np.sum([zeros, *(b for _, b, _ in sums)], axis=0) / tokens
    gram_a, gram_b = (gram.numpy() for gram in update.grams())
    whole = [slice(0, update.rank)]
    scales = [slice(of.start, of.stop) for of in map(update.columns, update.scales)]
    norms = np.array([[np.trace(gram[part, part]) for part in scales] for gram in (gram_a, gram_b)])
    bases = {"plain": (gram_a, gram_b, whole), "task": (s_a, s_b, whole)}
    if len(scales) > 1:
        bases |= {"scale_plain": (gram_a, gram_b, scales), "scale_task": (s_a, s_b, scales)}
    return _Bases(
        ModuleMoments(update.scales, update.ranks, s_a, s_b, norms, {}),
        {
            basis: [(part, directions(a[part, part], b[part, part])) for part in parts]
            for basis, (a, b, parts) in bases.items()
        },
    )


def _scores(
    cores: NDArray[np.float32], bases: Mapping[str, Sequence[tuple[slice, Directions]]], device: torch.device
) -> dict[str, Array]:
    """(rows, R) of each basis: left_k · core · right_k of each row's core, for every direction k of every part."""

    def sent(array: Array) -> torch.Tensor:
        return exact(torch.from_numpy(array).to(device))

    sides = {basis: [(part, sent(of.left), sent(of.right)) for part, of in terms] for basis, terms in bases.items()}
    scores: dict[str, Array] = {basis: np.zeros(cores.shape[:2], np.float32) for basis in bases}
    for start in range(0, len(cores), _AT_ONCE):  # once for all bases: cores are what takes time to send
        some = sent(cores[start : start + _AT_ONCE])
        for basis, parts in sides.items():
            gates = [torch.einsum("nik,ik->nk", some[:, p, p] @ right.T, left) for p, left, right in parts]
            scores[basis][start : start + _AT_ONCE] = torch.cat(gates, dim=1).float().cpu().numpy()
    return scores


def _array(tensor: torch.Tensor) -> Array:
    return tensor.cpu().double().numpy()


def _in_order(shares: Sequence[tuple[list[int], dict[str, dict[str, Array]]]]) -> dict[str, dict[str, Array]]:
    """Arrays whose rows are shared out among processes, whole: of each module, by name."""
    order = np.argsort(np.concatenate([rows for rows, _ in shares]))
    return {
        name: {key: np.concatenate([arrays[name][key] for _, arrays in shares])[order] for key in of}
        for name, of in shares[0][1].items()
    }
