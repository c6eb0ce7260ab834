"""The moments of an adapter: the file beside it, or the one that was named."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import State, state_of
from msplora_analysis.options import NO_MOMENTS, Options
from msplora_core.errors import TrainingError
from msplora_core.moments import MOMENTS, Moments, read_moments


def moments_file(adapter: Adapter, options: Options) -> Path | None:
    """The file of an adapter's moments, if there is one.

    Beside remote adapters none is looked for: one may be named.
    """
    if options.moments == NO_MOMENTS:
        return None
    if options.moments is not None:
        return Path(options.moments)
    folder = adapter.file.parent
    return folder / MOMENTS if isinstance(folder, Path) and (folder / MOMENTS).is_file() else None


def have_moments(adapters: Iterable[Adapter], options: Options) -> bool:
    """Whether any of them has moments: tables have their columns then."""
    return any(moments_file(adapter, options) is not None for adapter in adapters)


def open_moments(path: Path, states: dict[Path, State], *, scores: Collection[str] = ()) -> Moments:
    """What a file of moments holds.

    Args:
        path: The file.
        states: Of the files that were opened for the work; that of this one is added.
        scores: Of which bases to read the scores too.

    Raises:
        AnalysisError: it is none, or cannot be read; the message names it.
    """
    try:
        states[path] = state_of(path)
        return read_moments(path, scores=scores)
    except TrainingError as error:
        raise AnalysisError(str(error)) from None
    except OSError as error:
        reason = f"{path}: the moments cannot be read: {error.strerror or error}; give moments=, or moments=none"
        raise AnalysisError(reason, "moments") from None
