"""What the command lines of training and measuring share: their looks, their errors, how they end."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from msplora_core.errors import TrainingError
from msplora_core.names import printable
from msplora_core.run.distributed import is_writer
from msplora_core.streams import make_writable
from msplora_core.version import __version__

if TYPE_CHECKING:
    from types import FrameType

_PATIENCE = 5.0
"""Seconds that a process other than the writing one waits before it tells of an error of its own."""


def make_app() -> typer.Typer:
    """An empty command line."""
    return typer.Typer(
        pretty_exceptions_enable=False,
        # Plain help starts in less than half the time of rich help.
        rich_markup_mode=None,
        # Without a value here, `--help` makes typer import pydantic to check that none is given.
        context_settings={"default_map": {"help": False}, "token_normalize_func": usual_name},
    )


_HABITS = {
    "lr": "learning-rate",
    "num-train-epochs": "epochs",
    "num-epochs": "epochs",
    "per-device-train-batch-size": "batch-size",
    "train-batch-size": "batch-size",
    "model-name-or-path": "model",
    "task-name": "task",
    "max-seq-length": "max-length",
    "lora-r": "rank",
    "lora-rank": "rank",
    "alpha": "lora-alpha",
    "dropout": "lora-dropout",
    "overwrite-output-dir": "overwrite",
    "resume-from-checkpoint": "resume",
}
"""Options as scripts of transformers and PEFT call them, and as they are called here."""


def usual_name(name: str) -> str:
    """The name of an option, of whatever habit it is given by: ``--learning_rate`` and ``--lr`` are one."""
    name = name.replace("_", "-")
    return _HABITS.get(name, name)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"msplora {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
]


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it, or SIGHUP of a closed terminal: as Ctrl-C, nothing half-written stays behind."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated(number)


def stopped(stop: KeyboardInterrupt, state: str) -> typer.Exit:
    """The end of a command that was told to stop; ``state`` says what it leaves behind."""
    if is_writer():
        print(f"stopped: {state}", file=sys.stderr)
    return typer.Exit(128 + (stop.args[0] if isinstance(stop, _Terminated) else signal.SIGINT))


def quiet_libraries() -> None:
    """Keep the libraries from telling what no user of a command needs to know."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what PEFT calls there
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells of kernels that could be downloaded
    # PEFT looks whether the vocabulary was resized, and cannot for a GGUF file; it never is here
    warnings.filterwarnings("ignore", message="Could not find a config file")


def run(app: typer.Typer, options: Iterable[str]) -> None:
    """Run a command line; bad input ends in one line on standard error and status 1, a signal in 128 and its number.

    Args:
        options: The arguments, by name, that an error may tell of and that the command line has as options.
    """
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _terminate)
    make_writable()
    try:
        app()
    except TrainingError as error:
        message = _for_the_command_line(str(error), options)
    except OSError as error:  # whatever no module foresaw, such as a full disk
        message = f"{error.filename or 'system'}: {error.strerror or error}"
    except (MemoryError, ImportError) as error:  # a library that finds no room for itself is not found
        message = f"there is not enough memory, or a package is broken ({error or type(error).__name__})"
    try:
        # What goes wrong in one process mostly does in all, and is told by the writing one; a launcher ends the others.
        if not is_writer():
            time.sleep(_PATIENCE)
    except KeyboardInterrupt:
        sys.exit(1)
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(1)


def spelled(name: str) -> str:
    """An argument as an option."""
    return f"--{name.replace('_', '-')}"


def _for_the_command_line(message: str, options: Iterable[str]) -> str:
    """A message that tells arguments, as ``seed=-1`` or ``'seed'``, with the command's options in their place."""
    names = "|".join(options)
    told = rf"'({names})'|(?<![\w/.'-])({names})=(True\b)?"
    return re.sub(told, lambda m: spelled(m[1] or m[2]) + ("=" if m[2] and not m[3] else ""), message)
