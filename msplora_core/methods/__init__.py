"""The training methods, and the options that each takes. Nothing heavy is imported here.

How a method is put into a model: :mod:`msplora_core.methods.adaptation`; what each one is: docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from msplora_core.errors import TrainingError

_LORA = ("rank", "target_modules", "lora_alpha", "lora_dropout")
_SHARED = ("rank", "target_modules")
_BOTTLENECK = ("bottleneck", "dropped_layers", "target_modules")


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        description: What it is, in a line.
        options: The method's own options that it takes, besides those of every training.
        rank_factor: Default of the option ``rank``, as a multiple of that of the task's recipe.
        learning_rate: Default where the task's recipe, made for adapters, is of another order; the head's too.
        spectra: What follows ``msplora-analyze spectra RUN`` to read its checkpoints; None if they have no spectra.
    """

    description: str
    options: tuple[str, ...] = _LORA
    rank_factor: int = 1
    learning_rate: float | None = None
    spectra: str | None = ""


METHODS = {
    "msplora": Method("LoRA parts shared by all layers, by a third, and by none", ("ranks", *_LORA)),
    "lora": Method("a low-rank update of every adapted weight"),
    "rslora": Method("LoRA scaled by alpha / sqrt(rank)"),
    "dora": Method("LoRA, and the magnitudes of the weight's rows"),
    "adalora": Method("singular values, pruned to --rank of them on average"),
    "dylora": Method("LoRA of use at every rank up to --rank"),
    "pissa": Method("LoRA from the weight's largest singular values on"),
    "qlora": Method("LoRA on a base model in 4 bits"),
    "lily": Method("As and Bs shared by layers, Bs mixed by a router", _SHARED, rank_factor=4, spectra=None),
    "bitfit": Method("the biases alone", (), spectra=None),
    "adapterdrop": Method("bottleneck adapters, dropped from lower layers", _BOTTLENECK, spectra=None),
    "fft": Method("full fine-tuning", (), learning_rate=2e-5, spectra=" --base {run}/checkpoint-0"),
}

_OWN_OPTIONS = {option for method in METHODS.values() for option in method.options}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        TrainingError: there is no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise TrainingError(f"unknown method '{name}'; choose from {', '.join(METHODS)}")
    return METHODS[name]


def check_options(name: str, given: dict[str, object]) -> None:
    """Refuse options (None: not given) that another method has and this one has not.

    Raises:
        TrainingError: such an option was given.
    """
    taken = get_method(name).options
    for option in sorted(_OWN_OPTIONS):
        if given.get(option) is not None and option not in taken:
            owners = ", ".join(other for other, method in METHODS.items() if option in method.options)
            raise TrainingError(
                f"{_flag(option)} is no option of the method {name}, which takes "
                f"{', '.join(map(_flag, taken)) or 'none of its own'}; it belongs to {owners}"
            )


def is_head(parameter: str) -> bool:
    """Whether a parameter, by its name in the model, is of the task's head: PEFT trains a copy of it."""
    return ".modules_to_save." in parameter or parameter.split(".")[0] in ("classifier", "score")


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def methods_table() -> str:
    """Every method with its description, a line each."""
    width = max(map(len, METHODS))
    return "\n".join(f"{name:<{width}}  {method.description}" for name, method in METHODS.items())
