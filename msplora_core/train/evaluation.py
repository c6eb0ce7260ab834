"""The metric of every task."""

import math
from collections.abc import Callable

import numpy as np
import torch
from sklearn.metrics import matthews_corrcoef
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from msplora_core.data.instructions import IGNORED
from msplora_core.data.tasks import Task


def metric_function(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metric that the paper reports for the task, as Trainer wants it.

    CoLA: Matthews correlation (0 if the model predicts one class only); STS-B: Pearson correlation (NaN
    if its predictions are constant); instruction tuning, where the paper reports benchmarks alone: the
    perplexity of the responses, exp of the mean loss over all their tokens, from predictions of
    :func:`sum_token_losses`, and that loss, in the place of Trainer's mean over batches; the others: accuracy.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        if task.metric == "perplexity":
            losses, tokens = np.asarray(prediction.predictions, np.float64).sum(0)
            perplexity = float(np.exp(losses / tokens))
            return {"perplexity": perplexity, "loss": math.log(perplexity)}
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if task.metric == "pearson":
            return {"pearson": float(np.corrcoef(logits.squeeze(-1), labels)[0, 1])}
        classes = logits.argmax(-1)
        if task.metric == "matthews_correlation":
            return {"matthews_correlation": float(matthews_corrcoef(labels, classes))}
        return {"accuracy": float((classes == labels).mean())}

    return compute


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
