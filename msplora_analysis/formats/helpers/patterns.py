"""Which entry of ``rank_pattern`` or ``alpha_pattern`` is a module's, in bounded work.

PEFT takes the first key for which ``re.match(rf"(.*\\.)?({key})$", name)`` finds something. Python's ``re`` may take
for ever over a key that a stranger wrote: it tries one way through the pattern after another. A time limit would
make the answer depend on how busy the machine is. So keys are parsed by ``re``'s own parser and matched by following
all ways at once, letter by letter (K. Thompson 1968, "Regular expression search algorithm", CACM 11(6)). Sets of
places that were met before are remembered, which makes it fast. Keys without any repetition or choice, which is what
programs write, need no more than a look into a dictionary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from msplora_analysis.errors import AnalysisError

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as sre
    import sre_parse as parser

_MOST_PLACES = 5000  # of one key
_MOST_WORK = 100_000_000  # letters looked at, and places looked at for the first time, for all modules of a file

_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
    sre.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    sre.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    sre.CATEGORY_NOT_WORD: lambda letter: not (letter.isalnum() or letter == "_"),
}
_SETS = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN)
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)


class Patterns:
    """The values of a table by patterns of names, in its order.

    Args:
        table: Pattern to value.

    Raises:
        AnalysisError: A pattern is no regular expression, or of a kind that takes unbounded work.
    """

    def __init__(self, table: Mapping[str, float]) -> None:
        self._table = table
        self._left = _MOST_WORK
        # Length -> where any letter fits -> the others -> the number of the key and its value.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, tuple[int, float]]]] = {}
        self._anchored: dict[int, dict[tuple[int, ...], dict[str, tuple[int, float]]]] = {}
        self._others: list[tuple[int, _Machine, float]] = []
        for number, (key, value) in enumerate(table.items()):
            try:
                tree = parser.parse(key)
                if tree.state.flags & ~sre.SRE_FLAG_UNICODE:  # PEFT puts the key into a larger expression
                    raise ValueError
            except (parser.error, ValueError, RecursionError, OverflowError):
                raise AnalysisError(
                    f"adapter_config.json: the pattern {key[:100]!r} is not a regular expression"
                ) from None
            anchored = bool(len(tree)) and tree[0] == (sre.AT, sre.AT_BEGINNING)
            letters = list(tree)[anchored:]
            if all(kind in (sre.LITERAL, sre.ANY) for kind, _ in letters):
                free = tuple(i for i, (kind, _) in enumerate(letters) if kind is sre.ANY)
                text = "".join("." if kind is sre.ANY else chr(letter) for kind, letter in letters)
                of_length = (self._anchored if anchored else self._plain).setdefault(len(text), {})
                of_length.setdefault(free, {}).setdefault(text, (number, value))
            else:
                self._others.append((number, _Machine(key, tree), value))

    def get(self, name: str, default: float) -> float:
        """The value of a module.

        Args:
            name: Its dotted path.
            default: Where no pattern matches.

        Raises:
            AnalysisError: The patterns take too much work.
        """
        found: tuple[float, float] = (float("inf"), self._table.get(name, default))
        starts = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
        for of_length, at in ((self._anchored, starts[:1]), (self._plain, starts)):
            for start in at:
                for free, keys in of_length.get(len(name) - start, {}).items():
                    letters = list(name[start:])
                    for i in free:
                        letters[i] = "."
                    found = min(found, keys.get("".join(letters), found))
                    self._spend(len(letters))
        for number, machine, value in self._others:
            if number > found[0]:
                break
            if machine.matches(name, self._spend):
                return value
        return found[1]

    def _spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise AnalysisError("adapter_config.json: its patterns take too much work; write the names of the modules")


class _Place(NamedTuple):
    """Where in a pattern one may be: before a letter of a set, or where there is a choice of places without one."""

    kind: Any
    argument: Any
    then: tuple[int, ...]


class _Machine:
    """One pattern, followed at all its places at once."""

    def __init__(self, key: str, tree: Any) -> None:
        self._key = key
        self._places: list[_Place] = [_Place(None, None, ())]  # the end
        self._first = self._add(tree, 0)
        self._sets: list[frozenset[int]] = []  # of places that were met, by number
        self._numbers: dict[frozenset[int], int] = {}
        self._steps: list[dict[str, int]] = []  # set -> letter -> the set behind it
        self._start = self._number(self._closed({self._first}, begins=True))

    def matches(self, name: str, spend: Callable[[int], None]) -> bool:
        """Whether the name, or what follows one of its dots, is of the pattern."""
        spend(len(name))
        at, steps = self._start, self._steps
        for letter in name:
            to = steps[at].get(letter)
            if to is None:
                places = self._sets[at]
                spend(50 * (len(places) + 1))
                ahead = {behind for place in places for behind in self._after(place, letter)}
                to = self._number(self._closed(ahead | ({self._first} if letter == "." else set())))
                steps[at][letter] = to
            at = to
        return 0 in self._closed(self._sets[at], ends=True)

    def _number(self, places: frozenset[int]) -> int:
        if places not in self._numbers:
            self._numbers[places] = len(self._sets)
            self._sets.append(places)
            self._steps.append({})
        return self._numbers[places]

    def _after(self, place: int, letter: str) -> tuple[int, ...]:
        kind, argument, then = self._places[place]
        return then if kind in _SETS and _accepts(kind, argument, letter) else ()

    def _closed(self, places: Iterable[int], *, begins: bool = False, ends: bool = False) -> frozenset[int]:
        """The places, and all that follow without a letter."""
        found, pending = set(), list(places)
        while pending:
            place = pending.pop()
            if place not in found:
                found.add(place)
                kind, argument, then = self._places[place]
                passes = kind is sre.BRANCH or (begins and argument in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING))
                if passes or (ends and argument in (sre.AT_END, sre.AT_END_STRING)):
                    pending += then
        return frozenset(found)

    def _new(self, kind: Any, argument: Any, *then: int) -> int:
        if len(self._places) > _MOST_PLACES:
            raise self._error("is too large")
        self._places.append(_Place(kind, argument, then))
        return len(self._places) - 1

    def _add(self, tree: Any, then: int) -> int:
        """Enter a part of the pattern, behind which is ``then``; returns its first place."""
        for kind, argument in reversed(list(tree)):
            if kind in _SETS or kind is sre.AT:
                if argument in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
                    raise self._error("has a boundary of words")
                then = self._new(kind, argument, then)
            elif kind is sre.SUBPATTERN and not argument[1] and not argument[2]:  # no flags
                then = self._add(argument[3], then)
            elif kind is sre.BRANCH:
                then = self._new(sre.BRANCH, None, *[self._add(branch, then) for branch in argument[1]])
            elif kind in _REPEATS:
                least, most, part = argument
                then = self._repeated(least, most, part, then)
            else:
                raise self._error("has a reference, a look ahead or behind, flags or such")
        return then

    def _repeated(self, least: int, most: Any, part: Any, then: int) -> int:
        if least > _MOST_PLACES or (most is not sre.MAXREPEAT and most > _MOST_PLACES):
            raise self._error("is too large")
        if most is sre.MAXREPEAT:
            again = self._new(sre.BRANCH, None)
            self._places[again] = _Place(sre.BRANCH, None, (self._add(part, again), then))
            first = again
        else:
            first = then
            for _ in range(most - least):
                first = self._new(sre.BRANCH, None, self._add(part, first), then)
        for _ in range(least):
            first = self._new(sre.BRANCH, None, self._add(part, first))
        return first

    def _error(self, what: str) -> AnalysisError:
        return AnalysisError(f"adapter_config.json: the pattern {self._key[:100]!r} {what}; write the modules' names")


def _accepts(kind: Any, argument: Any, letter: str) -> bool:
    """Whether a set of letters has one."""
    code = ord(letter)
    if kind is sre.ANY:
        return letter != "\n"
    if kind in (sre.LITERAL, sre.NOT_LITERAL):
        return (code == argument) is (kind is sre.LITERAL)
    (first, _), *rest = argument
    inside = argument if first is not sre.NEGATE else rest
    return any(_has(item, letter, code) for item in inside) is not (first is sre.NEGATE)


def _has(item: Any, letter: str, code: int) -> bool:
    kind, argument = item
    if kind is sre.RANGE:
        return bool(argument[0] <= code <= argument[1])
    return _CATEGORIES[argument](letter) if kind is sre.CATEGORY else bool(code == argument)
