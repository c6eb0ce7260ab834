"""The embedded acceptability task: determinism, balance, disjoint vocabularies, no shallow cues."""

import hashlib
import itertools
import re
from collections import Counter

import pytest

from msplora_core.data import acceptability
from msplora_core.data.acceptability import (
    PHENOMENA,
    TRAIN_SIZE,
    VALIDATION_SIZE,
    Example,
    Split,
    generate,
)

SPLITS: tuple[Split, ...] = ("train", "validation")


def words(sentence: str) -> list[str]:
    return re.findall(r"[a-z]+", sentence.lower())


# Written out here, and not taken from the module, so that the disjointness test is independent.
FUNCTION_WORDS = words(
    """
    the this these that any no we they them himself herself who what which
    is are has did will not near after to if as than ever yesterday tomorrow
    """
)


def content_words(split: Split) -> set[str]:
    sentences = (e.sentence for seed in range(3) for e in generate(split, 2000, seed))
    return {w for sentence in sentences for w in words(sentence)} - set(FUNCTION_WORDS)


def stem(word: str) -> str:
    """Strip inflection crudely: enough to match the forms of a regular word with each other."""
    return re.sub(r"y$", "i", re.sub(r"(ing|ed|er|es|s|e)$", "", word))


@pytest.fixture(scope="module", params=SPLITS)
def split(request: pytest.FixtureRequest) -> Split:
    split: Split = request.param
    return split


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "b57c75242464a7fb30746c54cc2ccfca33cf558fdbbf9aa73d30897e437a38ce"),
        ("validation", "905229e8667987549ee14057534e8da5c4b850004ab9cbfec6d2cb166590e873"),
    ],
)
def test_default_splits_are_pinned(split: Split, digest: str) -> None:
    text = "".join(f"{e.sentence}\t{e.label}\t{e.phenomenon}\n" for e in generate(split))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_default_sizes() -> None:
    assert len(generate("train")) == TRAIN_SIZE
    assert len(generate("validation")) == VALIDATION_SIZE


def test_the_seed_chooses_other_sentences(split: Split) -> None:
    first, second = generate(split), generate(split, seed=1)
    assert first == generate(split, seed=0)
    assert first != second
    assert set(first) != set(second)


@pytest.mark.parametrize("size", [2, 30, 334, 2000])
def test_labels_phenomena_and_pairs_are_balanced(split: Split, size: int) -> None:
    examples = generate(split, size)
    assert len(examples) == size
    acceptable = Counter(e.phenomenon for e in examples if e.label == 1)
    unacceptable = Counter(e.phenomenon for e in examples if e.label == 0)
    assert acceptable == unacceptable
    counts = [acceptable[phenomenon] for phenomenon in PHENOMENA]
    assert sum(counts) == size // 2
    assert max(counts) - min(counts) <= 1


def test_labels_are_shuffled(split: Split) -> None:
    labels = [e.label for e in generate(split)]
    changes = sum(a != b for a, b in itertools.pairwise(labels))
    assert 0.4 < changes / len(labels) < 0.6


def test_every_sentence_has_its_minimal_pair_in_the_same_split(split: Split) -> None:
    """The two differ in one word, in its form, or in word order."""

    def differences(a: Example, b: Example) -> int:
        x, y = Counter(map(stem, words(a.sentence))), Counter(map(stem, words(b.sentence)))
        return max((x - y).total(), (y - x).total())

    for phenomenon in PHENOMENA:
        examples = [e for e in generate(split) if e.phenomenon == phenomenon]
        for good in (e for e in examples if e.label == 1):
            assert min(differences(good, e) for e in examples if e.label == 0) <= 1, good


def test_no_sentence_occurs_twice() -> None:
    for seed in range(10):
        sentences = [e.sentence for split in SPLITS for e in generate(split, seed=seed)]
        assert len(set(sentences)) == len(sentences)


def test_splits_share_function_words_only() -> None:
    """Judged by the sentences, over several seeds, and across the inflected forms of a word."""
    train, validation = map(content_words, SPLITS)
    assert len(train) > 100
    assert len(validation) > 100
    assert not train & validation
    assert not {stem(w) for w in train} & {stem(w) for w in validation}


def test_sentences_are_well_formed(split: Split) -> None:
    for example in generate(split):
        assert re.fullmatch(r"[A-Z][A-Za-z]*(,? [A-Za-z]+)+[.?]", example.sentence)
        assert example.label in (0, 1)


def test_inflection() -> None:
    forms = {
        "carry": ("carries", "carried", "carrying"),
        "annoy": ("annoys", "annoyed", "annoying"),
        "welcome": ("welcomes", "welcomed", "welcoming"),
        "touch": ("touches", "touched", "touching"),
    }
    for lemma, expected in forms.items():
        word = acceptability._Lemma(lemma)
        assert (word.s, word.ed, word.ing) == expected
    comparatives = {"heavy": "heavier", "large": "larger", "old": "older"}
    assert {lemma: acceptability._Lemma(lemma).er for lemma in comparatives} == comparatives


def test_every_phenomenon_is_documented() -> None:
    documentation = acceptability.__doc__ or ""
    assert len(PHENOMENA) >= 10
    assert [name for name in PHENOMENA if f"- ``{name}``:" not in documentation] == []


def test_no_function_word_predicts_the_label(split: Split) -> None:
    """The words that the splits share occur equally often in sentences of either label."""
    counts: dict[int, Counter[str]] = {0: Counter(), 1: Counter()}
    for example in generate(split):
        counts[example.label].update(w for w in words(example.sentence) if w in FUNCTION_WORDS)
    assert counts[0] == counts[1]


def test_length_does_not_predict_the_label(split: Split) -> None:
    lengths: dict[int, Counter[int]] = {0: Counter(), 1: Counter()}
    for example in generate(split):
        lengths[example.label][len(words(example.sentence))] += 1
    assert lengths[0] == lengths[1]


def test_a_bag_of_words_classifier_stays_at_chance() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    naive_bayes = pytest.importorskip("sklearn.naive_bayes")
    train, validation = generate("train"), generate("validation")
    vectorizer = text.CountVectorizer(token_pattern=r"\w+|[.,?]")
    model = naive_bayes.MultinomialNB().fit(
        vectorizer.fit_transform([e.sentence for e in train]), [e.label for e in train]
    )
    features = vectorizer.transform([e.sentence for e in validation])
    assert model.score(features, [e.label for e in validation]) < 0.6


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match=r"^unknown split 'test': choose .* train, validation$"):
        generate("test")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -2, 3, 2.0, "10"])
def test_size_must_be_a_positive_even_number(size: object) -> None:
    with pytest.raises(ValueError, match=r"^size must be a positive even number .*, not "):
        generate("train", size)  # type: ignore[arg-type]


def test_size_limit(split: Split) -> None:
    with pytest.raises(ValueError, match="the grammar yields at most") as error:
        generate(split, 10**9)
    limit = int(re.findall(r"\d+", str(error.value))[0])
    assert limit > 10_000
    assert len({e.sentence for e in generate(split, limit)}) == limit
    with pytest.raises(ValueError, match=f"at most {limit} {split} sentences, not {limit + 2}"):
        generate(split, limit + 2)
