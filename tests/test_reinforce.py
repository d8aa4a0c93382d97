"""REINFORCE's loss and baselines. Expectations are enumerated over all outcomes of small policies, so that unbiasedness
and variance are checked exactly, without a random draw."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torch_attn
from torch_attn import LearnedBaseline, MovingAverageBaseline, leave_one_out_baseline, reinforce_loss

KEYS = 4
Baseline = Callable[[Tensor], Tensor | None]


def every_estimate(logits: Tensor, rewards: Tensor, samples: int, baseline: Baseline) -> tuple[Tensor, Tensor]:
    """REINFORCE's estimate of ∇ E[R] for each way to draw keys, (ways, KEYS), and the ways' probabilities."""
    estimates, probabilities = [], []
    for keys in itertools.product(range(KEYS), repeat=samples):
        log_prob = logits.log_softmax(-1)[list(keys)].unsqueeze(1)  # (samples, N = 1)
        reward = rewards[list(keys)].unsqueeze(1)
        loss = reinforce_loss(log_prob, reward, baseline=baseline(reward))
        estimates.append(-torch.autograd.grad(loss, logits)[0])
        probabilities.append(log_prob.sum().exp().detach())
    return torch.stack(estimates), torch.stack(probabilities)


def mean_and_variance(estimates: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    mean = (probabilities.unsqueeze(1) * estimates).sum(0)
    return mean, (probabilities * (estimates - mean).square().sum(1)).sum()


def policy() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, rewards far from 0, and the exact gradient of the expected reward."""
    logits = torch.randn(KEYS, dtype=torch.float64, requires_grad=True)
    rewards = 10 + torch.rand(KEYS, dtype=torch.float64)
    return logits, rewards, torch.autograd.grad((logits.softmax(-1) * rewards).sum(), logits)[0]


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize(
    "baseline",
    [lambda reward: None, lambda reward: torch.tensor(3.0), leave_one_out_baseline],
    ids=["none", "constant", "leave_one_out"],
)
def test_mean_over_all_draws_is_the_exact_gradient(samples: int, baseline: Baseline) -> None:
    logits, rewards, exact = policy()
    mean, _ = mean_and_variance(*every_estimate(logits, rewards, samples, baseline))
    torch.testing.assert_close(mean, exact)


def test_mean_of_all_samples_as_baseline_would_be_biased() -> None:
    """By the factor (K − 1) / K: why each sample's own reward is left out."""
    logits, rewards, exact = policy()
    mean, _ = mean_and_variance(*every_estimate(logits, rewards, 2, lambda reward: reward.mean(0, keepdim=True)))
    torch.testing.assert_close(mean, exact / 2)


