"""Find adapters: which run, which step, which epoch, which file.

A path may be a folder that training left, an adapter's folder or file, or a folder of such at any
depth, on disk or at an address such as ``hf://owner/name`` (see ``addresses``; ``layouts`` knows what
training programs write). Names decide: nothing is read here but the header of a file whose name does not tell what
it is, and trainer_state.json where no name tells the step.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from msplora_analysis.adapters.layouts import (
    NEED_CONFIG,
    PEFT_NAMES,
    WEIGHTS_SUFFIXES,
    Saved,
    Top,
    adapters_in,
    config_of,
    config_of_opendelta,
    config_of_verl,
    dangling,
    describe,
    folder_of,
    missing_config,
    number_of,
    without_copies,
)
from msplora_analysis.errors import AnalysisError, enter, printable
from msplora_analysis.files.addresses import (
    At,
    Folder,
    Place,
    StrPath,
    as_place,
    identity,
    list_folder,
    natural_key,
    parse,
    parts,
    read_json,
    walk,
)
from msplora_analysis.files.opening import FULL_NAMES
from msplora_analysis.files.several import METADATA
from msplora_analysis.files.yaml import read_lines
from msplora_analysis.formats import config_files
from msplora_core.names import CONFIG

__all__ = ["Adapter", "as_paths", "discover", "read_config"]


_FEW = 6  # names that a message shows


@dataclass(frozen=True)
class Adapter:
    """One saved adapter, or one full checkpoint. The small JSON files beside it are read when they are asked for.

    Attributes:
        run: Names its training.
        step: None where neither the names of the folder and the file nor a trainer_state.json tell it, as for the
            final adapter beside its checkpoints.
        at: Where its weights are.
        named_epoch: The epoch that the names tell.
        state: How many folders above it the trainer_state.json stands that tells its epoch; None: there is none.
    """

    run: str
    step: int | None
    at: At
    named_epoch: int | None = field(default=None, repr=False)
    state: int | None = field(default=None, repr=False)

    @cached_property
    def file(self) -> Place:
        """Its weights."""
        return as_place(self.at)

    @cached_property
    def epoch(self) -> int | float | None:
        """None where neither a trainer_state.json nor names tell it. Raises AnalysisError if that cannot be read."""
        told = None if self.state is None else number_of(self.file, self.state, "epoch")
        return self.named_epoch if told is None else told

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed adapter_config.json, empty where there is none. Raises AnalysisError if it cannot be read."""
        return read_config(self.file)

    def read(self) -> None:
        """Read the small files beside it now. Raises AnalysisError if one cannot be read."""
        _ = self.epoch, self.config  # kept from here on

    @property
    def dated(self) -> bool:
        """Whether a step or an epoch is known; the final adapter, saved once more at the end, has none."""
        return self.step is not None or self.epoch is not None


def discover(
    paths: StrPath | Iterable[StrPath], *, full: bool = False, failed: list[AnalysisError] | None = None
) -> list[Adapter]:
    """All adapters at and under ``paths``, sorted by run (natural order), then step, then epoch.

    A run found inside a given path is named by its path relative to it ("cola/lora"), any other
    by its folder's own name; names that collide get more leading folders until they differ.
    A folder reached twice counts once. An adapter without step and epoch comes last in its run.

    Args:
        paths: Local paths, or addresses of fsspec (``hf://owner/name``, ``s3://...``, ``https://...``).
        full: Take full checkpoints too (model.safetensors, or the index of its parts), in folders without an adapter.
        failed: Errors of adapters below the paths, and of the JSON files beside them, are entered here, and these left
            out, instead of raising.

    Raises:
        AnalysisError: A path holds no adapter, or one that is incomplete.
    """
    found: dict[tuple[str, str], tuple[Saved, Top]] = {}
    visited: set[str] = set()
    for path in as_paths(paths):
        root = parse(path)
        before = len(found), len(failed or ())
        top = parts(root)
        for folder, file in _files(root, visited, full, failed):
            # Copies of one adapter in another layout have a name of the same list.
            key = folder.identity, PEFT_NAMES[0] if file in PEFT_NAMES else file
            if key not in found:
                try:
                    found[key] = describe(folder, file), top
                except AnalysisError as error:
                    enter(error, failed)
        if before == (len(found), len(failed or ())):  # unless all of it was visited before
            inside = identity(root if root.is_dir() else root.parent).rstrip("/")
            if not any(f"{place}/".startswith(f"{inside}/") for place, _ in found):
                raise AnalysisError(f"{path}: no {_expected(full)}{_seen(root)}")

    items = _told_apart(without_copies(list(found.values())))
    names = _run_names({(item.run, top) for item, top in items})
    adapters = [Adapter(names[item.run], item.step, item.at, item.epoch, item.state) for item, _ in items]
    if failed is not None:
        adapters = [adapter for adapter in adapters if _legible(adapter, failed)]
    keys = {run: natural_key(run) for run in names.values()}
    return sorted(adapters, key=lambda adapter: (keys[adapter.run], *_order(adapter)))


def _files(
    root: Place, visited: set[str], full: bool, failed: list[AnalysisError] | None
) -> Iterator[tuple[Folder, str]]:
    """The files of adapters at and under a place: the folder and the name of each."""
    if _is_weights(root, full):
        yield folder_of(root), root.name
        return
    if not root.is_dir():
        raise _no_such(root, full)
    for folder in walk(root, visited, failed):
        try:
            files = adapters_in(folder, full=full)
        except AnalysisError as error:
            enter(error, failed)
            continue
        for name in files:
            yield folder, name


