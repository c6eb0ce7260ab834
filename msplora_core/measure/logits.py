"""The gradient of an example's loss at the model's outputs: of the labels given, or of labels drawn from the model.

The mean of its square, over labels drawn from the model, is the Fisher information. With one label an example and few
classes it is had without drawing: a few gradients have exactly the mean square that drawn ones have on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from msplora_core.data.instructions import IGNORED
from msplora_core.errors import TrainingError
from msplora_core.measure.tokens import Batch, Tokens

Loss = Literal["classification", "regression", "causal"]
_ROWS = 512
"""Gradients in all that there should be at least."""
_MOST_DRAWS = 8
_MOST_EXACT = 4
"""Gradients an example that are worth it to have no noise of sampling."""


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch, a row for each label that there is to predict.

    Attributes:
        loss: Which loss its labels have.
        values: (rows, n) float32 or wider, with a graph behind it: logits, or the numbers of a regression.
        examples: (rows,) int: of which example of the batch a row is.
        labels: (rows,) classes, or (rows, n) numbers; None where the batch has none.
        independent: The n are labels of their own, each yes or no, and no classes that exclude each other.
    """

    loss: Loss
    values: torch.Tensor
    examples: torch.Tensor
    labels: torch.Tensor | None
    independent: bool = False

    def exact_draws(self) -> int | None:
        """How many gradients an example make the mean exact; None where an example has several labels to predict."""
        if self.loss == "causal" or len(self.examples) != len(torch.unique(self.examples)):
            return None
        n = self.values.shape[1]
        return n if self.independent or self.loss == "regression" else max(n - 1, 1)

    def given(self) -> torch.Tensor:
        """The gradient of the loss at ``values``, (rows, n): of cross-entropy, or of the squared error.

        Raises:
            TrainingError: the batch has no labels.
        """
        if self.labels is None:
            raise TrainingError("labels='given', but a batch has no 'labels'; give them, or labels='sampled'")
        values = self.values.detach()
        if self.loss == "regression":
            return 2 * (values - self.labels.reshape(values.shape).to(values.dtype))
        if self.independent:
            return values.sigmoid() - self.labels.to(values.dtype)
        return _minus_one_at(values.softmax(-1), self.labels)

    def exact(self, draw: int, draws: int) -> torch.Tensor:
        """Gradient number ``draw`` of those whose mean outer product is the Fisher information at ``values``.

        The information of classes is that of choices one after the other: is it the first, if not is it the second, ...
        """
        values = self.values.detach()
        if self.loss == "regression" or self.independent:
            one = torch.zeros_like(values)
            p = values[:, draw].sigmoid()
            one[:, draw] = 1.0 if self.loss == "regression" else (p * (1 - p)).sqrt()
            return draws**0.5 * one
        p = values.softmax(-1)
        own, rest = p[:, draw], p[:, draw + 1 :].sum(-1)
        weight = (own * rest / (own + rest).clamp_min(torch.finfo(p.dtype).tiny)).sqrt()
        one = torch.zeros_like(p)
        one[:, draw] = 1.0
        one[:, draw + 1 :] = -p[:, draw + 1 :] / rest.clamp_min(torch.finfo(p.dtype).tiny)[:, None]
        return draws**0.5 * weight[:, None] * one

    def sampled(self, seed: int, first: int, draw: int) -> torch.Tensor:
        """The gradient for labels drawn from the model: what it draws for an example depends on nothing but that.

        Args:
            seed: Seed of all draws.
            first: The number of the batch's first example among all.
            draw: The number of this draw.
        """
        values = self.values.detach()
        p = values.sigmoid() if self.independent else values
        gradient = torch.empty_like(values)
        for example in torch.unique(self.examples).tolist():
            own = self.examples == example
            rows = int(own.sum())
            rng = np.random.default_rng((seed, first + example, draw))
            if self.loss == "regression":
                gradient[own] = _like(2.0 * rng.integers(0, 2, (rows, values.shape[1])) - 1, values)
            elif self.independent:
                gradient[own] = p[own] - (_like(rng.random((rows, values.shape[1])), values) < p[own]).to(values.dtype)
            else:
                classes = values[own].softmax(-1)
                reached = classes.cumsum(-1)
                at = _like(rng.random((rows, 1)), values) * reached[:, -1:]
                drawn = torch.searchsorted(reached, at, right=True).clamp_max(values.shape[1] - 1)[:, 0]
                gradient[own] = _minus_one_at(classes, drawn)
        return gradient


