"""Runs the emulated kernels of attention maps: what the ops layer does around them, on the emulated GPU's memory."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_bool, c_double, c_int64, c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..map_oracle import ASKED, Results, leaves_of
from ..oracle import Call
from .emulation import BackwardTensors, Device, Run, TensorView, strides, view


class StatisticsOutputs(Structure):
    """csrc/core/map_problem.h, as are the others."""

    _fields_ = [
        *((name, c_void_p) for name in ("logsumexp", "entropy", "max_weight", "argmax", "mean_distance")),
        *((name, c_void_p) for name in ("window_mass", "top_weights", "top_indices", "column_sum")),
        ("mass_window", c_int64),
        ("top_k", c_int64),
    ]


class WeightsOutputs(Structure):
    _fields_ = [("logsumexp", c_void_p), ("weights", TensorView), ("mean", c_bool)]


class MapBackwardTensors(Structure):
    _fields_ = [
        ("base", BackwardTensors),
        ("row_terms", c_void_p),
        *((name, c_void_p) for name in ("entropy", "mean_distance", "window_mass")),
        ("mass_window", c_int64),
        ("column_sum", c_void_p),
        ("chosen", c_int64),
        ("chosen_keys", c_void_p),
        ("chosen_weights", c_void_p),
        ("weights", TensorView),
        ("weights_factor", c_double),
    ]


def check_structures(device: Device) -> None:
    sizes = (c_size_t * 3)()
    device.lib.emulation_map_structure_sizes(sizes)
    mirrored = [StatisticsOutputs, WeightsOutputs, MapBackwardTensors]
    assert list(sizes) == [ctypes.sizeof(s) for s in mirrored], "maps.py does not mirror csrc/core/map_problem.h"


class MapRun(Run):
    """One call of attention_statistics or attention_weights. rows: the query rows it is about, in any order."""

    def __init__(
        self,
        device: Device,
        query: Tensor,
        key: Tensor,
        options: dict[str, Any],
        rows: Tensor | None = None,
        *,
        allow_tf32: bool = False,
    ) -> None:
        check_structures(device)
        full_length = query.size(2)
        if rows is not None:
            query = query[:, :, rows]
            mask = options.get("attn_mask")
            if mask is not None and mask.size(2) > 1:
                options = options | {"attn_mask": mask[:, :, rows]}
        no_value = key[..., :0].contiguous()
        call = Call(query, key, no_value, options, query[..., :0], None)
        super().__init__(device, call, (0, 0), allow_tf32=allow_tf32)
        self.rows, self.statistics_found = rows, Results()
        if rows is not None:
            self.problem.query_rows, self.problem.full_query_length = device.put(rows), full_length

    def answers(self, backward: BackwardTensors | None) -> dict[str, str]:
        return self.answers_of(self.device.lib.emulation_map_tiers, backward)

    def statistics(self, **asked: Any) -> Results:
        """asked: top_k, mass_window and column_sum, as of the operator; names: only these outputs."""
        device, rows, o = self.device, self.sizes, StatisticsOutputs()
        o.top_k, o.mass_window = asked.get("top_k", 0), asked.get("mass_window") or 0
        shapes = dict.fromkeys(("logsumexp", "entropy", "max_weight", "argmax", "mean_distance"), rows)
        if asked.get("mass_window") is not None:
            shapes["window_mass"] = rows
        if o.top_k:
            shapes["top_weights"] = shapes["top_indices"] = (*rows, o.top_k)
        if asked.get("column_sum", True):
            shapes["column_sum"] = (*rows[:2], self.problem.key_length)
        for name in asked.get("names", shapes):
            integers = name in ("argmax", "top_indices")
            self.statistics_found[name] = torch.empty(shapes[name], dtype=torch.int64 if integers else self.real)
            setattr(o, name, device.empty(self.statistics_found[name]))
        device.check(device.lib.emulation_attention_statistics(ctypes.byref(self.problem), ctypes.byref(o)))
        for name, found in self.statistics_found.items():
            device.get(getattr(o, name), found)
        return self.statistics_found

    def weights(self, mean: bool) -> Tensor:
        """(B, Hq, L, S) or (B, L, S), from the logsumexp that the kernel of statistics finds."""
        device, o = self.device, WeightsOutputs()
        self.logsumexp = self.statistics(names=["logsumexp"])["logsumexp"]
        batch, heads, length = self.sizes
        found = torch.empty(batch, 1 if mean else heads, length, self.problem.key_length, dtype=self.call.query.dtype)
        pointer = device.empty(found)
        o.logsumexp, o.weights, o.mean = device.put(self.logsumexp), view(pointer, found), mean
        device.check(device.lib.emulation_attention_weights(ctypes.byref(self.problem), ctypes.byref(o)))
        device.get(pointer, found)
        return found.squeeze(1) if mean else found

    def weights_backward(self, gradient: Tensor, mean: bool) -> Results:
        t = MapBackwardTensors()
        dense = gradient.unsqueeze(1) if mean else gradient
        t.weights = view(self.device.put(dense), dense, strides(dense))
        t.weights.stride[3] = 1
        t.weights_factor = 1 / self.sizes[1] if mean else 1.0
        return self.map_backward(t, torch.zeros(self.sizes, dtype=self.real))

    def statistics_backward(self, gradients: Results) -> Results:
        """The gradients of the named statistics; statistics() has found these."""
        t, s, put = MapBackwardTensors(), self.statistics_found, self.device.put
        self.logsumexp = s["logsumexp"]
        terms = gradients.get("logsumexp", torch.zeros(self.sizes, dtype=self.real)).clone()
        keys, weights = [], []
        for name, gradient in gradients.items():
            if name == "column_sum":
                t.column_sum = put(gradient)
            elif name in ("max_weight", "top_weights"):
                index, statistic = s["argmax" if name == "max_weight" else "top_indices"], s[name]
                keys.append(index.view(*self.sizes, -1))
                weights.append(gradient.view(*self.sizes, -1))
                terms -= (gradient * statistic).view(*self.sizes, -1).sum(-1)
            elif name == "entropy":
                t.entropy = put(gradient)
                mass = (~self.logsumexp.isinf()).to(self.real)
                if (sinks := self.call.options.get("sinks")) is not None:
                    mass -= (sinks.view(-1, 1) - self.logsumexp).exp().masked_fill(self.logsumexp.isinf(), 0.0)
                terms -= gradient * (s["entropy"] - mass)
            elif name != "logsumexp":
                setattr(t, name, put(gradient))
                terms -= gradient * s[name]
        t.mass_window = ASKED["mass_window"]
        if keys:
            all_keys, all_weights = torch.cat(keys, -1).contiguous(), torch.cat(weights, -1).contiguous()
            t.chosen, t.chosen_keys, t.chosen_weights = all_keys.size(-1), put(all_keys), put(all_weights)
        return self.map_backward(t, terms)

    def map_backward(self, t: MapBackwardTensors, row_terms: Tensor) -> Results:
        device, base = self.device, t.base
        leaves = leaves_of(self.call.query, self.call.key, self.call.options)
        grads, pointers = Results(), dict[str, int]()

        def output(name: str, tensor: Tensor) -> int:
            grads[name], pointers[name] = tensor, device.empty(tensor)
            return pointers[name]

        base.logsumexp = device.put(self.logsumexp)
        terms = device.empty(row_terms)
        ctypes.memmove(terms, row_terms.data_ptr(), row_terms.nbytes)
        t.row_terms = base.grad_logsumexp = terms
        for name in ("query", "key"):
            grad = self.by_row(leaves[name])
            setattr(base, f"grad_{name}", view(output(f"grad_{name}", grad), grad))
        if "attn_mask" in leaves:
            grad = torch.empty(leaves["attn_mask"].shape, dtype=self.real)
            base.grad_attn_mask = view(output("grad_attn_mask", grad), grad, strides(grad))
        if "alibi_slopes" in leaves:
            base.grad_alibi_slopes = output("grad_alibi_slopes", torch.empty(self.sizes[:2], dtype=self.real))
        device.check(device.lib.emulation_attention_map_backward(ctypes.byref(self.problem), ctypes.byref(t)))
        for name, grad in grads.items():
            device.get(pointers[name], grad)
        if "attn_mask" in leaves:
            grads["grad_attn_mask"] = grads["grad_attn_mask"].to(leaves["attn_mask"].dtype)
        if "alibi_slopes" in leaves:
            grads["grad_alibi_slopes"] = grads["grad_alibi_slopes"].sum_to_size(leaves["alibi_slopes"].shape)
        if (sinks := leaves.get("sinks")) is not None:
            device.get(terms, row_terms)
            share = (sinks.view(-1, 1) - self.logsumexp).exp().masked_fill(self.logsumexp.isinf(), 0.0)
            grads["grad_sinks"] = (share * row_terms).sum((0, 2))
        return grads
