"""What is measured: a model with a trained adapter and head, and the examples of its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msplora_core import records
from msplora_core.data.loading import Split, load_splits
from msplora_core.data.tasks import ClassificationTask, Task, get_task
from msplora_core.errors import TrainingError
from msplora_core.methods import METHODS
from msplora_core.models import ModelSource, find_model, load_model
from msplora_core.names import CONFIG, RECORD, WEIGHTS
from msplora_core.run import checkpoints

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 32
"""Examples of a batch, where the task's recipe tells no smaller number."""
_RUN: records.Schema = {
    "settings": records.SETTINGS
    | {"data_dir?": (str, None), "max_length?": int, "precision?": str, "model_dtype?": str, "method?": str}
}
"""``run.json``, as far as measuring goes by it."""


@dataclass(frozen=True)
class Subject:
    """A model with a trained adapter, and the examples of its task.

    Attributes:
        adapter: Folder of the adapter.
        model: The base model with the adapter and, of a classifier, the trained head; on the GPU if there is one.
        tokenizer: The model's.
        task: The task.
        splits: Its examples, as they stand in the files.
        max_length: Longer examples lose their end.
        source: Where the base model comes from.
        precision: ``fp32``, ``bf16`` or ``fp16``: what the run was trained with.
    """

    adapter: Path
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    splits: Mapping[str, Split]
    max_length: int
    source: ModelSource
    precision: str = "fp32"

    def autocast(self) -> torch.autocast:
        """The precision that the run was trained with, on a GPU: a context for what the model computes.

        float16 stays out of it, as gradients would vanish there.
        """
        import torch

        device = self.model.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16" and device == "cuda")

    def without_adapter(self) -> Any:
        """The base model, from which the adapter is taken; this subject is of no use then, but for ``with_adapter``."""
        return self.model.unload()

    def with_adapter(self) -> Subject:
        """The same once more, its adapter and head read again."""
        return replace(self, model=_with_adapter(self.model.get_base_model(), self.adapter, self.task))

    @property
    def micro_batch_size(self) -> int:
        """Examples of a batch that the task's recipe computes at once."""
        return self.task.recipe.micro_batch_size or _AT_ONCE

    def batches(
        self,
        split: str = "train",
        examples: int | None = None,
        batch_size: int | None = None,
        *,
        by_length: bool = False,
    ) -> list[dict[str, torch.Tensor]]:
        """The first examples of a split, in the order of the file, as the model takes them.

        Args:
            split: ``train`` or ``validation``.
            examples: How many; None: all.
            batch_size: Examples of a batch; None: :attr:`micro_batch_size`.
            by_length: The longest first instead, which pads least; too little memory is known at once.

        Returns:
            Batches with labels, padded to their own longest example, on the processor.
        """
        from msplora_core.data.encoding import collator, encode

        own = self.splits[split]
        encoded = encode(Split(own.rows[:examples], own.source), self.task, self.tokenizer, self.max_length).examples
        if by_length:
            encoded = sorted(encoded, key=lambda example: -len(example["input_ids"]))
        collate, size = collator(self.task, self.tokenizer), batch_size or self.micro_batch_size
        return [dict(collate(encoded[i : i + size])) for i in range(0, len(encoded), size)]

    def about(self, split: str = "train") -> dict[str, Any]:
        """What the files of a measurement say of this: ``model``, ``task``, ``data`` (fingerprint, source)."""
        data = self.splits[split]
        return {
            "model": self.source.name,
            "task": self.task.name,
            "data": {"split": split, "source": data.source, "sha256": data.fingerprint},
        }


@dataclass(frozen=True)
class Place:
    """Where an adapter stands, and what its run, if it has one, was made with.

    Attributes:
        adapter: Folder of the adapter.
        settings: Those of run.json; empty for an adapter that no run has.
    """

    adapter: Path
    settings: Mapping[str, Any] = field(default_factory=dict)


