"""Places that files are read from: local paths, and addresses of any fsspec file system.

An address has a scheme: ``hf://owner/name[@revision][/folder]`` is a repository of the Hugging Face
Hub; ``s3://``, ``gs://``, ``https://``, ``github://``, ``memory://`` and others are those of fsspec
(filesystem-spec.readthedocs.io).
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from msplora_analysis.errors import AnalysisError, enter
from msplora_analysis.files.remote import Remote, RemoteFile
from msplora_core.names import PARTIAL
from msplora_core.records import MOST_BYTES, RecordError, Schema, check
from msplora_core.records import parse as parse_json

StrPath = str | os.PathLike[str]
Place = Path | Remote

_KEPT_JSON = 2**15  # bytes
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: C:// is a drive


At = str | Remote
"""A place, where there may be ten thousand: a text is made in a tenth of the time of a Path."""


class Folder(NamedTuple):
    """A folder, and the names of its files and of its folders, symbolic links last.

    Attributes:
        at: Where it is.
        parts: The names that lead to it, from the root of its file system.
        identity: The same text for every way to name it.
    """

    at: At
    files: set[str]
    folders: list[str]
    parts: tuple[str, ...]
    identity: str

    @property
    def place(self) -> Place:
        return as_place(self.at)

    def inside(self, name: str) -> At:
        """Where what has this name in it is."""
        return f"{self.at}/{name}" if isinstance(self.at, str) else self.at / name

    def file(self, name: str) -> Place:
        """The place of a file in it."""
        return as_place(self.inside(name))


def as_place(at: At) -> Place:
    return Path(at) if isinstance(at, str) else at


def as_at(place: Place) -> At:
    if not isinstance(place, Path):
        return place
    return str(place) if place.name else f"{place}."  # so that /name, not //name, stands in the root


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


def is_file(place: Place) -> bool:
    """Whether a file is there."""
    return os.path.isfile(place) if isinstance(place, Path) else place.is_file()


def list_folder(folder: Place) -> Folder:
    """Raises AnalysisError if the folder cannot be listed."""
    if not isinstance(folder, Path):
        files, below = folder.names()
        return Folder(folder, files, sorted(below), folder.parts, identity(folder))
    files, folders = _scan(str(folder))
    return Folder(as_at(folder), files, [name for _, name in folders], parts(folder), identity(folder))


def walk(root: Place, visited: set[str], failed: list[AnalysisError] | None = None) -> Iterator[Folder]:
    """The folder ``root`` and all under it, in no order, but for those ``visited``, to which each is added.

    Errors of folders that cannot be listed are entered into ``failed``, instead of raising.
    """
    if not isinstance(root, Path):
        for place, (files, below) in sorted(root.tree().items(), key=lambda item: str(item[0])):
            if PARTIAL not in place.parts and str(place) not in visited:
                visited.add(str(place))
                yield Folder(place, files, sorted(below), place.parts, str(place))
        return
    pending = [(str(as_at(root)), parts(root), identity(root))]
    while pending:
        path, names, real = pending.pop()
        if real in visited:  # given twice, or a loop of symbolic links
            continue
        visited.add(real)
        try:
            files, folders = _scan(path)
        except AnalysisError as error:
            enter(error, failed)
            continue
        yield Folder(path, files, [name for _, name in folders], names, real)
        for is_link, name in reversed(folders):
            if name != PARTIAL:
                inside = f"{path}/{name}"
                # The real path of what is no link need not be asked for.
                pending.append((inside, (*names, name), os.path.realpath(inside) if is_link else f"{real}/{name}"))


def _scan(path: str) -> tuple[set[str], list[tuple[bool, str]]]:
    """File names, and folder names with whether each is a symbolic link; those come last."""
    files, folders = set(), []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    if entry.is_dir():
                        folders.append((entry.is_symlink(), entry.name))
                    elif entry.is_file():
                        files.add(entry.name)
                except OSError as error:
                    if error.errno != errno.ELOOP:  # a link that leads to itself
                        raise
    except OSError as error:
        raise AnalysisError(
            f"{path}: cannot be listed: {error.strerror}; make it readable, or give other paths"
        ) from None
    return files, sorted(folders)


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
