"""Record moments: forward and backward over examples, and of every adapted module what A x and Bᵀ g were.

A low-rank layer computes A x anyway, and the gradient there is Bᵀ g, with B's scaling: hooks on these two small tensors
are all. They fire for the tensors that the gradient passes through, so that each token counts once, whether or
not activations are computed a second time (gradient checkpointing).
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from msplora_core.errors import TrainingError
from msplora_core.measure.hooks import exact, hooked, notes
from msplora_core.measure.logits import Outputs, outputs_of
from msplora_core.measure.quiet import differentiated
from msplora_core.measure.tokens import Batch, Tokens, prepared
from msplora_core.measure.updates import Update, updates_of
from msplora_core.moments import Array, ModuleMoments, Moments, directions
from msplora_core.run import distributed
from msplora_core.version import __version__

LABELS = ("sampled", "given")
CORES_UP_TO = 16
"""The largest rank whose cores a file keeps."""
_ROWS = 512
_MOST_DRAWS = 8
_MOST_EXACT = 4
_AT_ONCE = 256
_DORA_NOTE = (
    "DoRA: the update is its low-rank part, B A, and the magnitudes that then rescale it are part of the gradient"
)
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "numpy")


def record_moments(
    peft_model: nn.Module,
    batches: Iterable[Batch],
    *,
    labels: str = "sampled",
    draws: int | None = None,
    seed: int = 0,
    keep_cores: bool | None = None,
    progress: bool | None = None,
    about: Mapping[str, Any] | None = None,
) -> Moments:
    """Record what a task asks of each update of an adapter.

    Forward and backward over the examples, without dropout. The model is the same afterwards: mode, hooks, gradients
    and what is trained, also if something fails. Padding counts nowhere, and neither the size of batches nor their
    padding changes the result. In several processes (torchrun, accelerate) each takes its share of the batches, and
    all get the result of one.

    Args:
        peft_model: A model with an active low-rank adapter: LoRA (rsLoRA, PiSSA, DoRA), AdaLoRA or MSPLoRA, on linear
            layers, ``Conv1D``, quantised ones, embeddings or convolutions. The same in every process.
        batches: Dictionaries of tensors as the model takes them, with ``labels`` or without. The same in every process.
        labels: ``sampled``: from the model's own distribution, which makes the scores' mean squares the Fisher
            information, and predicts KL; ``given``: those of the batches.
        draws: Labels sampled for each example. None: where an example has one label of at most five classes, as
            many gradients as make the mean over all labels exact (two classes need one, a regression too); else
            more where examples are few, 8 at most.
        seed: Seed of what is sampled.
        keep_cores: Keep each example's gradient at the core of each update, (R, R); for ranks of at most 16.
        progress: Show a bar.
        about: What the file says of model, task and data besides what is known here.

    Returns:
        Moments and scores of every module, on the processor. While recording, examples × draws × Σ R² × 4 bytes of
        the processor's memory are taken.

    Raises:
        TrainingError: the model has no such adapter, nobody can tell which example a module's rows are of, or labels
            are missing.

    Example:
        >>> record_moments(peft_model, batches).save("adapter/moments.safetensors")
    """
    check_labels(labels)
    model: Any = getattr(peft_model, "module", peft_model)  # inside DistributedDataParallel
    updates = updates_of(model)
    wide = [update.name for update in updates.values() if update.rank > CORES_UP_TO]
    if keep_cores and wide:
        raise TrainingError(f"keep_cores=True: {wide[0]} has a rank above {CORES_UP_TO}; leave 'keep_cores' out")
    batches = list(batches)
    examples = [len(next(iter(batch.values()), ())) for batch in batches]
    if not sum(examples):
        raise TrainingError("batches: there is no example in them")
    distributed.join()
    recorder = _Recorder(updates, sum(examples), draws if labels == "sampled" else 1)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = range(distributed.process_index(), len(batches), distributed.process_count())
    failure = None
    try:
        with differentiated(model), recorder.watching():
            for number in tqdm(own, desc="moments", unit="batch", disable=not progress):
                recorder.record(model, base, batches[number], sum(examples[:number]), labels, seed)
    except TrainingError as error:
        failure = str(error)
    distributed.raise_first(failure)
    modules = recorder.moments(bool(keep_cores))
    known = {
        "model": getattr(base.config, "name_or_path", "") or type(base).__name__,
        "task": None,
        "data": None,
        "examples": sum(examples),
        "draws": recorder.draws,
        "tokens": recorder.tokens,
        "labels": labels,
        "exact": recorder.exact,
        "loss": recorder.loss,
        "seed": seed,
        "versions": {"msplora": __version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "notes": recorder.notes,
    }
    return Moments(modules, known | dict(about or {}))


def check_labels(labels: str) -> None:
    """Refuse what no labels can be.

    Raises:
        TrainingError: it is neither ``sampled`` nor ``given``.
    """
    if labels not in LABELS:
        raise TrainingError(f"labels={labels!r}: expected one of {', '.join(LABELS)}")


@dataclass
class _Sums:
    """Of one module so far: sums over tokens, and the cores; those of the current batch are on its device."""

    s_a: torch.Tensor
    s_b: torch.Tensor
    cores: torch.Tensor  # of all rows, on the processor
    core: torch.Tensor | None = None
    tokens: int = 0


class _Recorder:
    """Sums over tokens of every module, and each example's core.

    Args:
        updates: The adapted modules.
        examples: How many there are in all.
        draws: Gradients of an example; None: chosen at the first outputs.
    """

    def __init__(self, updates: Mapping[str, Update], examples: int, draws: int | None) -> None:
        self.updates = updates
        self.examples = examples
        self.draws = draws
        self.exact = False
        self.tokens = 0
        self.loss: str | None = None
        self.rows: list[int] = []
        self.sums: dict[str, _Sums] = {}
        self.batch: Tokens | None = None
        self.notes = notes(updates.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take A x and the gradient there of every module for the length of a ``with``."""
        hooks: list[Any] = []
        try:
            for name, update in self.updates.items():
                hooks.append(hooked(update, partial(self._take, name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def record(self, model: Any, base: Any, batch: Batch, first: int, labels: str, seed: int) -> None:
        """Forward once, backward for each draw.

        Args:
            first: The number of the batch's first example among all.
        """
        inputs, self.batch = prepared(batch, base)
        outputs = outputs_of(base, _logits(model, base, inputs), batch, self.batch)
        if not outputs.values.requires_grad:
            raise TrainingError("no adapted module is on the way to the model's outputs; nothing can be measured")
        draws = self._settle(outputs)
        self.tokens += self.batch.count() or self.batch.examples
        for draw in range(draws):
            if labels == "given":
                gradient = outputs.given()
            else:
                gradient = outputs.exact(draw, draws) if self.exact else outputs.sampled(seed, first, draw)
            torch.autograd.backward(outputs.values, gradient, retain_graph=draw + 1 < draws)
            del gradient
            self._put_away(slice(first * draws + draw, (first + self.batch.examples) * draws, draws))
        self.rows += range(first * draws, (first + self.batch.examples) * draws)
        self.batch = None

    def _settle(self, outputs: Outputs) -> int:
        """How many gradients an example has."""
        if self.draws is None:
            exact = outputs.exact_draws()
            self.exact = exact is not None and exact <= _MOST_EXACT
            self.draws = exact if exact and self.exact else max(1, min(_MOST_DRAWS, _ROWS // self.examples))
        self.loss = self.loss or outputs.loss
        return self.draws

    def _take(self, name: str, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        assert self.batch is not None
        assert self.draws is not None
        (ax, padding, tokens), (bg, _, _) = (self.batch.by_example(name, rows) for rows in (hidden, gradient))
        ax, bg = exact(ax), exact(bg)
        if padding is not None:
            padding = padding.to(ax.device)
            ax, bg = ax.masked_fill(padding, 0), bg.masked_fill(padding, 0)
        if name not in self.sums:
            r = ax.shape[-1]
            zeros = ax.new_zeros(r, r)
            self.sums[name] = _Sums(zeros, zeros.clone(), _spool(self.examples * self.draws, r))
        sums = self.sums[name]
        flat_a, flat_b = ax.flatten(0, 1), bg.flatten(0, 1)
        sums.s_a.addmm_(flat_a.T, flat_a)
        sums.s_b.addmm_(flat_b.T, flat_b)
        sums.tokens += tokens
        core = (bg.transpose(1, 2) @ ax).float()
        sums.core = core if sums.core is None else sums.core + core

    def _put_away(self, rows: slice) -> None:
        """The cores of a batch to the processor, once its backward is through."""
        for sums in self.sums.values():
            sums.cores[rows] = 0 if sums.core is None else sums.core.cpu()
            sums.core = None

    def moments(self, keep_cores: bool) -> dict[str, ModuleMoments]:
        """What all processes recorded, in each of them."""
        own = {name: (_array(sums.s_a), _array(sums.s_b), sums.tokens) for name, sums in self.sums.items()}
        shares = _gathered((own, self.draws, self.exact, self.loss, self.tokens))
        _, self.draws, self.exact, self.loss, _ = next(share for share in shares if share[3] is not None)
        self.tokens = sum(share[4] for share in shares)
        found, arrays = {}, {}
        for name, update in self.updates.items():
            s_a, s_b, tokens = np.zeros((update.rank, update.rank)), np.zeros((update.rank, update.rank)), 0
            for share in shares:
                if name in share[0]:
                    s_a, s_b, tokens = (
                        total + more for total, more in zip((s_a, s_b, tokens), share[0][name], strict=True)
                    )
            s_a, s_b = s_a / max(tokens, 1), s_b / max(tokens, 1)
            gram_a, gram_b = (gram.numpy() for gram in update.grams())
            norms = np.array([[np.trace(gram[part, part]) for part in _scales(update)] for gram in (gram_a, gram_b)])
            found[name] = ModuleMoments(update.scales, update.ranks, s_a, s_b, norms, {})
            arrays[name] = self._scores(update, (gram_a, gram_b), (s_a, s_b))
            if keep_cores:
                arrays[name]["cores"] = self._cores(update)[self.rows]
            if not tokens:
                self.notes.append(f"{name}: no token of the examples came there, so that it is worth nothing to them")
        for name, of in _in_order(_gathered((self.rows, arrays))).items():
            found[name] = replace(found[name], cores=of.pop("cores", None), scores=of)
        return found

    def _cores(self, update: Update) -> Array:
        """Those of all rows; (0) where this process has seen none."""
        if update.name in self.sums:
            return self.sums[update.name].cores.numpy()
        return np.zeros((self.examples * (self.draws or 0), update.rank, update.rank), np.float32)

    def _scores(
        self, update: Update, plain: tuple[Array, Array], task: tuple[Array, Array]
    ) -> dict[str, NDArray[np.float32]]:
        """This process's rows of each basis."""
        whole, scales = [slice(0, update.rank)], _scales(update)
        bases = {"plain": (plain, whole), "task": (task, whole)}
        if len(scales) > 1:
            bases |= {"scale_plain": (plain, scales), "scale_task": (task, scales)}
        cores = torch.from_numpy(self._cores(update))
        device = self.sums[update.name].s_a.device if update.name in self.sums else cores.device
        terms = {
            basis: [(part, *_terms(s_a[part, part], s_b[part, part], device)) for part in parts]
            for basis, ((s_a, s_b), parts) in bases.items()
        }
        scores: dict[str, list[Array]] = {basis: [] for basis in bases}
        for rows in torch.tensor(self.rows, dtype=torch.long).split(_AT_ONCE):
            some = exact(cores[rows].to(device))
            for basis, of in terms.items():
                gates = [torch.einsum("nik,ik->nk", some[:, p, p] @ right.T, left) for p, left, right in of]
                scores[basis].append(torch.cat(gates, dim=1).float().cpu().numpy())
        empty = np.zeros((0, update.rank), np.float32)
        return {basis: np.concatenate([empty, *rows]) for basis, rows in scores.items()}


def _logits(model: Any, base: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    cache = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    logits = getattr(model(**inputs | cache), "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise TrainingError(
            f"{type(base).__name__} gives no logits; expected a classifier, a regression or a language model"
        )
    return logits


def _scales(update: Update) -> list[slice]:
    return [slice(own.start, own.stop) for own in map(update.columns, update.scales)]


def _spool(rows: int, r: int) -> torch.Tensor:
    """Zeros, whose memory is taken only when they are written to."""
    return torch.from_numpy(np.zeros((rows, r, r), np.float32))


def _terms(s_a: Array, s_b: Array, device: torch.device) -> Iterator[torch.Tensor]:
    found = directions(s_a, s_b)
    return (exact(torch.from_numpy(side).to(device)) for side in (found.left, found.right))


def _array(tensor: torch.Tensor) -> Array:
    return tensor.double().cpu().numpy() if tensor.device.type != "mps" else tensor.cpu().double().numpy()


def _gathered(own: Any) -> list[Any]:
    """What each process has, in all of them."""
    return gather_object([own]) if distributed.process_count() > 1 else [own]


def _in_order(shares: list[tuple[list[int], dict[str, dict[str, Array]]]]) -> dict[str, dict[str, Any]]:
    """Arrays whose rows are shared out among processes, whole: of each module, by name."""
    order = np.argsort(np.concatenate([rows for rows, _ in shares]))
    return {
        name: {key: np.concatenate([arrays[name][key] for _, arrays in shares])[order] for key in of}
        for name, of in shares[0][1].items()
    }
