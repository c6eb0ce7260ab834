"""An embedded English acceptability task: classify sentences as grammatical (1) or not (0).

The package generates this data set itself, so that a machine with neither network nor data can
run a real, small fine-tuning job.

Each phenomenon is a small grammar: a list of frames such as ::

    the {p} [is/are] {vi.ing} near the {t}.

``{p}`` is a slot for a lemma of the lexical category ``p``, ``{vi.ing}`` one for the *-ing* form of a
``vi``, and ``{p2}`` would take a second, different ``p``. ``[x/y]`` marks where the two members of
a minimal pair differ: the acceptable one has ``x``, the other one ``y``. So this frame yields
*The farmer is yawning near the lamp.* and *The farmer are yawning near the lamp.*

The phenomena, and the rule that each of them tests:

- ``subject_verb_agreement``: a verb agrees in number with its subject;
- ``determiner_noun_agreement``: a demonstrative agrees in number with its noun;
- ``reflexive_agreement``: a reflexive agrees in gender with its antecedent;
- ``pronoun_case``: subjects are nominative and objects are accusative;
- ``argument_structure``: transitive verbs need an object and intransitive verbs refuse one;
- ``complement_selection``: some verbs select a gerund, others a *to*-infinitive;
- ``auxiliary_selection``: each auxiliary selects one form of the main verb;
- ``tense_and_time``: the tense fits the time adverbial;
- ``comparative_formation``: *than* goes with a comparative, *as* ... *as* with a bare adjective;
- ``modifier_order``: attributive adjectives precede their noun;
- ``negation``: *not* follows the auxiliary;
- ``npi_licensing``: *ever* and *any* occur only in the scope of negation or of *if*;
- ``filler_gap``: a fronted wh-phrase needs a gap, and a gap needs a fronted wh-phrase;
- ``wh_island``: a wh-phrase cannot leave an adjunct or a relative clause;
- ``subject_auxiliary_inversion``: the main-clause auxiliary, and no other, inverts in questions.

Training and validation sentences share the frames and their function words, but no content word:
each split fills the slots (nouns, names, verbs, adjectives) from a vocabulary of its own, so
validation measures the rule and not memorised words. Labels are balanced exactly, and phenomena,
and the frames within one, to within one pair. Frames come in mirrored twos, so that no word by
itself predicts the label: a bag-of-words classifier stays at chance. By default there are
``TRAIN_SIZE`` and ``VALIDATION_SIZE`` sentences. Equal arguments give equal lists on every
platform and Python version.

Limits: the task is easy compared with CoLA. Its sentences are short and formulaic, all inflection
is regular, both splits use the same few dozen frames, and the labels are textbook judgments, not
those of annotators. Its scores are not comparable with published ones for CoLA or BLiMP.
"""

