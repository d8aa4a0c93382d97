"""torch_attn: attention kernels in C++, forward and backward, that replace nn.MultiheadAttention inside real models."""

from ._library import load as _load

_load()  # registers the operators before anything below names them

# _vmap registers the batching rules; plot loads matplotlib when it draws.
from . import _vmap, distributed, plot  # noqa: E402, F401
from .cache import KVCache  # noqa: E402
from .functional import attention, scaled_dot_product_attention  # noqa: E402
from .hard import HardAttention, hard_attention  # noqa: E402
from .hard_modules import HardMultiheadAttention  # noqa: E402
from .maps import AttentionStatistics, attention_statistics, attention_weights  # noqa: E402
from .merge import merge_attention  # noqa: E402
from .modules import MultiheadAttention  # noqa: E402
from .record import AttentionRecord, record_attention  # noqa: E402
from .reinforce import (  # noqa: E402
    LearnedBaseline,
    MovingAverageBaseline,
    leave_one_out_baseline,
    reinforce_loss,
)
from .replace import replace_mha, restore_mha  # noqa: E402
from .rollout import attention_rollout  # noqa: E402
from .sdpa import patch_sdpa  # noqa: E402
from .varlen import paged_attention, varlen_attention  # noqa: E402

__all__ = [
    "AttentionRecord",
    "AttentionStatistics",
    "HardAttention",
    "HardMultiheadAttention",
    "KVCache",
    "LearnedBaseline",
    "MovingAverageBaseline",
    "MultiheadAttention",
    "attention",
    "attention_rollout",
    "attention_statistics",
    "attention_weights",
    "distributed",
    "hard_attention",
    "leave_one_out_baseline",
    "merge_attention",
    "paged_attention",
    "patch_sdpa",
    "plot",
    "record_attention",
    "reinforce_loss",
    "replace_mha",
    "restore_mha",
    "scaled_dot_product_attention",
    "varlen_attention",
]
