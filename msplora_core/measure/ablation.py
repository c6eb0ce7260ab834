"""Ablation: what a model loses by each cut of its adapter, measured on examples.

Every batch runs through the whole adapter first, and through each cut then. Layers before the first one that a cut
changes are not computed again. Nothing of the model is changed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax

from msplora_core.data.evaluation import metric_value
from msplora_core.data.instructions import IGNORED
from msplora_core.errors import TrainingError
from msplora_core.measure.cuts import Bases, Cut, layer_of, standard_cuts
from msplora_core.measure.updates import Update, evaluating, updates_of
from msplora_core.moments import Array, Moments

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 2000
"""Bootstrap samples of the examples."""


class Measured(NamedTuple):
    """What cuts did to some examples; the first cut is the whole adapter.

    Attributes:
        predictions: (cuts, examples, n) float32: the logits of a classifier; the output of a regression; of a causal
            model the sum of the losses of an example's learnt tokens, and their number.
        labels: (examples,); zero for a causal model.
        kl: (cuts, examples): nats an example; for regression the squared difference.
        loss: (cuts, examples): cross-entropy, or squared error; for a causal model summed over the learnt tokens.
    """

    predictions: Array
    labels: Array
    kl: Array
    loss: Array


@dataclass(frozen=True)
class Ablation:
    """Cuts of an adapter and what each did.

    Attributes:
        cuts: The cuts; the first is ``none``.
        measured: Of every example.
        parameters: What each cut leaves.
        predicted: The KL that moments predicted, for regression the mean squared difference; NaN without moments.
    """

    cuts: Sequence[Cut]
    measured: Measured
    parameters: Sequence[int]
    predicted: Sequence[float]

    def table(self, metric: str, *, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
        """One row for each cut.

        Args:
            metric: ``accuracy``, ``matthews_correlation``, ``pearson`` or ``perplexity``.
            confidence: Of the intervals of the change of the metric, by resampling examples in pairs: the same ones for
                the whole adapter and the cut one.
            draws: How many samples.
            seed: Of the samples.

        Returns:
            Columns cut, what, rank, parameters, metric, metric_change, low, high, kl, predicted_kl, loss.
        """
        import pandas as pd

        predictions, labels, kl, loss = self.measured
        examples = len(labels)
        counts = np.random.default_rng(seed).multinomial(examples, np.full(examples, 1 / examples), draws)
        weights = np.vstack([np.ones(examples), counts])
        tail = 50 * (1 - confidence)
        rows = []
        values = [metric_value(metric, found, labels, weights) for found in predictions]
        tokens = predictions[0, :, 1].sum(dtype=np.float64) if metric == "perplexity" else examples
        for i, cut in enumerate(self.cuts):
            change = values[i] - values[0]
            low, high = np.nanpercentile(change[1:], [tail, 100 - tail]) if np.isfinite(change[0]) else (np.nan, np.nan)
            rows.append(
                {
                    "cut": cut.cut,
                    "what": cut.what,
                    "rank": cut.rank,
                    "parameters": self.parameters[i],
                    "metric": values[i][0],
                    "metric_change": change[0],
                    "low": low,
                    "high": high,
                    "kl": kl[i].mean(),
                    "predicted_kl": self.predicted[i],
                    "loss": loss[i].sum() / tokens,
                }
            )
        return pd.DataFrame(rows).astype({"rank": "Int64"})


def ablate(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    cuts: Sequence[Cut] | None = None,
    moments: Moments | None = None,
    ranks: Sequence[int] = (1, 2, 4),
    progress: Callable[[], object] = lambda: None,
) -> Ablation:
    """Measure what each cut of an adapter costs.

    Args:
        model: A PEFT model with LoRA, AdaLoRA, SoRA or MSPLoRA; on any device. It is left as it was.
        batches: What the model takes, each with ``labels``: (rows,) classes or numbers, or (rows, length) tokens, -100
            where nothing is learnt. Padding is told by ``attention_mask``.
        cuts: What to leave out; default: :func:`msplora_core.measure.cuts.standard_cuts`.
        moments: Those of this adapter, for task-weighted cuts and predictions.
        ranks: What the default cuts cut every module to.
        progress: Called after each forward pass of a batch.

    Raises:
        TrainingError: no low-rank adapter, moments of another one, a cut of a module or direction that is not there,
            labels that fit no known loss, no batch.

    Example:
        >>> ablate(model, batches, moments=read_moments("adapter/moments.safetensors")).table("accuracy")
    """
    updates = updates_of(model)
    bases = Bases(updates, moments)
    if cuts is None:
        cuts = standard_cuts(updates, ranks, task=moments is not None)
    elif not cuts or cuts[0].closed:
        cuts = [Cut("none"), *cuts]
    parts = list(measure(model, batches, cuts, bases, progress=progress))
    if not parts:
        raise TrainingError("no batch is given; expected at least one")
    return summed_up(cuts, bases, parts)


def summed_up(cuts: Sequence[Cut], bases: Bases, parts: Sequence[Measured]) -> Ablation:
    """The ablation whose examples are those of all parts."""
    joined = Measured(*(np.concatenate(each, axis=0 if each[0].ndim == 1 else 1) for each in zip(*parts, strict=True)))
    # of regression the scores predict half of the mean squared difference
    factor = 2.0 if joined.predictions.shape[2] == 1 else 1.0
    predicted = [factor * bases.predicted(cut) for cut in cuts]
    return Ablation(cuts, joined, [bases.parameters(cut) for cut in cuts], predicted)


def measure(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    cuts: Sequence[Cut],
    bases: Bases,
    *,
    progress: Callable[[], object] = lambda: None,
) -> Iterator[Measured]:
    """What :func:`ablate` measures, batch by batch, so that it can be kept as it comes.

    The results of a batch come to the processor together: on a GPU nothing waits between two cuts.

    Args:
        model: See :func:`ablate`.
        batches: See :func:`ablate`.
        cuts: The first closes nothing.
        bases: Of the updates of this model.
        progress: See :func:`ablate`.

    Raises:
        TrainingError: see :func:`ablate`.
    """
    updates = bases.updates
    cores = [_cores(updates, bases, cut) for cut in cuts]
    device = next(model.parameters()).device
    shift = 0 if getattr(model.config, "is_encoder_decoder", False) else 1
    with evaluating(model, updates), _Tape.around(model, updates) as tape:
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            compare: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None = None
            results = []
            for changed in cores:
                for name, core in changed.items():
                    updates[name].set(core)
                tape.rewind(changed)
                try:
                    logits = model(**inputs).logits
                finally:
                    for name in changed:
                        updates[name].restore()
                if compare is None:
                    compare = _against(logits, inputs["labels"], shift)
                results.append(compare(logits))
                progress()
            predictions, kl, loss = (torch.stack(each).cpu().numpy() for each in zip(*results, strict=True))
            labels = batch["labels"].cpu().numpy() if batch["labels"].ndim == 1 else np.zeros(len(batch["labels"]))
            yield Measured(predictions.astype(np.float32), labels.astype(np.float64), kl, loss)


def _cores(updates: Mapping[str, Update], bases: Bases, cut: Cut) -> dict[str, torch.Tensor]:
    cores = {}
    for name, closed in cut.closed.items():
        if name not in updates:
            raise TrainingError(f"the cut {cut.cut} {cut.what}: the adapter has no module {name}")
        rank = updates[name].rank
        if any(not 0 <= place < rank for place in closed.places):
            raise TrainingError(f"the cut {cut.cut} {cut.what}: {name} has directions 0 to {rank - 1}")
        core = np.zeros((rank, rank)) if len(set(closed.places)) == rank else bases.core(name, closed)
        cores[name] = updates[name].tensor(core)
    return cores


def _against(
    whole: torch.Tensor, labels: torch.Tensor, shift: int
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """What compares a cut's logits with those of the whole adapter: predictions, KL and loss of each example.

    Raises:
        TrainingError: labels that fit no known loss.
    """
    rows = len(labels)
    if whole.ndim == 2 and labels.ndim == 1 and whole.shape[1] == 1:
        target = labels.double()

        def regression(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = logits.double().squeeze(1)
            return logits.float(), (found - whole.double().squeeze(1)) ** 2, (found - target) ** 2

        return regression
    if whole.ndim == 2 and labels.ndim == 1:
        log_p = log_softmax(whole.double(), -1)

        def classification(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
            log_q = log_softmax(logits.double(), -1)
            return logits.float(), _kl(log_p, log_q), cross_entropy(log_q, labels.long(), reduction="none")

        return classification
    if whole.ndim == 3 and labels.ndim == 2:
        targets = labels[:, shift:]
        row, place = (targets != IGNORED).nonzero(as_tuple=True)
        target = targets[row, place]
        counts = (targets != IGNORED).sum(1).double()
        log_p = log_softmax(whole[row, place].float(), -1)

        def causal(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
            log_q = log_softmax(logits[row, place].float(), -1)
            per_token = torch.stack([_kl(log_p, log_q), -log_q.gather(1, target[:, None]).squeeze(1)]).double()
            kl, loss = torch.zeros(2, rows, dtype=torch.float64, device=row.device).index_add_(1, row, per_token)
            return torch.stack([loss, counts], 1).float(), kl, loss

        return causal
    raise TrainingError(
        f"labels of shape {tuple(labels.shape)} for outputs of shape {tuple(whole.shape)}: expected a label for each "
        "row, or for each token"
    )


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Σ p log(p / q) over the last axis, as Σ p (q/p − 1 − log(q/p)): small values keep their digits."""
    difference = log_q - log_p
    return (log_p.exp() * (torch.expm1(difference) - difference)).sum(-1)


