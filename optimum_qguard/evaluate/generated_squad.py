"""Questions in SQuAD's format about people, places and works that do not exist, for where SQuAD itself is not at hand.

Nothing can be known by heart: the names of the two splits are disjoint, so an answer has to be read from its context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.squad import Passage

SquadSplit = Literal["train", "validation"]

_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "gr", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("l", "n", "r", "s")
_ENDINGS = ("ville", "stad", "burg", "mouth")
_ADJECTIVES = (
    "Silver",
    "Hollow",
    "Quiet",
    "Burning",
    "Distant",
    "Broken",
    "Golden",
    "Hidden",
    "Winter",
    "Crooked",
    "Gentle",
    "Frozen",
    "Scarlet",
    "Narrow",
)
_NOUNS = (
    "Harbour",
    "Lantern",
    "Orchard",
    "Mirror",
    "River",
    "Garden",
    "Tower",
    "Letter",
    "Island",
    "Bridge",
    "Falcon",
    "Mountain",
    "Window",
    "Kingdom",
)
_MONTHS = ("January", "March", "April", "June", "July", "August", "October", "December")
_VALIDATION_SHARE = 4  # one name of so many


@dataclass(frozen=True)
class _Relation:
    """What may be said of a person: sentences and questions (``{p}`` the person, ``{v}`` what is told), questions for
    the person (``{v}``), and how the value is drawn."""

    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    inverse: tuple[str, ...]
    draw: Callable[[Random, SquadSplit], str]


def generated_passages(n: int, *, seed: int, split: SquadSplit, facts: tuple[int, int] = (2, 4)) -> list[Passage]:
    """Questions, each with a context of its own in which its only answer stands.

    A context is a few facts about half as many people and one more, in varied sentences.

    Args:
        n: how many, at least 1.
        seed: the same seed gives the same questions.
        split: no name of a person, place or work of ``"train"`` occurs in ``"validation"``, nor the other way.
        facts: how many of them are in a context, from and to, at least 1.

    Raises:
        EvaluationError: numbers below 1, facts from more than to, or an unknown split.
    """
    if n < 1 or not 1 <= facts[0] <= facts[1]:
        raise EvaluationError(f"{n} questions about {facts[0]} to {facts[1]} facts: needs at least one of each")
    if split not in ("train", "validation"):
        raise EvaluationError(f"there is no split {split!r}; there are train and validation")
    random = Random(f"{split} {seed}")  # noqa: S311
    return [_passage(random, split, random.randint(*facts)) for _ in range(n)]


def _passage(random: Random, split: SquadSplit, n_facts: int) -> Passage:
    people = [_person(random, split) for _ in range(n_facts // 2 + 1)]
    chosen = random.sample([(person, relation) for person in people for relation in _RELATIONS], n_facts)
    facts = [(person, relation, relation.draw(random, split)) for person, relation in chosen]
    names = people + [value for _, _, value in facts]
    if len(set(names)) < len(names):
        return _passage(random, split, n_facts)
    context = " ".join(random.choice(relation.sentences).format(p=person, v=value) for person, relation, value in facts)
    person, relation, value = random.choice(facts)
    if random.random() < 0.25:
        return Passage(context, random.choice(relation.inverse).format(v=value), (person,))
    return Passage(context, random.choice(relation.questions).format(p=person), (value,))


def _of_split(draw: Callable[[], str], split: SquadSplit) -> str:
    """The first drawn name that belongs to the split; which one a name belongs to is its own property."""
    while True:
        name = draw()
        is_validation = hashlib.sha256(name.encode()).digest()[0] % _VALIDATION_SHARE == 0
        if is_validation == (split == "validation"):
            return name


def _syllable(random: Random) -> str:
    return random.choice(_ONSETS) + random.choice(_VOWELS)


def _person(random: Random, split: SquadSplit) -> str:
    return _of_split(lambda: f"{_syllable(random)}{_syllable(random)}{random.choice(_CODAS)}".capitalize(), split)


def _place(random: Random, split: SquadSplit) -> str:
    return _of_split(lambda: f"{_syllable(random)}{_syllable(random)}{random.choice(_ENDINGS)}".capitalize(), split)


def _title(random: Random, split: SquadSplit) -> str:
    return _of_split(lambda: f"The {random.choice(_ADJECTIVES)} {random.choice(_NOUNS)}", split)


def _date(random: Random, _split: SquadSplit) -> str:
    return f"{random.choice(_MONTHS)} {random.randint(1700, 1999)}"


_RELATIONS = (
    _Relation(
        ("{p} was born in {v}.", "{v} is where {p} was born.", "The birthplace of {p} is {v}."),
        ("Where was {p} born?", "What is the birthplace of {p}?"),
        ("Who was born in {v}?", "Whose birthplace is {v}?"),
        _place,
    ),
    _Relation(
        ("{p} lived in {v} for years.", "For many years {p} lived in {v}.", "{v} was the home of {p}."),
        ("Where did {p} live?", "What was the home of {p}?"),
        ("Who lived in {v}?", "Whose home was {v}?"),
        _place,
    ),
    _Relation(
        ("{p} wrote {v}.", "{v} was written by {p}.", "The book {v} is by {p}."),
        ("What did {p} write?", "Which book is by {p}?"),
        ("Who wrote {v}?", "By whom is the book {v}?"),
        _title,
    ),
    _Relation(
        ("{p} married in {v}.", "In {v} {p} married.", "The wedding of {p} was in {v}."),
        ("When did {p} marry?", "When was the wedding of {p}?"),
        ("Who married in {v}?", "Whose wedding was in {v}?"),
        _date,
    ),
    _Relation(
        ("{p} learned from {v}.", "{v} was the teacher of {p}.", "The teacher of {p} was {v}."),
        ("From whom did {p} learn?", "Who was the teacher of {p}?"),
        ("Who learned from {v}?", "Whose teacher was {v}?"),
        _person,
    ),
)
