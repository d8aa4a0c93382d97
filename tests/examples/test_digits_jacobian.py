"""The Jacobian penalty's pieces, shortened: its value and gradient, a few steps, and the figure."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.func import jacrev

from jacobian_demo import NOISES, accuracies, draw, loss_of, make_model, train
from training import BATCH_SIZE, Digits


def test_the_penalty_and_its_gradient_are_those_of_the_whole_jacobian() -> None:
    model = make_model(dim=8, heads=2, layers=1).double()
    parameters = list(model.parameters())
    images, labels = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 3])
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    loss = loss_of(model, images, labels, weight=0.7) - loss_of(model, images, labels, weight=0.0)

    torch.manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn_like(images).flatten(1)).view_as(images)
    samples = zip(images, direction, strict=True)
    changes = [
        (jacrev(lambda x: model(x[None])[0])(image).flatten(1) @ v.flatten()).square().sum() for image, v in samples
    ]
    wanted = 0.7 * torch.stack(changes).mean()
    torch.testing.assert_close(loss, wanted)
    gradients = [torch.autograd.grad(x, parameters, materialize_grads=True) for x in (loss, wanted)]
    torch.testing.assert_close(*gradients)


def test_a_short_run_ends_with_a_figure(tmp_path: Path) -> None:
    digits = Digits.load()
    digits.train_images, digits.train_labels = (x[: 3 * BATCH_SIZE] for x in (digits.train_images, digits.train_labels))
    calls = torch.ops.torch_attn.kernel_calls()
    results = accuracies(train(digits, weight=0.3, epochs=1, seed=0), digits, seed=0)
    assert torch.ops.torch_attn.kernel_calls() > calls
    assert len(results) == len(NOISES) and all(0 <= x <= 1 for x in results)
    draw(results, results, 0.3, tmp_path / "noise.png")
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")
