"""What a training method is. Each is a class in a file of this folder, which is found there; see docs/extending.md."""

from __future__ import annotations

import pkgutil
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msplora_core.errors import TrainingError
from msplora_core.options import COUNT, FROM_RECIPE, Option, check_ranges, options_of

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

    def before_step(self, step: int) -> None:
        """Before a step; the first has the number 0."""

    def after_update(self, step: int) -> None:
        """After the optimiser has changed the parameters, and before their gradients are cleared."""

    def state(self) -> dict[str, Any] | None:
        """What continues the training besides the trained parameters. None: the checkpoint's own files do."""
        return None

    def load(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``; the trained parameters are those of then."""

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


def draw(seed: int, step: int, low: int, high: int) -> int:
    """A whole number from low to high, the same in every process and in every repetition of a step."""
    return random.Random(f"{seed}, {step}").randint(low, high)
