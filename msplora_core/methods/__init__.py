"""The training methods, one a file; what each one is: docs/methods.md. Nothing heavy is imported here."""

import importlib
import pkgutil

from msplora_core.errors import TrainingError
from msplora_core.methods.base import METHODS, Method
from msplora_core.options import Field, options_of

__all__ = ["METHODS", "Method", "get_method", "method_options", "methods_table"]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


def get_method(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        TrainingError: there is no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise TrainingError(f"unknown method '{name}'; choose from {', '.join(sorted(METHODS))}")
    return METHODS[name]


def method_options() -> dict[str, Field]:
    """The options of all methods together."""
    return {name: field for method in METHODS.values() for name, field in options_of(method).items()}


def methods_table() -> str:
    """Every method with its description, a line each."""
    width = max(map(len, METHODS))
    return "\n".join(f"{name:<{width}}  {METHODS[name].__doc__}" for name in sorted(METHODS))
