"""KVCache: the keys and values of what a model has read so far, in tensors that stay where they are.

Used with :func:`torch_attn.attention`, whose ``key_lengths`` say how much of a cache is filled, so that nothing is cut
out of it or joined to it. Caches in blocks: :func:`torch_attn.paged_attention`.
"""

import torch
from torch import Tensor, nn


class KVCache(nn.Module):
    """One layer's cache for decoding, of fixed size, for sequences of different lengths.

    ::

        cache = torch_attn.KVCache(batch_size, kv_heads, max_length, head_dim)
        keys, values, lengths = cache.update(key, value)  # of one new token each, or of several
        out = torch_attn.attention(
            query, keys, values, key_lengths=lengths, is_causal=True, causal_alignment="bottom_right"
        )

    A module, so that its buffers move with the model, and torch.compile, torch.export and TorchScript see them change.
    They are not part of the state_dict, and have no gradients.

    Args:
        batch_size, num_heads, max_length, head_dim: B, Hkv, M and D.
        value_dim: Dv; ``head_dim`` when None.
        dtype, device: of keys and values.

    Attributes:
        key: (B, Hkv, M, D).
        value: (B, Hkv, M, Dv).
        lengths: (B), int64: how many keys each sequence has.
    """

    key: Tensor  # annotations that TorchScript reads: not strings
    value: Tensor
    lengths: Tensor

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = (batch_size, num_heads, max_length)
        columns = head_dim if value_dim is None else value_dim
        for name, dim in (("key", head_dim), ("value", columns)):
            self.register_buffer(name, torch.zeros(*sizes, dim, dtype=dtype, device=device), persistent=False)
        self.register_buffer("lengths", torch.zeros(batch_size, dtype=torch.int64, device=device), persistent=False)

    def update(self, key: Tensor, value: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Append keys and values to each sequence.

        Args:
            key: (B, Hkv, T, D), of T new positions.
            value: (B, Hkv, T, Dv).
            counts: (B), int64: how many of the T positions each sequence has, its first ones; None: all. For prompts of
                different lengths, padded at their ends: attend those with top-left alignment, as the first row of each
                is at position 0.

        Returns:
            The cache's key, value and lengths, after this; the tensors themselves, which the next call changes.

        Raises:
            IndexError: on the CPU, where lengths + T exceeds M; on CUDA this is a device-side assertion.
        """
        new = torch.arange(key.size(2), device=key.device)
        positions = self.lengths.unsqueeze(1) + new  # (B, T)
        entries = torch.arange(key.size(0), device=key.device).unsqueeze(1)
        self.key.transpose(1, 2)[entries, positions] = key.detach().transpose(1, 2).to(self.key.dtype)
        self.value.transpose(1, 2)[entries, positions] = value.detach().transpose(1, 2).to(self.value.dtype)
        if counts is None:
            self.lengths += key.size(2)
        else:
            self.lengths += counts
        return self.key, self.value, self.lengths

    def reset(self) -> None:
        """Forget all sequences."""
        self.lengths.zero_()

    def extra_repr(self) -> str:
        return f"key={tuple(self.key.shape)}, value={tuple(self.value.shape)}, dtype={self.key.dtype}"
