"""Train one adapter with Hugging Face Trainer, keeping its checkpoint before training and of every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from sklearn.metrics import matthews_corrcoef
from tqdm.auto import tqdm
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from msplora_core import record
from msplora_core.data.loading import Split, load_splits
from msplora_core.errors import TrainingError
from msplora_core.method import MSPLoraConfig
from msplora_core.models import find_model, load_model
from msplora_core.tasks import Task, get_task

if TYPE_CHECKING:
    from msplora_core.settings import Settings

# What Trainer needs to continue from a checkpoint; kept in the newest one only, as it is far larger than the adapter.
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")


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
        settings: What to train on what; see :class:`msplora_core.settings.Settings`.
        report: Called with lines of progress; the default prints them above the progress bar.

    Returns:
        The results of epoch 0 and of every epoch.

    Raises:
        TrainingError: bad input: model, task, data, method, ranks or output folder.
    """
    task = get_task(settings.task)
    source = find_model(settings.model)
    last_checkpoint = record.check_output_dir(settings)
    splits = load_splits(task, settings.data_dir)

    set_seed(settings.seed)
    base_model, tokenizer = load_model(source, task)
    model = adapt(base_model, settings)
    record.make_output_dir(settings)  # all that can be wrong with the input has been told by now
    trainer = AdapterTrainer(
        model=model,
        args=_training_arguments(settings, eval_on_start=last_checkpoint is None),
        train_dataset=tokenize(splits["train"], task, tokenizer, settings.max_length),
        eval_dataset=tokenize(splits["validation"], task, tokenizer, settings.max_length),
        # the bare function: given the collator itself, Trainer would copy the tokenizer into every checkpoint
        data_collator=DataCollatorWithPadding(tokenizer).__call__,
        compute_metrics=metric_function(task),
        head_learning_rate=settings.head_learning_rate,
    )
    trainer.add_callback(_KeepEveryEpoch(trainer))
    _show_progress(trainer, task, report)

    run = record.describe_run(settings, source, splits, model)
    report(record.summary(run))
    if settings.resume:
        report(f"resuming from {last_checkpoint or 'the beginning: there is no whole checkpoint'}")
    record.write(settings.output_dir, run)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(last_checkpoint) if last_checkpoint else None)
    results = _epoch_results(trainer.state.log_history, task)
    run["seconds"] = round(time.perf_counter() - started, 1)
    run["results"] = [asdict(result) for result in results]
    record.write(settings.output_dir, run)
    return results


def adapt(base_model: Any, settings: Settings) -> PeftModel:
    """Put the adapter of ``settings.method`` into a sequence classification model.

    Raises:
        TrainingError: ranks or target modules that do not fit the model.
    """
    common: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS,  # PEFT then trains and saves the classification head too
        "target_modules": settings.target_modules,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
    }
    try:
        config: PeftConfig
        if settings.method == "msplora":
            config = MSPLoraConfig(r=settings.rank, ranks=settings.ranks, **common)
        else:
            config = LoraConfig(r=settings.rank, **common)
        return get_peft_model(base_model, config)
    except ValueError as error:
        raise TrainingError(" ".join(str(error).split())) from error


def tokenize(split: Split, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Tokenise without padding: batches are padded to their own longest example."""
    columns = [[row[column] for row in split.rows] for column in task.text_columns]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return [
        {**{name: values[i] for name, values in encoded.items()}, "labels": row["label"]}
        for i, row in enumerate(split.rows)
    ]


def metric_function(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metric that the paper reports for the task, as Trainer wants it.

    CoLA: Matthews correlation (0 if the model predicts one class only); STS-B: Pearson correlation (NaN
    if its predictions are constant); the others: accuracy.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if task.metric == "pearson":
            return {"pearson": float(np.corrcoef(logits.squeeze(-1), labels)[0, 1])}
        classes = logits.argmax(-1)
        if task.metric == "matthews_correlation":
            return {"matthews_correlation": float(matthews_corrcoef(labels, classes))}
        return {"accuracy": float((classes == labels).mean())}

    return compute


class AdapterTrainer(Trainer):
    """Trainer whose task head (``modules_to_save``) has a learning rate of its own."""

    def __init__(self, *args: Any, head_learning_rate: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head_learning_rate = head_learning_rate

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        adapted: Any = self.model if model is None else model
        head = {id(p) for name, p in adapted.named_parameters() if ".modules_to_save." in name}
        for group in list(optimizer.param_groups):
            in_head = [p for p in group["params"] if id(p) in head]
            if in_head:
                group["params"] = [p for p in group["params"] if id(p) not in head]
                optimizer.add_param_group({**group, "params": in_head, "lr": self.head_learning_rate})
        return optimizer


class _KeepEveryEpoch(TrainerCallback):
    """Writes the adapter of epoch 0, and drops what only resuming needs from all but the newest checkpoint."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(str(args.output_dir)) / "checkpoint-0"
        if state.global_step == 0 and not folder.exists():
            self.trainer.save_model(str(folder))
            TrainerState(epoch=0, global_step=0).save_to_json(str(folder / "trainer_state.json"))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for folder in Path(str(args.output_dir)).glob("checkpoint-*"):
            if folder.name != f"checkpoint-{state.global_step}":
                for name in RESUME_FILES:
                    (folder / name).unlink(missing_ok=True)


class _TrainingBar(ProgressCallback):
    """Trainer's progress bar without its dictionary of every log and its bar for every evaluation."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        pass


class _EpochLines(TrainerCallback):
    """One line for every evaluated epoch."""

    def __init__(self, task: Task, report: Callable[[str], None]) -> None:
        self.task = task
        self.report = report
        self.train_loss: float | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        self.train_loss = logs.get("loss", self.train_loss)
        if f"eval_{self.task.metric}" in logs:
            epoch, epochs = round(state.epoch or 0), math.ceil(args.num_train_epochs)
            train_loss = "     -" if self.train_loss is None else f"{self.train_loss:.4f}"
            self.report(
                f"epoch {epoch:>{len(str(epochs))}}/{epochs}  train loss {train_loss}  "
                f"validation loss {logs['eval_loss']:.4f}  {self.task.metric} {logs[f'eval_{self.task.metric}']:.4f}"
            )


def _show_progress(trainer: Trainer, task: Task, report: Callable[[str], None]) -> None:
    trainer.remove_callback(PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_TrainingBar())
    trainer.add_callback(_EpochLines(task, report))


def _training_arguments(settings: Settings, eval_on_start: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(settings.output_dir),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,  # a fraction of all steps
        weight_decay=settings.weight_decay,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
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
        report_to="none",
    )


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
