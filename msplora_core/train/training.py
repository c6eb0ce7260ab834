"""Train one adapter with Hugging Face Trainer, keeping its checkpoint before training and of every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from msplora_core.data.encoding import collator, encode
from msplora_core.data.evaluation import metric_function, sum_token_losses
from msplora_core.data.loading import load_splits
from msplora_core.data.tasks import ClassificationTask, InstructionTask, Task, get_task
from msplora_core.errors import TrainingError
from msplora_core.methods.base import AnnealedMethod, Method, Training
from msplora_core.models import find_model, load_model
from msplora_core.run import checkpoints, distributed, record
from msplora_core.train.annealing import Annealing
from msplora_core.train.progress import show_progress
from msplora_core.train.trainer import AdapterTrainer, Recorder

if TYPE_CHECKING:
    from msplora_core.run.settings import Settings


@dataclass(frozen=True)
class EpochResult:
    """The outcome of one epoch; ``train_loss`` is None for epoch 0, before training."""

    epoch: int
    step: int
    train_loss: float | None
    validation_loss: float
    metric: float


def train(settings: Settings, report: Callable[[str], None] = tqdm.write) -> list[EpochResult]:
    """Train an adapter and write its run folder.

    The folder is a Trainer output folder: ``checkpoint-<step>/`` with ``adapter_model.safetensors``,
    ``adapter_config.json`` and ``trainer_state.json``, for epoch 0 and every epoch, and ``run.json``, the
    record of everything needed to repeat the run.

    Args:
        settings: What to train on what; see :class:`msplora_core.run.settings.Settings`.
        report: Called with lines of progress; the default prints them above the progress bar.

    Returns:
        The results of epoch 0 and of every epoch.

    Raises:
        TrainingError: bad input: model, task, data, method, ranks or output folder; or another training writes there.
    """
    with ExitStack() as until_end:
        return _train(settings, report, until_end)


def _train(settings: Settings, report: Callable[[str], None], until_end: ExitStack) -> list[EpochResult]:
    distributed.join()
    if not distributed.is_writer():
        report, settings = (lambda line: None), replace(settings, progress_bar=False)
    task = get_task(settings.task)
    source = find_model(settings.model)
    _check_batches(settings)
    _check_tracker(settings.report_to)
    last_checkpoint = distributed.by_writer(lambda: record.check_output_dir(settings))
    finished = distributed.by_writer(lambda: record.results_if_finished(settings))
    if finished is not None:
        report(f"{settings.output_dir}: the run is finished; nothing is left to do")
        return [EpochResult(**result) for result in finished]
    splits = load_splits(task, settings.data_dir)

    set_seed(settings.seed)
    method = settings.method
    if not source.is_local:
        report(f"model {source.name}: no folder here; asking the Hugging Face Hub")  # which may take a minute
    base_model, tokenizer = load_model(source, task, settings.model_dtype, method.quantization(settings.precision))
    encoded = {name: encode(split, task, tokenizer, settings.max_length) for name, split in splits.items()}
    cuts = _cuts(settings, len(encoded["train"].examples))
    model = method.adapt(base_model, task.peft_task_type)
    run = distributed.by_writer(lambda: record.describe_run(settings, source, splits, model))
    notes = distributed.by_writer(lambda: record.notes_on_resuming(settings, run))
    # all that can be wrong with the input has been told by now
    notes += distributed.by_writer(lambda: record.make_output_dir(settings, last_checkpoint, until_end))
    if settings.shard_base:
        distributed.shard_frozen(model)
    trainer = AdapterTrainer(
        model=model,
        args=_training_arguments(settings, eval_on_start=last_checkpoint is None),
        train_dataset=encoded["train"].examples,
        eval_dataset=encoded["validation"].examples,
        data_collator=collator(task, tokenizer),
        compute_metrics=metric_function(task),
        preprocess_logits_for_metrics=sum_token_losses if isinstance(task, InstructionTask) else None,
        method=_while_training(method, model, settings.seed, cuts),
        head_learning_rate=settings.head_learning_rate,
        weighs_rows=isinstance(task, ClassificationTask),
        base_is_sharded=settings.shard_base,
    )
    if settings.log_spectra:
        from msplora_analysis import SpectraCallback

        SpectraCallback().add_to(trainer)
    trainer.add_callback(Recorder(trainer, last_checkpoint, settings.save_steps))
    show_progress(trainer, task, report)

    report(record.summary(run))
    if isinstance(task, InstructionTask):
        for name, split in splits.items():
            loss = encoded[name].loss()
            report(f"{name}: {split.source}" + (f"; {loss} (max_length={settings.max_length})" if loss else ""))
            run["data"][name] |= {"cut": encoded[name].cut, "dropped": encoded[name].dropped}
    if settings.resume:
        notes.append(f"resuming from {last_checkpoint or 'the beginning: there is no whole checkpoint'}")
    for note in notes:
        report(note)
    distributed.by_writer(lambda: record.write(settings.output_dir, run))
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(last_checkpoint) if last_checkpoint else None)
    finally:
        if distributed.is_writer():
            checkpoints.remove_partial(settings.output_dir)
    results = _epoch_results(trainer.state.log_history, task)
    run["seconds"] = round(time.perf_counter() - started, 1)
    run["results"] = [asdict(result) for result in results]
    if cuts:
        run["cuts"] = [{"step": e["step"]} | _cut(e) for e in trainer.state.log_history if "anneal_to" in e]
        run["parameters"] = record.parameters(model)  # of the last rank
    distributed.by_writer(lambda: record.write(settings.output_dir, run))
    return results


def _cuts(settings: Settings, examples: int) -> dict[int, int]:
    """After which steps the rank falls, and to what; empty where it does not."""
    cuts = settings.method.cuts(settings.epochs * math.ceil(examples / settings.batch_size))
    if cuts and distributed.process_count() > 1:  # DistributedDataParallel holds parameters of one shape
        raise TrainingError("anneal: works in one process; start the training without torchrun or accelerate launch")
    return cuts


def _while_training(method: Method, model: Any, seed: int, cuts: dict[int, int]) -> Training:
    if isinstance(method, AnnealedMethod) and cuts:
        return Annealing(model, method, cuts)
    return method.training(model, seed)


def _cut(entry: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("anneal_"): value for name, value in entry.items() if name.startswith("anneal_")}


class _InPlace(TrainingArguments):
    """Arguments for a model whose parts are on their devices already."""

    place_model_on_device = False


def _check_batches(settings: Settings) -> None:
    processes = distributed.process_count()
    at_once = (settings.micro_batch_size or 1) * processes
    if settings.batch_size % at_once:
        raise TrainingError(
            f"batch_size={settings.batch_size}: it is that of all {processes} processes together, so expected a "
            f"multiple of {at_once} (processes x 'micro_batch_size'); change 'batch_size' or 'micro_batch_size'"
        )


def _check_tracker(name: str | None) -> None:
    try:
        for make in get_reporting_integration_callbacks([name] if name else []):
            make()
    except (ValueError, RuntimeError) as error:  # no such tracker; not installed
        raise TrainingError(f"report_to={name!r}: {' '.join(str(error).split())}") from error


def _training_arguments(settings: Settings, eval_on_start: bool) -> TrainingArguments:
    task = get_task(settings.task)
    processes = distributed.process_count()
    micro_batch_size = settings.micro_batch_size or settings.batch_size // processes
    arguments = (_InPlace if settings.shard_base else TrainingArguments)(
        output_dir=str(settings.output_dir),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,  # a fraction of all steps
        weight_decay=settings.weight_decay,
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // (micro_batch_size * processes),
        train_sampling_strategy="group_by_length" if isinstance(task, InstructionTask) else "random",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=settings.seed,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        eval_on_start=eval_on_start,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not settings.progress_bar,
        report_to=settings.report_to or "none",
        # gloo among processes; and Trainer has bf16 on a processor only if that was asked for
        use_cpu=(processes > 1 or settings.precision == "bf16") and not torch.cuda.is_available(),
        ddp_find_unused_parameters=settings.method.skips_parameters,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer trains one process on all GPUs, each with a whole batch
    return arguments


def _epoch_results(log_history: list[dict[str, Any]], task: Task) -> list[EpochResult]:
    train_loss = {entry["step"]: entry["loss"] for entry in log_history if "loss" in entry}
    return [
        EpochResult(
            epoch=round(entry["epoch"]),
            step=entry["step"],
            train_loss=train_loss.get(entry["step"]),
            validation_loss=entry["eval_loss"],
            metric=entry[f"eval_{task.metric}"],
        )
        for entry in log_history
        if f"eval_{task.metric}" in entry
    ]
