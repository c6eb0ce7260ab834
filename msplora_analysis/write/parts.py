"""Many safetensors files as one, by copying bytes: the memory that takes does not grow with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def join(parts: Iterable[Path], path: Path) -> None:
    """Write safetensors files, of different tensors, as one."""
    whole: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    sources = []
    for part in parts:
        of_part, begin = header(part)
        last = end
        for name, entry in of_part.items():
            if name == "__metadata__":
                continue
            offsets = [end + at for at in entry["data_offsets"]]
            whole[name] = {**entry, "data_offsets": offsets}
            last = max(last, offsets[1])
        sources.append((part, begin))
        end = last
    text = json.dumps(whole).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8 bytes
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part, begin in sources:
            with open(part, "rb") as file:
                file.seek(begin)
                shutil.copyfileobj(file, out, 2**22)


def header(part: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file of ours, and where its data begin."""
    with open(part, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size
