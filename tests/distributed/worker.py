"""One of several processes that share sequences over gloo; test_ring_attention.py starts them and judges their results.

python -m tests.distributed.worker RANK FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torch_attn.distributed import ring_attention, shard_positions, shard_sequence, unshard_sequence

from .ring_cases import LAYOUTS, RUNS, WORLD_SIZES
from .ring_model import MODEL_LAYOUT, attend_by_ring, train

Results = dict[str, Any]


def run(call: Any, layout: Any, **options: Any) -> Results:
    """This rank's part of one call, forward and backward, through output and logsumexp."""
    query, key, value = (shard_sequence(x, layout=layout).requires_grad_() for x in (call.query, call.key, call.value))
    options = {"enable_gqa": True, **call.options, **options}
    out, logsumexp = ring_attention(query, key, value, layout=layout, return_logsumexp=True, **options)
    gradients = [
        shard_sequence(call.grad_out, layout=layout),
        shard_sequence(call.grad_logsumexp, dim=-1, layout=layout).masked_fill(logsumexp.isinf(), 0.0),
    ]
    grads = torch.autograd.grad([out, logsumexp], [query, key, value], gradients)
    names = ("out", "logsumexp", "grad_query", "grad_key", "grad_value")
    return dict(zip(names, (out.detach(), logsumexp.detach(), *grads), strict=True))


def drawn(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)


def padded(inputs: Results) -> Results:
    """A length that cannot be divided, full (with key_lengths) and causal (which needs none)."""
    results: Results = {}
    query, key, value = inputs["padded"]
    length = query.size(2)
    for layout in LAYOUTS:
        for is_causal in (False, True):
            shards = [shard_sequence(x, layout=layout, pad=True).requires_grad_() for x in (query, key, value)]
            lengths = None if is_causal else torch.full((query.size(0),), length)
            out = ring_attention(*shards, layout=layout, is_causal=is_causal, key_lengths=lengths)
            whole = unshard_sequence(out, layout=layout, length=length)
            grads = torch.autograd.grad(out, shards, shard_sequence(whole.sin(), layout=layout, pad=True))
            grads = [unshard_sequence(grad, layout=layout, length=length) for grad in grads]
            results[f"{layout} {is_causal}"] = [whole, *grads]
    return results


def dealt_out(inputs: Results) -> Results:
    """Tensors of many kinds, and what comes back."""
    results: Results = {}
    for layout in LAYOUTS:
        for name, dim in (("tokens", 1), ("flags", 0), ("half", -2)):
            shard = shard_sequence(inputs[name], dim=dim, layout=layout, pad=True)
            whole = unshard_sequence(shard, dim=dim, layout=layout, length=inputs[name].size(dim))
            results[f"{layout} {name}"] = (shard, whole)
        results[f"{layout} positions"] = shard_positions(6, layout=layout)
    return results


