"""The demo's pieces, shortened: two epochs instead of twenty-five."""

from pathlib import Path

import pytest
import torch

import attention_figure
import cpp_check
import rollout_figure
from fixed_mixing import fix_mixing
from model import VisionTransformer
from torch_attn import replace_mha
from training import Digits, History, train

Trained = tuple[VisionTransformer, History]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits.load()


def trained(digits: Digits, replace: bool) -> Trained:
    torch.manual_seed(0)
    model = VisionTransformer()
    if replace:
        replace_mha(model)
    return model, train(model, digits, epochs=2, seed=0, label="test")


@pytest.fixture(scope="module")
def ours(digits: Digits) -> Trained:
    return trained(digits, replace=True)


def test_training_agrees_with_stock_attention_to_rounding(digits: Digits, ours: Trained) -> None:
    _, stock = trained(digits, replace=False)
    calls = torch.ops.torch_attn.kernel_calls()
    _, history = ours
    assert history.loss == pytest.approx(stock.loss, rel=1e-5)
    assert history.accuracy == stock.accuracy
    assert torch.ops.torch_attn.kernel_calls() == calls, "the stock model must not use our kernels"


def test_every_layer_uses_the_kernels(digits: Digits) -> None:
    calls = torch.ops.torch_attn.kernel_calls()
    model = VisionTransformer()
    replace_mha(model)
    model(digits.test_images[:2])
    layers = len(model.encoder.layers)
    assert torch.ops.torch_attn.kernel_calls() - calls == layers


def test_scripted_model_gives_the_same_answers_from_cpp(digits: Digits, ours: Trained, tmp_path: Path) -> None:
    model, _ = ours
    said = cpp_check.classify(*cpp_check.save(model, digits.test_images, tmp_path))
    count, layers = len(digits.test_images), len(model.encoder.layers)
    assert said == f"{count} of {count} answers equal Python's ({layers} calls of torch_attn's kernels from C++)"


def test_attention_shares_sum_to_at_most_one(digits: Digits, ours: Trained) -> None:
    weights = attention_figure.class_token_attention(ours[0], digits.test_images[:5])
    assert weights.shape == (5, 4, 16)
    assert (weights >= 0).all()
    assert (weights.sum(dim=2) <= 1 + 1e-6).all()


def test_figure_is_written(digits: Digits, ours: Trained, tmp_path: Path) -> None:
    file = tmp_path / "attention.png"
    attention_figure.draw(ours[0], digits.test_images, digits.test_labels, file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_rollout_shares_what_the_class_token_does_not_keep(digits: Digits, ours: Trained) -> None:
    shares = rollout_figure.class_token_rollout(ours[0], digits.test_images[:5])
    assert shares.shape == (5, 16)
    assert (shares > 0).all()
    kept = 0.5 ** len(ours[0].encoder.layers)  # at least, by the residual connections
    assert (shares.sum(dim=1) <= 1 - kept + 1e-6).all()


def test_rollout_figure_is_written(digits: Digits, ours: Trained, tmp_path: Path) -> None:
    rollout_figure.draw(ours[0], digits.test_images, digits.test_labels, tmp_path)
    for style in ("light", "dark"):
        assert (tmp_path / f"digits_rollout_{style}.png").read_bytes().startswith(b"\x89PNG")


def test_baseline_without_attention_learns(digits: Digits) -> None:
    torch.manual_seed(0)
    model = VisionTransformer()
    fix_mixing(model.encoder, model.positions.size(1))
    history = train(model, digits, epochs=2, seed=0, label="test")
    assert history.loss[1] < history.loss[0]
