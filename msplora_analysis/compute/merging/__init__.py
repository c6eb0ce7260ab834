"""Ways to merge the updates of several adapters, one module each. To add one, add its module with a ``METHOD``."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from msplora_analysis.compute.merging.protocol import Method
from msplora_analysis.errors import AnalysisError


@cache
def methods() -> dict[str, Method]:
    """All methods, by their names."""
    modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.__name__.rpartition(".")[2]: module.METHOD for module in modules if hasattr(module, "METHOD")}


def find_method(name: str) -> Method:
    """The method called ``name``. Raises AnalysisError where there is none."""
    if name not in methods():
        raise AnalysisError(f"method={name}: expected one of {', '.join(methods())}", "method")
    return methods()[name]
