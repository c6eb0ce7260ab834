"""The measures of a spectrum: each is one function, with all that is said of it beside it.

A file of this folder with a function under ``@Measure(...)`` is all that a new one takes: tables, reports, live values
and the check of docs/metrics.md find it here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache, partial
from typing import Any, Literal, ParamSpec

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.compute import measures as _folder

Array = NDArray[np.float64]
P = ParamSpec("P")
Place = Literal["metrics", "report", "matrices", "watch", "live"]
"""Where: the metrics table, the report's curves and its table of matrices, ``watch``, live values."""


@dataclass(frozen=True)
class Measure:
    """A measure of a spectrum, or a family of them, such as M_eff-k: the decorator of the function that computes it.

    Args:
        name: Its column; of a family with the parameter in braces: ``m_eff_{k}``.
        label: What a text calls it.
        formula: In LaTeX; docs/metrics.md has it too.
        source: Where it comes from; docs/metrics.md has it too.
        high: What a high value says: "broad", "concentrated", "large".
        shown: Where, and of a family for which values of its parameter.
        symbol: The label as short as it gets; empty: the label.
        axis: The label in figures, as matplotlib sets it; empty: the label.
        unit: Empty for a plain number.
        parameter: Of a family: the name of its whole number.
        cut: The measure (n,) where only the largest singular values (n, r) and the Frobenius norm (n,) of a matrix are
            known; None if it needs all.
        function: What is decorated: of singular values (..., r), descending, padded with zeros (and of the parameter);
            returns (...).

    Raises:
        ValueError: Another function has the name.
    """

    name: str
    _: KW_ONLY
    label: str
    formula: str
    source: str
    high: str
    shown: tuple[Place, ...] | Mapping[Place, Sequence[int]] = ("metrics",)
    symbol: str = ""
    axis: str = ""
    unit: str = ""
    parameter: str = ""
    cut: Callable[[Array, Array], Array] | None = None
    function: Callable[..., Array] = np.asarray

    def __call__(self, function: Callable[P, Array]) -> Callable[P, Array]:
        if self.name in _known and _known[self.name].function.__module__ != function.__module__:
            raise ValueError(f"{function.__module__}: there is a measure {self.name} already; choose another name")
        symbol, axis = self.symbol or self.label, self.axis or self.label
        _known[self.name] = replace(self, function=function, symbol=symbol, axis=axis)
        return function

    def of(self, value: int) -> Measure:
        """The one of a family whose parameter is ``value``."""
        texts = (self.name, self.label, self.symbol, self.axis)
        name, label, symbol, axis = (text.replace(f"{{{self.parameter}}}", str(value)) for text in texts)
        function = partial(self.function, **{self.parameter: value})
        return replace(self, name=name, label=label, symbol=symbol, axis=axis, parameter="", function=function)


_known: dict[str, Measure] = {}


@cache
def families() -> tuple[Measure, ...]:
    """All measures, those with a parameter once: of ``metrics`` first, then file by file."""
    for module in pkgutil.iter_modules(_folder.__path__):
        importlib.import_module(f"{_folder.__name__}.{module.name}")
    files = {name: found.function.__module__ for name, found in _known.items()}
    return tuple(sorted(_known.values(), key=lambda of: (not files[of.name].endswith(".metrics"), files[of.name])))


def measures(place: Place, ks: Iterable[int] | None = None) -> list[Measure]:
    """The measures that are shown at a place, in the order of their columns.

    Args:
        place: Where.
        ks: For which k there is M_eff-k; None: those that the place always has.
    """
    found = []
    for family in families():
        if place in family.shown:
            if isinstance(family.shown, Mapping):
                chosen = ks if ks is not None and family.parameter == "k" else family.shown[place]
                found += [family.of(value) for value in chosen]
            else:
                found.append(family)
    return found


def columns(
    chosen: Iterable[Measure], sigma: Sequence[NDArray[np.floating[Any]]], norms: Sequence[float | None]
) -> dict[str, Array]:
    """Measures of n matrices.

    Args:
        chosen: Which; of no family.
        sigma: The singular values of each matrix, descending.
        norms: The Frobenius norm of each whose largest singular values alone are known; None for the others.

    Returns:
        Name -> (n,), NaN where a measure needs values that are not known.
    """
    padded = np.zeros((len(sigma), max(map(len, sigma), default=1)))
    for values, row in zip(sigma, padded, strict=True):
        row[: len(values)] = values
    cut = np.array([i for i, norm in enumerate(norms) if norm is not None], dtype=int)
    known = np.array([norm for norm in norms if norm is not None], dtype=np.float64)
    found = {}
    for one in chosen:
        column = found[one.name] = np.array(one.function(padded), dtype=np.float64)
        if len(cut):  # what the missing values would change is not known
            column[cut] = np.nan if one.cut is None else one.cut(padded[cut], known)
    return found
