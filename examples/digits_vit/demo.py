"""`make demo`: trains one vision transformer twice from the same seed, with stock nn.MultiheadAttention and with
torch_attn's, shows that both learn the same, and takes the trained model to C++ and to two pictures. A third training,
with weights that depend on the patches' places alone, says what attention is worth here.
"""

import argparse
import sys
from pathlib import Path

import torch

import attention_figure
import cpp_check
import rollout_figure
from model import VisionTransformer
from torch_attn import replace_mha
from training import Digits, History, train

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
from fixed_mixing import fix_mixing  # noqa: E402

ENOUGH = 0.93  # test accuracy that the demo asks of itself


def print_table(stock: History, ours: History) -> None:
    print("\n        training loss                           test accuracy")
    print("epoch   stock      torch_attn  difference       stock    torch_attn")
    rows = zip(stock.loss, ours.loss, stock.accuracy, ours.accuracy, strict=True)
    for epoch, (stock_loss, our_loss, stock_accuracy, our_accuracy) in enumerate(rows, start=1):
        print(
            f"{epoch:5}   {stock_loss:.6f}   {our_loss:.6f}    {our_loss - stock_loss:+.1e}       "
            f"{stock_accuracy:6.2%}   {our_accuracy:6.2%}"
        )
    print(f"\nseconds of training: stock {stock.seconds:.1f}, torch_attn {ours.seconds:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args()
    digits = Digits.load()
    VisionTransformer()(digits.train_images).sum().backward()  # threads start up here, on nobody's clock

    torch.manual_seed(options.seed)
    model = VisionTransformer()
    stock = train(model, digits, options.epochs, options.seed, "stock     ")

    torch.manual_seed(options.seed)
    model = VisionTransformer()
    replace_mha(model)  # the only line that differs
    ours = train(model, digits, options.epochs, options.seed, "torch_attn")

    torch.manual_seed(options.seed)
    fixed_model = VisionTransformer()
    fix_mixing(fixed_model.encoder, fixed_model.positions.size(1))
    fixed = train(fixed_model, digits, options.epochs, options.seed, "fixed     ")

    print_table(stock, ours)
    accuracy = ours.accuracy[-1]
    print(f"test accuracy without attention, its weights fixed by the patches' places: {fixed.accuracy[-1]:.2%}")
    if accuracy < ENOUGH:
        raise SystemExit(f"the test accuracy is {accuracy:.2%}, and the demo asks for {ENOUGH:.0%}")

    print("\nC++ (the first time, building examples/cpp takes half a minute):", flush=True)
    print(cpp_check.classify(*cpp_check.save(model, digits.test_images, options.out)))

    picture = options.out / "attention.png"
    attention_figure.draw(model, digits.test_images, digits.test_labels, picture)
    print(f"\nattention over the patches: {picture}")
    rollout = rollout_figure.draw(model, digits.test_images, digits.test_labels, options.out)
    print(f"through all layers: {rollout}")


if __name__ == "__main__":
    main()
