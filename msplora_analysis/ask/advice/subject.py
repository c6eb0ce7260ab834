"""What advice is about, and what it consists of: an adapter with all that is known of it; answers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.opening import open_adapter
from msplora_analysis.ask.advice.cuts import unit_of
from msplora_analysis.ask.advice.learned import is_classifier
from msplora_analysis.formats.helpers.parts import is_head
from msplora_analysis.options import Options
from msplora_core.names import SCALES, TOTAL

if TYPE_CHECKING:
    from msplora_core.moments import Moments


@dataclass(frozen=True)
class Subject:
    """One adapter and all that is known of it.

    Args:
        spectra, metrics: Its rows of the tidy tables.
        moments: What its task asks of it, if recorded.
        ablation: What leaving out its parts did, if measured.
        checkpoints: All adapters of its run that were found, in order.
        history: The rows of ``metrics`` of those checkpoints that have moments, its own among them.
    """

    adapter: Adapter
    spectra: pd.DataFrame
    metrics: pd.DataFrame
    moments: Moments | None = None
    ablation: pd.DataFrame | None = None
    checkpoints: Sequence[Adapter] = ()
    history: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def whole(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Both tables, of the whole updates alone."""
        return whole_updates(self.spectra), whole_updates(self.metrics)

    def of_scale(self, scale: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Both tables, of one scale."""
        return self.spectra[self.spectra["scale"] == scale], self.metrics[self.metrics["scale"] == scale]

    @property
    def scales(self) -> list[str]:
        """The scales of MSPLoRA that it has, in the order of ``SCALES``."""
        present = set(self.metrics["scale"])
        return [scale for scale in SCALES if scale in present]

    @property
    def unit(self) -> str:
        """Of what its outputs move by."""
        return unit_of(self.moments)

    @property
    def path(self) -> str:
        """Its folder, for a command."""
        return as_word(self.adapter)

    @cached_property
    def lacks_head(self) -> bool:
        """Whether a classifier was saved without its head, so that its task cannot be measured."""
        if not is_classifier(self.adapter):
            return False
        with open_adapter(self.adapter, Options()) as file:
            return not any(map(is_head, file.shapes))

    @property
    def moments_command(self) -> str | None:
        """What would record its moments, if anything."""
        return None if self.lacks_head else f"msplora-measure moments {self.path}"


@dataclass(frozen=True)
class Answer:
    """An answer to one question.

    Args:
        question: As a user asks it.
        answer: In a sentence.
        evidence: The numbers behind it.
        sure: How sure it is, and why.
        command: What to run next: to do it, or to know it.
        value: What a program reads: a rank, a scale, a step.
    """

    question: str
    answer: str
    evidence: str = ""
    sure: str = ""
    command: str | None = None
    value: object = None


def whole_updates(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of whole updates: the totals of MSPLoRA, of other methods all."""
    totals = table[table["scale"] == TOTAL]
    return table if totals.empty else totals


def as_word(adapter: Adapter) -> str:
    """The folder of an adapter as a shell takes it, from the working directory where that is shorter."""
    folder = str(adapter.file.parent)
    if isinstance(adapter.file, Path):
        with suppress(ValueError, OSError):  # on another drive; a working directory that is gone
            folder = min(os.path.relpath(folder), folder, key=len)
    return shlex.quote(folder)
