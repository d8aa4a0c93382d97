"""torch_attn: attention kernels in C++, forward and backward, that replace nn.MultiheadAttention inside real models."""

from ._library import load as _load

_load()  # registers the operators before anything below names them

from . import _vmap, plot  # noqa: E402, F401  (_vmap registers the batching rules; plot loads matplotlib when it draws)
from .functional import attention, scaled_dot_product_attention  # noqa: E402
from .hard import HardAttention, hard_attention  # noqa: E402
from .hard_modules import HardMultiheadAttention  # noqa: E402
from .maps import AttentionStatistics, attention_statistics, attention_weights  # noqa: E402
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
from .varlen import paged_attention, varlen_attention  # noqa: E402

__all__ = [
    "AttentionRecord",
    "AttentionStatistics",
    "HardAttention",
    "HardMultiheadAttention",
    "LearnedBaseline",
    "MovingAverageBaseline",
    "MultiheadAttention",
    "attention",
    "attention_rollout",
    "attention_statistics",
    "attention_weights",
    "hard_attention",
    "leave_one_out_baseline",
    "paged_attention",
    "plot",
    "record_attention",
    "reinforce_loss",
    "replace_mha",
    "restore_mha",
    "scaled_dot_product_attention",
    "varlen_attention",
]
