"""Draws the pictures of docs/maps.md and docs/semantics.md into docs/images; trains small models (three minutes).

    .venv/bin/python docs/make_figures.py [name ...]

The screenshot of the HTML page needs Chromium; without it that picture stays as it is.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = [str(REPOSITORY / "examples" / name) for name in ("digits_vit", "cat_sat_on_the_mat")]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "docs"), *EXAMPLES]

import figure_models as models  # noqa: E402
import semantics_figures  # noqa: E402

import language_model  # noqa: E402
import model as digits_vit  # noqa: E402
import subject_head  # noqa: E402
import training  # noqa: E402
from grammar import encode  # noqa: E402
from tests.plot.chromium import PATH as CHROMIUM  # noqa: E402
from tests.plot.chromium import Chromium  # noqa: E402
from torch_attn import attention_rollout, plot, record_attention, replace_mha  # noqa: E402

IMAGES = REPOSITORY / "docs" / "images"
STYLES = ("light", "dark")
DPI = 100


def save(name: str, draw) -> None:
    for style in STYLES:
        draw(style).savefig(IMAGES / f"{name}_{style}.png", dpi=DPI)


def text() -> None:
    """heatmap at 64 tokens and at 4,096, head_grid, html."""
    document, alphabet = models.read_text()
    model = models.trained_character_model(document, alphabet)
    start = document.index("A vision transformer made of")
    characters = document[start : start + 64]
    maps: list[Tensor] = []
    model(torch.tensor([[alphabet[character] for character in characters]]), maps)
    weights = torch.cat(maps)  # (layers, heads, 64, 64)
    weights_of_long: list[Tensor] = []
    model(torch.tensor([[alphabet[character] for character in document[:4096]]]), weights_of_long)
    long = weights_of_long[-1][0, -1]  # (4096, 4096)

    save("heatmap", lambda style: plot.heatmap(weights[2, 2], list(characters), title="Layer 2, head 2", style=style))
    title = "4,096 characters: last layer, last head"
    save("heatmap_4096", lambda style: plot.heatmap(long, title=title, color_scale="log", style=style))
    save("head_grid", lambda style: plot.head_grid(weights, title="A character model's heads", style=style))
    page = plot.html(weights, list(characters), title="A character model's heads")
    photograph(page, "#query-43")


def photograph(page: plot.Page, pointed_at: str) -> None:
    if CHROMIUM is None:
        print("no Chromium: the picture of the HTML page stays as it is")
        return
    file = page.save(IMAGES / "page.html")
    browser = Chromium(1280, 900)
    try:
        for style in STYLES:
            browser.open(file, style)
            browser.hover(*browser.center(pointed_at))
            browser.screenshot(IMAGES / f"html_{style}.png")
    finally:
        browser.close()
        file.unlink()


def sentence() -> None:
    """The map of one head of "The cat sat on the mat.", its column sums, and rollout."""
    model = language_model.LanguageModel()
    language_model.train(model, seed=0)
    model.eval()
    chosen = subject_head.find_subject_head(model, language_model.held_out())
    words, weights = subject_head.map_of_the_sentence(model, chosen)
    for style in STYLES:
        subject_head.draw(words, weights, chosen, IMAGES / f"cat_sat_on_the_mat_{style}.png", style)

    tokens = encode([words])[:, : len(words)]
    words[0] = words[0].capitalize()
    with record_attention(model, maps=True, statistics=["column_sum"]) as record:
        model(tokens)
    rollout = attention_rollout(record.last_maps())[0]
    title = "What each word is made of after two layers"
    names = {"query_label": "word after two layers", "key_label": "word at the input", "value_label": "share"}
    save("rollout", lambda style: plot.heatmap(rollout, words, title=title, **names, style=style))
    looked_at = record.statistics["layers.layers.1.self_attn"]["column_sum"][-1][0]
    label, title = "sum of the attention weights", "How much each word is looked at"
    save(
        "column_sums",
        lambda style: plot.feature_bars(looked_at, words, sort=False, title=title, value_label=label, style=style),
    )


def digits() -> None:
    """image_overlay."""
    data = training.Digits.load()
    model = replace_mha(digits_vit.VisionTransformer())
    training.train(model, data, epochs=12, seed=0, label="digits")
    model.eval()
    image = data.test_images[int((data.test_labels == 3).nonzero()[0])]
    *before, last = model.encoder.layers
    tokens = model.tokens(image[None])
    for layer in before:
        tokens = layer(tokens)
    tokens = last.norm1(tokens)
    _, weights = last.self_attn(tokens, tokens, tokens)  # (1, 17, 17): the class token, then 4 x 4 patches
    save("image_overlay", lambda style: plot.image_overlay(image, weights[0, 0, 1:], title="A 3, as read", style=style))


def dates() -> None:
    """alignment."""
    model = models.trained_date_model()
    long, short = "17 september 2026", "2026-09-17"
    source = torch.tensor([models.encode(long, models.SOURCE)])
    begun = torch.tensor([models.encode("^" + short[:-1], models.TARGET)])
    predicted, weights = model(source, begun)
    assert predicted.argmax(-1)[0].tolist() == models.encode(short, models.TARGET)
    title = "Rewriting a date"
    save("alignment", lambda style: plot.alignment(weights[0], list(long), list(short), title=title, style=style))


def tones() -> None:
    """spectrogram_overlay, for one query and for three."""
    model = models.trained_tone_model()
    spectrogram, _ = models.tones_in_noise(1)
    _, weights = model(spectrogram)
    axes = {"seconds": 128 * models.FRAMES / models.RATE, "hertz": models.RATE / 2}
    power, maps = spectrogram[0], weights[0]
    title = "What is the second tone?"
    save(
        "spectrogram_frames",
        lambda style: plot.spectrogram_overlay(power, maps[1], title=title, **axes, style=style),
    )
    queries = ["first", "second", "third"]
    title = "Which tones are they?"
    save(
        "spectrogram_queries",
        lambda style: plot.spectrogram_overlay(power, maps, queries, title=title, **axes, style=style),
    )


def table() -> None:
    """feature_bars."""
    tumours = models.Tumours.load()
    model = models.trained_table_model(tumours)
    answers, weights = model(tumours.values)
    print(f"right: {((answers > 0) == tumours.malignant).float().mean():.1%}")
    heads = weights.mean(0)  # (4, 30)
    title = "Measurements that tell a malignant tumour"
    save("feature_bars", lambda style: plot.feature_bars(heads, tumours.names, top=12, title=title, style=style))


def masks() -> None:
    """masks."""
    save("masks", semantics_figures.masks)


def numerics() -> None:
    """numerics."""
    errors = semantics_figures.errors_by_length()
    save("numerics", lambda style: semantics_figures.numerics(style, errors))


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    drawings = {drawing.__name__: drawing for drawing in (text, sentence, digits, dates, tones, table, masks, numerics)}
    for name in sys.argv[1:] or drawings:
        torch.manual_seed(0)
        random.seed(0)
        drawings[name]()


if __name__ == "__main__":
    main()
