"""JSON that anybody may have written: parsed within bounds, and held against a schema before anything uses it.

A schema is written as the value itself would be: ``str``, ``bool``, ``int``, ``float`` (any number, NaN too) and None
stand for such values, ``object`` for any value, a tuple for one of several, ``[schema]`` for a list, and
``{"key": schema, "other?": schema}`` for an object, which may have more keys; ``...`` as a key stands for all of them.

Both packages read with it. Nothing heavy is imported: other validators take longer to import than ours to work.
"""

import json
import re
from pathlib import Path
from typing import Any

MOST_BYTES = 32 * 2**20  # of a file; parsed, the worst takes twenty times as much
MOST_DEPTH = 50  # lists and objects in each other; configurations have 4
MOST_LETTERS = 1024  # of a text that a schema asks for
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # whole or cut off, so that each letter is seen once
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_MOST_DIGITS = 300  # float64 has no larger numbers
_SHOWN = 60  # letters of a value in a message

Schema = Any

SETTINGS: Schema = {
    "task?": str,
    "method?": str,
    "model?": str,
    "seed?": int,
    "rank?": (int, None),
    "ranks?": ({...: int}, None),
    "anneal?": ([int], None),
    "epochs?": float,
}
"""What a run was trained with, as far as anybody else reads it."""
RESULT: Schema = {
    "epoch": int,
    "step": int,
    "train_loss?": (float, None),
    "validation_loss?": (float, None),
    "metric": (float, None),
}
RUN_RECORD: Schema = {
    "settings": SETTINGS,
    "results?": ([RESULT], None),
    "cuts?": ([{"step": int, ...: object}], None),
    "data?": {...: {"sha256": str}},
    "model?": {"weights_sha256?": {...: str}},
    "versions?": {...: (str, None)},
}
"""``run.json``, as far as a training continues from it."""
SCORED_RUN: Schema = RUN_RECORD | {
    "settings": SETTINGS | {"task": str, "method": str, "seed": int},
    "model": {"name": str},
    "parameters": {"adapter": int},
    "metric?": ({"name": str, "greater_is_better": bool}, None),
}
"""The same, as far as scores are read from it."""
TRAINER_STATE: Schema = {
    "epoch?": (float, None),
    "global_step?": (int, None),
    "num_train_epochs?": (float, None),
    "log_history?": ([{...: object}], None),
}
"""``trainer_state.json``, as Hugging Face Trainer writes it."""
RESUMED_STATE: Schema = {
    "epoch": float,
    "global_step": int,
    "max_steps": int,
    "num_train_epochs": float,
    "log_history": [{"epoch": float, "step": int, "loss?": float, "eval_loss?": float, ...: object}],
    "stateful_callbacks": {...: object},
    "train_batch_size": (int, None),
    "best_model_checkpoint": (str, None),
}
"""The same, as far as a training continues from it."""
RUNNING_LOSS: Schema = {"sum": float, "since_step": int}
"""``running_loss*.json`` of a checkpoint within an epoch."""


class RecordError(ValueError):
    """What is wrong with a record, and where in it; the message does not name the file."""


def parse(content: bytes) -> Any:
    """A JSON value.

    Args:
        content: UTF-8 text.

    Returns:
        Its value, of at most ``MOST_DEPTH`` levels, without lone surrogates and without numbers beyond float64.

    Raises:
        RecordError: It is no JSON, or not within these bounds.

    Example:
        >>> parse(b'{"a": [1, 2.5]}')
        {'a': [1, 2.5]}
    """
    if content.count(b"[") + content.count(b"{") > MOST_DEPTH and _is_deep(content):
        raise RecordError(f"more than {MOST_DEPTH} levels of lists and objects")
    try:
        value = _DECODER.decode(content.decode("utf-8-sig"))
        if b"\\u" in content:  # the only way to a lone surrogate, which no file and no terminal takes
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RecordError("a text in it is half of a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not valid JSON: {error}") from None
    return value