def find_adapter(path: Path) -> Place:
    """The adapter at a path: a checkpoint, any PEFT adapter, or a run folder, of which it is the last checkpoint.

    Raises:
        TrainingError: there is none.
    """
    if not path.is_dir():
        raise TrainingError(f"{path}: there is no such folder; expected a checkpoint, a run or a PEFT adapter")
    if not (path / CONFIG).is_file():
        kept = [folder for folder in checkpoints.all_in(path).values() if (folder / CONFIG).is_file()]
        if not kept:
            raise TrainingError(f"{path}: there is no {CONFIG} in it, nor a checkpoint with one; expected an adapter")
        path = kept[0]
    if not (path / WEIGHTS).is_file():
        raise TrainingError(f"{path / WEIGHTS}: missing; expected the adapter's tensors beside {CONFIG}")
    record = path.parent / RECORD
    if not record.is_file():
        return Place(path)
    try:
        return Place(path, records.read(record, _RUN)["settings"])
    except records.RecordError as error:
        raise TrainingError(f"{record}: not the record of a run ({error}); give 'model' and 'task'") from error


def load_subject(
    adapter: Path, *, data_dir: Path | None = None, model: str | None = None, task: str | None = None
) -> Subject:
    """Load a model with its adapter and trained head, and the examples of its task.

    Args:
        adapter: A checkpoint of a run, a run folder (its last checkpoint), or a folder of any PEFT adapter.
        data_dir: Folder of the data; None: as in run.json, else the embedded task's or the Hub's.
        model: Hub name, model folder, .gguf file or embedded model; None: as in run.json.
        task: One of the tasks; None: as in run.json.

    Raises:
        TrainingError: the adapter, its model or its data are missing or do not fit; or neither run.json nor
            arguments tell model and task.
        OSError: a file cannot be read.

    Example:
        >>> subject = load_subject(Path("examples/runs/lora-8"))
        >>> subject.task.name, len(subject.batches("train", examples=64))
        ('acceptability', 2)
    """
    place = find_adapter(adapter)
    recorded = place.settings
    for name, given in (("model", model), ("task", task)):
        if given is None and not isinstance(recorded.get(name), str):
            raise TrainingError(f"{place.adapter}: no {RECORD} beside it tells the {name}; give '{name}'")
    chosen, source = get_task(task or recorded["task"]), find_model(model or recorded["model"])
    same_task = chosen.name == recorded.get("task")
    if data_dir is None and same_task and recorded.get("data_dir"):
        data_dir = Path(recorded["data_dir"])
        if not data_dir.is_dir():
            raise TrainingError(f"{data_dir}: the folder of the run's data is not there; give 'data_dir'")
    splits = load_splits(chosen, data_dir)
    precision = recorded.get("precision", "fp32")
    method = METHODS.get(recorded.get("method", "lora"), METHODS["lora"])
    base, tokenizer = load_model(
        source, chosen, recorded.get("model_dtype", "float32"), method().quantization(precision)
    )
    max_length = recorded.get("max_length", chosen.recipe.max_length) if same_task else chosen.recipe.max_length
    return Subject(
        place.adapter,
        _with_adapter(base, place.adapter, chosen),
        tokenizer,
        chosen,
        splits,
        max_length,
        source,
        precision,
    )


def _with_adapter(base: Any, adapter: Path, task: Task) -> PeftModel:
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    if isinstance(task, ClassificationTask):
        try:
            with safe_open(adapter / WEIGHTS, "pt") as file:
                names = list(file.keys())
        except SafetensorError as error:
            raise TrainingError(f"{adapter / WEIGHTS}: cannot be read ({error}); save the adapter again") from error
        if not any(part in ("classifier", "score") for name in names for part in name.split(".")):
            raise TrainingError(
                f"{adapter / WEIGHTS}: holds no trained head (classifier or score), and {task.name} needs one; "
                "save the adapter with modules_to_save, or with task_type SEQ_CLS"
            )
    if getattr(base, "is_quantized", False):
        from msplora_core.methods.qlora import keep_quantized

        base = keep_quantized(base)
    try:
        model = PeftModel.from_pretrained(base, str(adapter))
    except (ValueError, KeyError, RuntimeError, SafetensorError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(f"{adapter}: does not fit the model {base.config.name_or_path}: {reason}") from error
    if torch.cuda.is_available() and not getattr(base, "is_quantized", False):
        model = model.to("cuda")
    return model.eval()
