"""Translates dates of twelve languages into English, character by character, beside the same model without attention to
the source, and draws how the months of two languages meet.

    python examples/translation/demo.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
import alignment_figure  # noqa: E402
from dates import LANGUAGES, Calendar, decode, sources, targets  # noqa: E402
from gallery import options, save_scripted  # noqa: E402
from translator import STEPS, Translator, exact, train  # noqa: E402

ENOUGH = 0.85  # of the unseen dates translated exactly, that the demo asks of itself
DRAWN = ("hu", "el")  # one language that writes a date the other way round, one with another alphabet


def main() -> None:
    chosen = options(__doc__, __file__, steps=STEPS, dates=50)
    torch.set_num_threads(1)  # the tensors are too small to share
    start = time.process_time()
    calendar = Calendar()
    unseen = calendar.test_sentences(chosen.dates)

    models = {}
    for name, one_vector in (("attention", False), ("one vector", True)):
        torch.manual_seed(chosen.seed)
        models[name] = Translator(one_vector=one_vector)
        train(models[name], calendar, chosen.seed, chosen.steps, f"{name:10}")
    right = {name: exact(model, unseen).view(len(LANGUAGES), -1).float().mean(1) for name, model in models.items()}

    print(f"\n{len(unseen)} dates, of years and days of the year that no training date has, translated exactly:")
    print(f"  {'':12}{'with attention':>16}{'one vector':>13}")
    for row, language in enumerate(LANGUAGES.values()):
        print(f"  {language:12}{right['attention'][row]:16.0%}{right['one vector'][row]:13.0%}")
    accuracy, baseline = (each.mean().item() for each in right.values())
    print(f"  {'all':12}{accuracy:16.1%}{baseline:13.1%}")

    model = models["attention"]
    examples = [next(sentence for sentence in unseen if sentence.language == language) for language in DRAWN]
    for sentence, said in zip(examples, decode(model.translate(sources(examples))), strict=True):
        print(f"  {sentence.source}  →  {said}")
    share, even = alignment_figure.on_the_month(alignment_figure.maps(model, unseen), unseen)
    print(
        f"\nas the English month begins, {share:.0%} of the last layer's attention is on the source's month, ", end=""
    )
    print(f"which is {even:.0%} of the characters")

    loaded = save_scripted(model, chosen.out / "translator.pt")
    source, target = sources(unseen), targets(unseen)
    with torch.no_grad():
        difference = (loaded(source, target) - model(source, target)).abs().max().item()
        same = torch.equal(loaded.translate(source), model.translate(source))
    print(f"saved with TorchScript and loaded again: logits differ by at most {difference:.0e}, ", end="")
    print(f"{'and no translation does' if same else 'and so do translations'}")
    print(f"where months meet months: {alignment_figure.draw(model, examples, chosen.out)}")
    print(f"minutes of one core: {(time.process_time() - start) / 60:.1f}")
    if difference > 1e-4 or not same:
        raise SystemExit("the loaded model says something else")
    if accuracy < ENOUGH:
        raise SystemExit(f"{accuracy:.1%} are translated exactly, and the demo asks for {ENOUGH:.0%}")


if __name__ == "__main__":
    main()