def _legible(adapter: Adapter, failed: list[AnalysisError]) -> bool:
    """Whether the files beside an adapter can be read; the error is entered if not."""
    try:
        adapter.read()
    except AnalysisError as error:
        failed.append(error)
        return False
    return True


def as_paths(source: Any) -> list[StrPath]:
    """A list of paths from one or several. Raises AnalysisError for anything else, such as a table."""
    paths = [source] if isinstance(source, (str, os.PathLike)) or not isinstance(source, Iterable) else list(source)
    if any(isinstance(path, str) and not path for path in paths):
        raise AnalysisError("an empty path is given; expected that of an adapter: is a variable of the shell not set?")
    wrong = [f"{type(path).__name__} is" for path in paths if not isinstance(path, (str, os.PathLike))]
    if type(source).__name__ == "DataFrame":
        wrong = ["a table is"]
    if wrong or not paths:
        given = wrong[0] if wrong else "no path is"
        raise AnalysisError(f"{given} given; expected a path, or a list of paths, of adapters")
    return paths


def _is_weights(place: Place, full: bool) -> bool:
    """Whether ``place`` is a file of weights. Raises AnalysisError if its configuration is missing."""
    named = place.suffix in WEIGHTS_SUFFIXES or place.name == METADATA or (full and place.name in FULL_NAMES)
    if not named or not place.is_file():
        return False
    if not full and place.name in NEED_CONFIG and not (place.parent / CONFIG).is_file():
        raise missing_config(place)
    return True


def _no_such(place: Place, full: bool) -> AnalysisError:
    if place.is_file():
        if place.suffix in (".h5", ".keras"):
            return AnalysisError(
                f"{place}: a file of Keras (HDF5), which is not read; load it with h5py, and save each lora_kernel_a "
                "and lora_kernel_b, transposed, as <module>.lora_A.weight and .lora_B.weight beside adapter_config.json"
            )
        also = " or the index of a model's parts" if full else ""
        return AnalysisError(f"{place}: not an adapter file; expected one of {', '.join(WEIGHTS_SUFFIXES)}{also}")
    if isinstance(place, Path) and place.is_symlink() and not place.exists():
        return AnalysisError(f"{place}: a link to {os.readlink(place)}, which is not there; download or copy it again")
    if isinstance(place, Path) and place.exists():
        return AnalysisError(f"{place}: neither a regular file nor a folder; copy its content to a file")
    return AnalysisError(f"{place}: no such file or folder")


def _expected(full: bool) -> str:
    names = f"{' or '.join(NEED_CONFIG)} beside {CONFIG}"
    more = f", and for files ({', '.join(WEIGHTS_SUFFIXES)}) with the keys of an adapter"
    if full:
        more += f", and for {' or '.join(FULL_NAMES)}"
    kind = "adapter or full checkpoint" if full else "adapter"
    return f"{kind} found; looked in it and all its folders for {names}{more}"


def _seen(root: Place) -> str:
    """What stands in a folder without adapters, so that its user sees what was not taken for one."""
    folder = list_folder(root)
    if lost := dangling(root):
        return f"; {lost[0]} in it is a link to a file that is not there: download it again"
    names = [*sorted(folder.files, key=natural_key), *(f"{name}/" for name in sorted(folder.folders, key=natural_key))]
    return f"; it has {', '.join(names[:_FEW])}{', ...' if len(names) > _FEW else ''}" if names else "; it is empty"


def read_config(file: Place) -> dict[str, Any]:
    """The adapter_config.json beside a file of weights, else what its format has in its place; empty without any."""
    if path := config_of(file):
        return read_json(path, {"peft_type?": str})
    if config := config_of_verl(file) or config_of_opendelta(file):
        return config
    beside = [file.parent / name for name in config_files(file.name)]
    return {
        place.name: read_json(place) if place.suffix == ".json" else read_lines(place)
        for place in beside
        if place.is_file()
    }


def _order(adapter: Adapter) -> tuple[bool, bool, int, float]:
    """Within a run, where steps and epochs of names do not occur twice."""
    if adapter.step is not None:
        return False, False, adapter.step, adapter.named_epoch or 0
    return adapter.epoch is None, True, 0, adapter.epoch or 0


def _told_apart(items: list[tuple[Saved, Top]]) -> list[tuple[Saved, Top]]:
    """Adapters of one run, step and epoch are not of one run: each becomes a run with its own name."""
    counts = Counter((item.run, item.step, item.epoch) for item, _ in items)
    if len(counts) == len(items):
        return items
    return [
        (item._replace(run=(*item.path, os.path.splitext(item.name)[0])), top)
        if counts[item.run, item.step, item.epoch] > 1
        else (item, top)
        for item, top in items
    ]


def _run_names(runs: Iterable[tuple[tuple[str, ...], Top]]) -> dict[tuple[str, ...], str]:
    """Shortest distinct name of each run: its last folders, at least those inside the given path."""
    depths: dict[tuple[str, ...], int] = {}
    for run, top in runs:
        inside = len(run) > len(top) and run[: len(top)] == top
        depths[run] = max(len(run) - len(top) if inside else 1, depths.get(run, 0))
    while True:
        names = {run: "/".join(run[-depth:]) for run, depth in depths.items()}
        counts = Counter(names.values())
        clashes = [run for run, name in names.items() if counts[name] > 1 and depths[run] < len(run)]
        if not clashes:
            # A file name need not be valid text, and may hold anything; a table's must not.
            return {run: printable(name.encode(errors="replace").decode()) for run, name in names.items()}
        for run in clashes:
            depths[run] += 1
