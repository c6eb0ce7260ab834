"""Everything that decides a training run, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msplora_core.errors import TrainingError
from msplora_core.pyramid import SCALES
from msplora_core.tasks import get_task

METHODS = ("msplora", "lora")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """A training run; :func:`make_settings` fills in a task's recipe.

    Args:
        rank: LoRA's rank; MSPLoRA's r (global r, mid r/2, layer r/4) unless ``ranks`` is given.
        ranks: MSPLoRA's rank of every scale.
        target_modules: Modules to adapt; None for what PEFT's LoRA adapts in that architecture.
        head_learning_rate: Learning rate of the classification head.
        warmup_ratio: Part of all steps in which the learning rate rises.
        max_length: Longest input in tokens; longer ones are cut.
        precision: ``fp32``, or mixed precision ``bf16`` / ``fp16``.
        resume: Continue the run in ``output_dir`` from its newest checkpoint.
        overwrite: Delete the run in ``output_dir`` first.
    """

    model: str
    task: str
    method: str
    output_dir: Path
    data_dir: Path | None
    epochs: int
    seed: int
    rank: int
    ranks: dict[str, int] | None
    target_modules: list[str] | None
    lora_alpha: float
    lora_dropout: float
    learning_rate: float
    head_learning_rate: float
    batch_size: int
    warmup_ratio: float
    weight_decay: float
    max_length: int
    precision: str = "fp32"
    resume: bool = False
    overwrite: bool = False
    progress_bar: bool = False

    def what_matters(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values; where and how it is shown left out."""
        values = asdict(self)
        for name in ("output_dir", "resume", "overwrite", "progress_bar"):
            del values[name]
        values["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        return values


def make_settings(
    *,
    model: str,
    task: str,
    method: str,
    output_dir: Path,
    rank: int | None = None,
    ranks: dict[str, int] | None = None,
    head_learning_rate: float | None = None,
    **options: Any,
) -> Settings:
    """Settings with the task's recipe for every option that is not given (or None).

    Raises:
        TrainingError: an unknown task, method or precision, or a number out of its range.
    """
    recipe = get_task(task).recipe
    if method not in METHODS:
        raise TrainingError(f"unknown method '{method}'; choose from {', '.join(METHODS)}")
    if ranks is not None and (method != "msplora" or rank is not None):
        raise TrainingError("ranks (one for each scale) belong to the method msplora, instead of rank")
    given = {name: value for name, value in options.items() if value is not None}
    for name in (
        "epochs", "learning_rate", "batch_size", "warmup_ratio", "weight_decay", "max_length", "lora_alpha",
        "lora_dropout",
    ):  # fmt: skip
        given.setdefault(name, getattr(recipe, name))
    if head_learning_rate is None:
        head_learning_rate = given["learning_rate"] * recipe.head_learning_rate_ratio
    settings = Settings(
        model=model,
        task=task,
        method=method,
        output_dir=output_dir,
        rank=8 if rank is None else rank,
        ranks=ranks,
        head_learning_rate=head_learning_rate,
        **{"data_dir": None, "seed": 0, "target_modules": None, **given},
    )
    _check(settings)
    return settings


def parse_ranks(text: str) -> dict[str, int]:
    """Ranks of the scales from ``"8,4,2"``: global, mid, layer.

    Raises:
        TrainingError: not three whole numbers of at least 1.
    """
    parts = text.split(",")
    if len(parts) != len(SCALES) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise TrainingError(f"ranks '{text}': expected {len(SCALES)} ranks for {', '.join(SCALES)}, such as 8,4,2")
    return {scale: int(part) for scale, part in zip(SCALES, parts, strict=True)}


def _check(settings: Settings) -> None:
    def require(holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise TrainingError(f"{name}={getattr(settings, name)!r}: expected {expected}")

    for name in ("epochs", "rank", "batch_size", "max_length"):
        require(getattr(settings, name) >= 1, name, "a whole number of at least 1")
    for name in ("learning_rate", "head_learning_rate", "weight_decay"):
        require(getattr(settings, name) >= 0, name, "a number of at least 0")
    require(settings.lora_alpha > 0, "lora_alpha", "a number above 0")
    require(0 <= settings.lora_dropout < 1, "lora_dropout", "a number from 0 to below 1")
    require(0 <= settings.warmup_ratio < 1, "warmup_ratio", "a fraction of the steps, from 0 to below 1")
    require(settings.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
    require(0 <= settings.seed < 2**32, "seed", "a whole number from 0 to 2**32 - 1")
    if settings.resume and settings.overwrite:
        raise TrainingError("resume and overwrite exclude each other: choose one")
