"""Tells malignant from benign tumours with a transformer whose tokens are measurements, tests it on each tumour by
cross-validation, and sets what it attends beside what it needs.

    python examples/healthcare/demo.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
import importance  # noqa: E402
import importance_figure  # noqa: E402
from feature_model import STEPS, FeatureModel, right, train  # noqa: E402
from gallery import options, save_scripted  # noqa: E402
from tumours import FOLDS, Tumours  # noqa: E402

ENOUGH = 0.95  # accuracy that the demo asks of itself
TAKEN_AWAY = 5  # measurements, to see what the model does without them
DRAWS = 10  # of measurements at random


def main() -> None:
    chosen = options(__doc__, __file__, steps=STEPS)
    torch.set_num_threads(1)  # the tensors are too small to share
    tumours = Tumours()
    start = time.process_time()

    answers: dict[str, list[torch.Tensor]] = {"attention": [], "without attention": [], "logistic regression": []}
    attended, summed, missed, without = [], [], [], []
    for number, fold in enumerate(tumours.folds(chosen.seed), start=1):
        test = fold.test_values, fold.test_malignant
        seed = FOLDS * chosen.seed + number  # models that begin alike would agree about what they attend
        models = {}
        for name in ("attention", "without attention"):
            torch.manual_seed(seed)
            models[name] = FeatureModel(len(tumours.names), attends=name == "attention")
            train(models[name], fold, seed, chosen.steps, f"fold {number} of {FOLDS}, {name:17}")
            answers[name].append(right(models[name], *test))
        regression = LogisticRegression(max_iter=1000).fit(fold.train_values.numpy(), fold.train_malignant.numpy())
        predicted = torch.from_numpy(regression.predict(fold.test_values.numpy()))
        answers["logistic regression"].append(predicted == fold.test_malignant)

        model = models["attention"]
        attended.append(importance.attention_importance(model, fold.test_values))
        summed.append(importance.column_sums(model, fold.test_values))
        missed.append(importance.permutation_importance(model, *test, seed))
        # Both orders come from the rows that they are tested on, but only the second has seen the rows' answers.
        best = [order[-1].argsort(descending=True)[:TAKEN_AWAY] for order in (attended, missed)]
        anything = [torch.randperm(len(tumours.names))[:TAKEN_AWAY] for _ in range(DRAWS)]
        losses = [importance.accuracy_without(model, *test, features) for features in (*best, *anything)]
        without.append([*losses[:2], sum(losses[2:]) / DRAWS])

    print(f"\naccuracy on {len(tumours.malignant)} tumours, each tested in one of {FOLDS} folds:")
    accuracies = {name: torch.cat(kept).float().mean().item() for name, kept in answers.items()}
    for name, kept in answers.items():
        folds = ", ".join(f"{fold.float().mean():.1%}" for fold in kept)
        print(f"  {name:20} {accuracies[name]:6.1%}   (folds: {folds})")

    attention, columns, permutation = map(torch.stack, (attended, summed, missed))
    print(f"\nrank correlation of {len(tumours.names)} measurements' importances:")
    print(f"  {'':24}{'with permutation importance':^30}{'between':>9}")
    print(f"  {'':24}{'in a model':>15}{'mean of models':>15}{'models':>9}")
    for name, found in (("class token's attention", attention), ("column sums", columns), ("permutation", permutation)):
        in_a_model = importance.in_a_model(found, permutation)
        of_means = importance.rank_correlation(found.mean(0), permutation.mean(0))
        print(f"  {name:24}{in_a_model:15.2f}{of_means:15.2f}{importance.agreement(found):9.2f}")
    losses = torch.tensor(without).mean(0).tolist()
    print(f"accuracy when {TAKEN_AWAY} of the measurements are replaced by their mean:")
    for name, accuracy in zip(("most attended", "most missed when shuffled", "drawn at random"), losses, strict=True):
        print(f"  {name:26} {accuracy:6.1%}")

    loaded = save_scripted(model, chosen.out / "feature_model.pt")
    with torch.no_grad():
        difference = (loaded(tumours.values) - model(tumours.values)).abs().max().item()
    print(f"\nsaved with TorchScript and loaded again: outputs differ by at most {difference:.0e}")
    picture = importance_figure.draw(attention, permutation, tumours.names, chosen.out)
    print(f"attention beside permutation importance: {picture}")
    print(f"minutes of one core: {(time.process_time() - start) / 60:.1f}")
    if difference > 1e-5:
        raise SystemExit("the loaded model says something else")
    if accuracies["attention"] < ENOUGH:
        raise SystemExit(f"the accuracy is {accuracies['attention']:.1%}, and the demo asks for {ENOUGH:.0%}")


if __name__ == "__main__":
    main()
