"""Hard attention's calls on the emulated GPU: emulation.py's Run for the kernels of csrc/cuda/selection_kernels.h."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import Structure, c_int64, c_size_t, c_uint8, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..oracle import DIFFERENTIABLE_OPTIONS, Call
from .emulation import BackwardTensors, Device, Run, TensorView, accumulator, strides, view


class Selection(Structure):
    """csrc/core/selection.h."""

    _fields_ = [("rule", c_uint8), ("count", c_int64)]


class SelectionOutputs(Structure):
    _fields_ = [(name, c_void_p) for name in ("indices", "scores", "log_prob", "entropy", "logsumexp")]


class SelectionBackwardTensors(BackwardTensors):
    _fields_ = [
        ("log_weight_gradient", c_void_p),
        ("indices", c_void_p),
        ("chosen_gradient", c_void_p),
        ("count", c_int64),
    ]


class RowChoice(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "length", "count", "source_length", "columns")),
        ("indices", c_void_p),
        ("weights", c_void_p),
    ]


def check_mirrors(device: Device) -> None:
    sizes = (c_size_t * 4)()
    device.lib.emulation_selection_structure_sizes(sizes)
    mirrored = [Selection, SelectionOutputs, SelectionBackwardTensors, RowChoice]
    assert list(sizes) == [ctypes.sizeof(s) for s in mirrored], "selection.py does not mirror csrc/core/selection.h"


class SelectionRun:
    """One call of select_keys, forward and backward."""

    def __init__(self, device: Device, inputs: dict[str, Any], rng_state: Tensor) -> None:
        check_mirrors(device)
        self.device, self.inputs = device, inputs
        options = {name: x for name, x in inputs.items() if name not in ("query", "key")}
        query, key = inputs["query"], inputs["key"]
        call = Call(query, key, key[..., :0], options, query[..., :0], None)
        seed, offset, batches = rng_state.tolist()
        self.run = Run(device, call, (seed, offset), batches)

    def forward(self, count: int, sample: bool = False, replacement: bool = False) -> tuple[Tensor, ...]:
        """As torch_attn::select_keys returns them, without the rng_state."""
        device, run = self.device, self.run
        selection = Selection((1 if replacement else 2) if sample else 0, count)
        per_choice = (*run.sizes, count)
        results = [
            torch.empty(per_choice, dtype=torch.int64),
            *(torch.empty(per_choice, dtype=run.real) for _ in range(2)),
            *(torch.empty(run.sizes, dtype=run.real) for _ in range(2)),
        ]
        pointers = [device.empty(x) for x in results]
        outputs = SelectionOutputs(*pointers)
        status = device.lib.emulation_select_keys(
            ctypes.byref(run.problem), ctypes.byref(selection), ctypes.byref(outputs)
        )
        device.check(status)
        self.results = tuple(device.get(p, x) for p, x in zip(pointers, results, strict=True))
        return self.results

    def backward(self, weights: list[Tensor | None], wanted: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Gradients of the sum of scores, log_prob, entropy and logsumexp times ``weights``, by the input's name."""
        device, run = self.device, self.run
        indices, scores, _, entropy, logsumexp = self.results
        t = SelectionBackwardTensors()
        no_columns = torch.empty(*run.sizes, 0, dtype=self.inputs["query"].dtype)
        t.out = t.grad_out = view(device.put(no_columns), no_columns)
        t.logsumexp = device.put(logsumexp)
        # What ops/selection_call.h does before the kernels.
        grad_scores, grad_log_prob, grad_entropy, grad_logsumexp = weights
        of_logsumexp = torch.zeros_like(logsumexp)
        chosen = torch.zeros_like(scores)
        if grad_logsumexp is not None:
            of_logsumexp += grad_logsumexp.masked_fill(logsumexp.isinf(), 0)
        if grad_scores is not None:
            chosen += grad_scores.masked_fill(indices < 0, 0)
        if grad_log_prob is not None:
            grad_log_prob = grad_log_prob.masked_fill(indices < 0, 0)
            chosen += grad_log_prob
            of_logsumexp -= grad_log_prob.sum(-1)
        if grad_entropy is not None:
            t.log_weight_gradient = device.put(-grad_entropy)
            of_logsumexp -= grad_entropy * entropy
        t.grad_logsumexp = device.put(of_logsumexp)
        t.indices, t.count = device.put(indices), indices.size(-1)
        if grad_scores is not None or grad_log_prob is not None:
            t.chosen_gradient = device.put(chosen)

        names = [n for n in ("query", "key", *DIFFERENTIABLE_OPTIONS[:2]) if n in self.inputs]
        grads: dict[str, Tensor] = {}
        pointers: dict[str, int] = {}
        for name in names:
            leaf = self.inputs[name]
            if not leaf.is_floating_point() or (wanted is not None and name not in wanted):
                continue
            if name in ("query", "key"):
                grads[name] = run.by_row(leaf)
            elif name == "attn_mask":
                grads[name] = torch.empty(leaf.shape, dtype=run.real)
            else:
                grads[name] = torch.empty(run.sizes[:2], dtype=run.real)
            pointer = pointers[name] = device.empty(grads[name])
            if name == "alibi_slopes":
                t.grad_alibi_slopes = pointer
            else:
                stride = strides(grads[name]) if name == "attn_mask" else None
                setattr(t, f"grad_{name}", view(pointer, grads[name], stride))
        device.check(device.lib.emulation_select_keys_backward(ctypes.byref(run.problem), ctypes.byref(t)))
        for name, grad in grads.items():
            device.get(pointers[name], grad)
        # What it does after them.
        if "attn_mask" in grads:
            grads["attn_mask"] = grads["attn_mask"].to(self.inputs["attn_mask"].dtype)
        if "alibi_slopes" in grads:
            grads["alibi_slopes"] = grads["alibi_slopes"].sum_to_size(self.inputs["alibi_slopes"].shape)
        return grads


