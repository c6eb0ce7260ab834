"""Formats that adapters are written in, one module each. To add one, add its module with a ``TARGET``."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from msplora_analysis.errors import AnalysisError
from msplora_analysis.write.targets.protocol import Target


@cache
def targets() -> dict[str, Target]:
    """All targets, by their names."""
    modules = {found.name: import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)}
    return {name: module.TARGET for name, module in modules.items() if hasattr(module, "TARGET")}


def find_target(name: str) -> Target:
    """The target called ``name``. Raises AnalysisError where there is none."""
    if name not in targets():
        raise AnalysisError(f"to={name}: expected one of {', '.join(targets())}", "to")
    return targets()[name]
