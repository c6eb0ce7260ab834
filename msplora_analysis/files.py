"""Find adapters on disk: which run, which step, which epoch, which file.

A path may be a Trainer output folder (``checkpoint-<step>/adapter_model.safetensors``), one
adapter folder, one adapter file, or a folder of such at any depth. Nothing is read here but the
small JSON files beside the weights; all that is written goes through ``replacing``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msplora_analysis.errors import AnalysisError

CONFIG_NAME = "adapter_config.json"
STATE_NAME = "trainer_state.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")  # in order of preference
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt")

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Adapter:
    """One saved adapter.

    ``run`` names its training; ``step`` and ``epoch`` are None for an adapter outside a
    ``checkpoint-<step>`` folder (the final one, say), and ``epoch`` also where the checkpoint
    has no trainer_state.json. ``config`` is the parsed adapter_config.json.
    """

    run: str
    step: int | None
    epoch: int | float | None
    file: Path
    config: dict[str, Any] = field(repr=False)


def discover(paths: StrPath | Iterable[StrPath]) -> list[Adapter]:
    """All adapters at and under ``paths``, sorted by run (natural order), then step.

    A run found inside a given path is named by its path relative to it ("cola/lora"), any other
    by its folder's own name; names that collide get more leading folders until they differ.
    A folder reached twice counts once. An adapter without a step comes last in its run.

    Raises AnalysisError if a path holds no adapter, or holds one that is incomplete.
    """
    found: dict[tuple[str, str], _Found] = {}
    visited: set[str] = set()
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        # abspath, not resolve(): runs are named by the folders that the user sees.
        root = Path(os.path.abspath(path))
        for file in _adapter_files(root, visited):
            identity = (os.path.realpath(file.parent), file.stem)
            found.setdefault(identity, _Found.at(file, root))
        real_root = Path(os.path.realpath(root))
        if root.is_dir() and not any(Path(folder).is_relative_to(real_root) for folder, _ in found):
            raise AnalysisError(
                f"{path}: no adapter found; looked in it and all its folders for "
                f"{' or '.join(WEIGHTS_NAMES)} beside {CONFIG_NAME}"
            )

    names = _run_names(found.values())
    adapters = [
        Adapter(
            run=names[item.run],
            step=item.step,
            epoch=_read_epoch(item.state) if item.step is not None else None,
            file=item.file,
            config=_read_json(item.file.parent / CONFIG_NAME),
        )
        for item in found.values()
    ]
    return sorted(adapters, key=lambda a: (natural_key(a.run), a.step is None, a.step or 0))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; at the end it takes its place, so nobody sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def natural_key(text: str) -> list[Any]:
    """Sort key under which "layer.10" follows "layer.9"."""
    # The split alternates text and digits, so equal positions always hold equal types. Digits
    # are taken in bounded pieces, because int() refuses very long ones.
    parts = re.split(r"([0-9]{1,18})", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


@dataclass(frozen=True)
class _Found:
    """An adapter file, before its run has a name."""

    file: Path
    run: tuple[str, ...]  # the folders that lead to the run, from the root of the file system
    depth: int  # how many of them, from the end, name it to begin with
    step: int | None
    state: Path

    @classmethod
    def at(cls, file: Path, root: Path) -> _Found:
        """``root`` is the given path: the run is named relative to it where it lies inside."""
        # The checkpoint is the file's folder, or the one above it: PEFT saves an adapter that is
        # not called "default" in a folder of its own.
        folder = run = file.parent
        step = None
        for checkpoint in (folder, folder.parent):
            if match := _CHECKPOINT.fullmatch(checkpoint.name):
                step = int(match[1])
                run = checkpoint.parent / folder.relative_to(checkpoint)
                break
        state = (checkpoint if step is not None else folder) / STATE_NAME
        if file.name not in WEIGHTS_NAMES:  # several such files may share a folder
            run = run / file.stem
        inside = run != root and run.is_relative_to(root)
        depth = len(run.relative_to(root).parts) if inside else 1
        return cls(file, run.parts[1:] or run.parts, depth, step, state)


def _adapter_files(root: Path, visited: set[str]) -> Iterator[Path]:
    """The adapter file that ``root`` is, or those at and under the folder ``root``."""
    if root.is_file():
        if root.suffix not in WEIGHTS_SUFFIXES:
            raise AnalysisError(f"{root}: not an adapter file; expected one of {', '.join(WEIGHTS_SUFFIXES)}")
        if not (root.parent / CONFIG_NAME).is_file():
            raise AnalysisError(f"{root}: no {CONFIG_NAME} beside it; copy it there")
        yield root
        return
    if not root.is_dir():
        raise AnalysisError(f"{root}: no such file or folder")

    pending = [root]
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in visited:  # given twice, or a loop of symbolic links
            continue
        visited.add(real)
        try:
            with os.scandir(folder) as entries:
                files, folders = _split(entries)
        except OSError as error:
            raise AnalysisError(f"{folder}: cannot be listed: {error.strerror}") from None
        weights = next((name for name in WEIGHTS_NAMES if name in files), None)
        if weights and CONFIG_NAME not in files:
            raise AnalysisError(f"{folder / weights}: no {CONFIG_NAME} beside it; copy it there")
        if CONFIG_NAME in files and not weights:
            raise AnalysisError(
                f"{folder / CONFIG_NAME}: no weights beside it; expected "
                f"{' or '.join(WEIGHTS_NAMES)}; remove the folder if its saving was cut off"
            )
        if weights:
            yield folder / weights
        pending += [folder / name for name in reversed(folders)]


def _split(entries: Iterable[os.DirEntry[str]]) -> tuple[set[str], list[str]]:
    """File names, and folder names in natural order with symbolic links last."""
    files, folders = set(), []
    for entry in entries:
        try:
            if entry.is_dir():
                folders.append((entry.is_symlink(), natural_key(entry.name), entry.name))
            elif entry.is_file():
                files.add(entry.name)
        except OSError:  # a link that leads to itself
            continue
    return files, [name for *_, name in sorted(folders)]


def _run_names(found: Iterable[_Found]) -> dict[tuple[str, ...], str]:
    """Shortest distinct name of each run: its last folders, at least ``depth`` of them."""
    depths: dict[tuple[str, ...], int] = {}
    for item in found:
        depths[item.run] = max(item.depth, depths.get(item.run, 0))
    while True:
        names = {run: "/".join(run[-depth:]) for run, depth in depths.items()}
        taken = list(names.values())
        clashes = [run for run, name in names.items() if taken.count(name) > 1]
        if not clashes:
            # A file name need not be valid text; a table's must be.
            return {run: name.encode(errors="replace").decode() for run, name in names.items()}
        for run in clashes:
            depths[run] = min(depths[run] + 1, len(run))


def _read_epoch(state: Path) -> int | float | None:
    """``epoch`` of a trainer_state.json; None if there is no such file or value."""
    if not state.is_file():
        return None
    epoch = _read_json(state).get("epoch")
    if epoch is None:
        return None
    if isinstance(epoch, bool) or not isinstance(epoch, (int, float)) or not math.isfinite(epoch):
        raise AnalysisError(f"{state}: epoch must be a number, got {epoch!r}")
    return int(epoch) if epoch == int(epoch) else epoch


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise AnalysisError(f"{path}: not valid JSON: {error}; save the adapter again") from None
    if not isinstance(value, dict):
        raise AnalysisError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
