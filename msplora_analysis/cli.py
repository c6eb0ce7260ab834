"""The command ``msplora-analyze``. Whatever is slow to import is imported inside a command."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from msplora_analysis.commands.shared.declaring import find_commands
from msplora_analysis.commands.shared.terminal import end_cleanly, with_options
from msplora_analysis.commands.shared.values import without_pydantic
from msplora_analysis.errors import AnalysisError, printable
from msplora_core.streams import make_writable


class _Commands(TyperGroup):
    """The commands; a path in the place of a command is one to advise on."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        without_pydantic(self.get_params(ctx))
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        first = args[0]
        if first not in self.commands and not first.startswith("-") and ("/" in first or os.path.exists(first)):
            args = ["advise", *args]
        return super().resolve_command(ctx, args)


def _print_version(wanted: bool) -> None:
    if wanted:
        from msplora_core.version import __version__

        print(f"msplora-analyze {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def _with_dashes(name: str) -> str:
    return name.replace("_", "-")


def make_app(only: str = "") -> typer.Typer:
    """The command line, of all commands that are found; of one alone, if there is one called ``only``."""
    made = typer.Typer(
        cls=_Commands,
        help="See what an adapter learned, what rank it needs, and what may go. Commands read adapter files; they run "
        "no model.\n\n"
        "`msplora-analyze PATH` is short for `msplora-analyze advise PATH`.",
        epilog="Run `msplora-analyze COMMAND --help` for the options and examples of a command.",
        # Plain help starts in less than half the time of rich help.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"token_normalize_func": _with_dashes},
        callback=_options,
    )
    for command in find_commands(only):
        command.add_to(made)
    return made


def __getattr__(name: str) -> typer.Typer:
    if name == "app":  # all commands; main makes no more than it needs
        return make_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> NoReturn:
    """Entry point: exit status 0 done, 1 bad input (one line on stderr), 2 wrong usage."""
    # Factors are small: more than one BLAS thread is slower. It must be set before numpy starts. Whole weights are not.
    if sys.argv[1:2] != ["extract"]:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    warnings.showwarning = _print_warning
    make_writable()
    end_cleanly()
    try:
        make_app(*sys.argv[1:2])(prog_name="msplora-analyze")
    except AnalysisError as error:
        message = with_options(error)
    except OSError as error:  # whatever no module foresaw, such as a full disk
        message = f"{error.filename or 'system'}: {error.strerror or error}"
    except (MemoryError, ImportError) as error:  # a library that finds no room for itself is not found
        message = f"there is not enough memory, or a package is broken ({error or type(error).__name__})"
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU
            raise
        message = "--device: the GPU has not enough memory; leave it out, for the CPU"
    print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(1)


def _print_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {printable(str(message))}", file=sys.stderr)


if __name__ == "__main__":
    main()
