"""The language of the example: sentences of a subject, a verb and the place where such a subject is found.

    the old king still waited on the throne .

Which preposition follows the verb, and which place, is decided by the subject alone, whatever the verb is: at the verb,
a model that predicts the next word has to look back at the subject. Optional words before the subject and between it
and the verb move both, so that counting positions does not find it.
"""

import random

import torch
from torch import Tensor

PLACES = {
    "cat": ("on", "mat"),
    "king": ("on", "throne"),
    "frog": ("on", "leaf"),
    "dog": ("in", "kennel"),
    "bird": ("in", "tree"),
    "horse": ("in", "stable"),
    "mouse": ("under", "floor"),
    "fox": ("under", "hedge"),
    "rabbit": ("under", "bush"),
    "guest": ("by", "door"),
    "farmer": ("by", "gate"),
    "child": ("by", "fire"),
}
VERBS = ("sat", "stood", "lay", "slept", "hid", "waited", "rested", "stayed")
OPENINGS = ("today", "yesterday", "then")
ADJECTIVES = ("old", "young", "small", "hungry", "happy", "tired")
ADVERBS = ("still", "often", "quietly", "never")

PADDING = ""
SENTENCE = "the cat sat on the mat ."
WORDS = [PADDING, ".", "the", *PLACES, *VERBS, *OPENINGS, *ADJECTIVES, *ADVERBS]
WORDS += sorted({preposition for preposition, _ in PLACES.values()}) + [place for _, place in PLACES.values()]
NUMBERS = {word: number for number, word in enumerate(WORDS)}
LONGEST = 10  # words of a sentence that has all the optional ones

UNSEEN = ("cat", "sat")  # no training sentence joins the two: what the model does with SENTENCE, it was never shown


def sentence(draw: random.Random) -> list[str]:
    """A random sentence without the unseen pair."""
    while True:
        subject, verb = draw.choice(list(PLACES)), draw.choice(VERBS)
        if (subject, verb) != UNSEEN:
            break
    preposition, place = PLACES[subject]
    words = [draw.choice(OPENINGS)] if draw.random() < 0.3 else []
    words += ["the"] + ([draw.choice(ADJECTIVES)] if draw.random() < 0.5 else []) + [subject]
    words += [draw.choice(ADVERBS)] if draw.random() < 0.3 else []
    return [*words, verb, preposition, "the", place, "."]


def encode(sentences: list[list[str]]) -> Tensor:
    """(batch, LONGEST) word numbers, padded at the end."""
    rows = [[NUMBERS[word] for word in words] + [0] * (LONGEST - len(words)) for words in sentences]
    return torch.tensor(rows)


def find(tokens: Tensor, words: tuple[str, ...]) -> Tensor:
    """(batch): where in each sentence one of ``words`` is."""
    return torch.isin(tokens, torch.tensor([NUMBERS[word] for word in words])).int().argmax(1)
