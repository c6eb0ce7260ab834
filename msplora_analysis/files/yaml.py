"""Settings of a YAML file that stand a line each: ``lora_r: 8``, and those one level below a name, by two spaces.

Deeper ones, lists and long texts are left out.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, open_binary

_MOST_BYTES = 2**20
_LINE = re.compile(r"(?P<inside>  )?(?P<key>[A-Za-z_]\w*):(?:[ \t]+(?P<value>[^\s#]\S*))?[ \t]*")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}


def read_lines(place: Place) -> dict[str, Any]:
    """The settings that are one number, word or text without spaces; those below a name as a dictionary under it."""
    with open_binary(place) as file:
        content = file.read(_MOST_BYTES + 1) or b""
    if len(content) > _MOST_BYTES:
        raise AnalysisError(f"{place}: it has more than {_MOST_BYTES} bytes; expected a file of settings")
    settings: dict[str, Any] = {}
    group: dict[str, Any] = {}
    for line in content.decode(errors="replace").splitlines():
        if not (found := _LINE.fullmatch(line)):
            continue
        key, value = found["key"], found["value"]
        if found["inside"]:
            if value:
                group[key] = _value(value)
        elif value:
            settings[key] = _value(value)
        else:
            group = settings[key] = {}
    return settings


def _value(text: str) -> str | int | float | bool | None:
    if text in _WORDS:
        return _WORDS[text]
    if len(text) < 20:
        for kind in (int, float):
            with suppress(ValueError):
                return kind(text)
    return text
