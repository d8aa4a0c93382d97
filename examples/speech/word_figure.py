"""The picture of the demo: which frames the listener attends, and where the word is."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import torch_attn
from clips import SECONDS, Clips
from listener import Listener
from torch_attn import plot
from words import RATE, WORDS

matplotlib.use("Agg")  # draws into a file, so no screen is needed
from matplotlib import pyplot  # noqa: E402

BACKGROUND = {"light": "#ffffff", "dark": "#10131a"}
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


def draw(model: Listener, clips: Clips, file: Path, style: str = "light") -> None:
    """A spectrogram for each clip, side by side."""
    count = len(clips.labels)
    weights = frame_attention(model, clips)
    said = model(clips.spectrograms).argmax(1)
    figure, axes = pyplot.subplots(
        1, count, figsize=(5.6 * count, 4), layout="constrained", facecolor=BACKGROUND[style], squeeze=False
    )
    for clip, axis in enumerate(axes[0]):
        word, answer = WORDS[clips.labels[clip]], WORDS[said[clip]]
        plot.spectrogram_overlay(
            clips.spectrograms[clip],
            weights[clip],
            seconds=SECONDS,
            title=f"“{word}”, {clips.decibels[clip]:.0f} dB above the noise; heard “{answer}”",
            style=style,
            ax=axis,
        )
        axis.set_ylabel(f"mel band (of {RATE // 2} Hz)")
        for second in clips.spans[clip].tolist():
            axis.axvline(second, color=SPAN[style], linewidth=1.6)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
