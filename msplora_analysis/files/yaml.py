"""Settings of a YAML file that stand a line each: ``lora_r: 8``. Nested ones, lists and long texts are left out."""

from __future__ import annotations

import re
from contextlib import suppress

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, open_binary

_MOST_BYTES = 2**20
_LINE = re.compile(r"([A-Za-z_]\w*):[ \t]+([^\s#]\S*)[ \t]*")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}


def read_lines(place: Place) -> dict[str, str | int | float | bool | None]:
    """The settings of the outermost level that are one number, word or text without spaces."""
    with open_binary(place) as file:
        content = file.read(_MOST_BYTES + 1) or b""
    if len(content) > _MOST_BYTES:
        raise AnalysisError(f"{place}: it has more than {_MOST_BYTES} bytes; expected a file of settings")
    lines = content.decode(errors="replace").splitlines()
    return {found[1]: _value(found[2]) for line in lines if (found := _LINE.fullmatch(line))}


def _value(text: str) -> str | int | float | bool | None:
    if text in _WORDS:
        return _WORDS[text]
    if len(text) < 20:
        for kind in (int, float):
            with suppress(ValueError):
                return kind(text)
    return text