@pytest.mark.parametrize("samples", [2, 3])
def test_leave_one_out_reduces_variance(samples: int) -> None:
    """Rewards of 10 to 11: without a baseline each estimate is mostly the 10, which carries no information."""
    logits, rewards, _ = policy()
    _, without = mean_and_variance(*every_estimate(logits, rewards, samples, lambda reward: None))
    _, with_it = mean_and_variance(*every_estimate(logits, rewards, samples, leave_one_out_baseline))
    assert with_it < 0.05 * without


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    reward = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = torch.stack([torch.cat([reward[:s], reward[s + 1 :]]).mean(0) for s in range(4)])
    torch.testing.assert_close(leave_one_out_baseline(reward), expected)
    hits = torch.tensor([[True, False], [True, False], [False, False]])
    torch.testing.assert_close(leave_one_out_baseline(hits), torch.tensor([[0.5, 0.0], [0.5, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("choices", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("examples", [(4,), (2, 4)], ids=str)
def test_choices_that_earn_one_reward_share_it(examples: tuple[int, ...], choices: tuple[int, ...]) -> None:
    log_prob = torch.randn(*examples, *choices, dtype=torch.float64, requires_grad=True)
    reward, baseline = torch.randn(examples, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    loss = reinforce_loss(log_prob, reward, baseline=baseline)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    expected = -(reward - baseline) / reward.numel()
    torch.testing.assert_close(gradient, expected.view(*examples, *(1 for _ in choices)).expand_as(log_prob))


@pytest.mark.parametrize("of_samples", [True, False], ids=["each_sample", "shared"])
def test_entropy_bonus_is_the_mean_entropy_of_all_choices_of_a_reward(of_samples: bool) -> None:
    log_prob = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    entropy = torch.rand(log_prob.shape if of_samples else log_prob.shape[1:], dtype=torch.float64, requires_grad=True)
    reward = torch.randn(3, 4, dtype=torch.float64)
    plain = reinforce_loss(log_prob, reward)
    bonus = plain - reinforce_loss(log_prob, reward, entropy=entropy, entropy_weight=0.3)
    torch.testing.assert_close(bonus, 0.3 * entropy.flatten(-2).sum(-1).mean())
    torch.testing.assert_close(torch.autograd.grad(bonus, entropy)[0], torch.full_like(entropy, 3.0 / entropy.numel()))


def test_reward_and_baseline_receive_no_gradient() -> None:
    log_prob, reward, baseline = (torch.randn(4, requires_grad=True) for _ in range(3))
    reinforce_loss(log_prob, reward, baseline=baseline).backward()
    assert log_prob.grad is not None and reward.grad is None and baseline.grad is None


def test_rewards_may_be_truth_values() -> None:
    log_prob = torch.randn(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(reinforce_loss(log_prob, torch.tensor([True, False])), log_prob)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5] * 3, [0.0] * 3]))


def test_rows_with_nothing_to_attend_add_nothing() -> None:
    query, key = (torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = False  # one row of the first example
    mask[1] = False  # all of the second
    choice = torch_attn.hard_attention(query, key, key.detach(), attn_mask=mask, num_samples=2)
    reward = torch.randn(2, 2, dtype=torch.float64)
    options = {"entropy": choice.entropy, "entropy_weight": 0.1}
    loss = reinforce_loss(choice.log_prob, reward, baseline=leave_one_out_baseline(reward), **options)
    grad_query, grad_key = torch.autograd.grad(loss, (query, key))
    assert grad_query.isfinite().all() and grad_key.isfinite().all()
    assert grad_query[0, 0, [0, 2]].any()
    assert not grad_query[0, 0, 1].any() and not grad_query[1].any() and not grad_key[1].any()


def test_moving_average_is_of_the_batches_before() -> None:
    baseline = MovingAverageBaseline(momentum=0.5)
    rewards = [torch.tensor([1.0, 3.0]), torch.tensor([8.0]), torch.tensor([[0.0], [2.0]])]
    seen = [baseline(reward).item() for reward in [*rewards, rewards[0]]]
    weights = [[], [1.0], [1 / 3, 2 / 3], [1 / 7, 2 / 7, 4 / 7]]
    means = [2.0, 8.0, 1.0]
    assert seen == pytest.approx([sum(w * m for w, m in zip(ws, means, strict=False)) for ws in weights])


def test_moving_average_stands_still_in_evaluation_and_is_saved() -> None:
    baseline = MovingAverageBaseline()
    baseline(torch.tensor([5.0]))
    baseline.eval()
    assert baseline(torch.tensor([-100.0])).item() == pytest.approx(5.0)
    assert baseline.train()(torch.empty(0)).item() == pytest.approx(5.0)
    loaded = MovingAverageBaseline()
    loaded.load_state_dict(baseline.state_dict(), strict=True)
    assert loaded(torch.tensor([1.0])).item() == pytest.approx(5.0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_moving_average_survives_saving() -> None:
    buffer = io.BytesIO()
    scripted = torch.jit.script(MovingAverageBaseline(momentum=0.5))
    scripted(torch.tensor([4.0]))
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert loaded(torch.tensor([1.0])).item() == pytest.approx(4.0)
    assert loaded(torch.tensor([1.0])).item() == pytest.approx(2.0)


def test_critic_learns_from_its_own_loss_alone() -> None:
    critic = LearnedBaseline(6, 5, dtype=torch.float64)
    features = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    log_prob = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    value = critic(features)
    assert value.shape == (3,)
    loss = critic.loss(value, reward)
    torch.testing.assert_close(loss, (reward - value).square().mean())
    parameters = list(critic.parameters())
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    (loss + reinforce_loss(log_prob, reward, baseline=value)).backward()
    torch.testing.assert_close([p.grad for p in parameters], list(expected))
    assert features.grad is None and reward.grad is None
    torch.testing.assert_close(log_prob.grad, (-(reward - value) / 6).detach().unsqueeze(-1).expand_as(log_prob))


def test_critic_learns_a_reward_that_depends_on_the_input() -> None:
    torch.manual_seed(0)
    critic = LearnedBaseline(2, 32)
    optimizer = torch.optim.Adam(critic.parameters(), 0.02)
    features = torch.rand(256, 2)
    reward = features.prod(1)
    for _ in range(150):
        loss = critic.loss(critic(features), reward)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * reward.var()


@pytest.mark.parametrize("baseline", ["leave_one_out", "moving_average", "critic"])
def test_attention_learns_to_read_the_key_that_pays(baseline: str) -> None:
    """From seed 0: keys differ in their first component, and the reward is that component of what was read."""
    torch.manual_seed(0)
    key = torch.randn(1, 1, 16, 8)
    query = torch.zeros(1, 1, 1, 8, requires_grad=True)
    optimizer = torch.optim.Adam([query], 0.1)
    average, critic = MovingAverageBaseline(), LearnedBaseline(8, 8)
    for _ in range(80):
        choice = torch_attn.hard_attention(query, key, key, num_samples=8)
        reward = choice.output[..., 0].flatten(1).sum(1, keepdim=True)  # (samples, N)
        baselines = {
            "leave_one_out": leave_one_out_baseline(reward),
            "moving_average": average(reward),
            "critic": critic(query.flatten(1)),
        }
        loss = reinforce_loss(choice.log_prob, reward, baseline=baselines[baseline])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = torch_attn.hard_attention(query, key, key, estimator="argmax")
    assert best.log_prob.item() > math.log(0.5)
    assert best.output[..., 0].item() >= key[..., 0].flatten().topk(2).values[-1].item()


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "reward": (
        lambda: reinforce_loss(torch.zeros(2, 3, 4), torch.zeros(3, 2)),
        r"reward must have the first dimensions of log_prob \(2, 3, 4\), but is \(3, 2\)\.",
    ),
    "reward_larger": (
        lambda: reinforce_loss(torch.zeros(2), torch.zeros(2, 3)),
        r"reward must have the first dimensions of log_prob \(2,\), but is \(2, 3\)\.",
    ),
    "baseline_that_would_enlarge": (
        lambda: reinforce_loss(torch.zeros(3), torch.zeros(3), baseline=torch.zeros(3, 1)),
        r"baseline must be broadcastable to reward \(3,\), but is \(3, 1\)\.",
    ),
    "baseline_of_other_size": (
        lambda: reinforce_loss(torch.zeros(3), torch.zeros(3), baseline=torch.zeros(2)),
        r"baseline must be broadcastable to reward \(3,\), but is \(2,\)\.",
    ),
    "entropy_missing": (
        lambda: reinforce_loss(torch.zeros(3), torch.zeros(3), entropy_weight=0.1),
        r"entropy must be given with an entropy_weight, which is 0\.1\.",
    ),
    "entropy_shape": (
        lambda: reinforce_loss(torch.zeros(3, 2), torch.zeros(3), entropy=torch.zeros(3), entropy_weight=0.1),
        r"entropy must have the last dimensions of log_prob \(3, 2\), but is \(3,\)\.",
    ),
    "entropy_larger": (
        lambda: reinforce_loss(torch.zeros(3), torch.zeros(3), entropy=torch.zeros(2, 3), entropy_weight=0.1),
        r"entropy must have the last dimensions of log_prob \(3,\), but is \(2, 3\)\.",
    ),
    "one_sample": (
        lambda: leave_one_out_baseline(torch.zeros(1, 5)),
        r"reward must hold at least 2 samples in its first dimension, but is \(1, 5\)\.",
    ),
    "momentum": (lambda: MovingAverageBaseline(1.0), r"momentum must be in \[0, 1\), but is 1\.0\."),
    "value": (
        lambda: LearnedBaseline(2).loss(torch.zeros(3, 1), torch.zeros(3)),
        r"value must be broadcastable to reward \(3,\), but is \(3, 1\)\.",
    ),
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES)
def test_shapes_that_do_not_fit_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