import math
import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Split = Literal["train", "validation"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Example:
    """A sentence, its label (1 acceptable, 0 not), and the phenomenon that it tests."""

    sentence: str
    label: int
    phenomenon: str


class _Lemma(str):
    """A citation form whose attributes are its inflected forms, whatever its part of speech.

    Every word of the vocabularies is regular, and none doubles a consonant ("planned").
    """

    def __init__(self, lemma: str) -> None:
        stem = re.sub("(?<=[^aeiou])y$", "i", lemma.removesuffix("e"))
        sibilant = lemma.endswith(("s", "ch", "sh"))
        self.s = stem + "es" if sibilant or stem.endswith("i") else lemma + "s"
        self.ed = stem + "ed"
        self.ing = lemma.removesuffix("e") + "ing"
        self.er = stem + "er"


# For each lexical category its words. The labels are right only while these hold: "vo" and "vh" need exactly
# one object (not "buy": "what he bought the king" has two) and "vi" takes none; "vg" and "vt" reject each other's
# complement; "vh" and "vi" allow the progressive; contrasting forms differ (unlike those of "put" and "sheep").
_VOCABULARIES: dict[str, dict[str, str]] = {
    "train": {
        "p": "lawyer farmer teacher singer soldier driver banker dentist baker writer pianist painter",  # persons
        "nf": "Mary Alice Emma Laura Susan Julia",  # names of women
        "nm": "John Peter David Robert Frank Henry",  # names of men
        "t": "lamp clock basket ladder window piano carpet bicycle wagon chair bottle boat",  # things
        "a": "old heavy cheap small dark dirty",  # adjectives for things, compared with -er
        "vo": "repair destroy carry remove inspect damage replace describe touch",  # verbs that need a thing as object
        "vh": "praise greet admire thank blame frighten amuse insult imitate",  # that need a person
        "vi": "sneeze yawn laugh cough wait arrive faint listen",  # intransitive verbs
        "vc": "learn remember notice discover",  # verbs with a that-clause or an indirect question
        "vg": "enjoy avoid postpone imagine deny",  # with a gerund
        "vt": "hope decide refuse agree pretend",  # with an infinitive
    },
    "validation": {
        "p": "engineer dancer sailor hunter student gardener chemist plumber tailor poet",
        "nf": "Sarah Anna Helen Linda Karen Nancy",
        "nm": "Tom Michael Paul George Richard Kevin",
        "t": "sofa mirror kettle camera statue radio tractor cabinet guitar bench",
        "a": "new ugly large strong clean tall",
        "vo": "restore demolish acquire examine mention ruin wreck dismantle",
        "vh": "welcome comfort rescue annoy convince invite accuse flatter",
        "vi": "giggle snore smile shiver hesitate tremble stumble blush",
        "vc": "guess predict reveal explain",
        "vg": "resist consider recall risk suggest",
        "vt": "promise want wish threaten volunteer",
    },
}
for _words in _VOCABULARIES.values():
    _words["name"] = f"{_words['nf']} {_words['nm']}"  # where gender plays no role

# Frames stand in mirrored twos: what one rules in, the next rules out. A frame whose pair only
# reorders its words (as far as inflection permits) is its own mirror.
_GRAMMAR = {
    "subject_verb_agreement": ("the {p} [is/are] {vi.ing} near the {t}.", "the {p.s} [are/is] {vi.ing} near the {t}."),
    "determiner_noun_agreement": ("{name} {vo.ed} [this/these] {a} {t}.", "{name} {vo.ed} [these/this] {a} {t.s}."),
    "reflexive_agreement": (
        "{nf} {vh.ed} [herself/himself] near the {t}.",
        "{nm} {vh.ed} [himself/herself] near the {t}.",
    ),
    "pronoun_case": ("[they/them] {vh.ed} the {p} near the {t}.", "the {p} {vh.ed} [them/they] near the {t}."),
    "argument_structure": ("the {p} [{vo.ed}/{vi.ed}] the {t}.", "the {p} [{vi.ed}/{vo.ed}] near the {t}."),
    "complement_selection": (
        "the {p} [{vg.ed}/{vt.ed}] {vo.ing} the {t}.",
        "the {p} [{vt.ed}/{vg.ed}] to {vo} the {t}.",
    ),
    "auxiliary_selection": ("the {p} [has/will] {vo.ed} the {t}.", "the {p} [will/has] {vo} the {t}."),
    "tense_and_time": (
        "the {p} {vo.ed} the {t} [yesterday/tomorrow].",
        "the {p} will {vo} the {t} [tomorrow/yesterday].",
    ),
    "comparative_formation": ("the {t} is [{a.er}/{a}] than the {t2}.", "the {t} is as [{a}/{a.er}] as the {t2}."),
    "modifier_order": ("{name} {vi.ed} near the [{a} {t}/{t} {a}].", "the [{a} {t}/{t} {a}] is near the {p}."),
    "negation": ("the {p} [will not/not will] {vo} the {t}.", "{name} [has not/not has] {vh.ed} the {p}."),
    "npi_licensing": (
        "[no {p} has ever {vh.ed} the/the {p} has ever {vh.ed} no] {p2}.",
        "[the {p} did not {vo} any/any {p} did not {vo} the] {t}.",
        "if {name} [ever {vh.s} the {p}, we will/{vh.s} the {p}, we will ever] {vi}.",
    ),
    "filler_gap": ("{name} {vc.s} [what/that] the {p} {vo.ed}.", "{name} {vc.s} [that/what] the {p} {vo.ed} the {t}."),
    "wh_island": (
        "which {t} did the {p} [{vo} after the {p2} {vi.ed}/{vi} after the {p2} {vo.ed}]?",
        "which {t} did the {p} who [{vh.ed} {name} {vo}/{vo.ed} {vh} {name}]?",
    ),
    "subject_auxiliary_inversion": (
        "which {t} [will the {p}/the {p} will] {vo}?",
        "{name} {vc.s} which {t} [the {p} will/will the {p}] {vo}.",
        "[has the {p} who is {vi.ing}/is the {p} who {vi.ing} has] {vo.ed} the {t}?",
    ),
}

PHENOMENA: tuple[str, ...] = tuple(_GRAMMAR)

# A multiple of 12 pairs per phenomenon gives each of its 2 or 3 frames equally many. So few sentences
# that a laptop trains an adapter on them in a minute.
TRAIN_SIZE = len(PHENOMENA) * 24 * 2
VALIDATION_SIZE = len(PHENOMENA) * 12 * 2

_ALTERNATIVES = re.compile(r"\[(.*?)/(.*?)\]")

_Lexicon = dict[str, list[_Lemma]]
_LEXICA: dict[str, _Lexicon] = {
    split: {category: list(map(_Lemma, words.split())) for category, words in vocabulary.items()}
    for split, vocabulary in _VOCABULARIES.items()
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
            what the grammar can yield with its phenomena and frames in balance.
    """
    if split not in _LEXICA:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(_LEXICA)}")
    if size is None:
        size = TRAIN_SIZE if split == "train" else VALIDATION_SIZE
    if not isinstance(size, int) or size <= 0 or size % 2:
        raise ValueError(f"size must be a positive even number of sentences, not {size!r}")
    lexicon = _LEXICA[split]
    fewest = (len(f) * min(_capacity(frame, lexicon) for frame in f) for f in _GRAMMAR.values())
    limit = 2 * len(PHENOMENA) * min(fewest)
    if size > limit:
        raise ValueError(f"the grammar yields at most {limit} {split} sentences, not {size}")

    rng = random.Random(f"{split} {seed}")  # A string is seeded alike on all Python versions.
    examples: dict[str, Example] = {}
    for phenomenon, pairs in _deal(PHENOMENA, size // 2, rng):
        for frame, count in _deal(_GRAMMAR[phenomenon], pairs, rng):
            wanted = len(examples) + 2 * count
            while len(examples) < wanted:
                pair = _realise(frame, lexicon, rng)
                # Pairs can have a member in common: "The poet [smiled/ruined] near the sofa."
                if examples.keys().isdisjoint(pair):
                    for label, sentence in enumerate(pair):
                        examples[sentence] = Example(sentence, label, phenomenon)
    shuffled = list(examples.values())
    rng.shuffle(shuffled)
    return shuffled


def _deal(items: Sequence[_T], total: int, rng: random.Random) -> Iterator[tuple[_T, int]]:
    """Yield each item with its share of the total; the shares differ by one at most."""
    share, rest = divmod(total, len(items))
    for rank, item in enumerate(rng.sample(items, len(items))):
        yield item, share + (rank < rest)


def _sides(frame: str) -> tuple[str, str]:
    """Split a frame into its unacceptable and its acceptable side, in the order of the labels."""
    return re.sub(_ALTERNATIVES, r"\2", frame), re.sub(_ALTERNATIVES, r"\1", frame)


def _slots(template: str) -> dict[str, str]:
    """Map the slots of a frame, or of one side of it, to their lexical categories."""
    slots = (field.split(".")[0] for _, field, _, _ in string.Formatter().parse(template) if field)
    return {slot: slot.rstrip(string.digits) for slot in slots}


def _capacity(frame: str, lexicon: _Lexicon) -> int:
    """Count the pairs without common members: as many as the poorer side has sentences."""
    sides = (Counter(_slots(side).values()).items() for side in _sides(frame))
    return min(math.prod(math.perm(len(lexicon[c]), n) for c, n in side) for side in sides)


def _realise(frame: str, lexicon: _Lexicon, rng: random.Random) -> tuple[str, str]:
    """Fill the slots of a frame with random lemmas, no lemma twice, and return its sides."""
    filling: dict[str, _Lemma] = {}
    for slot, category in _slots(frame).items():
        unused = [lemma for lemma in lexicon[category] if lemma not in filling.values()]
        filling[slot] = rng.choice(unused)
    bad, good = (side.format_map(filling) for side in _sides(frame))
    return bad[0].upper() + bad[1:], good[0].upper() + good[1:]
