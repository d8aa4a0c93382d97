"""The pieces of the demo in examples/healthcare, and a few steps of its training."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torch_attn
from feature_model import FeatureModel, right, train
from gallery import save_scripted
from importance import (
    accuracy_without,
    agreement,
    attention_importance,
    column_sums,
    in_a_model,
    permutation_importance,
    rank_correlation,
)
from tests.examples.conftest import EXAMPLES, assert_pictures
from tumours import FOLDS, Tumours

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tumours() -> Tumours:
    return Tumours()


class SecondColumn(nn.Module):
    """Knows that a tumour is malignant where the second measurement is above 0, and looks at nothing else."""

    def forward(self, values: Tensor) -> Tensor:
        return 4 * values[:, 1]


def test_each_tumour_is_tested_once_by_a_model_that_has_not_seen_it(tumours: Tumours) -> None:
    folds = list(tumours.folds(seed=0))
    assert len(folds) == FOLDS
    assert sum(len(fold.test_values) for fold in folds) == len(tumours.values) == 569
    assert sum(int(fold.test_malignant.sum()) for fold in folds) == tumours.malignant.sum() == 212
    for fold in folds:
        assert len(fold.train_values) + len(fold.test_values) == 569
        torch.testing.assert_close(fold.train_values.mean(0), torch.zeros(30), rtol=0, atol=1e-4)
        torch.testing.assert_close(fold.train_values.std(0), torch.ones(30), rtol=0, atol=1e-4)
        assert not (fold.test_values[:, None] == fold.train_values[None]).all(2).any()


@pytest.mark.parametrize("attends", [True, False], ids=["attention", "without"])
def test_model_learns_and_saves_as_it_is(attends: bool, tumours: Tumours, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fold = next(tumours.folds(seed=0))
    model = FeatureModel(30, attends=attends)
    calls = torch.ops.torch_attn.kernel_calls()
    train(model, fold, seed=0, steps=40)
    assert torch.ops.torch_attn.kernel_calls() > calls
    assert right(model, fold.train_values, fold.train_malignant).float().mean() > 0.85, "always benign is right in 63 %"
    loaded = save_scripted(model, tmp_path / "model.pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(fold.test_values), model(fold.test_values))


def test_without_attention_a_measurement_acts_by_itself(tumours: Tumours) -> None:
    """Then the rest of the table does not change what a change of one measurement adds to the mean of tokens."""
    values = tumours.values[:2].clone()
    values = (values - tumours.values.mean(0)) / tumours.values.std(0)
    changed = values.clone()
    changed[:, 3] = 1.5
    values[:, 3] = 0.0
    changes = {}
    for attends in (True, False):
        torch.manual_seed(0)
        model = FeatureModel(30, attends=attends).eval()
        with torch.no_grad():
            step = model(changed) - model(values)
        changes[attends] = (step[0] - step[1]).abs().item()
    assert changes[False] < 1e-6 < 1e-4 < changes[True]


def test_attention_is_read_off_the_maps(tumours: Tumours) -> None:
    model = FeatureModel(30).eval()
    values = tumours.values[:20] / tumours.values.std(0)
    with torch.no_grad(), torch_attn.record_attention(model) as record:
        model(values)
    maps = torch.stack(record.last_maps()).mean((0, 1, 2))  # (31, 31)
    for importance, expected in ((attention_importance, maps[0, 1:]), (column_sums, maps.sum(0)[1:])):
        found = importance(model, values)
        torch.testing.assert_close(found, expected / expected.sum())
        assert found.sum() == pytest.approx(1)


def test_permutation_and_erasure_find_the_column_that_a_model_uses() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 5, generator=generator)
    malignant = (values[:, 1] > 0).float()
    model = SecondColumn()
    before = values.clone()
    rises = permutation_importance(model, values, malignant, seed=0)
    assert torch.equal(values, before)
    assert rises[1] > 1
    torch.testing.assert_close(rises[[0, 2, 3, 4]], torch.zeros(4))
    assert accuracy_without(model, values, malignant, torch.tensor([0, 2])) == 1.0
    assert accuracy_without(model, values, malignant, torch.tensor([1])) == (malignant == 0).float().mean()


def test_rank_correlation_is_spearmans() -> None:
    x = torch.randn(30)
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    y = torch.randn(30)
    ranks = [sum(other < one for other in z.tolist()) for z in (x, y) for one in z.tolist()]
    squares = sum((a - b) ** 2 for a, b in zip(ranks[:30], ranks[30:], strict=True))
    assert rank_correlation(x, y) == pytest.approx(1 - 6 * squares / (30 * (30**2 - 1)))
    assert agreement(torch.stack([x, x, -x])) == pytest.approx(-1 / 3)
    assert in_a_model(torch.stack([x, x, -x]), torch.stack([x, x, x])) == pytest.approx(1 / 3)


def test_demo_prints_its_table_and_draws_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step teaches nothing, which the demo must say, and makes permutation importances below 0 to draw."""
    monkeypatch.setattr("sys.argv", ["demo.py", "--steps", "1", "--out", str(tmp_path)])
    monkeypatch.setattr("importance.SHUFFLES", 1)
    monkeypatch.setattr("tumours.FOLDS", 2)
    with pytest.raises(SystemExit, match="the accuracy is .*, and the demo asks for 95%"):
        runpy.run_path(str(EXAMPLES / "healthcare" / "demo.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "accuracy on 569 tumours" in said and "rank correlation of 30 measurements' importances" in said
    assert_pictures(tmp_path, "importance")
