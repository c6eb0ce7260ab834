"""Files of another machine, through fsspec: only the parts that are read are fetched.

Whatever goes wrong (each file system has its own exceptions) is an AnalysisError of one line.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from msplora_analysis.errors import AnalysisError

_BLOCK = 4 * 2**20  # bytes fetched at a time: fewer requests for small tensors, little waste beside large ones
_MOST_AT_ONCE = 8 * _BLOCK  # bytes of one request
_MOST_STREAMED = 4 * 2**30  # bytes of a file that can only be fetched whole


@dataclass(frozen=True)
class Remote:
    """A file or folder of an fsspec file system, with as much of pathlib as is needed."""

    address: str  # as a user writes it
    path: str = field(compare=False, repr=False)  # as the file system names it
    fs: Any = field(compare=False, repr=False)

    @classmethod
    def parse(cls, address: str) -> Remote:
        with one_line(address):
            fs, path = _file_system(address)
        return cls(address.rstrip("/"), path, fs)

    def __str__(self) -> str:
        return self.address

    def __fspath__(self) -> str:
        """The address, for it is given where paths are; who takes it for a local path finds no file."""
        return self.address

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.address.rstrip('/')}/{name}", f"{self.path.rstrip('/')}/{name}", self.fs)

    @property
    def parent(self) -> Remote:
        address, path = (_without_query(text).rstrip("/").rpartition("/")[0] for text in (self.address, self.path))
        return Remote(address, path, self.fs)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in _without_query(self.path).split("/") if part)

    @property
    def name(self) -> str:
        return self.parts[-1] if self.parts else ""

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def is_file(self) -> bool:
        with one_line(self):
            return bool(self.fs.isfile(self.path))

    def is_dir(self) -> bool:
        """Whether it can be searched. The web has no folders: a page, with its links, counts as one."""
        with one_line(self):
            info = self.fs.info(self.path)
        if "mimetype" in info:
            return str(info["mimetype"]).startswith("text/html")
        return bool(info["type"] == "directory")

    def names(self) -> tuple[set[str], set[str]]:
        """Names of the files and of the folders in this folder."""
        files: set[str] = set()
        folders: set[str] = set()
        with one_line(self):
            for entry in self.fs.ls(self.path, detail=True):
                name = entry["name"].rstrip("/").rpartition("/")[2]
                (folders if entry["type"] == "directory" else files).add(name)
        return files, folders

    def tree(self) -> dict[Remote, tuple[set[str], set[str]]]:
        """``names`` of this folder and of all under it."""
        with one_line(self):
            base = self.fs.info(self.path)["name"].rstrip("/") + "/"
            found = [path.removeprefix(base).split("/") for path in self.fs.find(self.path)]
        tree: dict[Remote, tuple[set[str], set[str]]] = {}
        for *folders, name in found:
            place = self
            files, inside = tree.setdefault(place, (set(), set()))
            for folder in folders:
                inside.add(folder)
                place = place / folder
                files, inside = tree.setdefault(place, (set(), set()))
            files.add(name)
        return tree


class RemoteFile(io.RawIOBase):
    """A remote file open to read: fsspec fetches blocks when they are first read, and keeps them in a file."""

    def __init__(self, place: Remote) -> None:
        self._place = place
        with one_line(place):
            self._file = place.fs.open(place.path, "rb", block_size=_BLOCK, cache_type="mmap")
            if not isinstance(getattr(self._file, "size", None), int):
                self._fetch_whole()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[:_MOST_AT_ONCE]
        with one_line(self._place):
            try:
                data = self._file.read(len(view))
            except ValueError:  # a web server that cannot give parts
                position = self._file.tell()
                self._fetch_whole()
                self._file.seek(position)
                data = self._file.read(len(view))
            except IndexError:  # of the cache, which has room for all
                raise AnalysisError(f"{self._place}: fewer bytes came than it has; try again") from None
        view[: len(data)] = data
        return len(data)

    def _fetch_whole(self) -> None:
        copy = tempfile.TemporaryFile(prefix="msplora-")  # noqa: SIM115 (closed in close)
        fs = _file_system(self._place.address, whole=True)[0] if _is_web(self._place.address) else self._place.fs
        start = time.monotonic()
        with fs.open(self._place.path, "rb", block_size=0) as stream:
            while data := stream.read(_BLOCK):
                copy.write(data)
                LIMITS.hold(copy.tell(), start)
                if copy.tell() > _MOST_STREAMED:
                    raise AnalysisError(
                        f"{self._place}: the server gives no parts of this large file; download it first"
                    )
        copy.seek(0)
        self._file.close()
        self._file = copy

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _without_query(text: str) -> str:
    return text.partition("?")[0] if _is_web(text) else text


def _is_web(address: str) -> bool:
    return address.startswith(("http://", "https://"))


class _Limits:
    """What a server may cost: seconds of silence, seconds for its bytes, and requests for one question of ours.

    fsspec and the Hub's client have longer limits or none: a server that is silent, sends a byte now and then, or whose
    pages lead in a circle, would be waited for for ever. The Hub's client also takes its token along to whatever host a
    page leads to.
    """

    SILENCE = 30.0  # seconds
    SLOWEST = 50_000.0  # bytes a second
    REQUESTS = 2000  # each lists a page of a thousand names, or a folder

    def __init__(self) -> None:
        self._requests: int | None = None  # None: others are asking, to whom this does not apply

    @contextmanager
    def one_question(self) -> Iterator[None]:
        before, self._requests = self._requests, 0
        try:
            self._watch_hub()
            yield
        finally:
            self._requests = before

    def seconds(self, size: int) -> float:
        """How long so many bytes may take."""
        return self.SILENCE + size / self.SLOWEST

    def hold(self, size: int, start: float) -> None:
        """Raises OSError if ``size`` bytes since ``start`` are too few."""
        if time.monotonic() - start > self.seconds(size):
            raise OSError(f"too slow: {size} bytes in {time.monotonic() - start:.0f} s")

    def count(self) -> None:
        if self._requests is not None:
            self._requests += 1
            if self._requests > self.REQUESTS:
                raise OSError(f"no end after {self.REQUESTS} requests: its pages lead in a circle")

    def _watch_hub(self) -> None:
        """Look at every request of the Hub's client, redirects too."""
        hub = sys.modules.get("huggingface_hub")
        if hub is None:
            return
        hooks = getattr(hub.get_session(), "event_hooks", {})  # a version before 1.0 has limits of its own
        if "request" in hooks and self._hub_request not in hooks["request"]:
            hooks["request"].append(self._hub_request)
            hooks["response"].append(self._hub_response)

    def _hub_request(self, request: Any) -> None:
        if self._requests is None:
            return
        from huggingface_hub import constants

        self.count()
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), self.SILENCE)
        if request.url.host != urlsplit(constants.ENDPOINT).hostname:
            request.headers.pop("authorization", None)

    def _hub_response(self, response: Any) -> None:
        if self._requests is None:
            return
        limits, stream = self, response.stream

        # The client takes streams of its own kind alone, and versions of it differ in whose kind that is.
        class Held(next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")):  # type: ignore[misc]
            def __iter__(self) -> Iterator[bytes]:
                start, size = time.monotonic(), 0
                for data in stream:
                    size += len(data)
                    limits.hold(size, start)
                    yield data

            def close(self) -> None:
                stream.close()

        response.stream = Held()

    async def web_request(self, *_: Any) -> None:
        self.count()


LIMITS = _Limits()


def _file_system(address: str, *, whole: bool = False) -> tuple[Any, str]:
    """A file system and what it calls the address; for the web with its limits, ``whole`` files at their own pace."""
    from fsspec.core import url_to_fs

    if not _is_web(address):
        return url_to_fs(address)
    from aiohttp import ClientTimeout, TraceConfig

    trace = TraceConfig()
    trace.on_request_start.append(LIMITS.web_request)
    silence, total = LIMITS.SILENCE, None if whole else LIMITS.seconds(_MOST_AT_ONCE)
    timeout = ClientTimeout(total, connect=silence, sock_connect=silence, sock_read=silence)
    return url_to_fs(address, client_kwargs={"timeout": timeout, "trace_configs": [trace]})


@contextmanager
def one_line(place: Remote | str) -> Iterator[None]:
    """Turns any exception of a file system into an AnalysisError."""
    try:
        with LIMITS.one_question():
            yield
    except AnalysisError:
        raise
    except ImportError as error:
        raise AnalysisError(f"{place}: a package that reads such addresses is missing: {_reason(error)}") from None
    except Exception as error:
        if type(error) is ValueError and "rotocol" in str(error):
            raise AnalysisError(f"{place}: {_reason(error)}; expected hf://, s3://, https:// or such") from None
        what = "not found" if isinstance(error, FileNotFoundError) else "cannot be read"
        cause = error.__cause__ or error
        reason = "" if isinstance(cause, FileNotFoundError) else f" ({_reason(cause)})"
        raise AnalysisError(
            f"{place}: {what}{reason}; check the address, the network, and your login if it is private"
        ) from None


def _reason(error: BaseException) -> str:
    bare = "too slow" if isinstance(error, TimeoutError) else type(error).__name__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), bare)
