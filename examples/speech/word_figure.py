"""The picture of the demo: which frames the listener attends, and where the word is."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor

import torch_attn
from clips import SECONDS, Clips
from listener import Listener
from panels import draw_panels
from torch_attn import plot
from words import RATE, WORDS

SPAN = {"light": "#1b7f3b", "dark": "#7ddc8a"}


def frame_attention(model: Listener, clips: Clips) -> Tensor:
    """(N, frames), the mean of the heads."""
    with torch.no_grad(), torch_attn.record_attention(model, heads="mean") as record:
        model(clips.spectrograms)
    return record.maps["attention"][0][:, 0]


def inside(weights: Tensor, spans: Tensor) -> Tensor:
    """(N,): the share of the attention on frames whose middle lies in the word's span."""
    middles = (torch.arange(weights.size(1)) + 0.5) * SECONDS / weights.size(1)
    within = (middles >= spans[:, :1]) & (middles <= spans[:, 1:])
    return (weights * within).sum(1)


def draw(model: Listener, clips: Clips, folder: Path) -> Path:
    """A spectrogram for each clip, side by side; lines mark where the word begins and ends."""
    weights = frame_attention(model, clips)
    with torch.no_grad():
        said = model(clips.spectrograms).argmax(1)

    def draw_each(axes: list[Axes], style: str) -> None:
        for clip, axis in enumerate(axes):
            word, answer = WORDS[clips.labels[clip]], WORDS[said[clip]]
            plot.spectrogram_overlay(
                clips.spectrograms[clip],
                weights[clip],
                seconds=SECONDS,
                title=f"“{word}”, {clips.decibels[clip]:.0f} dB above the noise: heard “{answer}”",
                style=style,
                ax=axis,
            )
            axis.set_ylabel(f"mel band, up to {RATE / 2000:.0f} kHz")
            axis.set_xlabel("time (s); the word lies between the lines")
            for second in clips.spans[clip].tolist():
                axis.axvline(second, color=SPAN[style], linewidth=1.6)

    return draw_panels(draw_each, len(clips.labels), (5.6 * len(clips.labels), 4), folder, "speech")
