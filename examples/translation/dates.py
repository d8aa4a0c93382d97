"""The data: dates as twelve languages write them, from Unicode's CLDR by way of Babel, and their English.

A test date's year occurs in no training date, and neither does its day of the year ("17 March"), in no language.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import date, timedelta

import torch
from babel.dates import format_date
from torch import Tensor

LANGUAGES = {
    "cs": "Czech",
    "de": "German",
    "el": "Greek",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "hu": "Hungarian",
    "lt": "Lithuanian",
    "pl": "Polish",
    "ru": "Russian",
    "tr": "Turkish",
    "uk": "Ukrainian",
}
ENGLISH = "en"
FIRST_YEAR, YEARS = 1600, 800  # with two centuries, digits are learned by heart, a year at a time
HELD_OUT = 0.2  # of the years, and of the days of a year

PADDING, START = "\0", "\1"
# Every weekday, month and digit of every language is in the dates of one year and its number.
CHARACTERS = (
    PADDING
    + START
    + "".join(
        sorted(
            set("0123456789").union(
                *(
                    format_date(date(2026, 1, 1) + timedelta(days), "full", locale=language)
                    for language in (ENGLISH, *LANGUAGES)
                    for days in range(365)
                )
            )
        )
    )
)
NUMBER = {character: number for number, character in enumerate(CHARACTERS)}
LONGEST_SOURCE, LONGEST_TARGET = 40, 30  # characters, of which the target's last is padding: the text has ended


@dataclass(frozen=True)
class Sentence:
    """A date in one language: "2026. március 17., kedd"."""

    day: date
    language: str

    @property
    def source(self) -> str:
        """CLDR's full form."""
        return format_date(self.day, "full", locale=self.language)

    @property
    def target(self) -> str:
        return format_date(self.day, "full", locale=ENGLISH)

    def month_place(self, in_target: bool = False) -> slice:
        """The characters of the month's name."""
        text, language = (self.target, ENGLISH) if in_target else (self.source, self.language)
        name = format_date(self.day, "MMMM", locale=language)
        start = text.index(name)
        return slice(start, start + len(name))


class Calendar:
    """The days of eight centuries, split by year and by day of the year; days with one of them held out are unused."""

    def __init__(self) -> None:
        draw = random.Random(0)
        first = date(FIRST_YEAR, 1, 1)
        every_day = [first + timedelta(days) for days in range((date(FIRST_YEAR + YEARS, 1, 1) - first).days)]
        of_the_year = sorted({(day.month, day.day) for day in every_day})
        years = set(draw.sample(range(FIRST_YEAR, FIRST_YEAR + YEARS), round(HELD_OUT * YEARS)))
        days = set(draw.sample(of_the_year, round(HELD_OUT * len(of_the_year))))
        held_out = [(day.year in years) + ((day.month, day.day) in days) for day in every_day]
        self.train = [day for day, count in zip(every_day, held_out, strict=True) if count == 0]
        self.test = [day for day, count in zip(every_day, held_out, strict=True) if count == 2]

    def training_batch(self, size: int, draw: random.Random) -> list[Sentence]:
        return [Sentence(draw.choice(self.train), draw.choice(list(LANGUAGES))) for _ in range(size)]

    def test_sentences(self, a_language: int) -> list[Sentence]:
        """So many unseen dates of each language, the same ones at every call."""
        draw = random.Random(1)
        return [Sentence(day, language) for language in LANGUAGES for day in draw.sample(self.test, a_language)]


def encode(texts: list[str], length: int) -> Tensor:
    """(len(texts), length) numbers of characters, padded at the end."""
    return torch.tensor([[NUMBER[character] for character in text.ljust(length, PADDING)] for text in texts])


def decode(numbers: Tensor) -> list[str]:
    """The texts of (count, length), each up to its first padding."""
    return ["".join(CHARACTERS[number] for number in row).split(PADDING)[0] for row in numbers.tolist()]


def sources(sentences: list[Sentence]) -> Tensor:
    return encode([sentence.source for sentence in sentences], LONGEST_SOURCE)


def targets(sentences: list[Sentence]) -> Tensor:
    return encode([sentence.target for sentence in sentences], LONGEST_TARGET)