def groups(inputs: Results) -> Results:
    """The ring of a device mesh, and of a part of the processes."""
    call = inputs["causal", torch.float64]
    rank, size = dist.get_rank(), dist.get_world_size()
    results: Results = {"mesh": run(call, "zigzag", group=dist.init_device_mesh("cpu", (size,)))}
    halves = [dist.new_group([first, first + size // 2]) for first in range(size // 2)]
    group = halves[rank % (size // 2)]
    query, key, value = (shard_sequence(x, group=group) for x in (call.query, call.key, call.value))
    out = ring_attention(query + rank % (size // 2), key, value, group=group, is_causal=True)
    results["half"] = unshard_sequence(out, group=group)
    foreign = halves[(rank + 1) % len(halves)]
    results["foreign"] = message_of(lambda: ring_attention(query, key, value, group=foreign)) if size > 2 else None
    return results


def some_gradients(inputs: Results) -> Results:
    """Where not all inputs have gradients, and where only logsumexp is used."""
    call = inputs["causal", torch.float64]
    results: Results = {}
    for wanted in ("query", "key", "value", "query value"):
        shards = {name: shard_sequence(getattr(call, name)) for name in ("query", "key", "value")}
        leaves = [shards[name].requires_grad_() for name in wanted.split()]
        out = ring_attention(**shards, is_causal=True)
        grads = torch.autograd.grad(out, leaves, shard_sequence(call.grad_out))
        results[wanted] = dict(zip(wanted.split(), grads, strict=True))
    shards = {name: shard_sequence(getattr(call, name)).requires_grad_() for name in ("query", "key", "value")}
    _, logsumexp = ring_attention(**shards, is_causal=True, return_logsumexp=True)
    of_logsumexp = torch.autograd.grad(logsumexp, list(shards.values()), shard_sequence(call.grad_logsumexp, dim=-1))
    results["of logsumexp"] = dict(zip(shards, of_logsumexp, strict=True))
    with torch.no_grad():
        results["none"] = ring_attention(**shards, is_causal=True)
    return results


def under_autocast(inputs: Results) -> Results:
    call = inputs["full", torch.float32]
    shards = [shard_sequence(x).requires_grad_() for x in (call.query, call.key, call.value)]
    with torch.autocast("cpu", torch.bfloat16):
        out = ring_attention(*shards)
    grads = torch.autograd.grad(out, shards, torch.ones_like(out))
    rounded = [x.detach().bfloat16() for x in shards]
    return {"out": out.detach(), "grads": [x.dtype for x in grads], "expected": ring_attention(*rounded)}


def checkpointed(inputs: Results) -> Results:
    call = inputs["causal", torch.float64]
    shards = [shard_sequence(x).requires_grad_() for x in (call.query, call.key, call.value)]

    def layer(*tensors: Tensor) -> Tensor:
        return ring_attention(*tensors, is_causal=True).sin()

    grads = [torch.autograd.grad(layer(*shards).sum(), shards)]
    grads.append(torch.autograd.grad(checkpoint(layer, *shards, use_reentrant=False).sum(), shards))
    return {"plain": grads[0], "checkpointed": grads[1]}


def large_logsumexp(inputs: Results) -> Results:
    return {layout: run(inputs["large"], layout) for layout in LAYOUTS}


class LargestTensor(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operator returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(x, Tensor) and x.device.type != "meta":
                self.largest = max(self.largest, x.numel() * x.element_size())
        return results


def memory(inputs: Results) -> Results:
    """The largest tensor, as a multiple of a shard of one of query, key, value."""
    shards = [drawn(1, 2, 64, 16, dtype=torch.float32).requires_grad_() for _ in range(3)]
    with LargestTensor() as mode:
        out = ring_attention(*shards, is_causal=True)
        out.sum().backward()
    return {"largest": mode.largest / (shards[0].numel() * 4)}


def message_of(call: Callable[[], Any]) -> str:
    """What a call that must fail says."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors(inputs: Results) -> Results:
    query = drawn(1, 2, 4, 8)
    odd = drawn(1, 2, 5, 8)
    leaf = query.clone().requires_grad_()
    (first,) = torch.autograd.grad(ring_attention(leaf, leaf, leaf).sum(), leaf, create_graph=True)
    calls: dict[str, Callable[[], Any]] = {
        "layout": lambda: ring_attention(query, query, query, layout="ring"),  # type: ignore[arg-type]
        "shard layout": lambda: shard_sequence(query, layout="ring"),  # type: ignore[arg-type]
        "odd": lambda: ring_attention(odd, odd, odd),
        "odd shard": lambda: unshard_sequence(odd),
        "odd positions": lambda: shard_positions(5),
        "dims": lambda: ring_attention(query[0], query, query),
        "heads": lambda: ring_attention(query, query[:, :1], query[:, :1]),
        "dtype": lambda: ring_attention(query, query, query.float()),
        "window": lambda: ring_attention(query, query, query, window_left=-1),
        "softcap": lambda: ring_attention(query, query, query, softcap=-1.0),
        "key_lengths": lambda: ring_attention(query, query, query, key_lengths=torch.tensor([1, 2])),
        "indivisible": lambda: shard_sequence(drawn(1, 2, 13, 8)),
        "length": lambda: unshard_sequence(query, length=1000),
        "twice": lambda: torch.autograd.grad(first.sum(), leaf),
    }
    return {name: message_of(call) for name, call in calls.items()}


SCENARIOS = (
    padded,
    dealt_out,
    groups,
    some_gradients,
    under_autocast,
    checkpointed,
    large_logsumexp,
    memory,
    errors,
)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for size in WORLD_SIZES:  # the processes are the same, as starting one takes longer than all it does
        if rank >= size:
            continue
        store = f"file://{folder}/store{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        inputs = torch.load(folder / f"inputs{size}.pt", weights_only=False)
        results: Results = {run_: run(inputs[run_[:2]], run_[2]) for run_ in RUNS}
        for scenario in SCENARIOS:
            results[scenario.__name__] = scenario(inputs)
        results["trained"] = train(attend_by_ring, lambda x: shard_sequence(x, dim=1, layout=MODEL_LAYOUT))
        torch.save(results, folder / f"results{size}_{rank}.pt")
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
