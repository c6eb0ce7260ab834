"""The metric of every task."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from msplora_core.data.instructions import IGNORED
from msplora_core.data.tasks import Task
from msplora_core.moments import Array


def metric_function(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metric that the paper reports for the task, as Trainer wants it.

    CoLA: Matthews correlation (0 if the model predicts one class only); STS-B: Pearson correlation (NaN
    if its predictions are constant); instruction tuning, where the paper reports benchmarks alone: the
    perplexity of the responses, exp of the mean loss over all their tokens, from predictions of
    :func:`sum_token_losses`, and that loss, in the place of Trainer's mean over batches; the others: accuracy.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        value = float(metric_value(task.metric, predictions, labels, np.ones(len(predictions))))
        loss = {"loss": math.log(value)} if task.metric == "perplexity" else {}
        return {task.metric: value} | loss

    return compute


def metric_value(metric: str, predictions: Array, labels: Array, counts: Array) -> Array:
    """A metric of samples of the examples; see :func:`metric_function` for the metrics.

    Args:
        metric: ``accuracy``, ``matthews_correlation``, ``pearson`` or ``perplexity``.
        predictions: (examples, n): logits of classes, the one number of a regression, or sums of losses and of tokens.
        labels: (examples,); of no use to the perplexity.
        counts: (..., examples), how often each example is in a sample.

    Returns:
        (...), float64.

    Raises:
        ValueError: an unknown metric.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if metric == "perplexity":
            sums = counts @ predictions.astype(np.float64)
            return np.exp(sums[..., 0] / sums[..., 1])
        if metric == "pearson":
            x, y = predictions[:, 0].astype(np.float64), labels.astype(np.float64)
            x, y = x - x.mean(), y - y.mean()  # so that the products below lose no digits
            n, sx, sy, sxx, syy, sxy = (counts @ each for each in (np.ones_like(x), x, y, x * x, y * y, x * y))
            return (n * sxy - sx * sy) / np.sqrt((n * sxx - sx**2) * (n * syy - sy**2))
        classes = predictions.argmax(-1)
        correct = counts @ (classes == labels)
        total = counts.sum(-1)
        if metric == "accuracy":
            return correct / total
        if metric == "matthews_correlation":  # Gorodkin 2004, for any number of classes
            found = [(counts @ (classes == k), counts @ (labels == k)) for k in range(predictions.shape[1])]
            together = sum(p * t for p, t in found)
            spread = (total**2 - sum(p * p for p, _ in found)) * (total**2 - sum(t * t for _, t in found))
            return np.where(spread > 0, (correct * total - together) / np.sqrt(spread), 0.0)
    raise ValueError(f"metric={metric!r}: expected accuracy, matthews_correlation, pearson or perplexity")


def sum_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What a causal model's perplexity needs, in place of its logits, which no memory would hold.

    Args:
        logits: (batch, length, vocabulary); those at a position predict the next one.
        labels: (batch, length), IGNORED where nothing is learnt.

    Returns:
        (batch, 2): sum of the losses (nats) of an example's learnt tokens, and their number.
    """
    rows = []
    for predictions, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):
        learnt = targets != IGNORED
        loss = cross_entropy(predictions[learnt].float(), targets[learnt], reduction="sum")
        rows.append(torch.stack([loss, learnt.sum().to(loss)]))
    return torch.stack(rows)
