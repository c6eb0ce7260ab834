"""Hugging Face Trainer with what an adapter run adds: a learning rate for the head, whole checkpoints of every epoch,
and the same result however many processes share a batch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from msplora_core import names, records
from msplora_core.errors import TrainingError
from msplora_core.methods.base import Training
from msplora_core.models import is_head
from msplora_core.run import checkpoints, distributed

_WEIGHT = "loss_weight"
"""Key of a batch: what its loss counts among those of its step."""


class AdapterTrainer(Trainer):
    """Trainer whose task head (``modules_to_save``) has a learning rate of its own.

    A checkpoint is written aside and renamed when it is complete. Several processes, and several parts of a
    batch (gradient accumulation), give the loss and gradients of the whole batch in one process, up to the
    order of summation: every example counts once, in the last batch of an epoch too.

    Args:
        method: What the training method does, as :meth:`msplora_core.methods.Method.training` gives it.
        head_learning_rate: That of the head.
        weighs_rows: The model's loss is a mean over rows, as a classifier's is, and not over tokens.
        base_is_sharded: The model went through :func:`msplora_core.run.distributed.shard_frozen`.
        others: Trainer's own arguments.
    """

    def __init__(
        self, *, method: Training, head_learning_rate: float, weighs_rows: bool, base_is_sharded: bool, **others: Any
    ) -> None:
        super().__init__(**others)
        self.method = method
        self.head_learning_rate = head_learning_rate
        self.base_is_sharded = base_is_sharded
        self._writing_to: Path | None = None
        # Losses that are means over rows need weights where a batch is shared unevenly; Trainer does the same for
        # language models, over tokens, and wrongly takes classifiers for such.
        shared = self.args.world_size * self.args.gradient_accumulation_steps > 1
        self.weighs_rows = shared and weighs_rows
        if self.weighs_rows:
            self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.base_is_sharded:  # Trainer leaves a model alone that is wrapped before it gets to it, just after this
            prepared = self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
            self.model_wrapped = distributed.replicate_trained(prepared)
        optimizer = super().create_optimizer(model)
        adapted: nn.Module = self.model if model is None else model
        head = {id(p) for name, p in adapted.named_parameters() if is_head(name)}
        for group in list(optimizer.param_groups):
            in_head = [p for p in group["params"] if id(p) in head]
            if in_head:
                group["params"] = [p for p in group["params"] if id(p) not in head]
                optimizer.add_param_group({**group, "params": in_head, "lr": self.head_learning_rate})
        self.method.arrange(optimizer)
        return optimizer

    # --- Checkpoints. Trainer has no hook before one is written or loaded: the next are functions of its own. ---

    def _get_output_dir(self, trial: None) -> str:
        return str(self._writing_to) if self._writing_to else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        output_dir = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        self._writing_to = output_dir / names.PARTIAL
        failure = None
        try:
            with checkpoints.told(self._writing_to):
                super()._save_checkpoint(model, trial)
                state = self.method.state()
                if state is not None and self.args.should_save:
                    values = {"trained": {key: p.detach() for key, p in self._trained().items()}, "method": state}
                    torch.save(values, self._writing_to / name / checkpoints.METHOD_STATE)
                # In the middle of an epoch: the losses since its beginning, which its log entry will average.
                running = {"sum": float(self._tr_loss), "since_step": self._globalstep_last_logged}
                (self._writing_to / name / _running_loss_name()).write_text(json.dumps(running))
        except TrainingError as error:
            failure = str(error)
        finally:
            self._writing_to = None
        distributed.raise_first(failure)
        distributed.by_writer(lambda: _publish(output_dir, name))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.method.state() is None:
            with checkpoints.continuing(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        path = Path(resume_from_checkpoint) / checkpoints.METHOD_STATE
        if not path.is_file():
            raise TrainingError(f"{path}: missing, and training continues from it; start anew with overwrite=True")
        with checkpoints.continuing(path.parent):
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._continue_with(state, path)

    def _continue_with(self, state: dict[str, Any], path: Path) -> None:
        trained = self._trained()
        if unlike := sorted(trained.keys() ^ state["trained"].keys()):
            raise TrainingError(f"{path}: made for another model ({unlike[0]} is in one alone); give that 'model'")
        self.method.load(state["method"])
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["trained"][name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.continuing(Path(str(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.continuing(Path(str(checkpoint))):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with checkpoints.continuing(Path(str(checkpoint))):
            super()._load_scaler(checkpoint)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self.method.saving():
            super().save_model(output_dir, _internal_call)

    def save_first(self) -> None:
        """Write checkpoint-0, the adapter before training."""
        output_dir = Path(str(self.args.output_dir))
        folder = output_dir / names.PARTIAL / "checkpoint-0"
        with checkpoints.told(folder.parent):
            self.save_model(str(folder))
            TrainerState(epoch=0, global_step=0).save_to_json(str(folder / names.STATE))
        _publish(output_dir, folder.name)

    def restore_running_loss(self, checkpoint: Path) -> None:
        """Continue the average of an epoch's training loss where the checkpoint left it."""
        path = checkpoint / _running_loss_name()
        if path.is_file():
            with checkpoints.continuing(checkpoint):
                running = records.read(path, records.RUNNING_LOSS)
            self._tr_loss += running["sum"]
            self._globalstep_last_logged = running["since_step"]

    # --- Several processes, several parts of a batch ---

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        if not self.weighs_rows and self.args.world_size == 1:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, items = super().get_batch_samples(map(self._own_rows, epoch_iterator), num_batches, device)
        if self.weighs_rows:
            at_once = self.args.per_device_train_batch_size * self.args.world_size
            size = at_once * len(batches)
            if self.accelerator.gradient_state.end_of_dataloader:
                size -= -len(self.train_dataset) % at_once
            # DistributedDataParallel and Trainer divide by these two counts.
            divided = self.args.world_size * len(batches)
            for batch in batches:
                batch[_WEIGHT] = batch[_WEIGHT] * divided / size
        return batches, items

    def _own_rows(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A batch without repeats of other rows, and how many its own are, for the weight of its loss."""
        rows = len(batch["labels"])
        if self.accelerator.gradient_state.end_of_dataloader:
            batch, rows = self._without_repeats(batch, len(self.train_dataset))
        if self.weighs_rows:
            batch[_WEIGHT] = rows
        elif rows == 0:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *others: Any) -> torch.Tensor:
        self.method.sees({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return super().training_step(model, inputs, *others)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weight = inputs.pop(_WEIGHT, None)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if weight is None:
            return result
        return (result[0] * weight, *result[1:]) if return_outputs else result * weight

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader:
            # Trainer drops the repeats' outputs, but has averaged their losses.
            own, _ = self._without_repeats(inputs, len(self.eval_dataset))
            loss, *_ = super().prediction_step(model, own, True, ignore_keys)
        return loss, logits, labels

    def _without_repeats(self, batch: dict[str, Any], examples: int) -> tuple[dict[str, Any], int]:
        """The rows of an epoch's last batch that are not repeats to make it full, and how many: if none, one stays."""
        rows = len(batch["labels"])
        left = examples % (rows * self.args.world_size)
        own = min(max(left - rows * self.args.process_index, 0), rows) if left else rows
        return {name: values[: max(own, 1)] for name, values in batch.items()}, own


class Recorder(TrainerCallback):
    """Tells the method where training is; keeps the adapter of every epoch, and what resuming needs of the newest.

    Args:
        resumed_from: The checkpoint that training continues from.
        save_steps: Also write a checkpoint every so many steps; of these only the newest is kept.
    """

    def __init__(self, trainer: AdapterTrainer, resumed_from: Path | None = None, save_steps: int | None = None):
        self.trainer = trainer
        self.resumed_from = resumed_from
        self.save_steps = save_steps

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.trainer.method.begin(state.max_steps)
        if self.resumed_from is not None:
            self.trainer.restore_running_loss(self.resumed_from)
        else:
            distributed.by_writer(self.trainer.save_first)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: Any) -> None:
        batches = kwargs["train_dataloader"].batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        # grouped by the whole batch: the same order for any number of processes
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        set_order(batches.sampler, seed=args.seed, epoch=int(state.epoch or 0), batch_size=batch_size)

    def on_step_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.trainer.method.before_step(state.global_step)

    def on_optimizer_step(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.trainer.method.after_update(state.global_step)

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if values := self.trainer.method.after_step(state.global_step, _bare(self.trainer.optimizer)):
            self.trainer.log(values)
        # An epoch's end is saved once it has been evaluated.
        if self.save_steps and state.global_step % self.save_steps == 0 and not _ends_epoch(state.global_step, state):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        if distributed.is_writer():
            for step, folder in checkpoints.all_in(Path(str(args.output_dir))).items():
                if step != state.global_step and _ends_epoch(step, state):
                    checkpoints.drop_resume_files(folder)
                elif step != state.global_step:
                    checkpoints.discard(folder)


def set_order(sampler: LengthGroupedSampler | SeedableRandomSampler, *, seed: int, epoch: int, batch_size: int) -> None:
    """Have the order of an epoch follow from seed and epoch alone: after a resume within it, and in any process.

    Drawn from the global generator, as Trainer does, an order by length would differ there.
    """
    if isinstance(sampler, LengthGroupedSampler):
        sampler.batch_size = batch_size
        sampler.generator = torch.Generator().manual_seed(seed + epoch)
    else:
        sampler.set_epoch(epoch)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Without what accelerate puts around it."""
    return getattr(optimizer, "optimizer", optimizer)


def _publish(output_dir: Path, name: str) -> None:
    source = output_dir / names.PARTIAL / name
    with checkpoints.told(source):  # some file systems tell of a full disk only now
        checkpoints.publish(source, output_dir / name)


def _ends_epoch(step: int, state: TrainerState) -> bool:
    return step % (state.max_steps // state.num_train_epochs) == 0


def _running_loss_name() -> str:
    index = f"_{distributed.process_index()}" if distributed.process_count() > 1 else ""
    return f"running_loss{index}.json"
