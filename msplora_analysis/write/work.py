"""A long job in parts: each is kept as it is finished, so that a job that ends early goes on where it was.

The parts are safetensors files in a folder beside the output. At the end they are joined into one file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from msplora_analysis.errors import AnalysisError
from msplora_analysis.write.parts import header, join
from msplora_analysis.write.write import Array, save_tensors
from msplora_core.atomic import replacing, replacing_folder

_ABOUT, _FACTS = "msplora_job.json", "msplora_part"


class Work:
    """The folder of a job's finished parts; a context manager, within which nobody else works there.

    Args:
        folder: Where; it is made.
        about: What the job is, as JSON has it. Parts of another job are removed.

    Attributes:
        found: Facts of the parts that an earlier call finished, by their names.

    Raises:
        AnalysisError: something else stands there, or another process works there.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        told = json.dumps(about, sort_keys=True, indent=2) + "\n"
        mark = folder / _ABOUT
        if folder.exists() and not mark.is_file():
            raise AnalysisError(f"{folder}: it is to hold what is finished, and holds something else; move it away")
        self._locks = ExitStack()
        if mark.is_file():
            self._lock(mark)
        if mark.is_file() and mark.read_text(encoding="utf-8") != told:
            self.remove()
        if not mark.is_file():
            with replacing_folder(folder) as beside:  # never without its mark
                (beside / _ABOUT).write_text(told, encoding="utf-8")
            self._lock(mark)
        self.found = dict(map(_facts, sorted(folder.glob("*.safetensors"))))
        self._count = len(self.found)

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        self._locks.close()

    def _lock(self, mark: Path) -> None:
        """Until the end of the block this process alone works here: two at once would mix their parts."""
        if os.name != "posix":
            return
        import fcntl

        self._locks.close()  # of a mark that is no longer there
        file = self._locks.enter_context(mark.open("rb"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._locks.close()
            raise AnalysisError(
                f"{mark.parent}: another call is at work there; wait for its end, or write elsewhere"
            ) from None
        except OSError:  # a file system without locks
            pass

    def put(self, tensors: Mapping[str, Array], kinds: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Keep a part: its tensors, the types to write them in, and what is to be known of it, with its ``name``."""
        self._count += 1
        with replacing(self.folder / f"{self._count:06d}.safetensors", durable=True) as beside:
            save_tensors(dict(tensors), kinds, beside, {_FACTS: json.dumps(facts)})

    def join(self, path: Path) -> None:
        """All parts as one safetensors file."""
        join(sorted(self.folder.glob("*.safetensors")), path)

    def remove(self) -> None:
        """Remove the folder, its mark last."""
        for part in self.folder.glob("*.safetensors"):
            part.unlink()
        shutil.rmtree(self.folder)


def _facts(part: Path) -> tuple[str, dict[str, Any]]:
    facts = json.loads(header(part)[0]["__metadata__"][_FACTS])
    return facts["name"], facts


def beside(out: str | os.PathLike[str]) -> Path:
    """The folder of a job whose output is ``out``."""
    path = Path(os.path.abspath(out))
    return path.with_name(f"{path.name}.unfinished")
