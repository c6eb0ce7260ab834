"""What adding other adapters costs the task of one: a gate of 0 on the whole update of each, and the gradient there.

With c the gradient of an example's loss at the gate, opening it costs ½ mean c² nats: the exact Fisher form of the
scores in moments, with interactions of all modules. The others are never applied, only what they would do is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn
from tqdm.auto import tqdm

from msplora_core.added import Added, Other
from msplora_core.errors import TrainingError
from msplora_core.measure.hooks import beside, exact
from msplora_core.measure.logits import Drawing
from msplora_core.measure.quiet import differentiated
from msplora_core.measure.recorder import Recorder
from msplora_core.measure.recording import forward_and_backward, what_was_measured
from msplora_core.measure.tokens import Batch
from msplora_core.measure.updates import updates_of

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Of each module, by its dotted path: A (rank, in), and B with its scaling (out, rank)."""


def record_added(
    peft_model: nn.Module,
    batches: Iterable[Batch],
    others: Mapping[str, Factors],
    *,
    draws: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    about: Mapping[str, Any] | None = None,
) -> Added:
    """Predict what adding each of several adapters costs the task of the active one.

    Forward and backward over the examples with the active adapter alone, without dropout; the model is not changed.

    Args:
        peft_model: A model with an active adapter, as ``record_moments`` takes it.
        batches: Dictionaries of tensors as the model takes them.
        others: Updates of linear modules, by the adapter's name: such as ``factors_of`` reads.
        draws: See ``record_moments``; labels are always sampled.
        seed: Seed of what is sampled.
        progress: Show a bar.
        about: What the file says of model, task and data besides what is known here.

    Returns:
        The prediction for each of the others, in all and for each module alone.

    Raises:
        TrainingError: there is no example or no other, or a module is missing, is not linear, or has another size.
    """
    model: Any = getattr(peft_model, "module", peft_model)
    batches = list(batches)
    examples = [len(next(iter(batch.values()), ())) for batch in batches]
    if not sum(examples) or not others:
        raise TrainingError(f"{'others' if sum(examples) else 'batches'}: there is nothing in it")
    gates = Gates(model, others, sum(examples))
    drawing = Drawing("sampled", draws, seed, sum(examples))
    with differentiated(model), gates.watching():
        for number, batch in enumerate(tqdm(batches, desc="added", unit="batch", disable=not progress)):
            forward_and_backward(model, batch, gates, drawing, sum(examples[:number]))
    half = 1.0 if drawing.loss == "regression" else 0.5  # scores predict half of the mean squared difference
    whole, parts = gates.predicted(half)
    return Added(
        {name: _norm(update.a(), update.b()) for name, update in updates_of(model).items()},
        tuple(
            Other(
                label,
                float(whole[i]),
                {name: float(parts[name][i]) for name in factors},
                {name: _norm(*pair) for name, pair in factors.items()},
            )
            for i, (label, factors) in enumerate(others.items())
        ),
        what_was_measured(model, drawing, sum(examples), gates.tokens) | dict(about or {}),
    )


class Gates(Recorder):
    """The gradient at a gate on the whole update of each other adapter, and on each of its modules.

    Args:
        model: With the active adapter.
        others: As ``record_added`` takes them.
        examples: How many examples there will be.
    """

    def __init__(self, model: Any, others: Mapping[str, Factors], examples: int) -> None:
        super().__init__(updates_of(model), examples)
        self._layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
        self._stacked = {
            name: _stacked(name, others) for name in dict.fromkeys(n for of in others.values() for n in of)
        }
        self._scores: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}
        self._rows = 0
        if missing := self._stacked.keys() - self._layers.keys():
            raise TrainingError(f"{min(missing)}: the model has no such module; expected adapters of its base model")

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks: list[Any] = []
        try:
            for name, (a, b, gather) in self._stacked.items():
                layer = self._layers[name]
                weight = next(layer.parameters())
                a, b = (factor.to(weight.device) for factor in (a, b))
                hooks.append(beside(name, layer, a, b, partial(self._score, name, gather.to(weight.device))))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._pool.shutdown()

    def _score(self, name: str, gather: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        assert self._batch is not None
        (ax, padding, _), (bg, _, _) = (self._batch.by_example(name, rows) for rows in (hidden, gradient))
        terms = exact(ax) * exact(bg) / self._factor
        if padding is not None:
            terms = terms.masked_fill(padding.to(terms.device), 0)
        scores = (terms.sum(1) @ exact(gather)).cpu()
        self._scores[name] = self._scores[name] + scores if name in self._scores else scores  # called more than once

    def _put_away(self, rows: slice) -> None:
        whole = torch.stack(list(self._scores.values())).sum(0)
        for name, scores in {**self._scores, "": whole}.items():
            self._squares[name] = self._squares.get(name, 0) + scores.square().sum(0)
        self._rows += len(whole)
        self._scores.clear()

    def predicted(self, half: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Half the mean square of each adapter's score, (others,), in all and of each module."""
        nothing = torch.zeros_like(self._squares[""])  # of modules that no token came to
        means = {name: half * self._squares.get(name, nothing) / self._rows for name in ("", *self._stacked)}
        return means.pop(""), means


def _stacked(name: str, others: Mapping[str, Factors]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (R, in) and B (out, R) of all adapters side by side, and which of the R are whose, (R, others) of 0 and 1."""
    known = [(i, of[name]) for i, of in enumerate(others.values()) if name in of]
    sizes = {(a.shape[1], b.shape[0]) for _, (a, b) in known}
    if len(sizes) > 1:
        raise TrainingError(f"{name}: updates of sizes {sizes}; expected adapters of one base model")
    owners = torch.cat([torch.full((len(a),), i) for i, (a, _) in known])
    gather = nn.functional.one_hot(owners, len(others)).float()
    return torch.cat([a for _, (a, _) in known]), torch.cat([b for _, (_, b) in known], dim=1), gather


def _norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖B A‖, from the factors."""
    a, b = exact(a), exact(b)
    return float(((a @ a.T) * (b.T @ b)).sum().clamp_min(0).sqrt())


def factors_of(base: nn.Module, folders: Sequence[Path]) -> list[Factors]:
    """The updates of several PEFT adapters, without their heads: LoRA, AdaLoRA, SoRA or MSPLoRA of linear modules.

    Args:
        base: The base model, without an adapter; it is as before afterwards.
        folders: Of the adapters.

    Raises:
        TrainingError: an adapter does not fit the model, or is of another kind.
    """
    found: list[Factors] = []
    for folder in folders:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.modules_to_save = config.task_type = None  # heads are of other tasks, perhaps of another size
        config.inference_mode = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the path of the base model, which is another one here
                model: Any = peft.get_peft_model(base, config)
            own = f".{model.base_model.prefix}"
            tensors = {key: tensor for key, tensor in load_peft_weights(str(folder), "cpu").items() if own in key}
            loaded: Any = set_peft_model_state_dict(model, tensors)
            missing = [key for key in loaded.missing_keys if own in key]
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise TrainingError(f"{folder}: does not fit the model: {reason}") from error
        if missing:
            raise TrainingError(f"{folder}: has no {missing[0]}; expected an adapter of this base model")
        found.append({name: (of.a().cpu(), of.b().cpu()) for name, of in updates_of(model).items()})
        model.unload()
    return found
