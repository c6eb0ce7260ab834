"""What programs that read adapters do with one: the scale they apply, what they refuse, what they leave out.

One module a reader, with a ``READER``, found by being in this folder. Each says where its code was looked up.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.ask.readers.always import RULES
from msplora_analysis.ask.readers.base import EFFECTS, Fault, Reader
from msplora_analysis.ask.readers.facts import facts_of
from msplora_analysis.errors import AnalysisError
from msplora_analysis.options import Options


@cache
def readers() -> dict[str, Reader]:
    """All readers, by what ``check --for`` calls them."""
    modules = (import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.READER.name: module.READER for module in modules if hasattr(module, "READER")}


def check(adapter: Adapter, reader: str | None, options: Options, place: str | None = None) -> list[Fault]:
    """What each reader, or one, will do with an adapter, the worst first; what holds of all has reader "".

    Args:
        adapter: What discovery found.
        reader: One of ``readers()``; None: all.
        options: How it is to be read.
        place: What the commands that mend it call it; None: its path.

    Raises:
        AnalysisError: there is no such reader, or the adapter cannot be read.
    """
    if reader is not None and reader not in readers():
        raise AnalysisError(f"reader={reader}: expected one of {', '.join(readers())}", "reader")
    facts = facts_of(adapter, options, place)
    chosen = [readers()[reader]] if reader else list(readers().values())
    found = [fault for rule in RULES for fault in rule(facts)]
    for one in chosen:
        found += [fault._replace(reader=one.name) for fault in one.faults(facts)]
    return sorted(found, key=lambda finding: ("error", "warning", "info").index(finding.severity))


def verdicts(found: list[Fault]) -> Iterator[tuple[Reader, str]]:
    """Of each reader what comes of the findings: it refuses the adapter, loads it wrongly or in part, or reads it."""
    for name, reader in readers().items():
        effects = {finding.effect for finding in found if finding.reader in ("", name)}
        yield reader, next((effect for effect in EFFECTS if effect in effects), "reads it")
