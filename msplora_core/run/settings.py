"""Everything that decides a training run, checked before anything heavy is imported."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msplora_core.data.tasks import EMBEDDED_TASK, TASKS, get_task
from msplora_core.errors import TrainingError
from msplora_core.methods import METHODS, Method, get_method, method_options
from msplora_core.methods.msplora import MSPLora
from msplora_core.models import EMBEDDED_MODELS
from msplora_core.options import (
    COUNT,
    FRACTION,
    FROM_RECIPE,
    NOT_NEGATIVE,
    SEED,
    Option,
    check_ranges,
    one_of,
    options_of,
)

PRECISIONS = ("fp32", "bf16", "fp16")
MODEL_DTYPES = {"float32": None, "bfloat16": "bf16", "float16": "fp16"}
"""Types that the base model's weights may have, and the precision that each needs (None: any)."""


def _by_task(others: str = "") -> str:
    """What the help says of a default that the recipe of the task has; ``others``: of methods that have their own."""
    return f"[default: by the task, see below{others}]"


@dataclass(frozen=True)
class Settings:
    """A training run. What is not given comes from the recipe of the task.

    The options of ``msplora-train`` are these fields, and those of the methods.

    Raises:
        TrainingError: an unknown task, or a value out of its range.
    """

    output_dir: Annotated[Path, Option("Folder of the run: one checkpoint for every epoch.", decides=False)]
    model: Annotated[str, Option(f"Hub name, model folder or .gguf file; embedded: {', '.join(EMBEDDED_MODELS)}.")] = (
        "minilm"
    )
    task: Annotated[str, Option(f"One of {', '.join(TASKS)}.")] = EMBEDDED_TASK
    method: Annotated[Method, Option(f"One of {', '.join(sorted(METHODS))}; see below.")] = MSPLora()  # noqa: RUF009 - frozen
    data_dir: Annotated[
        Path | None, Option("Folder with {task}_train.jsonl[.gz] and {task}_validation.jsonl[.gz]; else the Hub.")
    ] = None
    seed: Annotated[int, Option("Seed of initialisation, order and dropout.", SEED)] = 0
    epochs: Annotated[int, Option(f"Passes over the training data.  {_by_task()}", COUNT)] = FROM_RECIPE
    learning_rate: Annotated[
        float,
        Option(f"Largest rate of AdamW; it falls linearly to 0.  {_by_task('; fft: 2e-5')}", NOT_NEGATIVE),
    ] = FROM_RECIPE
    head_learning_rate: Annotated[
        float, Option("That of a new head.  [default: half the learning rate; fft: all of it]", NOT_NEGATIVE)
    ] = FROM_RECIPE
    batch_size: Annotated[int, Option(f"Examples of a step.  {_by_task()}", COUNT)] = FROM_RECIPE
    micro_batch_size: Annotated[
        int | None, Option("Examples computed at once.  [default: the whole batch; alpaca: 4]")
    ] = None
    warmup_ratio: Annotated[float, Option(f"Part of the steps.  {_by_task()}", FRACTION)] = FROM_RECIPE
    weight_decay: Annotated[float, Option(f"Decay of AdamW.  {_by_task('; pissa: 0')}", NOT_NEGATIVE)] = FROM_RECIPE
    max_length: Annotated[int, Option(f"Tokens.  {_by_task()}", COUNT)] = FROM_RECIPE
    precision: Annotated[str, Option(f"One of {', '.join(PRECISIONS)}.", one_of(PRECISIONS))] = "fp32"
    model_dtype: Annotated[
        str, Option(f"Type of the base model's weights, one of {', '.join(MODEL_DTYPES)}.", one_of(MODEL_DTYPES))
    ] = "float32"
    gradient_checkpointing: Annotated[
        bool, Option("Less memory, slower: activations are computed twice.", decides=False)
    ] = False
    save_steps: Annotated[
        int | None, Option("Also keep a checkpoint every so many steps, the newest only.", COUNT, decides=False)
    ] = None
    shard_base: Annotated[
        bool, Option("Spread the base model over the processes of torchrun (FSDP2).", decides=False)
    ] = False
    log_spectra: Annotated[
        bool, Option("Log effective rank, M_eff-k, norms and scale overlap with the loss.", decides=False)
    ] = False
    report_to: Annotated[
        str | None, Option("Tracker to report to: tensorboard, wandb, trackio, mlflow, ...", decides=False)
    ] = None
    resume: Annotated[bool, Option("Continue from the newest complete checkpoint.", decides=False)] = False
    overwrite: Annotated[bool, Option("Delete the run in the folder first.", decides=False)] = False
    progress_bar: bool = False

    def __post_init__(self) -> None:
        recipe = get_task(self.task).recipe
        filled: dict[str, Any] = {name: getattr(recipe, name, None) for name in options_of(Settings)}
        filled |= {name: value for name, value in self.method.defaults.items() if name in filled}
        ratio = 1 if "learning_rate" in self.method.defaults else recipe.head_learning_rate_ratio
        rate = filled["learning_rate"] if self.learning_rate is None else self.learning_rate
        filled["head_learning_rate"] = rate * ratio
        if recipe.micro_batch_size is not None:  # the largest that fits a batch size of the user's
            filled["micro_batch_size"] = math.gcd(recipe.micro_batch_size, self.batch_size or recipe.batch_size)
        for name, value in filled.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the only place where a frozen field is set
        object.__setattr__(self, "method", self.method.filled(recipe))
        check_ranges(self)
        needed = MODEL_DTYPES[self.model_dtype]
        if needed not in (None, self.precision):
            raise TrainingError(f"precision={self.precision!r}: expected {needed}, with model_dtype={self.model_dtype}")
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise TrainingError(f"micro_batch_size={micro}: expected a divisor of batch_size={self.batch_size}")
        if self.resume and self.overwrite:
            raise TrainingError("'resume' and 'overwrite' exclude each other: choose one")

    def what_matters(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values; where and how it is shown left out.

        The options of other methods than the run's are there too, as None.
        """
        values: dict[str, Any] = {
            name: getattr(self, name) for name, field in options_of(Settings).items() if field.option.decides
        }
        values |= {name: getattr(self.method, name, None) for name in method_options()}
        data_dir = None if self.data_dir is None else str(self.data_dir)
        return {**values, "method": self.method.name, "data_dir": data_dir}


def make_settings(*, method: str, **given: Any) -> Settings:
    """Settings from the options of ``msplora-train``, those of the method among the others.

    Args:
        method: Name of the method.
        given: The options by name (the methods' files say which there are); None: not given.

    Raises:
        TrainingError: an unknown task or method, an option of another method, or a value out of its range.
    """
    chosen = get_method(method)
    given = {name: value for name, value in given.items() if value is not None}
    own = {name: given.pop(name) for name in method_options() if name in given}
    return Settings(method=chosen.from_options(own), **given)