class Drawing:
    """Which labels the examples have, and how many gradients that makes for each.

    Args:
        labels: ``sampled`` or ``given``.
        draws: Labels sampled for each example; None: chosen when the first outputs are seen.
        seed: Of what is sampled.
        examples: How many there are in all processes.
    """

    def __init__(self, labels: str, draws: int | None, seed: int, examples: int) -> None:
        self.given = labels == "given"
        self.draws = 1 if self.given else draws
        self.seed = seed
        self.examples = examples
        self.exact = False
        self.loss: Loss | None = None

    def settled(self, outputs: Outputs) -> int:
        """How many gradients an example has."""
        self.loss = self.loss or outputs.loss
        if self.draws is None:
            enough = outputs.exact_draws()
            self.exact = enough is not None and enough <= _MOST_EXACT
            self.draws = enough if enough and self.exact else max(1, min(_MOST_DRAWS, _ROWS // self.examples))
        return self.draws

    def gradient(self, outputs: Outputs, first: int, draw: int) -> torch.Tensor:
        """The gradient of a batch's losses at its outputs, for one of the draws.

        Args:
            first: The number of the batch's first example among all.
        """
        if self.given:
            return outputs.given()
        if self.exact:
            return outputs.exact(draw, self.draws or 1)
        return outputs.sampled(self.seed, first, draw)


def outputs_of(model: Any, logits: torch.Tensor, batch: Batch, tokens: Tokens) -> Outputs:
    """The rows of a model's outputs that have a label.

    A classifier of examples has one each. A language model has one for each token of the response (its label is not
    -100) or, without labels, for every token but the first; a decoder's labels stand where the decoder predicts them.

    Args:
        model: The base model.
        logits: (examples, n), or (examples, length, n).
        batch: With its labels, if it has some.
        tokens: Those of the batch.
    """
    labels = batch.get("labels")
    labels = None if labels is None else labels.to(logits.device)
    if logits.ndim == 2:
        kind = getattr(model.config, "problem_type", None)
        if logits.shape[1] == 1 or kind == "regression":
            loss, independent = "regression", False
        else:
            loss, independent = "classification", kind == "multi_label_classification"
        return Outputs(loss, _wide(logits), torch.arange(len(logits), device=logits.device), labels, independent)  # type: ignore[arg-type]
    mask = tokens.masks.get(logits.shape[1]) if logits.ndim == 3 else None
    if mask is None:
        raise TrainingError(
            f"the model gives outputs of shape {tuple(logits.shape)}; expected one for each example or token"
        )
    mask = mask.to(logits.device)
    if labels is not None:
        mask = mask & (labels != IGNORED)
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    causal = type(model).__name__ in _CAUSAL
    if causal and not encoder_decoder:  # what stands at a position predicts the next one
        logits, mask, labels = logits[:, :-1], mask[:, 1:], None if labels is None else labels[:, 1:]
    return Outputs(
        "causal" if causal or encoder_decoder else "classification",
        _wide(logits[mask]),
        mask.nonzero()[:, 0],
        None if labels is None else labels[mask],
    )


_CAUSAL = {
    name
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    for found in names.values()
    for name in ((found,) if isinstance(found, str) else found)
}


def _minus_one_at(values: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """``values`` (rows, n), 1 less at each row's class; in place."""
    return values.scatter_add_(-1, classes[:, None], values.new_full((len(classes), 1), -1.0))


def _like(numbers: Any, tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(numbers, dtype=tensor.dtype, device=tensor.device)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
