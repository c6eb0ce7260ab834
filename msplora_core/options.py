"""An option, told once: where its type stands, with its help and its range. The command line is built from it."""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from msplora_core.errors import TrainingError

FROM_RECIPE: Any = None
"""Default of an option that is filled in from the recipe of the task."""


class Range(NamedTuple):
    """The values that an option may have, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


COUNT = Range("a whole number of at least 1", lambda value: value >= 1)
COUNT_OR_0 = Range("a whole number of at least 0", lambda value: value >= 0)
NOT_NEGATIVE = Range("a number of at least 0", lambda value: value >= 0)
POSITIVE = Range("a number above 0", lambda value: value > 0)
FRACTION = Range("a number from 0 to below 1", lambda value: 0 <= value < 1)


SEED = Range("a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)


def one_of(choices: Iterable[str]) -> Range:
    """The range of an option with these choices."""
    return Range(f"one of {', '.join(choices)}", lambda value: value in choices)


@dataclass(frozen=True)
class Option:
    """What makes a field of settings an option, as in ``rank: Annotated[int, Option("LoRA's rank.", COUNT)]``.

    Args:
        help: Its line in ``--help``.
        range: The values that it may have; None: all.
        parse: Reads the text of the command line, where the type is not one of its own.
        decides: Whether the result of a run depends on it, so that run.json records it.
        unrecorded: What a run had whose record is older than the option, if not the option's default.
    """

    help: str
    range: Range | None = None
    parse: Callable[[str], object] | None = None
    decides: bool = True
    unrecorded: object = None


class Field(NamedTuple):
    """A field that is an option: its type and its default (``...``: must be given)."""

    type: Any
    option: Option
    default: Any


def options_of(cls: type) -> dict[str, Field]:
    """The options of a dataclass by name, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in fields(cls):
        if get_origin(hints[field.name]) is Annotated:
            type_, option = get_args(hints[field.name])
            found[field.name] = Field(type_, option, ... if field.default is MISSING else field.default)
    return found


def check_ranges(instance: object) -> None:
    """Refuse values out of the range of their option.

    Raises:
        TrainingError: it names the option, the value and what was expected.
    """
    for name, (_, option, _) in options_of(type(instance)).items():
        value = getattr(instance, name)
        if value is not None and option.range is not None and not option.range.holds(value):
            raise TrainingError(f"{name}={value!r}: expected {option.range.text}")
