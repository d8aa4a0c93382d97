"""Trains a small GPT on Shakespeare's plays, beside the same net whose tokens cannot choose where they look; measures
both on two plays held out, lets the first write, with a key-value cache and without, and draws a head that copies.

    python examples/shakespeare/gpt_demo.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import gpt_figure
from gpt_model import write
from gpt_training import STEPS, bits_per_character, trained, windows
from plays import HELD_OUT, Plays

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
from gallery import options, save_scripted  # noqa: E402

START = "MACBETH\n"
GAIN = 0.02  # bits per character of attention over the baseline that the demo asks of itself


def main() -> None:
    chosen = options(__doc__, __file__, steps=STEPS, tokens=150, plays=36, speeches=3000)
    torch.set_num_threads(1)  # the tensors are too small to share
    start = time.process_time()
    plays = Plays.load(chosen.plays, chosen.speeches)
    names = {True: "attention", False: "fixed mixing"}
    models = {name: trained(plays, looks, chosen.seed, chosen.steps, f"{name:12}") for looks, name in names.items()}
    bits = {name: bits_per_character(model, plays) for name, model in models.items()}

    print(f"\nbits per character of {' and '.join(HELD_OUT)}, which training did not see:")
    print(f"  {'':14}{'all':>8}{'where two tokens come together again':>40}{'elsewhere':>12}")
    for name, (everywhere, repeated, new) in bits.items():
        print(f"  {name:14}{everywhere:8.3f}{repeated:40.3f}{new:12.3f}")

    model = models["attention"]
    begun = plays.encode(START)
    seconds, texts = [], []
    for cached in (True, False):
        before = time.process_time()
        texts.append(write(model, begun, chosen.tokens, chosen.seed, cached))
        seconds.append(time.process_time() - before)
    print(f"\n{plays.decode(texts[0][0])}\n")
    same = "the same tokens" if torch.equal(*texts) else "other tokens"
    print(f"{chosen.tokens} tokens in {seconds[0]:.2f} s with the cache; in {seconds[1]:.2f} s without, {same}")

    unseen = windows(plays)[:4, :-1]
    loaded = save_scripted(model, chosen.out / "gpt.pt")
    with torch.no_grad():
        apart = (loaded(unseen)[0] - model(unseen)[0]).abs().max().item()
    rewritten = write(loaded, begun, chosen.tokens, chosen.seed)
    print(f"scripted, saved and loaded, its logits differ by {apart:.1e}", end="")
    print(f", and it writes {'the same' if torch.equal(rewritten, texts[0]) else 'something else'}")

    head = gpt_figure.find_copying_head(model, plays)
    print(
        f"\nlayer {head.layer + 1}, head {head.head + 1}: {head.share:.0%} of its attention is on what followed ",
        end="",
    )
    print(f"the same token before; such places are {head.chance:.0%} of the text")
    tokens, weights = gpt_figure.map_of_the_sentence(model, plays, head)
    for style in ("light", "dark"):
        gpt_figure.draw(tokens, weights, head, chosen.out / f"gpt_{style}.png", style)
    print(f"its map: {chosen.out / 'gpt_light.png'}")
    print(f"minutes of one core, all in all: {(time.process_time() - start) / 60:.1f}")

    gain = bits["fixed mixing"].everywhere - bits["attention"].everywhere
    if gain < GAIN:
        raise SystemExit(f"attention saves {gain:.3f} bits per character, and the demo asks for {GAIN}")
    if not torch.equal(*texts):
        raise SystemExit("with the cache the model writes other tokens")


if __name__ == "__main__":
    main()
