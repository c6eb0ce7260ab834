"""Everything that decides a training run, checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msplora_core.data.tasks import get_task
from msplora_core.errors import TrainingError
from msplora_core.methods import METHODS, check_options, get_method
from msplora_core.names import SCALES

__all__ = ["METHODS", "MODEL_DTYPES", "PRECISIONS", "Settings", "make_settings", "parse_ranks"]

PRECISIONS = ("fp32", "bf16", "fp16")
MODEL_DTYPES = {"float32": None, "bfloat16": "bf16", "float16": "fp16"}
"""Types that the base model's weights may have, and the precision that each needs (None: any)."""


@dataclass(frozen=True)
class Settings:
    """A training run; :func:`make_settings` fills in a task's recipe.

    Args:
        rank: LoRA's rank; MSPLoRA's r (global r, mid r/2, layer r/4) unless ``ranks`` is given; AdaLoRA's average
            rank at the end. None, like every other option of a method, for a method that does not take it.
        ranks: MSPLoRA's rank of every scale.
        bottleneck: Width of bottleneck adapters.
        dropped_layers: How many of the lowest layers have no bottleneck adapter; None for all having one, and a
            random number of them left out in every training step.
        target_modules: Modules to adapt; None for what PEFT's LoRA adapts in that architecture.
        head_learning_rate: Learning rate of the classification head.
        warmup_ratio: Part of all steps in which the learning rate rises.
        max_length: Longest input in tokens; longer ones are cut.
        micro_batch_size: Examples computed at once, a divisor of ``batch_size``, over which the gradient of a
            batch is summed; None for the whole batch.
        precision: ``fp32``, or mixed precision ``bf16`` / ``fp16``.
        model_dtype: Type of the base model's weights; adapter and head are float32 always.
        gradient_checkpointing: Compute activations a second time instead of keeping them: less memory, slower.
        save_steps: Also keep the newest of a checkpoint every so many steps, for epochs that take long; the result
            is the same.
        shard_base: Spread the base model over the processes (FSDP2).
        log_spectra: Log the adapter's spectral measures wherever Trainer logs (``msplora_analysis.SpectraCallback``).
        report_to: A tracker that Trainer reports to, such as ``tensorboard``.
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
    rank: int | None
    ranks: dict[str, int] | None
    target_modules: list[str] | None
    lora_alpha: float | None
    lora_dropout: float | None
    learning_rate: float
    head_learning_rate: float
    batch_size: int
    warmup_ratio: float
    weight_decay: float
    max_length: int
    bottleneck: int | None = None
    dropped_layers: int | None = None
    micro_batch_size: int | None = None
    precision: str = "fp32"
    model_dtype: str = "float32"
    gradient_checkpointing: bool = False
    save_steps: int | None = None
    shard_base: bool = False
    log_spectra: bool = False
    report_to: str | None = None
    resume: bool = False
    overwrite: bool = False
    progress_bar: bool = False

    def what_matters(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values; where and how it is shown left out."""
        values = asdict(self)
        for name in (
            "output_dir", "save_steps", "shard_base", "log_spectra", "report_to", "resume", "overwrite",
            "progress_bar", "gradient_checkpointing",
        ):  # fmt: skip
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
    chosen = get_method(method)
    check_options(method, {"rank": rank, "ranks": ranks, **options})
    if ranks is not None and rank is not None:
        raise TrainingError("--rank and --ranks (one for each scale) exclude each other: choose one")
    if rank is None and "rank" in chosen.options:
        rank = recipe.rank * chosen.rank_factor
    given = {name: value for name, value in options.items() if value is not None}
    if chosen.learning_rate is not None:
        given.setdefault("learning_rate", chosen.learning_rate)
    for name in ("epochs", "learning_rate", "batch_size", "warmup_ratio", "weight_decay", "max_length"):
        given.setdefault(name, getattr(recipe, name))
    for name, default in {
        "lora_alpha": recipe.lora_alpha,
        "lora_dropout": recipe.lora_dropout,
        "bottleneck": 16,
    }.items():
        given.setdefault(name, default if name in chosen.options else None)
    if recipe.micro_batch_size is not None:  # the largest that fits a batch size of the user's
        given.setdefault("micro_batch_size", math.gcd(recipe.micro_batch_size, given["batch_size"]))
    if head_learning_rate is None:
        ratio = recipe.head_learning_rate_ratio if chosen.learning_rate is None else 1
        head_learning_rate = given["learning_rate"] * ratio
    settings = Settings(
        model=model,
        task=task,
        method=method,
        output_dir=output_dir,
        rank=rank,
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

    for name in ("epochs", "rank", "bottleneck", "batch_size", "max_length"):
        value = getattr(settings, name)
        require(value is None or value >= 1, name, "a whole number of at least 1")
    require((settings.dropped_layers or 0) >= 0, "dropped_layers", "a whole number of at least 0")
    for name in ("learning_rate", "head_learning_rate", "weight_decay"):
        require(getattr(settings, name) >= 0, name, "a number of at least 0")
    require(settings.lora_alpha is None or settings.lora_alpha > 0, "lora_alpha", "a number above 0")
    require(0 <= (settings.lora_dropout or 0) < 1, "lora_dropout", "a number from 0 to below 1")
    require(0 <= settings.warmup_ratio < 1, "warmup_ratio", "a fraction of the steps, from 0 to below 1")
    require(settings.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
    require(settings.model_dtype in MODEL_DTYPES, "model_dtype", f"one of {', '.join(MODEL_DTYPES)}")
    precision = MODEL_DTYPES[settings.model_dtype]
    require(
        precision in (None, settings.precision), "precision", f"{precision}, with model_dtype={settings.model_dtype}"
    )
    micro, batch = settings.micro_batch_size, settings.batch_size
    require(
        micro is None or (micro >= 1 and batch % micro == 0), "micro_batch_size", f"a divisor of batch_size={batch}"
    )
    require(0 <= settings.seed < 2**32, "seed", "a whole number from 0 to 2**32 - 1")
    require(settings.save_steps is None or settings.save_steps >= 1, "save_steps", "a whole number of at least 1")
    if settings.resume and settings.overwrite:
        raise TrainingError("resume and overwrite exclude each other: choose one")
