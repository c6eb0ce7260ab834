"""What a training method is. Each is a class in a file of this folder, which is found there; see docs/extending.md."""

from __future__ import annotations

import pkgutil
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msplora_core.errors import TrainingError
from msplora_core.options import COUNT, FROM_RECIPE, Option, check_ranges, one_of, options_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from msplora_core.data.tasks import Recipe

METHODS: dict[str, type[Method]] = {}
"""The methods by their name in ``--method``."""


class Training:
    """What a method does while a model is trained, and what it keeps between two runs: nothing, for most."""

    def begin(self, steps: int) -> None:
        """Before the first step; ``steps``: how many the whole training has."""

    def arrange(self, optimizer: torch.optim.Optimizer) -> None:
        """Once the optimiser is made: give parameters a learning rate or a weight decay of their own."""

    def before_step(self, step: int) -> None:
        """Before a step; the first has the number 0."""

    def after_update(self, step: int) -> None:
        """After the optimiser has changed the parameters, and before their gradients are cleared."""

    def sees(self, batch: dict[str, torch.Tensor]) -> None:
        """Before a batch is learnt from: several make a step where gradients are accumulated."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """After a step, when gradients are cleared; ``step``: how many are done. Returns what is to be logged."""
        return {}

    def state(self) -> dict[str, Any] | None:
        """What continues the training besides the trained parameters. None: the checkpoint's own files do."""
        return None

    def load(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``; the trained parameters come back to what they were just after it."""

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While the model is written into a checkpoint."""
        yield


@dataclass(frozen=True)
class Method:
    """A way to fine-tune, with its own options: the fields of the class.

    A subclass with a ``name`` is a method of ``msplora-train`` as soon as it is imported; its docstring, with
    the source, is its line in ``--help``. Nothing heavy is imported before a function of it is called.
    """

    name: ClassVar[str]
    """What ``--method`` calls it."""
    rank_factor: ClassVar[int] = 1
    """Default of the option ``rank``, as a multiple of that of the task's recipe."""
    defaults: ClassVar[dict[str, float]] = {}
    """Defaults of options, where the value of the task's recipe does not suit the method."""
    spectra: ClassVar[str | None] = ""
    """What follows ``msplora-analyze spectra RUN`` to read its checkpoints; None if they have no spectra."""
    peft_config: ClassVar[str | None] = None
    """The class of PEFT's configuration, as ``module:name``; None: all of the model is trained, without an adapter."""
    switches: ClassVar[dict[str, Any]] = {}
    """What else that configuration is made with, whatever the options."""
    skips_parameters: ClassVar[bool] = False
    """Whether a step may give some trained parameters no gradient."""

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            METHODS[cls.name] = cls

    @classmethod
    def from_options(cls, given: dict[str, Any]) -> Method:
        """The method with these options.

        Raises:
            TrainingError: an option that another method has and this one has not.
        """
        own = options_of(cls)
        for option in sorted(given.keys() - own):
            taken = ", ".join(map(repr, own)) or "none of its own"
            owners = ", ".join(name for name, other in METHODS.items() if option in options_of(other))
            raise TrainingError(
                f"'{option}' is no option of the method {cls.name}, which takes {taken}; it belongs to {owners}"
            )
        return cls(**given)

    def filled(self, recipe: Recipe) -> Method:
        """The method with the recipe's value of every option that is not given.

        Raises:
            TrainingError: a value out of its range.
        """
        missing = [name for name in options_of(type(self)) if getattr(self, name) is None]
        values: dict[str, Any] = {name: self.defaults.get(name, getattr(recipe, name, None)) for name in missing}
        if "rank" in values:
            values["rank"] *= self.rank_factor
        filled = replace(self, **values)
        check_ranges(filled)
        return filled

    def quantization(self, precision: str) -> BitsAndBytesConfig | None:
        """How to quantise the base model on loading; None: not at all.

        Args:
            precision: That of training: ``fp32``, ``bf16`` or ``fp16``.
        """
        return None

    def peft_options(self, base_model: PreTrainedModel) -> dict[str, Any]:
        """What that configuration is made with, besides the options of the method that it has by the same name."""
        return dict(self.switches)

    def cuts(self, steps: int) -> dict[int, int]:
        """After which steps the rank falls, and to what; for most methods it does not.

        Args:
            steps: How many the whole training has.

        Raises:
            TrainingError: a step that the training has not, or cuts that do not follow each other.
        """
        return {}

    def training(self, model: PeftModel, seed: int) -> Training:
        """What it does while ``model`` is trained; made before the first step, or before a checkpoint is loaded."""
        return Training()

    def adapt(self, base_model: PreTrainedModel, task_type: str) -> torch.nn.Module:
        """Put the method's adapter into a model.

        Args:
            task_type: PEFT's name of the kind of task, which decides whether there is a head to train too.

        Raises:
            TrainingError: ranks or target modules that do not fit the model.
        """
        if self.peft_config is None:
            return base_model
        from peft import get_peft_model  # it takes seconds to import

        config_class = pkgutil.resolve_name(self.peft_config)
        shared = options_of(type(self)).keys() & {field.name for field in fields(config_class)}
        options = {name: getattr(self, name) for name in shared if getattr(self, name) is not None}
        _check_names(options.get("target_modules"), base_model)
        try:
            config = config_class(task_type=task_type, **options | self.peft_options(base_model))
            return get_peft_model(base_model, config)
        except ValueError as error:
            raise TrainingError(" ".join(str(error).split())) from error


def _check_names(given: list[str] | None, model: PreTrainedModel) -> None:
    """Refuse names that no module of the model has; PEFT leaves them out, unless no name is left."""
    modules = dict(model.named_modules())
    unknown = [name for name in given or () if not any(f".{module}".endswith(f".{name}") for module in modules)]
    if unknown:
        adapted = (name for name, module in modules.items() if getattr(module, "weight", None) is not None)
        there = dict.fromkeys(name.rpartition(".")[2] for name in adapted if not name[-1:].isdigit())
        raise TrainingError(
            f"target_modules={','.join(unknown)}: the model has no module of that name; it has {', '.join(there)}"
        )


@dataclass(frozen=True)
class TargetedMethod(Method):
    """A method that adapts some of the model's modules."""

    target_modules: Annotated[
        list[str] | None,
        Option(
            "Modules to adapt, comma-separated.  [default: as PEFT's LoRA: query,value in BERT]",
            parse=lambda text: text.split(","),
        ),
    ] = None


@dataclass(frozen=True)
class RankedMethod(TargetedMethod):
    """A method of a rank."""

    rank: Annotated[
        int,
        Option(
            "LoRA's rank, or MSPLoRA's r: global r, mid r/2, layer r/4.  "
            "[default: 8; alpaca: 64; lily: 4 times as much]",
            COUNT,
        ),
    ] = FROM_RECIPE

    def peft_options(self, base_model: PreTrainedModel) -> dict[str, Any]:
        return {**super().peft_options(base_model), "r": self.rank}


def parse_falling(text: str) -> list[int]:
    """Ranks from ``"32:8"``, or ``"32:16:8"``.

    Raises:
        TrainingError: not whole numbers of at least 1.
    """
    parts = text.split(":")
    if not all(part.strip().isdecimal() for part in parts):
        raise TrainingError(f"anneal='{text}': expected ranks from the first to the last, such as 32:8 or 32:16:8")
    return [int(part) for part in parts]


def parse_when(text: str) -> list[float]:
    """Steps, or parts of all steps, from ``"200"`` or ``"0.25,0.5"``.

    Raises:
        TrainingError: not numbers.
    """
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise TrainingError(f"anneal_at='{text}': expected steps, or parts of all steps, such as 0.25,0.5") from None


@dataclass(frozen=True)
class AnnealedMethod(RankedMethod):
    """A method whose rank may fall while it trains (LoRA-Squeeze, arXiv 2602.10993); docs/anneal.md.

    :class:`msplora_core.train.annealing.Annealing` is then what it does while a model is trained.
    """

    anneal: Annotated[
        list[int] | None,
        Option(
            "Lower the rank while training, as 32:8 or 32:16:8: each update is cut to its best of the next rank; "
            "the last is the adapter's rank.",
            parse=parse_falling,
        ),
    ] = None
    anneal_at: Annotated[
        list[float] | None,
        Option(
            "When: steps, or parts of all steps, such as 200 or 0.25,0.5.  [default: evenly in the first half]",
            parse=parse_when,
        ),
    ] = None
    anneal_by: Annotated[
        str | None,
        Option(
            "What is best: plain, nearest to the update; task, nearest in what it does to the task, by moments of the "
            "last steps.  [default: plain]",
            one_of(("plain", "task")),
        ),
    ] = None
    anneal_optimizer: Annotated[
        str | None,
        Option(
            "Averages of the optimiser: carry them into the new factors, or reset them.  [default: carry]",
            one_of(("carry", "reset")),
        ),
    ] = None

    @classmethod
    def from_options(cls, given: dict[str, Any]) -> Method:
        alone = [name for name in ("anneal_at", "anneal_by", "anneal_optimizer") if name in given]
        if alone and "anneal" in options_of(cls) and "anneal" not in given:
            raise TrainingError(f"'{alone[0]}' needs 'anneal', which says the ranks, such as 32:8")
        return super().from_options(given)

    def filled(self, recipe: Recipe) -> Method:
        if self.anneal is None:
            return super().filled(recipe)
        told = ":".join(map(str, self.anneal))
        if len(self.anneal) < 2 or not all(a > b >= 1 for a, b in pairwise(self.anneal)):
            raise TrainingError(f"anneal={told}: expected ranks that fall, the last at least 1, such as 32:8")
        if self.rank not in (None, self.anneal[-1]):
            raise TrainingError(f"anneal={told} ends at another rank than rank={self.rank}; leave 'rank' out")
        if self.anneal_at is not None and len(self.anneal_at) != len(self.anneal) - 1:
            raise TrainingError(f"anneal_at: expected {len(self.anneal) - 1} for anneal={told}, one for each cut")
        how: dict[str, Any] = {
            "anneal_by": self.anneal_by or "plain",
            "anneal_optimizer": self.anneal_optimizer or "carry",
        }
        return super(AnnealedMethod, replace(self, rank=self.anneal[-1], **how)).filled(recipe)

    def cuts(self, steps: int) -> dict[int, int]:
        last = self.anneal[1:] if self.anneal else []
        given = self.anneal_at or [0.5 * (i + 1) / len(last) for i in range(len(last))]
        at = [round(when * steps) if isinstance(when, float) else when for when in given]
        if not all(a < b for a, b in pairwise([0, *at, steps])):
            raise TrainingError(
                f"anneal_at={', '.join(map(str, given))}: steps {', '.join(map(str, at))} of {steps}; expected one "
                "after the other, and before the last step: change 'anneal_at', or train longer"
            )
        return dict(zip(at, last, strict=True))

    def ranks_at(self, rank: int) -> dict[str, int]:
        """The rank of each scale where the method's is ``rank``."""
        return {"layer": rank}

    def peft_options(self, base_model: PreTrainedModel) -> dict[str, Any]:
        first = {"r": self.anneal[0]} if self.anneal else {}
        return super().peft_options(base_model) | first


def draw(seed: int, step: int, low: int, high: int) -> int:
    """A whole number from low to high, the same in every process and in every repetition of a step."""
    return random.Random(f"{seed}, {step}").randint(low, high)
