"""The small models whose maps docs/make_figures.py draws: each is trained for seconds, and looks at something real.

Their attention layers are torch_attn.MultiheadAttention, asked for its weights.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional

from torch_attn import MultiheadAttention

REPOSITORY = Path(__file__).parents[1]


def optimize(model: nn.Module, steps: int, rate: float, loss_of_step) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"{type(model).__name__}: loss {loss.item():.3f} after {steps} steps")
    model.eval()


class CharacterModel(nn.Module):
    """Predicts the next character; its positions are ALiBi's biases, so it reads texts longer than those it learned."""

    def __init__(self, characters: int, dim: int = 96, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(characters, dim)
        self.attention = nn.ModuleList(MultiheadAttention(dim, heads, batch_first=True) for _ in range(layers))
        self.feedforward = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.out = nn.Linear(dim, characters)

    def mask(self, batch: int, length: int) -> Tensor:
        """(batch * heads, length, length): Press et al. 2022, "Train Short, Test Long", and what lies ahead hidden."""
        place = torch.arange(length)
        slopes = 2.0 ** -torch.arange(1, 2 * self.heads, 2, dtype=torch.float32)
        bias = slopes[:, None, None] * (place - place[:, None])
        bias = bias.masked_fill(place > place[:, None], -torch.inf)
        return bias.repeat(batch, 1, 1)

    def forward(self, text: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(batch, length) -> (batch, length, characters); the layers' (batch, heads, length, length) go to `maps`."""
        x = self.embedding(text)
        mask = self.mask(*text.shape)
        for attention, feedforward, norm in zip(self.attention, self.feedforward, self.norms, strict=True):
            y = norm(x)
            wanted = maps is not None
            out, weights = attention(y, y, y, attn_mask=mask, need_weights=wanted, average_attn_weights=False)
            if wanted:
                maps.append(weights)
            x = x + out
            x = x + feedforward(x)
        return self.out(x)


def read_text() -> tuple[str, dict[str, int]]:
    """This project's own documents, and its alphabet."""
    files = ("README.md", "CONTRIBUTING.md", "csrc/README.md", "CHANGELOG.md")
    text = "\n".join((REPOSITORY / file).read_text(encoding="utf-8") for file in files)
    return text, {character: place for place, character in enumerate(sorted(set(text)))}


def trained_character_model(text: str, alphabet: dict[str, int], steps: int = 500) -> CharacterModel:
    data = torch.tensor([alphabet[character] for character in text])
    model = CharacterModel(len(alphabet))

    def loss() -> Tensor:
        starts = torch.randint(len(data) - 129, (12,))
        batch = torch.stack([data[start : start + 129] for start in starts.tolist()])
        return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    optimize(model, steps, 3e-3, loss)
    return model


MONTHS = "january february march april may june july august september october november december".split()
SIGNS = {sign: place for place, sign in enumerate("_ abcdefghijklmnopqrstuvwxyz0123456789-^")}
SOURCE, TARGET = 17, 10  # characters of the longest "17 september 2026" and of "2026-09-17"


def random_date() -> tuple[str, str]:
    day, month, year = random.randint(1, 28), random.randrange(12), random.randint(1900, 2099)
    return f"{day} {MONTHS[month]} {year}", f"{year}-{month + 1:02}-{day:02}"


def encode(text: str, length: int) -> list[int]:
    return [SIGNS[sign] for sign in text.ljust(length, "_")]


class DateModel(nn.Module):
    """Rewrites "17 september 2026" as "2026-09-17": an encoder, and a decoder that looks into it with one head."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(SIGNS), dim)
        self.places = nn.Parameter(torch.randn(SOURCE + TARGET, dim) * 0.3)
        self.encoder = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, batch_first=True, norm_first=True)
        self.cross = MultiheadAttention(dim, 1, batch_first=True)
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, len(SIGNS)))

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, SOURCE), (batch, TARGET) -> predicted characters, and the map (batch, TARGET, SOURCE)."""
        memory = self.encoder(self.embedding(source) + self.places[:SOURCE])
        ahead = nn.Transformer.generate_square_subsequent_mask(TARGET)
        query = self.decoder(self.embedding(target) + self.places[SOURCE:], src_mask=ahead, is_causal=True)
        seen, weights = self.cross(query, memory, memory, key_padding_mask=source == 0)
        return self.out(query + seen), weights


def date_batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    dates = [random_date() for _ in range(size)]
    source = torch.tensor([encode(long, SOURCE) for long, _ in dates])
    target = torch.tensor([encode(short, TARGET) for _, short in dates])
    begun = torch.tensor([encode("^" + short[:-1], TARGET) for _, short in dates])
    return source, begun, target


def trained_date_model(steps: int = 700) -> DateModel:
    model = DateModel()

    def loss() -> Tensor:
        source, begun, target = date_batch(48)
        return functional.cross_entropy(model(source, begun)[0].flatten(0, 1), target.flatten())

    optimize(model, steps, 3e-3, loss)
    return model


RATE = 8000  # samples a second
TONES = (600.0, 1200.0, 2000.0, 3000.0)  # hertz
FRAMES = 96


def tones_in_noise(size: int) -> tuple[Tensor, Tensor]:
    """Spectrograms (size, 65, FRAMES) in decibels of three short tones, one after another, in noise; which tones."""
    samples = 128 * (FRAMES - 1)
    time = torch.arange(samples) / RATE
    wave = torch.randn(size, samples)
    which = torch.randint(len(TONES), (size, 3))
    for place in range(3):
        start = (place + 0.2 + 0.5 * torch.rand(size, 1)) * samples / RATE / 3
        inside = (time > start) & (time < start + 0.12)
        wave += inside * torch.sin(2 * torch.pi * torch.tensor(TONES)[which[:, place], None] * time)
    spectrum = torch.stft(wave, 128, 128, window=torch.hann_window(128), return_complex=True)
    return 20 * (spectrum.abs() + 1e-3).log10(), which


class ToneModel(nn.Module):
    """Hears three tones: three learned queries, one for each, attend to the frames."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.frame = nn.Sequential(nn.Linear(65, dim), nn.GELU(), nn.Linear(dim, dim))
        self.places = nn.Parameter(torch.randn(FRAMES, dim) * 0.3)
        self.queries = nn.Parameter(torch.randn(3, dim) * 0.3)
        self.attention = MultiheadAttention(dim, 1, batch_first=True)
        self.out = nn.Linear(dim, len(TONES))

    def forward(self, spectrogram: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, 65, FRAMES) -> which tone for each query (batch, 3, tones), and the map (batch, 3, FRAMES)."""
        frames = self.frame(spectrogram.mT / 20) + self.places
        query = self.queries.expand(len(frames), -1, -1)
        seen, weights = self.attention(query, frames, frames)
        return self.out(seen), weights


def trained_tone_model(steps: int = 300) -> ToneModel:
    model = ToneModel()

    def loss() -> Tensor:
        spectrogram, which = tones_in_noise(48)
        return functional.cross_entropy(model(spectrogram)[0].flatten(0, 1), which.flatten())

    optimize(model, steps, 3e-3, loss)
    return model


@dataclass
class Tumours:
    """scikit-learn's table of breast tumours: 569 rows of 30 measurements, each with mean 0 and variance 1."""

    values: Tensor
    malignant: Tensor
    names: list[str]

    @classmethod
    def load(cls) -> Tumours:
        table = load_breast_cancer()
        values = torch.tensor(table.data, dtype=torch.float32)
        values = (values - values.mean(0)) / values.std(0)
        return cls(values, torch.tensor(table.target) == 0, list(map(str, table.feature_names)))


class TableModel(nn.Module):
    """Each measurement is a token; a learned query attends to those that tell a malignant tumour."""

    def __init__(self, features: int, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.randn(features, dim) * 0.5)
        self.offset = nn.Parameter(torch.randn(features, dim) * 0.5)
        self.query = nn.Parameter(torch.randn(1, 1, dim) * 0.5)
        self.attention = MultiheadAttention(dim, heads, batch_first=True)
        self.out = nn.Linear(dim, 1)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, features) -> malignant or not (batch,), and the map (batch, heads, features)."""
        tokens = values[..., None] * self.slope + self.offset
        query = self.query.expand(len(tokens), -1, -1)
        seen, weights = self.attention(query, tokens, tokens, average_attn_weights=False)
        return self.out(seen).flatten(), weights[:, :, 0]


def trained_table_model(tumours: Tumours, steps: int = 250) -> TableModel:
    model = TableModel(tumours.values.size(1))

    def loss() -> Tensor:
        rows = torch.randint(len(tumours.values), (64,))
        return functional.binary_cross_entropy_with_logits(
            model(tumours.values[rows])[0], tumours.malignant[rows].float()
        )

    optimize(model, steps, 5e-3, loss)
    return model
