"""Clips: a spoken word somewhere in noise, as a spectrogram; where it is, is known, for we put it there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from words import RATE, Spoken

SECONDS = 2.0
SAMPLES = int(SECONDS * RATE)
WINDOW, HOP = 512, 256  # samples of a spectrogram's column, and from one to the next (12 ms)
COLUMNS = 1 + SAMPLES // HOP
BANDS = 40
QUIETEST, LOUDEST = 0.0, 20.0  # decibels of the word, in its own span, above the noise
STRETCH = 0.15  # at most this much longer or shorter, so deeper or higher, is a word in training
COLOURS = (0.0, 0.5, 1.0)  # white to pink: noise whose power falls with the frequency to this exponent


@dataclass
class Clips:
    """spectrograms (N, BANDS, COLUMNS); labels (N); spans (N, 2), the seconds at which the word begins and ends;
    decibels (N).
    """

    spectrograms: Tensor
    labels: Tensor
    spans: Tensor
    decibels: Tensor


def mel_filters() -> Tensor:
    """(BANDS, WINDOW // 2 + 1): triangles that lie evenly on the mel scale (O'Shaughnessy 1987), up to RATE / 2."""
    top = 2595 * torch.log10(torch.tensor(1 + RATE / 2 / 700))
    corners = 700 * (10 ** (torch.linspace(0, float(top), BANDS + 2) / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)
    low, middle, high = (corners[place : place + BANDS, None] for place in range(3))
    return torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)


def log_mel(waves: Tensor) -> Tensor:
    """(N, SAMPLES) -> (N, BANDS, COLUMNS), less each band's mean over the clip; a clip has variance 1."""
    spectrum = torch.stft(waves, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    x = (mel_filters() @ spectrum.abs().square() + 1e-6).log()
    x = x - x.mean(2, keepdim=True)
    return x / x.std((1, 2), keepdim=True)


def noise(count: int, generator: torch.Generator) -> Tensor:
    """(count, SAMPLES), of each clip's own colour, with mean square 1."""
    white = torch.fft.rfft(torch.randn(count, SAMPLES, generator=generator))
    colour = torch.tensor(COLOURS)[torch.randint(len(COLOURS), (count, 1), generator=generator)]
    frequency = torch.arange(white.size(1)).clamp(min=1)
    x = torch.fft.irfft(white * frequency ** (-colour / 2), n=SAMPLES)
    return x / x.square().mean(1, keepdim=True).sqrt()


def make_clips(spoken: Spoken, rows: Tensor, generator: torch.Generator, stretch: float = 0.0) -> Clips:
    """Each of the words ``rows`` at a random place of a clip of its own, in noise of random colour and loudness.

    ``stretch``: how much longer or shorter a word may be played (Ko et al. 2015, "Audio Augmentation for Speech
    Recognition").
    """
    decibels = QUIETEST + (LOUDEST - QUIETEST) * torch.rand(len(rows), generator=generator)
    places = torch.rand(len(rows), generator=generator)
    lengths = 1 + stretch * (2 * torch.rand(len(rows), generator=generator) - 1)
    waves, spans = noise(len(rows), generator), torch.empty(len(rows), 2)
    for clip, row in enumerate(rows.tolist()):
        word = spoken.waves[row]
        if stretch > 0:
            length = int(len(word) * lengths[clip])
            word = torch.nn.functional.interpolate(word.view(1, 1, -1), length, mode="linear").flatten()
        start = int(places[clip] * (SAMPLES - len(word)))
        power = 10 ** (decibels[clip] / 10)
        waves[clip, start : start + len(word)] += word * (power / word.square().mean()).sqrt()
        spans[clip] = torch.tensor([start, start + len(word)]) / RATE
    return Clips(log_mel(waves), spoken.labels[rows], spans, decibels)
