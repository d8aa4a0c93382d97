"""`make glimpses`: a model that may read three small patches of a large canvas learns where to look.

Trained by REINFORCE, by the straight-through gradient, and, to compare, with patches chosen at random.
"""

import argparse
from pathlib import Path

import torch

import glimpse_figure
from canvas import CANVAS, Canvases, Painter
from glimpse_model import PATCH, PLACES, RANDOM, GlimpseModel
from glimpse_training import evaluate, train

NAMES = {"reinforce": "REINFORCE", "straight_through": "straight-through", RANDOM: "random"}
ENOUGH = 0.85  # test accuracy that the demo asks of REINFORCE
FAR_BELOW = 0.50  # and the most that it allows the random choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    painter, test = Painter(train=True), Painter(train=False).every_digit(times=4, seed=1)

    models, seconds = {}, {}
    for estimator, name in NAMES.items():
        torch.manual_seed(options.seed)
        models[name] = GlimpseModel(estimator)
        seconds[name] = train(models[name], painter, options.steps, options.seed, f"{name:16}")

    glimpses = models["REINFORCE"].queries.size(2)
    print(f"\n{glimpses} of {PLACES**2} patches are read: {glimpses * PATCH**2 / CANVAS**2:.0%} of the pixels at most.")
    print(f"\ntest canvases ({len(test.labels)})                answered rightly   digit found   seconds of training")
    results = {name: evaluate(model, test) for name, model in models.items()}
    for name, result in results.items():
        print(f"{name:33} {result.accuracy:15.1%} {result.found:13.1%} {seconds[name]:15.0f}")
    models["REINFORCE"].estimator = RANDOM
    blind = evaluate(models["REINFORCE"], test)
    models["REINFORCE"].estimator = "reinforce"
    print(f"{'REINFORCE, tested at random':33} {blind.accuracy:15.1%} {blind.found:13.1%}")

    picture = options.out / "glimpses.png"
    rows = torch.tensor([(test.labels == digit).nonzero()[0, 0] for digit in range(10)])
    glimpse_figure.draw(models, Canvases(test.images[rows], test.labels[rows], test.corners[rows]), picture)
    print(f"\nthe patches that were read: {picture}")

    learned, at_random = results["REINFORCE"].accuracy, results["random"].accuracy
    if learned < ENOUGH:
        raise SystemExit(f"REINFORCE answers {learned:.1%} rightly, and the demo asks for {ENOUGH:.0%}")
    if at_random > FAR_BELOW:
        raise SystemExit(f"the random choice answers {at_random:.1%} rightly: the task is too easy")


if __name__ == "__main__":
    main()
