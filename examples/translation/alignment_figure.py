"""Finds the head that aligns the two languages' months, and draws its maps of dates that training never saw."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from torch import Tensor

import torch_attn
from dates import LANGUAGES, Sentence, decode, sources, targets
from panels import draw_panels
from translator import Translator


class MonthHead(NamedTuple):
    layer: int
    head: int
    share: (
        float  # of the attention, while the month's first letter is chosen, on the source's month: mean over sentences
    )
    chance: float  # the month's share of the source's characters, which even attention would give it


def maps(model: Translator, sentences: list[Sentence]) -> Tensor:
    """(layers, sentences, heads, LONGEST_TARGET, LONGEST_SOURCE): the decoder's attention to the source."""
    with torch.no_grad(), torch_attn.record_attention(model, layers="*.multihead_attn") as record:
        model(sources(sentences), targets(sentences))
    return torch.stack(record.last_maps())


def find_month_head(model: Translator, sentences: list[Sentence]) -> MonthHead:
    """The head that puts most on the source's month when the English month begins."""
    of_all = maps(model, sentences)
    shares, chances = [], []
    for number, sentence in enumerate(sentences):
        month = sentence.month_place()
        begins = sentence.month_place(in_target=True).start
        shares.append(of_all[:, number, :, begins, month].sum(-1))
        chances.append((month.stop - month.start) / len(sentence.source))
    mean = torch.stack(shares).mean(0)
    layer, head = divmod(int(mean.argmax()), mean.size(1))
    return MonthHead(layer, head, mean[layer, head].item(), sum(chances) / len(chances))


def draw(model: Translator, sentences: list[Sentence], chosen: MonthHead, folder: Path) -> Path:
    """One map a sentence, from left to right: its characters run along the top, those of its translation down."""
    weights = maps(model, sentences)[chosen.layer, :, chosen.head]
    translations = decode(model.translate(sources(sentences)))

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
