"""Hugging Face Trainer with what an adapter run adds: a learning rate for the head, whole checkpoints of every epoch,
and the same result however many processes share a batch."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from msplora_core import names
from msplora_core.data.order import OrderOfEpoch
from msplora_core.errors import TrainingError
from msplora_core.methods import is_head
from msplora_core.run import checkpoints, distributed


class AdapterTrainer(Trainer):
    """Trainer whose task head (``modules_to_save``) has a learning rate of its own.

    A checkpoint is written aside and renamed when it is complete. Several processes, and several parts of a
    batch (gradient accumulation), give the loss and gradients of the whole batch in one process, up to the
    order of summation: every example counts once, in the last batch of an epoch too.

    Args:
        base_is_sharded: The model went through :func:`msplora_core.run.distributed.shard_frozen`.
    """

    def __init__(self, *args: Any, head_learning_rate: float, base_is_sharded: bool = False, **kwargs: Any) -> None:
        self.base_is_sharded = base_is_sharded  # asked during what follows
        super().__init__(*args, **kwargs)
        self.head_learning_rate = head_learning_rate
        self._writing_to: Path | None = None
        # Losses that are means over rows, as classifiers' are, need weights where a batch is shared unevenly; Trainer
        # does the same for language models, over tokens, and wrongly takes classifiers for such.
        shared = self.args.world_size * self.args.gradient_accumulation_steps > 1
        self._weighs_rows = shared and not self._loss_shifts_labels
        self._weights: deque[float] = deque()
        if self._weighs_rows:
            self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        adapted: Any = self.model if model is None else model
        head = {id(p) for name, p in adapted.named_parameters() if is_head(name)}
        for group in list(optimizer.param_groups):
            in_head = [p for p in group["params"] if id(p) in head]
            if in_head:
                group["params"] = [p for p in group["params"] if id(p) not in head]
                optimizer.add_param_group({**group, "params": in_head, "lr": self.head_learning_rate})
        return optimizer

    # --- Language models ---

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        sampler.batch_size *= self.args.world_size  # grouped by the whole batch: the same order for any number
        return OrderOfEpoch(sampler, self.args.seed)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        metrics: Any = output.metrics
        if "eval_perplexity" in metrics:  # over all tokens; Trainer's own loss is a mean over batches
            metrics["eval_loss"] = math.log(metrics["eval_perplexity"])
        return output

    # --- Checkpoints ---

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to) if self._writing_to else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        self._writing_to = output_dir / names.PARTIAL
        failure = None
        try:
            super()._save_checkpoint(model, trial)
            # In the middle of an epoch: the losses since its beginning, which its log entry will average.
            running = {"sum": float(self._tr_loss), "since_step": self._globalstep_last_logged}
            (self._writing_to / name / _running_loss_name()).write_text(json.dumps(running))
        except Exception as error:
            failure = checkpoints.write_failure(error, self._writing_to)
            if failure is None:
                raise
        finally:
            self._writing_to = None
        distributed.raise_first(failure)
        distributed.by_writer(lambda: _publish(output_dir, name))

    def save_first(self) -> None:
        """Write checkpoint-0, the adapter before training."""
        output_dir = Path(str(self.args.output_dir))
        folder = output_dir / names.PARTIAL / "checkpoint-0"
        try:
            self.save_model(str(folder))
            TrainerState(epoch=0, global_step=0).save_to_json(str(folder / names.STATE))
        except Exception as error:
            failure = checkpoints.write_failure(error, folder.parent)
            if failure is None:
                raise
            raise TrainingError(failure) from error
        _publish(output_dir, folder.name)

    def restore_running_loss(self, checkpoint: Path) -> None:
        """Continue the average of an epoch's training loss where the checkpoint left it."""
        path = checkpoint / _running_loss_name()
        if path.is_file():
            running = json.loads(path.read_text())
            self._tr_loss += running["sum"]
            self._globalstep_last_logged = running["since_step"]

    # --- Several processes ---

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if batch_samples and (self._weighs_rows or self.args.world_size > 1):
            rows = [self.args.per_device_train_batch_size] * len(batch_samples)
            size = sum(rows) * self.args.world_size
            dataset: Any = self.train_dataset
            if self.accelerator.gradient_state.end_of_dataloader:
                missing = -len(dataset) % (rows[-1] * self.args.world_size)
                batch_samples[-1], rows[-1] = self._without_repeats(batch_samples[-1], dataset)
                size -= missing
            if self._weighs_rows:
                # DistributedDataParallel and Trainer divide by these two counts.
                divided = self.args.world_size * len(batch_samples)
                self._weights = deque(count * divided / size for count in rows)
            elif rows[-1] == 0:
                batch_samples[-1]["labels"] = torch.full_like(batch_samples[-1]["labels"], -100)
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if not self._weighs_rows or not model.training:
            return result
        weight = self._weights.popleft()
        return (result[0] * weight, *result[1:]) if isinstance(result, tuple) else result * weight

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader:
            # Trainer drops the repeats' outputs, but has averaged their losses.
            own, _ = self._without_repeats(inputs, self.eval_dataset)
            loss, *_ = super().prediction_step(model, own, True, ignore_keys)
            return loss, *result[1:]
        return result

    def _without_repeats(self, batch: dict[str, Any], dataset: Any) -> tuple[dict[str, Any], int]:
        """The rows of an epoch's last batch that are not repeats to make it full, and how many: if none, one stays."""
        rows = len(batch["labels"])
        left = len(dataset) % (rows * self.args.world_size)
        own = min(max(left - rows * self.args.process_index, 0), rows) if left else rows
        return {name: values[: max(own, 1)] for name, values in batch.items()}, own

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self.base_is_sharded:
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if not self.base_is_sharded or not training or model is not self.model:
            return super()._wrap_model(model, training, dataloader)
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # autocast only
        return distributed.replicate_trained(model)


