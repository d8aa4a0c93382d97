r"""The score-function estimator that trains hard attention: REINFORCE's loss, and baselines that lower its variance.

With π the policy, a the choices that were made and R the reward they earned,

    ∇ E[R] = E[(R − b) ∇ log π(a)],        Var lower the better b foretells R,

for every baseline b that does not depend on a (Williams 1992). ``log_prob`` and ``entropy`` come from
:func:`torch_attn.hard_attention` and :class:`torch_attn.HardMultiheadAttention`; the loss knows nothing of attention.
"""

# No "from __future__ import annotations": TorchScript reads the annotations of the baselines as types, not as strings.

import torch
from torch import Tensor, nn


def reinforce_loss(
    log_prob: Tensor,
    reward: Tensor,
    *,
    baseline: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_weight: float = 0.0,
) -> Tensor:
    r"""A scalar whose gradient is minus REINFORCE's estimate of the expected reward's, minus an entropy bonus.

        loss = − mean over rewards of [ (R − b) Σ log π(aᵢ) + entropy_weight · Σ H(πᵢ) ],

    with the sums over all choices aᵢ (queries, heads) that earned the reward R together: they are independent given
    the inputs, so their log-probabilities and their entropies add. Its *value* means nothing: minimise it, don't watch
    it. Add the model's own loss, which trains what comes after the choice (Xu et al. 2015, section 4.1).

    A row with nothing to attend has log_prob 0, entropy 0 and no gradient: it adds nothing to either sum. A reward all
    of whose rows are such still counts in the mean.

    Args:
        log_prob: (..., choices of one reward), differentiable. Reward's dimensions come first; all others are summed.
        reward: the higher the better; (N), one for each example, or (samples, N), one for each example and sample, or
            of log_prob's shape, one for each choice. Any dtype; never differentiated.
        baseline: broadcastable to reward, None: 0. Never differentiated. It must not depend on the choice whose reward
            it is taken from, or the gradient is biased.
        entropy: log_prob's shape, or that without its first dimensions (one policy, several samples). Differentiable.
        entropy_weight: weight of the bonus, in reward per nat; keeps the policy from settling too early.

    Raises:
        ValueError: naming the argument whose shape does not fit.

    Sources: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning",
    theorem 1; Xu et al. 2015, "Show, Attend and Tell", section 4.1.
    """
    if log_prob.shape[: reward.dim()] != reward.shape:
        raise ValueError(
            f"reward must have the first dimensions of log_prob {tuple(log_prob.shape)}, but is {tuple(reward.shape)}."
        )
    advantage = reward.detach().to(log_prob.dtype)
    if baseline is not None:
        if not _broadcasts_to(baseline.shape, reward.shape):
            raise ValueError(
                f"baseline must be broadcastable to reward {tuple(reward.shape)}, but is {tuple(baseline.shape)}."
            )
        advantage = advantage - baseline.detach().to(log_prob.dtype)
    joint = log_prob.unsqueeze(-1).flatten(reward.dim()).sum(-1)
    loss = -(advantage * joint).mean()
    if entropy_weight == 0.0:
        return loss
    if entropy is None:
        raise ValueError(f"entropy must be given with an entropy_weight, which is {entropy_weight}.")
    if log_prob.shape[log_prob.dim() - entropy.dim() :] != entropy.shape:
        raise ValueError(
            f"entropy must have the last dimensions of log_prob {tuple(log_prob.shape)}, but is {tuple(entropy.shape)}."
        )
    choices = log_prob.shape[reward.dim() :].numel()
    return loss - entropy_weight * choices * entropy.mean()


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    """Whether it does without making target larger, which (N, 1) beside (N) would."""
    aligned = target[max(len(target) - len(shape), 0) :]
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in zip(shape, aligned, strict=True))


def leave_one_out_baseline(reward: Tensor) -> Tensor:
    r"""For each sample the mean reward of the others: bₛ = Σ_{t≠s} Rₜ / (K − 1).

    Independent samples of one query see the same input, so this foretells well, is unbiased, has no parameters and
    needs no memory. With it REINFORCE's gradient is K / (K − 1) times that with the mean
    of all samples for a baseline, which is biased.

    Args:
        reward: (K, ...), K ≥ 2 samples first, drawn with replacement.

    Returns:
        The baselines, of reward's shape; floating.

    Raises:
        ValueError: if there are fewer than two samples.

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """
    if reward.dim() == 0 or reward.size(0) < 2:
        raise ValueError(f"reward must hold at least 2 samples in its first dimension, but is {tuple(reward.shape)}.")
    reward = reward.detach()
    if not reward.is_floating_point():
        reward = reward.to(torch.get_default_dtype())
    return (reward.sum(0, keepdim=True) - reward) / (reward.size(0) - 1)


class MovingAverageBaseline(nn.Module):
    r"""One number for all inputs: the exponential moving average of past rewards, bₜ = m bₜ₋₁ + (1 − m) mean(Rₜ).

    A call returns the average of the batches *before* this one, so it does not depend on this one's choices, and then,
    in training, takes the batch in. The start at 0 is corrected for: the first calls' average is that of the batches
    seen (0 before any). The state is in buffers, so it is saved with the model.

    Args:
        momentum: m in [0, 1).

    Source: Xu et al. 2015, "Show, Attend and Tell", section 4.1 (m = 0.9).
    """

    average: Tensor
    weight: Tensor

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), but is {momentum}.")
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}"

    def forward(self, reward: Tensor) -> Tensor:
        """The baseline for rewards (...), a scalar."""
        with torch.no_grad():
            baseline = self.average / self.weight.clamp(min=1e-30)  # 0 / 1e-30 before the first batch
            if self.training and reward.numel() > 0:
                share = 1.0 - self.momentum
                self.average.lerp_(reward.to(self.average.dtype).mean(), share)
                self.weight.lerp_(torch.ones_like(self.weight), share)
        return baseline


class LearnedBaseline(nn.Module):
    r"""A critic: a small network that foretells the reward from what is known before the choice, b(x).

        value = critic(features)
        loss = reinforce_loss(log_prob, reward, baseline=value) + critic.loss(value, reward)

    ``features`` must not depend on the choice. They are detached: the critic reads the model, and does not train it.

    Args:
        in_features: size of the last dimension of the features.
        hidden_features: width of the one hidden layer (ReLU).
        device, dtype: of the parameters.

    Source: Mnih & Gregor 2014, "Neural Variational Inference and Learning in Belief Networks"
    (input-dependent baselines).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_features, 1, device=device, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., in_features) to values (...)."""
        return self.out(torch.relu(self.hidden(features.detach()))).squeeze(-1)

    def loss(self, value: Tensor, reward: Tensor) -> Tensor:
        """mean (R − b(x))², with value broadcastable to reward, which may have samples before it."""
        if not _broadcasts_to(value.shape, reward.shape):
            raise ValueError(
                f"value must be broadcastable to reward {tuple(reward.shape)}, but is {tuple(value.shape)}."
            )
        return (reward.detach().to(value.dtype) - value).square().mean()
