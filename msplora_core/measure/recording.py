"""Record moments: forward and backward over examples, and of every adapted module what A x and Bᵀ g were.

A low-rank layer computes A x anyway, and the gradient there is Bᵀ g, with B's scaling: hooks on these two small tensors
are all. They fire for the tensors that the gradient passes through, so that each token counts once, whether or
not activations are computed a second time (gradient checkpointing).
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from msplora_core.errors import TrainingError
from msplora_core.measure.hooks import notes
from msplora_core.measure.logits import Drawing, outputs_of
from msplora_core.measure.quiet import differentiated
from msplora_core.measure.recorder import Recorder
from msplora_core.measure.scoring import gathered, scored
from msplora_core.measure.tokens import Batch, prepared
from msplora_core.measure.updates import updates_of
from msplora_core.moments import Moments
from msplora_core.run import distributed
from msplora_core.version import __version__

LABELS = ("sampled", "given")
CORES_UP_TO = 16
"""The largest rank whose cores a file keeps."""
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
        peft_model: A model with an active low-rank adapter: LoRA (rsLoRA, PiSSA, DoRA), AdaLoRA, SoRA or MSPLoRA, on
            linear layers, ``Conv1D``, quantised ones, embeddings or convolutions. The same in every process.
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
    own = range(distributed.process_index(), len(batches), distributed.process_count())
    recorder = Recorder(updates, sum(examples[number] for number in own))
    drawing = Drawing(labels, draws, seed, sum(examples))
    failure = None
    try:
        with differentiated(model), recorder.watching():
            for number in tqdm(own, desc="moments", unit="batch", disable=not progress):
                forward_and_backward(model, batches[number], recorder, drawing, sum(examples[:number]))
    except TrainingError as error:
        failure = str(error)
    distributed.raise_first(failure)
    modules = scored(updates, recorder, keep_cores=bool(keep_cores))
    shares = gathered((drawing.loss, drawing.draws, drawing.exact, recorder.tokens, set(recorder.sums)))
    drawing.loss, drawing.draws, drawing.exact, _, _ = next(share for share in shares if share[0] is not None)
    unseen = [name for name in updates if not any(name in share[-1] for share in shares)]
    known = what_was_measured(model, drawing, sum(examples), sum(share[3] for share in shares))
    known["notes"] = notes(updates.values()) + [f"{name}: no token of the examples came there" for name in unseen]
    return Moments(modules, known | dict(about or {}))


def check_labels(labels: str) -> None:
    """Refuse what no labels can be.

    Raises:
        TrainingError: it is neither ``sampled`` nor ``given``.
    """
    if labels not in LABELS:
        raise TrainingError(f"labels={labels!r}: expected one of {', '.join(LABELS)}")


def what_was_measured(model: Any, drawing: Drawing, examples: int, tokens: int) -> dict[str, Any]:
    """What the files of a measurement say of it, as far as it is known without the task."""
    base = _base(model)
    return {
        "model": getattr(base.config, "name_or_path", "") or type(base).__name__,
        "task": None,
        "data": None,
        "examples": examples,
        "draws": drawing.draws,
        "exact": drawing.exact,
        "tokens": tokens,
        "labels": "given" if drawing.given else "sampled",
        "loss": drawing.loss,
        "seed": drawing.seed,
        "versions": {"msplora": __version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def forward_and_backward(model: Any, batch: Batch, recorder: Recorder, drawing: Drawing, first: int) -> None:
    """Run a batch through, and back once for each draw; ``first``: the number of its first example among all."""
    base = _base(model)
    inputs, tokens = prepared(batch, base)
    recorder.record(outputs_of(base, _logits(model, base, inputs), batch, tokens), tokens, drawing, first)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _logits(model: Any, base: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    cache = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    logits = getattr(model(**inputs | cache), "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise TrainingError(
            f"{type(base).__name__} gives no logits; expected a classifier, a regression or a language model"
        )
    return logits