class _Tape:
    """The outputs of a model's numbered layers for one batch, given again where a cut changes nothing before them."""

    def __init__(self, numbered: Mapping[str, nn.Module]) -> None:
        self.names = numbered
        self.outputs: list[tuple[str, Any]] = []
        self.recording = False
        self.calls = self.known = 0

    @classmethod
    @contextmanager
    def around(cls, model: Any, updates: Mapping[str, Update]) -> Iterator[_Tape]:
        """Listen to all layers of the stacks in which the updates stand."""
        base = model.get_base_model()
        stacks = {layer.rpartition(".")[0] for layer in map(layer_of, updates) if layer is not None}
        numbered = {
            f"{stack}.{number}".lstrip("."): layer
            for stack in sorted(stacks)
            if isinstance(container := base.get_submodule(stack), nn.ModuleList)
            for number, layer in container.named_children()
        }
        tape = cls(numbered)
        before = {name: vars(layer).get("forward") for name, layer in numbered.items()}
        try:
            for name, layer in numbered.items():
                layer.forward = tape._listening(name, layer.forward)
            yield tape
        finally:
            for name, layer in numbered.items():
                vars(layer).pop("forward", None)
                if before[name] is not None:
                    layer.forward = before[name]

    def rewind(self, changed: Mapping[str, object]) -> None:
        """Before a forward pass with these modules changed; with none, one that is recorded."""
        self.calls, self.recording = 0, not changed
        if self.recording:
            self.outputs.clear()
        layers = {layer_of(name) for name in changed}
        heard = layers <= self.names.keys()
        self.known = next((i for i, (name, _) in enumerate(self.outputs) if name in layers), 0) if heard else 0

    def _listening(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def listening(*args: Any, **kwargs: Any) -> Any:
            call, self.calls = self.calls, self.calls + 1
            if call < self.known:
                return self.outputs[call][1]
            output = forward(*args, **kwargs)
            if self.recording:
                self.outputs.append((name, output))
            return output

        return listening
