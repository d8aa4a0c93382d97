"""The pieces of the demo in examples/glimpses, and a few steps of its training instead of a thousand."""

from pathlib import Path

import pytest
import torch
from torch import nn

import glimpse_demo
import glimpse_figure
from canvas import CANVAS, DIGIT, Painter
from glimpse_model import PATCH, PLACES, RANDOM, GlimpseModel, corners
from glimpse_training import evaluate, loss_of, train
from torch_attn import leave_one_out_baseline, reinforce_loss

ESTIMATORS = tuple(glimpse_demo.NAMES)


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter(train=True)


def test_every_digit_lies_whole_on_its_canvas() -> None:
    painter = Painter(train=False)
    canvases = painter.every_digit(times=2, seed=0)
    assert len(canvases.images) == 2 * len(painter.labels)
    assert torch.equal(canvases.labels, painter.labels.repeat(2))
    for image, (y, x), digit in zip(
        canvases.images[:, 0], canvases.corners, painter.digits.repeat(2, 1, 1), strict=True
    ):
        assert (image[y : y + DIGIT, x : x + DIGIT] >= digit).all()


def test_same_seed_paints_the_same_canvases() -> None:
    painter = Painter(train=False)
    first, again, other = (painter.every_digit(times=1, seed=seed).images for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_test_digit_is_in_training(painter: Painter) -> None:
    test = Painter(train=False)
    assert len(test.labels) + len(painter.labels) == 1797
    assert len(torch.cat([test.digits, painter.digits]).unique(dim=0)) == 1797


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_glimpses_are_the_pixels_at_the_chosen_places(estimator: str, training: bool, painter: Painter) -> None:
    images = painter.batch(3, torch.Generator().manual_seed(0)).images
    choice = GlimpseModel(estimator, num_samples=2).train(training).choose(images)
    glimpses, indices = choice.output.squeeze(-3), choice.indices.squeeze(-2)
    assert indices.shape == ((2, 3, 3) if training else (3, 3))
    flat = zip(glimpses.reshape(-1, 3, PATCH, PATCH), corners(indices).reshape(-1, 3, 2), strict=True)
    for number, (patches, places) in enumerate(flat):
        for patch, (y, x) in zip(patches, places, strict=True):
            torch.testing.assert_close(patch, images[number % 3, 0, y : y + PATCH, x : x + PATCH], rtol=0, atol=0)


def test_every_place_of_the_canvas_can_be_read() -> None:
    places = corners(torch.arange(PLACES**2))
    assert places.min() == 0 and places.max() == CANVAS - PATCH
    assert len(places.unique(dim=0)) == PLACES**2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_loss_trains_the_choice_unless_it_is_random(estimator: str, painter: Painter) -> None:
    torch.manual_seed(0)
    model = GlimpseModel(estimator)
    loss, _ = loss_of(model, painter.batch(16, torch.Generator().manual_seed(0)))
    loss.backward()
    choosing = [model.queries, *model.look.parameters()]
    learns = [p.grad is not None and bool(p.grad.any()) for p in choosing]
    # The last bias moves all scores of a query alike.
    assert learns[:-1] == [estimator != RANDOM] * (len(choosing) - 1)
    assert all(p.grad.any() for p in [*model.read.parameters(), *model.answer.parameters()])


def test_reinforce_learns_to_find_the_digit(painter: Painter) -> None:
    """Paid for ink on the brightest glimpse, which needs no reader, it takes 60 steps instead of hundreds."""
    torch.manual_seed(0)
    model = GlimpseModel("reinforce", glimpses=1, num_samples=8)
    generator = torch.Generator().manual_seed(0)
    before = evaluate(model, painter.batch(200, generator)).found
    optimizer = torch.optim.Adam([model.queries, *model.look.parameters()], 0.01)
    for _ in range(60):
        choice = model.train().choose(painter.batch(32, generator).images)
        reward = choice.output.mean((-3, -2, -1))
        loss = reinforce_loss(choice.log_prob, reward, baseline=leave_one_out_baseline(reward))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = evaluate(model, painter.batch(200, generator)).found
    assert before < 0.2 and after > 0.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_runs_and_the_seed_repeats_it(estimator: str, painter: Painter) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = GlimpseModel(estimator)
        train(model, painter, steps=2, seed=0, label="test")
        states.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(states[0], states[1])


def test_demo_prints_its_table_and_draws_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps teach nothing, which the demo must say."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        "sys.argv", ["glimpse_demo.py", "--steps", "2", "--threads", str(threads), "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit, match="REINFORCE answers .* rightly, and the demo asks for 85%"):
        glimpse_demo.main()
    said = capsys.readouterr().out
    assert "3 of 169 patches are read: 19% of the pixels at most." in said
    assert all(f"\n{name} " in said for name in glimpse_demo.NAMES.values())
    assert (tmp_path / "glimpses.png").read_bytes().startswith(b"\x89PNG")


def test_figure_takes_any_number_of_canvases(painter: Painter, tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    glimpse_figure.draw({"untrained": GlimpseModel("reinforce")}, painter.batch(1, torch.Generator()), file)
    assert file.read_bytes().startswith(b"\x89PNG")
