"""Where the translator looks as it writes: how much of the source's month it sees as the English month begins, and maps
of dates that training never saw.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor

import torch_attn
from dates import LANGUAGES, Sentence, decode, sources, targets
from panels import draw_panels
from translator import Translator


def maps(model: Translator, sentences: list[Sentence]) -> Tensor:
    """(sentences, LONGEST_TARGET, LONGEST_SOURCE): attention to the source in the last layer, the mean of its heads."""
    with torch.no_grad(), torch_attn.record_attention(model, layers="*.multihead_attn", heads="mean") as record:
        model(sources(sentences), targets(sentences))
    return record.last_maps()[-1]


def on_the_month(weights: Tensor, sentences: list[Sentence]) -> tuple[float, float]:
    """The share of the attention that is on the source's month when the English month's first letter is chosen, and
    the month's share of the characters, which attention to all alike would give it; means over the sentences.
    """
    shares, even = [], []
    for sentence, one in zip(sentences, weights, strict=True):
        month = sentence.month_place()
        shares.append(one[sentence.month_place(in_target=True).start, month].sum().item())
        even.append((month.stop - month.start) / len(sentence.source))
    return sum(shares) / len(sentences), sum(even) / len(sentences)


def draw(model: Translator, sentences: list[Sentence], folder: Path) -> Path:
    """One map a sentence, from left to right: its characters run along the top, those of its translation down."""
    translations = decode(model.translate(sources(sentences)))
    weights = maps(model, sentences)

    def draw_each(axes: list[Axes], style: str) -> None:
        for axis, sentence, translation, one in zip(axes, sentences, translations, weights, strict=True):
            text = sentence.source
            torch_attn.plot.alignment(
                one[: len(translation), : len(text)],
                list(text),
                list(translation),
                title=f"{LANGUAGES[sentence.language]} to English",
                source_label=text,
                target_label=translation,
                style=style,
                ax=axis,
            )

    return draw_panels(draw_each, len(sentences), (6.6 * len(sentences), 6.4), folder, "translation")
