"""patch_sdpa: models that call PyTorch's scaled_dot_product_attention compute on this library's kernels.

A TorchFunctionMode sees the call itself, so that it does not matter under which name a model imported the function, and
torch.compile guards on it; an assignment to ``torch.nn.functional`` would give neither.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._library import build_info
from .functional import attention

# By any name in Python, and as exported programs call it.
_FUNCTION = F.scaled_dot_product_attention
_OPERATOR = torch.ops.aten.scaled_dot_product_attention
_OVERLOAD = torch.ops.aten.scaled_dot_product_attention.default

# Written in Python, these ask the mode once and do the rest without it; inside that rest are calls of ours: those of
# nn.MultiheadAttention(need_weights=False), and those that activation checkpointing repeats.
_HIDING = (Tensor.backward, torch.autograd.backward, torch.autograd.grad, F.multi_head_attention_forward)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COUNTING = threading.Lock()
_NO_CUDA = build_info()["cuda_off_reason"]


class patch_sdpa(TorchFunctionMode, ContextDecorator):
    """PyTorch's ``scaled_dot_product_attention`` on this library's kernels: a ``with`` block or a decorator.

    ::

        with torch_attn.patch_sdpa() as patch:
            model(x).sum().backward()
        patch.calls, patch.fallbacks  # 24, {}

        @torch_attn.patch_sdpa()
        def train(): ...

    Served are calls by any name (``F.``, ``torch.nn.functional.``, imported from there before the block), from exported
    programs, and from functions that torch.compile compiles: those are compiled once for use inside and once for use
    outside the block. What torch.export and torch.jit.trace make inside the block holds this library's operator for
    good. Results are those of :func:`torch_attn.scaled_dot_product_attention`.

    Calls that these kernels do not serve go to PyTorch's own function, and are counted with the reason in
    ``fallbacks``: integer, float8 and complex types, devices without kernels of this library, nested tensors, DTensor
    and other wrappers, and a mask together with ``is_causal``, which PyTorch leaves undefined.

    Not reached are: compiled TorchScript, whose calls are C++; other threads, except those in which a ``backward()``
    called in the block runs; and :class:`torch.nn.MultiheadAttention` where it does not make the call: with
    ``need_weights=True``, on its inference path, compiled or exported (:func:`torch_attn.replace_mha` serves all of
    these). With activation checkpointing, call ``backward()`` in the block too. Blocks may be nested (the innermost one
    counts), entered again, and used in several threads; leaving one, also by an exception, takes back exactly what
    entering it did. ``torch.nn.attention.sdpa_kernel`` chooses among PyTorch's kernels, and says nothing to these.

    Each PyTorch function called in the block costs about a microsecond more.

    Attributes:
        calls: how many calls this library served; those of compiled code, which is made once, are not counted.
        fallbacks: how many calls it did not, by reason; likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.fallbacks: dict[str, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _HIDING and set(types) <= {Tensor} and not torch.compiler.is_compiling():
            with self:
                return _without_asking(func)(*args, **kwargs)
        if func is not _FUNCTION and func is not _OVERLOAD and func is not _OPERATOR:
            return func(*args, **kwargs)
        call = _Call(*args, **kwargs)
        reason = call.why_not()
        self._count(reason)
        return func(*args, **kwargs) if reason else call.run()

    def _count(self, reason: str) -> None:
        if torch.compiler.is_compiling():  # a count would be guarded on, and each call compiled anew
            return
        with _COUNTING:
            if reason:
                self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1
            else:
                self.calls += 1


def _without_asking(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as it would go on if no mode and no tensor wanted to override it."""
    names = {"has_torch_function": _nothing_overrides, "has_torch_function_unary": _nothing_overrides}
    names = {**function.__globals__, **names}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _nothing_overrides(*_: object) -> bool:
    return False


class _Call(NamedTuple):
    """One call's arguments, by PyTorch's names and in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def why_not(self) -> str:
        """Empty: served. Otherwise why not."""
        query, key, value, mask = self[:4]
        for x in (query, key, value) if mask is None or isinstance(mask, CausalBias) else (query, key, value, mask):
            if x.is_nested:
                return "nested tensors"
            if is_traceable_wrapper_subclass(x):
                return f"{type(x).__name__} has an attention of its own"
        if query.device.type not in ("cpu", "cuda", "meta"):
            return f"no kernels for device {query.device.type}"
        if query.device.type == "cuda" and _NO_CUDA:
            return f"no CUDA kernels: {_NO_CUDA}"
        if query.dtype not in _DTYPES:
            return f"dtype {query.dtype}"
        if self.enable_gqa and key.shape[-3:-2] != value.shape[-3:-2]:
            return "key and value with different numbers of heads"
        if mask is not None and self.is_causal:
            return "attn_mask together with is_causal=True"
        if isinstance(mask, CausalBias) and (mask.seq_len_q, mask.seq_len_kv) != (query.shape[-2], key.shape[-2]):
            return "a CausalBias of another size"
        return ""

    def run(self) -> Tensor:
        options = {"dropout_p": self.dropout_p, "scale": self.scale, "enable_gqa": self.enable_gqa}
        if isinstance(self.attn_mask, CausalBias):
            upper_left = self.attn_mask.variant == CausalVariant.UPPER_LEFT
            options |= {"is_causal": True, "causal_alignment": "top_left" if upper_left else "bottom_right"}
        else:
            options |= {"is_causal": self.is_causal, "attn_mask": self.attn_mask}
        return attention(self.query, self.key, self.value, **options)
