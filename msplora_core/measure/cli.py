"""The command ``msplora-measure``. Heavy libraries are imported only once there is something to measure."""

from __future__ import annotations

import typer

from msplora_core.measure.commands import ablate, added, moments
from msplora_core.run.console import Version, make_app, run

COMMANDS = (moments, ablate, added)
"""The modules of ``msplora_core.measure.commands``, in the order of the help; each has a function of its own name."""

app = make_app()


@app.callback(no_args_is_help=True)
def measure(version: Version = False) -> None:
    """Measure what a trained adapter is worth to its task: it needs the model and the data."""


for _module in COMMANDS:
    _examples = "".join(f"  {example}\n" for example in _module.EXAMPLES)
    app.command(epilog=f"Examples:\n\n\b\n{_examples}")(getattr(_module, _module.__name__.rpartition(".")[2]))


def main() -> None:
    """Run the command; bad input ends in one line on standard error and exit status 1, Ctrl-C in 130 (SIGTERM: 143)."""
    group = typer.main.get_command(app)
    options = {parameter.name for command in group.commands.values() for parameter in command.params}  # type: ignore[attr-defined]
    run(app, sorted(name for name in options if name))


if __name__ == "__main__":
    main()
