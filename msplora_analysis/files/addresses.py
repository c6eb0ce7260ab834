"""Places that files are read from: local paths, and addresses of any fsspec file system.

An address has a scheme: ``hf://owner/name[@revision][/folder]`` is a repository of the Hugging Face
Hub; ``s3://``, ``gs://``, ``https://``, ``github://``, ``memory://`` and others are those of fsspec
(filesystem-spec.readthedocs.io).
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.remote import Remote, RemoteFile
from msplora_core.names import PARTIAL
from msplora_core.records import MOST_BYTES, RecordError, Schema, check
from msplora_core.records import parse as parse_json

StrPath = str | os.PathLike[str]
Place = Path | Remote

_KEPT_JSON = 2**15  # bytes
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: C:// is a drive


class Folder(NamedTuple):
    """A folder, the names of its files, and of its folders in natural order."""

    place: Place
    files: set[str]
    folders: list[str]


def parse(address: StrPath) -> Place:
    """The place that an address or a path names; nothing is looked up yet."""
    text = os.fspath(address)
    if _SCHEME.match(text):
        return Remote.parse(text)
    # abspath, not resolve(): runs are named by the folders that the user sees.
    return Path(os.path.abspath(text))


def natural_key(text: str) -> list[Any]:
    """Sort key under which "layer.10" follows "layer.9"."""
    # The split alternates text and digits, so equal positions always hold equal types. Digits
    # are taken in bounded pieces, because int() refuses very long ones.
    pieces = re.split(r"([0-9]{1,18})", text)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def identity(folder: Place) -> str:
    """The same text for every way to name one folder."""
    return os.path.realpath(folder) if isinstance(folder, Path) else str(folder)


def parts(place: Place) -> tuple[str, ...]:
    """The names that lead to a place, from the root of its file system."""
    return (place.parts[1:] or place.parts) if isinstance(place, Path) else place.parts


def same_folder(folder: Place) -> str:
    """The same text for every way to name one folder that is there, in far less time than ``identity``."""
    if not isinstance(folder, Path):
        return str(folder)
    try:
        status = os.stat(folder)
    except OSError as error:
        raise AnalysisError(f"{folder}: cannot be listed: {error.strerror}") from None
    return f"{status.st_dev}:{status.st_ino}"


def is_file(place: Place) -> bool:
    """Whether a file is there."""
    return os.path.isfile(place) if isinstance(place, Path) else place.is_file()


def list_folder(folder: Place) -> Folder:
    """Raises AnalysisError if the folder cannot be listed."""
    if not isinstance(folder, Path):
        files, folders = folder.names()
        return Folder(folder, files, sorted(folders, key=natural_key))
    try:
        with os.scandir(folder) as entries:
            return Folder(folder, *_split(entries))
    except OSError as error:
        raise AnalysisError(f"{folder}: cannot be listed: {error.strerror}") from None


def walk(root: Place, visited: set[str]) -> Iterator[Folder]:
    """The folder ``root`` and all under it, but for those ``visited``, to which each is added."""
    if isinstance(root, Path):
        pending = [root]
        while pending:
            folder = pending.pop()
            if _first_time(folder, visited):  # not given twice, nor a loop of symbolic links
                found = list_folder(folder)
                yield found
                pending += [folder / name for name in reversed(found.folders) if name != PARTIAL]
    else:
        for place, (files, folders) in sorted(root.tree().items(), key=lambda item: natural_key(str(item[0]))):
            if PARTIAL not in parts(place) and _first_time(place, visited):
                yield Folder(place, files, sorted(folders, key=natural_key))


def _first_time(folder: Place, visited: set[str]) -> bool:
    name = same_folder(folder)
    known = name in visited
    visited.add(name)
    return not known


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


def open_binary(place: Place) -> io.RawIOBase:
    """A file open to read at any position. Raises AnalysisError if it cannot be."""
    if not isinstance(place, Path):
        return RemoteFile(place)
    try:
        mode = os.stat(place).st_mode
        # A pipe would wait for its writer for ever, and a device may never end.
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise AnalysisError(f"{place}: cannot be opened: it is not a regular file; copy its content to one")
        return open(place, "rb", buffering=0)
    except OSError as error:
        raise AnalysisError(f"{place}: cannot be opened: {error.strerror}") from None


def read_json(place: Place, schema: Schema = None) -> dict[str, Any]:
    """A JSON object that fits a schema of ``msplora_core.records``. Raises AnalysisError if the file holds another."""
    with open_binary(place) as file:
        try:
            size = file.seek(0, os.SEEK_END)
            if size > MOST_BYTES:
                raise AnalysisError(f"{place}: it has {size} bytes; expected at most {MOST_BYTES}")
            file.seek(0)
            content = file.readall()
        except OSError as error:
            raise AnalysisError(f"{place}: cannot be read: {error.strerror}") from None
    try:
        value = (_parse if size < _KEPT_JSON else parse_json)(content)
        if not isinstance(value, dict):
            raise AnalysisError(f"{place}: expected a JSON object, got {type(value).__name__}")
        check(value, schema or {})
    except RecordError as error:
        raise AnalysisError(f"{place}: {error}; save or copy it again") from None
    return value


@lru_cache(maxsize=16)
def _parse(content: bytes) -> Any:
    """A run's checkpoints have one configuration: kept once, it does not fill the memory. Not to be changed."""
    return parse_json(content)
