"""Trains a small language model on sentences whose verb needs its subject, shows that the model without attention
cannot predict what follows the verb, and draws where "sat" looks in "The cat sat on the mat."

    python examples/cat_sat_on_the_mat/demo.py
"""

import argparse
import warnings
from pathlib import Path

import torch

from grammar import SENTENCE, WORDS, encode
from language_model import STEPS, LanguageModel, accuracy_at_the_verb, held_out, train
from subject_head import draw, find_subject_head, map_of_the_sentence


def continuation(model: LanguageModel, words: list[str]) -> str:
    """The sentence that the model makes of its beginning."""
    words = list(words)
    while words[-1] != ".":
        with torch.no_grad():
            words.append(WORDS[int(model(encode([words])[:, : len(words)])[0, -1].argmax())])
    return " ".join(words)


def save(model: LanguageModel, file: Path) -> float:
    """Script, save and load the model; the largest difference of what the loaded one says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tokens = held_out(64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated, and its word on a constant in nn.Transformer
        torch.jit.script(model).save(str(file))
        return (torch.jit.load(str(file))(tokens) - model(tokens)).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are too small to share

    torch.manual_seed(options.seed)
    model = LanguageModel()
    train(model, options.seed, options.steps, "with attention   ")
    torch.manual_seed(options.seed)
    alone = LanguageModel(looks_back=False)
    train(alone, options.seed, options.steps, "without attention")
    model.eval()
    alone.eval()

    unseen = held_out()
    print(f"\nthe word after the verb, in {len(unseen)} new sentences:")
    print(f"  with attention     {accuracy_at_the_verb(model, unseen):6.1%} right")
    print(f"  without attention  {accuracy_at_the_verb(alone, unseen):6.1%} right")

    chosen = find_subject_head(model, unseen)
    words, weights = map_of_the_sentence(model, chosen)
    sat, cat = words.index("sat"), words.index("cat")
    print(f"\nlayer {chosen.layer + 1}, head {chosen.head + 1} looks from the verb to the subject: {chosen.share:.1%}")
    print(f"“{SENTENCE}”, never seen in training; “sat” attends to")
    for word, share in zip(words[: sat + 1], weights[sat].tolist(), strict=False):
        print(f"  {word:4} {share:6.1%}")
    print(f"the model goes on from “the cat sat”: {continuation(model, words[: sat + 1])}")
    print(f"scripted, saved and loaded, its logits differ by {save(model, options.out / 'language_model.pt'):.1e}")

    for style in ("light", "dark"):
        draw(words, weights, chosen, options.out / f"cat_sat_on_the_mat_{style}.png", style)
    print(f"\nits map: {options.out / 'cat_sat_on_the_mat_light.png'}")
    if weights[sat].argmax() != cat:
        raise SystemExit("“sat” does not attend most to “cat”: the model has not learned the language")


if __name__ == "__main__":
    main()
