"""The one list of module calls that the tests of MultiheadAttention are parametrised from, and how two modules are
compared on one of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torch_attn

BATCH, QUERY_LENGTH, KEY_LENGTH = 3, 5, 7
EMBED_DIM, HEADS = 8, 2

MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv_zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim_vdim": {"kdim": 6, "vdim": 10},
    "kdim_bias_kv": {"kdim": 6, "add_bias_kv": True, "batch_first": True, "bias": False},
}
SHARING = ("self", "cross", "separate")  # query is key is value; key is value; three tensors
ATTN_MASKS = ("none", "bool", "float", "bool_per_head", "float_per_head", "causal")
KEY_PADDING_MASKS = ("none", "bool", "float")
WEIGHTS: dict[str, dict[str, Any]] = {
    "averaged": {},
    "per_head": {"average_attn_weights": False},
    "no_weights": {"need_weights": False},
}


@dataclass(frozen=True)
class Case:
    """One call of the module. ``causal`` gives the causal mask together with the hint, so it needs L = S."""

    module: str = "batch_first"
    sharing: str = "self"
    attn_mask: str = "none"
    key_padding_mask: str = "none"
    weights: str = "averaged"
    batched: bool = True

    def __str__(self) -> str:
        words = [self.module, self.sharing, "batched" if self.batched else "unbatched", self.weights]
        words += [f"attn_mask_{self.attn_mask}"] if self.attn_mask != "none" else []
        words += [f"padding_{self.key_padding_mask}"] if self.key_padding_mask != "none" else []
        return "-".join(words)

    @property
    def same_length(self) -> bool:
        return self.sharing == "self" or self.attn_mask == "causal"

    def build(self, dtype: torch.dtype = torch.float64, **more: Any) -> nn.MultiheadAttention:
        """PyTorch's module, with biases that are not the zeros they start as."""
        module = nn.MultiheadAttention(EMBED_DIM, HEADS, **{**MODULES[self.module], **more}, dtype=dtype)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        return module

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Every argument of the call. All masks leave each row a key, as PyTorch returns NaN where they do not."""
        options = MODULES[self.module]
        key_length = QUERY_LENGTH if self.same_length else KEY_LENGTH

        def make(length: int, dim: int) -> Tensor:
            x = torch.randn(BATCH, length, dim, dtype=dtype)
            if not self.batched:
                x = x[0]
            elif not options.get("batch_first", False):
                x = x.transpose(0, 1).contiguous()
            return x.requires_grad_()

        query = make(QUERY_LENGTH, EMBED_DIM)
        key = query if self.sharing == "self" else make(key_length, options.get("kdim", EMBED_DIM))
        value = make(key_length, options.get("vdim", EMBED_DIM)) if self.sharing == "separate" else key
        arguments: dict[str, Any] = {"query": query, "key": key, "value": value, **WEIGHTS[self.weights]}

        if self.attn_mask == "causal":
            arguments["attn_mask"] = torch.ones(QUERY_LENGTH, key_length, dtype=torch.bool).triu(1)
            arguments["is_causal"] = True
        elif self.attn_mask != "none":
            heads = HEADS * BATCH if self.batched else HEADS
            sizes = (heads,) * self.attn_mask.endswith("per_head") + (QUERY_LENGTH, key_length)
            arguments["attn_mask"] = _mask(self.attn_mask, sizes, dtype)
        if self.key_padding_mask != "none":
            sizes = (BATCH, key_length) if self.batched else (key_length,)
            arguments["key_padding_mask"] = _mask(self.key_padding_mask, sizes, dtype)
        return arguments


def _mask(kind: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    blocked = torch.rand(sizes) > 0.6
    blocked[..., 0] = False
    if kind.startswith("bool"):
        return blocked
    return torch.randn(sizes, dtype=dtype).masked_fill(blocked, -math.inf).requires_grad_()


def _all_cases() -> Iterator[Case]:
    axes = (MODULES, SHARING, ATTN_MASKS, KEY_PADDING_MASKS, WEIGHTS, (True, False))
    for module, sharing, attn_mask, key_padding_mask, weights, batched in itertools.product(*axes):
        options = MODULES[module]
        if sharing not in (("separate",) if "kdim" in options else ("self", "cross")) and module != "batch_first":
            continue  # kdim and vdim need three tensors; packed weights are tried with three in one module
        if attn_mask == "causal" and (options.get("add_bias_kv") or options.get("add_zero_attn")):
            continue  # PyTorch is wrong there; see test_appended_keys_stay_visible_under_is_causal
        if not batched and weights == "per_head" and module != "plain":
            continue  # what is left to check, the shape of the weights, is the same in every module
        yield Case(module, sharing, attn_mask, key_padding_mask, weights, batched)


CASES = list(_all_cases())


def detached(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same call on fresh leaves, in which arguments that were one tensor stay one."""
    copies: dict[int, Tensor] = {}

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in copies:
            fresh = x.detach().clone()
            if dtype is not None and x.is_floating_point():
                fresh = fresh.to(dtype)
            copies[id(x)] = fresh.requires_grad_(x.requires_grad)
        return copies[id(x)]

    return {name: copy(x) for name, x in arguments.items()}


def ours(module: nn.MultiheadAttention) -> torch_attn.MultiheadAttention:
    """A second module of this library's class, with the state of the first."""
    options = {
        "bias": module.in_proj_bias is not None,
        "add_bias_kv": module.bias_k is not None,
        "add_zero_attn": module.add_zero_attn,
        "dropout": module.dropout,
        "kdim": module.kdim,
        "vdim": module.vdim,
        "batch_first": module.batch_first,
        "dtype": module.out_proj.weight.dtype,
    }
    copy = torch_attn.MultiheadAttention(module.embed_dim, module.num_heads, **options)
    copy.load_state_dict(module.state_dict(), strict=True)
    return copy.train(module.training)


def results(module: nn.Module, arguments: dict[str, Any], cotangent_seed: int = 0) -> dict[str, Tensor]:
    """Output, weights, and the gradient of a random function of both with respect to every input and parameter."""
    out, weights = module(**arguments)
    named = {"out": out} | ({} if weights is None else {"weights": weights})
    generator = torch.Generator().manual_seed(cotangent_seed)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in named.values()
    )
    leaves = {n: x for n, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    leaves |= dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named |= {f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return {n: x.detach() for n, x in named.items()}


def output_from(module: nn.MultiheadAttention, value: Tensor, weights: Tensor) -> Tensor:
    """The module's output recomputed from per-head weights (N, H, L, S), by the definition."""
    unbatched = value.dim() == 2
    if unbatched:
        value, weights = value.unsqueeze(0), weights.unsqueeze(0)
    elif not module.batch_first:
        value = value.transpose(0, 1)
    packed = module.in_proj_weight
    v_weight = module.v_proj_weight if packed is None else packed.chunk(3)[2]
    v_bias = None if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[2]
    v = nn.functional.linear(value, v_weight, v_bias)
    if module.bias_v is not None:
        v = torch.cat([v, module.bias_v.expand(v.size(0), 1, -1)], 1)
    if module.add_zero_attn:
        v = torch.cat([v, torch.zeros_like(v[:, :1])], 1)
    out = weights @ v.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    out = module.out_proj(out.transpose(1, 2).flatten(-2))
    if unbatched:
        return out.squeeze(0)
    return out if module.batch_first else out.transpose(0, 1)
