"""torch_attn: attention kernels in C++, forward and backward, that replace nn.MultiheadAttention inside real models."""

from ._library import load as _load

_load()  # registers the operators before anything below names them

from . import _vmap  # noqa: E402, F401  (registers the batching rules)
from .functional import attention, scaled_dot_product_attention  # noqa: E402
from .hard import HardAttention, hard_attention  # noqa: E402
from .hard_modules import HardMultiheadAttention  # noqa: E402
from .maps import AttentionStatistics, attention_statistics, attention_weights  # noqa: E402
from .modules import MultiheadAttention  # noqa: E402
from .reinforce import (  # noqa: E402
    LearnedBaseline,
    MovingAverageBaseline,
    leave_one_out_baseline,
    reinforce_loss,
)
from .replace import replace_mha, restore_mha  # noqa: E402

__all__ = [
    "AttentionStatistics",
    "HardAttention",
    "HardMultiheadAttention",
    "LearnedBaseline",
    "MovingAverageBaseline",
    "MultiheadAttention",
    "attention",
    "attention_statistics",
    "attention_weights",
    "hard_attention",
    "leave_one_out_baseline",
    "reinforce_loss",
    "replace_mha",
    "restore_mha",
    "scaled_dot_product_attention",
]
