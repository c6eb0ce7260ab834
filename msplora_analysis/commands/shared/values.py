"""Values of the command line without pydantic: typer asks it for every one, which half of a short command goes into.

What pydantic would give back as it is, or nearly, is made here: absent values, texts, paths, choices, whole numbers.
All else, and whatever is wrong, is left to typer, with its messages. A typer without pydantic is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

from typer.core import TyperCommand

_UNKNOWN = object()


class PlainCommand(TyperCommand):
    """A command whose plain values need no pydantic."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        without_pydantic(self.get_params(ctx))
        return super().parse_args(ctx, args)


def without_pydantic(parameters: list[Any]) -> None:
    """Have typer's parameters ask pydantic for a value only where it is needed."""
    for parameter in parameters:
        if hasattr(parameter, "get_runtime_param") and "get_runtime_param" not in vars(parameter):
            parameter.get_runtime_param = _Values(parameter, parameter.get_runtime_param)


class _Values:
    """In the place of what converts the values of a parameter; ``made`` makes typer's own."""

    def __init__(self, parameter: Any, made: Callable[[], Any]) -> None:
        self._parameter, self._made = parameter, made

    def __call__(self) -> _Values:
        return self

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        about = self._parameter.type_descriptor
        least = getattr(about.parameter_info, "min", None)
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        found = _plain(value, about.annotation, least)
        return self._made().coerce(value, param=param, ctx=ctx) if found is _UNKNOWN else found


def _plain(value: Any, kind: Any, least: float | None) -> Any:
    """The value as its annotation has it, where nothing can be wrong with it."""
    if get_origin(kind) is list and isinstance(value, (list, tuple)):
        found = [_plain(one, get_args(kind)[0], least) for one in value]
        return _UNKNOWN if _UNKNOWN in found else found
    if not isinstance(kind, type):
        return _UNKNOWN
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        if kind is Path:
            return Path(value)
        if issubclass(kind, Enum):
            return next((one for one in kind if one.value == value), _UNKNOWN)
        if kind is int and value.isascii() and value.isdecimal() and len(value) < 10 and int(value) >= (least or 0):
            return int(value)
    return _UNKNOWN
