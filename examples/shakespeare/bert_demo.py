"""Trains a small masked language model on Shakespeare's plays, beside the same net whose layers mix tokens by their
places alone; measures both on two plays held out, and draws where the first looks from a masked word.

    python examples/shakespeare/bert_demo.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import bert_figure
from bert_training import STEPS, batches, guesses, most_frequent, trained
from plays import HELD_OUT, Plays

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
from gallery import options, save_scripted  # noqa: E402

ENOUGH = 0.25  # of the masked tokens guessed, that the demo asks of itself
GAIN = 0.02  # and so much more than the baseline guesses


def main() -> None:
    chosen = options(__doc__, __file__, steps=STEPS, plays=36, speeches=3000)
    torch.set_num_threads(1)  # the tensors are too small to share
    start = time.process_time()
    plays = Plays.load(chosen.plays, chosen.speeches)
    model = trained(plays, True, chosen.seed, chosen.steps, "attention   ")
    fixed = trained(plays, False, chosen.seed, chosen.steps, "fixed mixing")
    results = {
        "attention": guesses(model, plays),
        "fixed mixing": guesses(fixed, plays),
        "most frequent": most_frequent(plays),
    }
    print(f"\nmasked tokens of {' and '.join(HELD_OUT)}, which training did not see:")
    print(f"  {'':14}{'guessed':>9}{'among five guesses':>21}")
    for name, (first, five) in results.items():
        print(f"  {name:14}{first:9.1%}{five:21.1%}")

    seen, _ = next(batches(plays))
    padded = (seen == 0).float().mean().item()
    loaded = save_scripted(model, chosen.out / "bert.pt")
    with torch.no_grad():
        together, again = model(seen), loaded(seen)
        lengths = (seen != 0).sum(1)
        short = int(lengths.argmin())
        alone = model(seen[short : short + 1, : int(lengths[short])])
    print(f"\nscripted, saved and loaded, its logits differ by {(again - together).abs().max():.1e}")
    apart = (together[short, : alone.size(1)] - alone[0]).abs().max()
    print(f"those of the shortest passage alone and padded, in a batch that is {padded:.0%} padding, by {apart:.1e}")

    print(f"\n{bert_figure.SENTENCE}")
    for word, share in bert_figure.answers(model, plays.encode(bert_figure.SENTENCE), plays):
        print(f"  {word:10}{share:6.1%}")
    for style in ("light", "dark"):
        bert_figure.draw(model, plays, bert_figure.SENTENCE, chosen.out / f"bert_{style}.png", style)
    print(f"where it looks: {chosen.out / 'bert_light.png'}")
    print(f"minutes of one core, all in all: {(time.process_time() - start) / 60:.1f}")

    first, baseline = results["attention"].first, results["fixed mixing"].first
    if first < max(ENOUGH, baseline + GAIN):
        raise SystemExit(
            f"{first:.1%} of the masked tokens are guessed, {baseline:.1%} without attention, and the demo asks for "
            f"{ENOUGH:.0%} and {GAIN:.0%} more than without"
        )


if __name__ == "__main__":
    main()
