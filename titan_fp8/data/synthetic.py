"""An endless, made-up language to train on without files and without a network.

A small grammar writes short stories: a few people, places and things, verbs that agree with their subjects, pronouns
that refer back, numbers that are counted up, days that follow each other. A small model learns the letters in a few
steps, the words in some tens, and then goes on improving on what takes context: agreement, reference, the next
number. So the loss falls fast at first and keeps falling, which is what a first run and a comparison of two number
formats should show.

A story is a function of integers and nothing else, so any one of them can be written at any time, on any machine:
there is no state to save.
"""

from collections.abc import Sequence
from typing import TypeVar

from titan_fp8.data.permutation import mix

T = TypeVar("T")

_PEOPLE = (("Ada", "she"), ("Ben", "he"), ("Clara", "she"), ("David", "he"), ("Emma", "she"), ("Felix", "he"))
_PLACES = ("garden", "market", "harbour", "library", "kitchen", "station", "forest")
_THINGS = (
    ("apple", "apples"), ("book", "books"), ("key", "keys"), ("lamp", "lamps"),
    ("letter", "letters"), ("stone", "stones"), ("cup", "cups"), ("boat", "boats"),
)  # fmt: skip
_ADJECTIVES = ("red", "old", "small", "heavy", "bright", "broken", "green", "quiet")
_VERBS = (
    ("finds", "find"), ("carries", "carry"), ("sees", "see"), ("paints", "paint"), ("sells", "sell"), ("hides", "hide"),
)  # fmt: skip
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class _Dice:
    """A stream of choices that depends on a key only, and not on the version of Python's `random`."""

    def __init__(self, key: int) -> None:
        self._key = key
        self._throws = 0

    def below(self, count: int) -> int:
        self._throws += 1
        return mix(self._key, self._throws) * count >> 64

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]


def story(*key: int) -> str:
    """The story of a key: 4 to 11 sentences, about 150 to 500 characters of ASCII."""
    dice = _Dice(mix(*key))
    first, second = dice.below(len(_PEOPLE)), dice.below(len(_PEOPLE) - 1)
    cast = (_PEOPLE[first], _PEOPLE[second if second < first else second + 1])
    place, day = dice.pick(_PLACES), dice.below(len(_DAYS))
    sentences = [f"On {_DAYS[day]} {cast[0][0]} and {cast[1][0]} meet in the {place}."]
    for _ in range(3 + dice.below(8)):
        kind = dice.below(6)
        if kind == 5:
            day = (day + 1) % len(_DAYS)
            sentences.append(f"Then it is {_DAYS[day]}.")
        else:
            sentences.append(_SENTENCES[kind](dice, cast, place))
    return " ".join(sentences)


_Cast = tuple[tuple[str, str], tuple[str, str]]


def _acts(dice: _Dice, cast: _Cast, place: str) -> str:
    name, pronoun = dice.pick(cast)
    thing, adjective, verb = dice.pick(_THINGS)[0], dice.pick(_ADJECTIVES), dice.pick(_VERBS)[0]
    return f"{name} {verb} the {adjective} {thing}, and {pronoun} {dice.pick(_VERBS)[0]} it in the {place}."


def _act_together(dice: _Dice, cast: _Cast, place: str) -> str:
    things, adjective = dice.pick(_THINGS)[1], dice.pick(_ADJECTIVES)
    return f"{cast[0][0]} and {cast[1][0]} {dice.pick(_VERBS)[1]} the {adjective} {things}."


def _counts(dice: _Dice, cast: _Cast, place: str) -> str:
    start, length = dice.below(8), 2 + dice.below(3)
    counted = ", ".join(_NUMBERS[start : start + length])
    return f"{dice.pick(cast)[0]} counts the {dice.pick(_THINGS)[1]}: {counted}."


def _has(dice: _Dice, cast: _Cast, place: str) -> str:
    number = dice.below(len(_NUMBERS))
    return f"There {'is' if number == 0 else 'are'} {_NUMBERS[number]} {dice.pick(_THINGS)[number > 0]} in the {place}."


def _asks(dice: _Dice, cast: _Cast, place: str) -> str:
    speaker = dice.below(2)
    asker, answerer = cast[speaker][0], cast[1 - speaker][0]
    thing = dice.pick(_THINGS)[0]
    return f'"Where is the {thing}?" asks {asker}. "The {thing} is in the {place}," says {answerer}.'


_SENTENCES = (_acts, _act_together, _counts, _has, _asks)