class ChosenRows:
    """gather_values, forward and backward: rows of ``source`` (B, Hkv, S, D) chosen by ``indices`` (B, H, L, count)."""

    def __init__(self, device: Device, source: Tensor, indices: Tensor, weights: Tensor | None) -> None:
        check_mirrors(device)
        device.lib.emulation_free_all()
        self.device, self.source = device, source
        b, h, n, count = indices.shape
        self.choice = RowChoice(b, h, source.size(1), n, count, source.size(2), source.size(3))
        self.choice.indices = device.put(indices)
        self.choice.weights = None if weights is None else device.put(weights)
        self.shape = (b, h, n)

    def view(self, tensor: Tensor) -> TensorView:
        return view(self.device.put(tensor), tensor)

    def gather(self) -> Tensor:
        out = torch.empty(*self.shape, self.source.size(3), dtype=self.source.dtype)
        pointer, source = self.device.empty(out), self.view(self.source)
        status = self.device.lib.emulation_gather_rows(
            ctypes.byref(self.choice), ctypes.byref(source), ctypes.byref(view(pointer, out))
        )
        self.device.check(status)
        return self.device.get(pointer, out)

    def scatter(self, rows: Tensor) -> Tensor:
        out = torch.empty(self.source.shape, dtype=self.source.dtype)
        pointer, given = self.device.empty(out), self.view(rows)
        status = self.device.lib.emulation_scatter_rows(
            ctypes.byref(self.choice), ctypes.byref(given), ctypes.byref(view(pointer, out))
        )
        self.device.check(status)
        return self.device.get(pointer, out)

    def dots(self, rows: Tensor) -> Tensor:
        dots = torch.empty(*self.shape, self.choice.count, dtype=accumulator(rows.dtype))
        pointer, given, source = self.device.empty(dots), self.view(rows), self.view(self.source)
        status = self.device.lib.emulation_chosen_dots(
            ctypes.byref(self.choice), ctypes.byref(given), ctypes.byref(source), c_void_p(pointer)
        )
        self.device.check(status)
        return self.device.get(pointer, dots)
