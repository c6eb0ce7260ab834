"""Patterns of names against PEFT's own function, and keys that a stranger wrote to take for ever."""

import random
import re

import pytest
from peft.utils.other import get_pattern_key

from msplora_analysis import AnalysisError
from msplora_analysis.formats.helpers import patterns
from msplora_analysis.formats.helpers.patterns import Patterns

PARTS = [
    "q",
    "layers",
    "0",
    "1",
    ".",
    r"\.",
    "[0-9]",
    "[^0-9]",
    r"\d",
    r"\w",
    ".*",
    ".+?",
    "(a|b)",
    "(?:0|12)",
    "x?",
    "$",
]
PARTS += ["[0-9]{1,2}", "(q|k)+", "^", "_proj", "(ab)*", "a{2}", "(", "|"]
NAMES = ["q", "k", "layers.", "0", "1", ".", "_proj", "a", "b", "x", "layers.0.", "layers.12.q"]


def peft(table: dict[str, int], name: str) -> int | None:
    try:
        for key in table:
            re.compile(key)
        return table.get(get_pattern_key(list(table), name), -1)
    except re.error:
        return None


def ours(table: dict[str, int], name: str) -> int | None:
    try:
        return Patterns(table).get(name, -1)
    except AnalysisError:
        return None


def test_the_first_that_matches_as_in_peft():
    rng = random.Random(0)
    found = set()
    for _ in range(3000):
        keys = ["".join(rng.choices(PARTS, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        name = "".join(rng.choices(NAMES, k=rng.randint(1, 6)))
        table = {key: number for number, key in enumerate(keys)}
        assert ours(table, name) == peft(table, name), (keys, name)
        found.add(peft(table, name))
    assert {None, -1, 0, 1, 2} <= found


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["q", "proj", "a.q"], "a.q"),
        (["x|q"], "a.xq"),
        (["^a.q"], "b.a.q"),
        (["^a.q"], "a.q"),
        (["a.b", "a.*"], "axb"),
        (["a+b"], "a+b"),
        (["w.q", "layers.1.*q$"], "layers.11.q"),
    ],
)
def test_single_cases_as_in_peft(keys, name):
    table = {key: number for number, key in enumerate(keys)}
    assert ours(table, name) == peft(table, name)


@pytest.mark.parametrize("key", ["(a+)+b", "(a|a)*b", "(.*)*b", ".*" * 50 + "b", "(" * 90 + "a*" + ")*" * 90 + "b"])
def test_keys_over_which_re_never_ends(key):
    assert Patterns({key: 1}).get("a" * 1000, -1) == -1
    assert Patterns({key: 1}).get("a" * 1000 + "b", -1) == 1


@pytest.mark.parametrize(
    "key", ["((a{0,99}){0,99}){0,99}", "(a?){4000}", "(?=a)a", r"(a)\1", r"\ba", "(?i)a", "(?i:a)", "(?>a)", "a++", "("]
)
def test_keys_that_are_refused(key):
    with pytest.raises(AnalysisError, match=r"^adapter_config.json: the pattern '"):
        Patterns({key: 1}).get("a", -1)


def test_work_is_bounded_over_all_modules(monkeypatch):
    monkeypatch.setattr(patterns, "_MOST_WORK", 10**6)
    table = Patterns({f"(a|b)*{i}x*": i for i in range(100)})
    with pytest.raises(AnalysisError, match="take too much work"):
        [table.get(f"{'ab' * 500}{i}", -1) for i in range(10**6)]


def test_a_pattern_for_every_module():
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(60) for expert in range(100)]
    for keys in (names, [f"^{re.escape(name)}" for name in names]):
        table = Patterns({key: number for number, key in enumerate(keys)})
        assert [table.get(name, -1) for name in names] == list(range(6000))
