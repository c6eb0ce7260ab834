"""An embedded English acceptability task: classify sentences as grammatical (1) or not (0).

The package generates this data set itself, so a real, small fine-tuning job can run on a machine
that has neither network nor data. It uses the standard library only.

Each phenomenon is a small grammar: a list of frames such as ::

    the {p} near the {t.s} [{vi.s}/{vi}].

``{p}`` is a slot for a lemma of the lexical category ``p``, ``{p.s}`` its *-s* form, and ``{p2}``
a second, different lemma of that category. ``[x/y]`` marks where the two members of a minimal
pair differ: the acceptable one has ``x``, the other one ``y``. Here: *The lawyer near the lamps
sleeps.* and *The lawyer near the lamps sleep.*

The phenomena, and the rule that each of them tests:

- ``subject_verb_agreement``: a verb agrees in number with the subject right before it;
- ``agreement_across_attractor``: ... also when another noun intervenes;
- ``agreement_across_relative_clause``: ... also when a relative clause intervenes;
- ``determiner_noun_agreement``: demonstratives and quantifiers agree in number with their noun;
- ``count_and_mass_nouns``: *many* and *few* go with count nouns, *much* and *little* with mass ones;
- ``reflexive_agreement``: a reflexive agrees in gender and number with its antecedent;
- ``reflexive_binding``: the antecedent is the local c-commanding noun, not any nearby noun;
- ``pronoun_case``: subjects are nominative and objects are accusative;
- ``argument_structure``: transitive verbs need an object and intransitive verbs refuse one;
- ``complement_selection``: some verbs select a gerund, others a *to*-infinitive;
- ``auxiliary_selection``: each auxiliary selects one form of the main verb;
- ``tense_and_time``: the tense fits the time adverbial;
- ``comparative_formation``: the degree word, the adjective's form and *than* or *as* match;
- ``npi_licensing``: *ever* and *any* occur only in the scope of negation or of *if*;
- ``filler_gap``: a fronted wh-phrase needs a gap, and a gap needs a fronted wh-phrase;
- ``wh_island``: a wh-phrase cannot leave an adjunct or a relative clause;
- ``subject_auxiliary_inversion``: the main-clause auxiliary, and no other, inverts in questions.

Training and validation sentences share the frames and their function words, but no content word:
each split fills the slots (nouns, names, verbs, adjectives) from a vocabulary of its own, so
validation measures the rule and not memorised words. Labels are balanced exactly, and phenomena,
and the frames within one, to within one pair. Frames come in mirrored twos, so that no word by
itself predicts the label: a bag-of-words classifier stays at chance.

By default there are ``TRAIN_SIZE`` and ``VALIDATION_SIZE`` sentences. Equal arguments give equal
lists on every platform and Python version.

Limits: the task is easy compared with CoLA. Its sentences are short and formulaic, every split
uses the same few dozen frames, and the labels follow the standard textbook judgments instead of
annotators. Report it as a synthetic task, next to no published CoLA or BLiMP score.
"""

import random
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

__all__ = ["PHENOMENA", "TRAIN_SIZE", "VALIDATION_SIZE", "Example", "generate"]

