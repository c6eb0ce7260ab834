"""How a command is declared in its module, and how all of them are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import typer

from msplora_analysis import commands
from msplora_analysis.commands.shared.values import PlainCommand

_Function = TypeVar("_Function", bound=Callable[..., None])


class Command(NamedTuple):
    """A function that the command line offers under its own name."""

    function: Callable[..., None]
    summary: str
    examples: tuple[str, ...]
    kind: type[PlainCommand]

    def add_to(self, app: typer.Typer) -> None:
        examples = "".join(f"  {example}\n" for example in self.examples)
        epilog = f"Examples:\n\n\b\n{examples}"  # after \b click keeps lines as they are
        app.command(cls=self.kind, short_help=self.summary, epilog=epilog)(self.function)


_DECLARED: dict[str, Command] = {}  # module -> its command


def command(
    summary: str, *, examples: tuple[str, ...], kind: type[PlainCommand] = PlainCommand
) -> Callable[[_Function], _Function]:
    """Make a function the command of its module.

    Args:
        summary: the line of ``msplora-analyze --help``.
        examples: command lines, which end the command's own help.
        kind: the class of the command, if it reads its words in a way of its own.
    """

    def declare(function: _Function) -> _Function:
        _DECLARED[function.__module__] = Command(function, summary, examples, kind)
        return function

    return declare


def find_commands(only: str = "") -> list[Command]:
    """The commands of all modules of ``msplora_analysis.commands``, in the order of the help.

    Args:
        only: if there is a command of this name, it alone: typer needs milliseconds for each.
    """
    modules = [found.name for found in pkgutil.iter_modules(commands.__path__) if not found.ispkg]
    order = [*commands.ORDER, *sorted(set(modules) - set(commands.ORDER))]
    wanted = [only] if only in order else order
    return [_DECLARED[importlib.import_module(f"{commands.__name__}.{name}").__name__] for name in wanted]
