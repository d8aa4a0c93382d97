"""Recognises ten spoken words in noise, from voices and speeds that training never heard, beside the same model without
attention, and draws which moments it listens to. The words are spoken by espeak-ng:

    apt-get install espeak-ng
    python examples/speech/demo.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
import word_figure  # noqa: E402
from clips import LOUDEST, QUIETEST, SECONDS, Clips, make_clips  # noqa: E402
from gallery import options, save_scripted  # noqa: E402
from listener import STEPS, Listener, right, train  # noqa: E402
from words import TEST, TRAIN, WORDS, spoken_once  # noqa: E402

ENOUGH = 0.90  # accuracy that the demo asks of itself
BAND = 5.0  # decibels
DRAWN = ("left", "stop")


def choose(clips: Clips, rows: torch.Tensor) -> Clips:
    return Clips(*(each[rows] for each in vars(clips).values()))


def main() -> None:
    chosen = options(__doc__, __file__, steps=STEPS, words=80)
    torch.set_num_threads(1)  # the tensors are too small to share
    start = time.process_time()
    trained_on = spoken_once(TRAIN, chosen.words, 0, "words to train ", chosen.out / "train_words.pt")
    unheard = spoken_once(TEST, chosen.words, 1, "words to test  ", chosen.out / "test_words.pt")
    test = make_clips(unheard, torch.arange(len(unheard.waves)), torch.Generator().manual_seed(2))

    models = {}
    for name, attends in (("attention", True), ("mean of frames", False)):
        torch.manual_seed(chosen.seed)
        models[name] = Listener(attends=attends)
        train(models[name], trained_on, chosen.seed, chosen.steps, f"{name:15}")
    correct = {name: right(model, test) for name, model in models.items()}

    print(f"\n{len(test.labels)} clips of {SECONDS:.0f} s, of voices, speeds and pitches that training never heard:")
    print(f"  {'word above the noise by':28}{'attention':>10}{'mean of frames':>16}")
    for low in range(int(QUIETEST), int(LOUDEST), int(BAND)):
        band = (test.decibels >= low) & (test.decibels < low + BAND)
        shares = [each[band].float().mean().item() for each in correct.values()]
        print(f"  {low:3} to {low + BAND:3.0f} dB{'':15}{shares[0]:10.1%}{shares[1]:16.1%}")
    accuracy, baseline = (each.float().mean().item() for each in correct.values())
    print(f"  {'all':28}{accuracy:10.1%}{baseline:16.1%}")

    model = models["attention"]
    listens = word_figure.inside(word_figure.frame_attention(model, test), test.spans).mean()
    spoken = ((test.spans[:, 1] - test.spans[:, 0]) / SECONDS).mean()
    print(f"\n{listens:.0%} of the attention lies in the word's own span, which is {spoken:.0%} of a clip")

    loaded = save_scripted(model, chosen.out / "listener.pt")
    with torch.no_grad():
        difference = (loaded(test.spectrograms) - model(test.spectrograms)).abs().max().item()
    print(f"saved with TorchScript and loaded again: logits differ by at most {difference:.0e}")
    rows = [next(i for i, label in enumerate(test.labels.tolist()) if WORDS[label] == word) for word in DRAWN]
    picture = word_figure.draw(model, choose(test, torch.tensor(rows)), chosen.out)
    print(f"the moments that it listens to: {picture}")
    print(f"minutes of one core: {(time.process_time() - start) / 60:.1f}")
    if difference > 1e-4:
        raise SystemExit("the loaded model says something else")
    if accuracy < ENOUGH:
        raise SystemExit(f"the accuracy is {accuracy:.1%}, and the demo asks for {ENOUGH:.0%}")


if __name__ == "__main__":
    main()