def text_of(value: Any) -> str:
    """JSON that every reader takes and every terminal may show, for a person to read.

    Args:
        value: What JSON can hold. Half of a character, as in a path that is no UTF-8, is written as the letters of its
            escape.

    Example:
        >>> print(text_of({"é": "\\x1b[31m"}))
        {
          "é": "\\u001b[31m"
        }
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(letter: str) -> str:
    halved = "\ud800" <= letter <= "\udfff"
    return ("\\" if halved else "") + json.dumps(letter)[1:-1]


def _is_deep(content: bytes) -> bool:
    """Whether there may be more levels than are parsed."""
    brackets = _STRING.sub(b"", content).translate(None, _NO_BRACKETS)
    for _ in range(MOST_DEPTH):  # each time the innermost go
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return len(brackets) > MOST_DEPTH


def read(path: Path, schema: Schema) -> Any:
    """The value of a JSON file that fits a schema.

    Args:
        path: The file.
        schema: See the module.

    Raises:
        RecordError: The file is too large, no JSON, or does not fit.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise RecordError(f"it has more than {MOST_BYTES} bytes")
    value = parse(content)
    check(value, schema)
    return value


def check(value: Any, schema: Schema, name: str = "") -> None:
    """Hold a value against a schema.

    Args:
        value: Of :func:`parse`.
        schema: See the module.
        name: What the value is called in the message.

    Raises:
        RecordError: It does not fit; the message says where.

    Example:
        >>> try:
        ...     check({"results": [{"epoch": "x"}]}, {"results": [{"epoch": int}]})
        ... except RecordError as error:
        ...     print(error)
        results[0].epoch must be a whole number, got 'x'
    """
    choices = schema if isinstance(schema, tuple) else (schema,)
    for choice in choices:
        if _is(value, choice):
            if isinstance(choice, list):
                for i, item in enumerate(value):
                    check(item, choice[0], f"{name}[{i}]")
            elif isinstance(choice, dict):
                _check_object(value, choice, name)
            return
    expected = " or ".join(map(_called, choices))
    raise RecordError(f"{name or 'it'} must be {expected}, got {shown(value)}")


def fits(value: Any, schema: Schema) -> bool:
    """Whether a value fits a schema."""
    try:
        check(value, schema)
    except RecordError:
        return False
    return True


def shown(value: Any) -> str:
    """A value in a message: as Python writes it, cut if it is long, by its type alone if it has others in it."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value[: _SHOWN + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _check_object(value: dict[str, Any], schema: dict[Any, Schema], name: str) -> None:
    for key, inner in schema.items():
        if key is ...:
            for other, item in value.items():
                check(item, inner, f"{name}.{other}".lstrip("."))
            continue
        own = key.rstrip("?")
        if own in value:
            check(value[own], inner, f"{name}.{own}".lstrip("."))
        elif own == key:
            raise RecordError(f"{name}.{own}".lstrip(".") + " is missing")


def _is(value: Any, kind: Schema) -> bool:
    """Whether a value is of a kind, whatever is in it."""
    if kind is None:
        return value is None
    if kind is object:
        return True
    if kind is str:
        return isinstance(value, str) and len(value) <= MOST_LETTERS
    if kind is int:  # as tables hold them
        return type(value) is int and -(2**63) <= value < 2**63
    if kind is float:
        return type(value) in (int, float)
    return isinstance(value, kind if isinstance(kind, type) else type(kind))


def _called(kind: Schema) -> str:
    names: dict[Any, str] = {str: f"a text of at most {MOST_LETTERS} letters", int: "a whole number", float: "a number"}
    names |= {bool: "true or false", None: "null"}
    return "an object" if isinstance(kind, dict) else "a list" if isinstance(kind, list) else names[kind]


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, more than float64 has")
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_whole)  # made anew for every small file, it would take most of the time
