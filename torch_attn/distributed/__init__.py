"""Attention of one sequence whose rows lie on several processes: ring attention, and how to share a sequence out."""

from .ring import ring_attention
from .sharding import Layout, shard_positions, shard_sequence, unshard_sequence

__all__ = ["Layout", "ring_attention", "shard_positions", "shard_sequence", "unshard_sequence"]
