"""What a run shows while it trains: one bar, and one line for every epoch."""

import math
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from msplora_core.data.tasks import Task


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

    def on_log(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs.get("logs") or {}
        self.train_loss = logs.get("loss", self.train_loss)
        if "anneal_to" in logs:
            self.report(
                f"step {state.global_step}: rank {logs['anneal_from']} cut to {logs['anneal_to']}, with "
                f"{logs['anneal_kept']:.1%} of what the updates are worth"
            )
        if f"eval_{self.task.metric}" in logs:
            epoch, epochs = round(state.epoch or 0), math.ceil(args.num_train_epochs)
            train_loss = "     -" if self.train_loss is None else f"{self.train_loss:.4f}"
            self.report(
                f"epoch {epoch:>{len(str(epochs))}}/{epochs}  train loss {train_loss}  "
                f"validation loss {logs['eval_loss']:.4f}  {self.task.metric} {logs[f'eval_{self.task.metric}']:.4f}"
            )


def show_progress(trainer: Trainer, task: Task, report: Callable[[str], None]) -> None:
    trainer.remove_callback(PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_TrainingBar())
    trainer.add_callback(_EpochLines(task, report))