class KeepEveryEpoch(TrainerCallback):
    """Writes the adapter of epoch 0, and drops what only resuming needs from all but the newest checkpoint.

    Args:
        resumed_from: The checkpoint that training continues from.
        save_steps: Also write a checkpoint every so many steps; of these only the newest is kept.
    """

    def __init__(
        self, trainer: AdapterTrainer, resumed_from: Path | None = None, save_steps: int | None = None
    ) -> None:
        self.trainer = trainer
        self.resumed_from = resumed_from
        self.save_steps = save_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resumed_from is not None:
            self.trainer.restore_running_loss(self.resumed_from)
        else:
            distributed.by_writer(self.trainer.save_first)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The order of an epoch follows from its number, which several processes that resume within it are not told.
        sampler = kwargs["train_dataloader"].batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        sampler.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # An epoch's end is saved once it has been evaluated.
        if self.save_steps and state.global_step % self.save_steps == 0 and not _ends_epoch(state.global_step, state):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if distributed.is_writer():
            for step, folder in checkpoints.all_in(Path(str(args.output_dir))).items():
                if step == state.global_step:
                    continue
                if _ends_epoch(step, state):
                    checkpoints.drop_resume_files(folder)
                else:
                    checkpoints.discard(folder)


def _publish(output_dir: Path, name: str) -> None:
    source = output_dir / names.PARTIAL / name
    try:
        checkpoints.publish(source, output_dir / name)
    except OSError as error:  # some file systems tell of a full disk only now
        raise TrainingError(checkpoints.write_failure(error, source)) from error


def _ends_epoch(step: int, state: TrainerState) -> bool:
    return step % (state.max_steps // state.num_train_epochs) == 0


def _running_loss_name() -> str:
    index = f"_{distributed.process_index()}" if distributed.process_count() > 1 else ""
    return f"running_loss{index}.json"