Split = Literal["train", "validation"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Example:
    """A sentence, its label (1 acceptable, 0 not), and the phenomenon that it tests."""

    sentence: str
    label: int
    phenomenon: str


# Past tense and past participle.
_IRREGULAR = {
    "bring": ("brought", "brought"),
    "buy": ("bought", "bought"),
    "forget": ("forgot", "forgotten"),
    "know": ("knew", "known"),
    "kneel": ("knelt", "knelt"),
    "sleep": ("slept", "slept"),
    "understand": ("understood", "understood"),
}


class _Lemma(str):
    """A citation form whose attributes are its inflected forms, whatever its part of speech.

    The vocabularies avoid doubled consonants ("planned") and irregular -s forms ("wives").
    """

    def __init__(self, lemma: str) -> None:
        stem = re.sub("(?<=[^aeiou])y$", "i", lemma.removesuffix("e"))
        sibilant = lemma.endswith(("s", "ch", "sh"))
        self.s = stem + "es" if sibilant or stem.endswith("i") else lemma + "s"
        self.ed, self.en = _IRREGULAR.get(lemma, (stem + "ed", stem + "ed"))
        self.ing = lemma.removesuffix("e") + "ing"
        self.er = stem + "er"


# For each lexical category, the train and the validation vocabulary. The labels are right only
# while these hold: "vo" and "vh" need exactly one object ("buy" in "what he bought the boat" could
# have two) and "vi" takes none; "vg" and "vt" reject each other's complement; activity verbs allow
# the progressive; "u" has no plural; and forms that contrast differ (unlike those of "put").
_VOCABULARY = {
    # p: persons of either gender
    "p": (
        "lawyer farmer teacher singer soldier driver banker dentist baker writer pianist painter",
        "engineer dancer sailor hunter student gardener chemist plumber tailor poet",
    ),
    # f, m: women and men; nf, nm: their names; name: a name where gender plays no role
    "f": ("queen girl aunt sister bride nun", "princess duchess niece mother witch grandmother"),
    "m": ("king boy uncle brother groom monk", "prince duke nephew father wizard grandfather"),
    "nf": ("Mary Alice Emma Laura Susan Julia", "Sarah Anna Helen Linda Karen Nancy"),
    "nm": ("John Peter David Robert Frank Henry", "Tom Michael Paul George Richard Kevin"),
    "name": (
        "Mary Alice Emma Laura Susan Julia John Peter David Robert Frank Henry",
        "Sarah Anna Helen Linda Karen Nancy Tom Michael Paul George Richard Kevin",
    ),
    # t: things; u: stuff (mass nouns)
    "t": (
        "lamp clock basket ladder window piano carpet bicycle wagon chair bottle boat",
        "sofa mirror kettle camera statue radio tractor cabinet guitar bench",
    ),
    "u": ("sand rice furniture luggage milk gold", "flour wheat equipment butter mud jewelry"),
    # a: adjectives compared with -er; b: adjectives compared with "more"
    "a": ("old heavy cheap small dark dirty", "new ugly large strong clean tall"),
    "b": ("expensive beautiful fragile valuable", "dangerous elegant useful comfortable"),
    # vo: verbs that need a thing as object; vh: that need a person; vi: intransitive
    "vo": (
        "repair destroy carry remove inspect damage replace describe touch",
        "restore demolish purchase examine obtain mention ruin locate",
    ),
    "vh": (
        "praise greet admire thank blame frighten amuse insult imitate",
        "welcome comfort rescue annoy convince invite accuse flatter",
    ),
    "vi": (
        "sneeze sleep yawn laugh cough wait arrive faint",
        "giggle snore kneel smile shiver hesitate tremble stumble",
    ),
    # vm: verbs for stuff and things alike; vc: with a that-clause or an indirect question;
    # vg: with a gerund; vt: with a to-infinitive
    "vm": ("buy carry waste remove", "purchase bring collect store"),
    "vc": ("know remember notice discover", "forget understand reveal explain"),
    "vg": ("enjoy avoid postpone imagine deny", "resist consider recall risk suggest"),
    "vt": ("hope decide refuse agree pretend", "promise want wish threaten volunteer"),
}

# Frames stand in mirrored twos: what one rules in, the next rules out. A frame whose pair only
# reorders its words (as far as inflection permits) is its own mirror.
_GRAMMAR = {
    "subject_verb_agreement": (
        "the {p} [{vi.s}/{vi}] near the {t}.",
        "the {p.s} [{vi}/{vi.s}] near the {t}.",
    ),
    "agreement_across_attractor": (
        "the {t} near the {p.s} [is/are] {a}.",
        "the {t.s} near the {p} [are/is] {a}.",
    ),
    "agreement_across_relative_clause": (
        "the {p} who {vh.ed} the {p2.s} [was/were] {vi.ing}.",
        "the {p.s} who {vh.ed} the {p2} [were/was] {vi.ing}.",
    ),
    "determiner_noun_agreement": (
        "{name} {vi.ed} behind [that/those] {a} {t}.",
        "{name} {vi.ed} behind [those/that] {a} {t.s}.",
    ),
    "count_and_mass_nouns": (
        "the {p} {vm.ed} too [much/many] {u}.",
        "the {p} {vm.ed} too [many/much] {t.s}.",
    ),
    "reflexive_agreement": (
        "{nf} {vh.ed} [herself/himself] near the {t}.",
        "{nm} {vh.ed} [himself/herself] near the {t}.",
        "the {f} {vh.ed} [herself/themselves] near the {t}.",
        "the {f.s} {vh.ed} [themselves/herself] near the {t}.",
    ),
    "reflexive_binding": (
        "the {f} near the {m} {vh.ed} [herself/himself].",
        "the {m} near the {f} {vh.ed} [himself/herself].",
    ),
    "pronoun_case": (
        "[she/her] {vh.ed} the {p} near the {t}.",
        "the {p} {vh.ed} [her/she] near the {t}.",
        "{name} {vc.s} that [they/them] {vh.ed} the {p}.",
        "{name} {vc.s} that the {p} {vh.ed} [them/they].",
    ),
    "argument_structure": (
        "the {p} [{vo.ed}/{vi.ed}] the {t}.",
        "the {p} [{vi.ed}/{vo.ed}] near the {t}.",
    ),
    "complement_selection": (
        "the {p} [{vg.ed}/{vt.ed}] {vo.ing} the {t}.",
        "the {p} [{vt.ed}/{vg.ed}] to {vo} the {t}.",
    ),
    "auxiliary_selection": (
        "the {p} [has/will] {vo.en} the {t}.",
        "the {p} [will/has] {vo} the {t}.",
        "{name} [is/has] {vh.ing} the {p}.",
        "{name} [has/is] {vh.en} the {p}.",
    ),
    "tense_and_time": (
        "the {p} {vo.ed} the {t} [yesterday/tomorrow].",
        "the {p} will {vo} the {t} [tomorrow/yesterday].",
    ),
    "comparative_formation": (
        "the {t} is [{a.er}/{a}] than the {t2}.",
        "the {t} is as [{a}/{a.er}] as the {t2}.",
        "this {t} is [more/as] {b} than that {t2}.",
        "this {t} is [as/more] {b} as that {t2}.",
    ),
    "npi_licensing": (
        "[no {p} has ever {vh.en} the/the {p} has ever {vh.en} no] {p2}.",
        "[the {p} did not {vo} any/any {p} did not {vo} the] {t}.",
        "if {name} [ever {vh.s} the {p}, we will/{vh.s} the {p}, we will ever] {vi}.",
    ),
    "filler_gap": (
        "{name} {vc.s} [what/that] the {p} {vo.ed}.",
        "{name} {vc.s} [that/what] the {p} {vo.ed} the {t}.",
    ),
    "wh_island": (
        "which {t} did the {p} [{vo} after the {p2} {vi.ed}/{vi} after the {p2} {vo.ed}]?",
        "which {t} did the {p} who [{vh.ed} {name} {vo}/{vo.ed} {vh} {name}]?",
    ),
    "subject_auxiliary_inversion": (
        "which {t} [will the {p}/the {p} will] {vo}?",
        "{name} {vc.s} which {t} [the {p} will/will the {p}] {vo}.",
        "[has the {p} who is {vi.ing}/is the {p} who {vi.ing} has] {vo.en} the {t}?",
    ),
}

PHENOMENA: tuple[str, ...] = tuple(_GRAMMAR)

# A multiple of 12 pairs per phenomenon gives each of its 2, 3 or 4 frames equally many.
TRAIN_SIZE = len(PHENOMENA) * 60 * 2
VALIDATION_SIZE = len(PHENOMENA) * 12 * 2

_LEXICON: dict[str, dict[str, list[_Lemma]]] = {
    split: {category: [_Lemma(word) for word in words[column].split()] for category, words in _VOCABULARY.items()}
    for column, split in enumerate(get_args(Split))
}


def generate(split: Split, size: int | None = None, seed: int = 0) -> list[Example]:
    """Generate one split of the task.

    Args:
        split: "train" or "validation"; they share no content word, whatever the seeds.
        size: Number of sentences, an even number; by default TRAIN_SIZE or VALIDATION_SIZE.
        seed: Chooses the sentences and their order.

    Returns:
        Distinct sentences in random order, half of them acceptable. Every acceptable sentence has
        its unacceptable counterpart somewhere in the list.

    Raises:
        ValueError: If the split is unknown, or the size is not a positive even number or exceeds
            what the grammar can yield with phenomena and frames in balance.
    """
    if split not in _LEXICON:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(_LEXICON)}")
    if size is None:
        size = TRAIN_SIZE if split == "train" else VALIDATION_SIZE
    if not isinstance(size, int) or size <= 0 or size % 2:
        raise ValueError(f"size must be a positive even number of sentences, not {size!r}")
    lexicon = _LEXICON[split]
    limit = (
        2
        * len(PHENOMENA)
        * min(len(frames) * min(_count_fillings(frame, lexicon) for frame in frames) for frames in _GRAMMAR.values())
    )
    if size > limit:
        raise ValueError(f"the grammar yields at most {limit} {split} sentences, not {size}")

    rng = random.Random(f"{split} {seed}")  # A string is seeded alike on all Python versions.
    examples = []
    for phenomenon, pairs in _deal(PHENOMENA, size // 2, rng):
        for frame, count in _deal(_GRAMMAR[phenomenon], pairs, rng):
            for index in rng.sample(range(_count_fillings(frame, lexicon)), count):
                for label, sentence in enumerate(_realise(frame, lexicon, index)):
                    examples.append(Example(sentence, label, phenomenon))
    rng.shuffle(examples)
    return examples


def _deal(items: Sequence[_T], total: int, rng: random.Random) -> Iterator[tuple[_T, int]]:
    """Yield each item with its share of the total; the shares differ by one at most."""
    share, rest = divmod(total, len(items))
    for rank, item in enumerate(rng.sample(items, len(items))):
        yield item, share + (rank < rest)


def _choices(frame: str, lexicon: dict[str, list[_Lemma]]) -> dict[str, list[_Lemma]]:
    """Return the slots of a frame, each with the vocabulary of its category."""
    fields = (field for _, field, _, _ in string.Formatter().parse(frame) if field)
    slots = dict.fromkeys(field.partition(".")[0] for field in fields)
    return {slot: lexicon[slot.rstrip(string.digits)] for slot in slots}


def _count_fillings(frame: str, lexicon: dict[str, list[_Lemma]]) -> int:
    """Return in how many ways a frame can be filled with distinct lemmas."""
    count, used = 1, []
    for words in _choices(frame, lexicon).values():
        count *= len(words) - used.count(words)
        used.append(words)
    return count


def _realise(frame: str, lexicon: dict[str, list[_Lemma]], index: int) -> tuple[str, str]:
    """Return the unacceptable and the acceptable sentence of a frame's index-th filling."""
    filling: dict[str, _Lemma] = {}
    for slot, words in _choices(frame, lexicon).items():
        words = [word for word in words if word not in filling.values()]
        index, position = divmod(index, len(words))
        filling[slot] = words[position]
    bad, good = (re.sub(r"\[(.*?)/(.*?)\]", side, frame).format_map(filling) for side in (r"\2", r"\1"))
    return bad[0].upper() + bad[1:], good[0].upper() + good[1:]
