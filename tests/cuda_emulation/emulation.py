"""Builds the emulated CUDA kernels and runs attention calls on them: the tests' view of emulator/ and runner.cpp."""

from __future__ import annotations

import ctypes
import fcntl
import math
import shutil
import subprocess
from collections.abc import Iterable
from ctypes import POINTER, Structure, c_bool, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint8, c_uint64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..oracle import Call

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "cuda_emulation"
SCALAR_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool]
UNBOUNDED = 1 << 60


class TensorView(Structure):
    _fields_ = [
        *(("data", c_void_p), ("stride", c_int64 * 4), ("dtype", c_uint8)),
        *(("pages", c_void_p), ("pages_stride", c_int64), ("page_rows", c_int64)),
    ]


class AttentionProblem(Structure):
    """csrc/core/problem.h."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "query_length", "key_length")),
        *((name, c_int64) for name in ("head_dim", "value_dim")),
        ("dtype", c_uint8),
        *((name, TensorView) for name in ("query", "key", "value")),
        ("scale", c_double),
        ("softcap", c_double),
        *((name, TensorView) for name in ("attn_mask", "alibi_slopes", "sinks")),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("alignment", c_uint8),
        ("key_lengths", c_void_p),
        *(("query_starts", c_void_p), ("key_starts", c_void_p), ("packed_rows", c_int64)),
        ("query_rows", c_void_p),
        ("full_query_length", c_int64),
        ("dropout_p", c_double),
        ("philox_seed", c_uint64),
        ("philox_offset", c_uint64),
        ("rng_state", c_void_p),
        ("dropout_batches", c_int64),
        ("allow_tf32", c_bool),
    ]


class ForwardOutputs(Structure):
    _fields_ = [("out", TensorView), ("logsumexp", c_void_p)]


class BackwardTensors(Structure):
    _fields_ = [
        ("out", TensorView),
        ("grad_out", TensorView),
        ("logsumexp", c_void_p),
        ("grad_logsumexp", c_void_p),
        *((f"grad_{name}", TensorView) for name in ("query", "key", "value", "attn_mask")),
        ("grad_alibi_slopes", c_void_p),
        ("deterministic", c_bool),
    ]


class Fault(IntEnum):
    NONE = 0
    SKIP_BLOCK_BARRIER = 1
    SKIP_WARP_BARRIER = 2
    SKIP_COPY_WAIT = 3
    WRONG_PHASE = 4
    EARLY_RELEASE = 5
    SKIP_PRODUCT_WAIT = 6


class KernelError(RuntimeError):
    """What the emulator found wrong with a kernel."""


class Device:
    """The emulated GPU: copies tensors to its memory, runs kernels, copies results back."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.emulation_allocate.restype = c_void_p
        self.lib.emulation_allocate.argtypes = [c_size_t, c_size_t]
        self.lib.emulation_set_read_only.argtypes = [c_void_p]
        self.lib.emulation_configure.argtypes = [c_uint64, c_int, c_int, c_int]
        self.lib.emulation_keep_mask.argtypes = [POINTER(AttentionProblem), c_void_p]
        self.lib.emulation_error.restype = c_char_p
        self.lib.emulation_faulty_kernel_name.restype = c_char_p
        sizes = (c_size_t * 4)()
        self.lib.emulation_structure_sizes(sizes)
        mirrored = [TensorView, AttentionProblem, ForwardOutputs, BackwardTensors]
        assert list(sizes) == [ctypes.sizeof(s) for s in mirrored], "emulation.py does not mirror csrc/core/problem.h"
        self.force_tier("")
        self.configure()

    def configure(
        self, seed: int = 0, fault: Fault = Fault.NONE, fault_call: int = 0, multiprocessors: int = 108
    ) -> None:
        self.lib.emulation_configure(seed, fault, fault_call, multiprocessors)

    def force_tier(self, name: str) -> None:
        self.check(self.lib.emulation_force_tier(name.encode()))

    def check(self, status: int) -> None:
        if status:
            raise KernelError(self.lib.emulation_error().decode())

    def faulty_kernels(self) -> list[str]:
        names = []
        while name := self.lib.emulation_faulty_kernel_name(len(names)):
            names.append(name.decode())
        return names

    def run_faulty_kernel(self, name: str) -> Tensor:
        self.lib.emulation_free_all()
        result = torch.empty(64)
        self.check(self.lib.emulation_run_faulty_kernel(self.faulty_kernels().index(name), c_void_p(result.data_ptr())))
        return result

    # Memory: one allocation for each storage, so that strides and gaps are the tensor's own.

    def empty(self, tensor: Tensor) -> int:
        elements = max(tensor.untyped_storage().nbytes() // tensor.element_size(), 1)
        pointer = self.lib.emulation_allocate(elements * tensor.element_size(), tensor.element_size())
        ctypes.memset(pointer, 0xFF, elements * tensor.element_size())  # NaN, should a kernel forget to write
        return pointer

    def put(self, tensor: Tensor) -> int:
        pointer = self.empty(tensor)
        storage = tensor.untyped_storage()
        ctypes.memmove(pointer, storage.data_ptr(), storage.nbytes())
        self.lib.emulation_set_read_only(pointer)
        return pointer + tensor.storage_offset() * tensor.element_size()

    def get(self, pointer: int, like: Tensor) -> Tensor:
        storage = like.untyped_storage()
        ctypes.memmove(storage.data_ptr(), pointer, storage.nbytes())
        return like


# What is compiled with AddressSanitizer where CI looks for memory errors: most kernels of both tiers once.
SAMPLE = "faulty_kernels|sm80/instantiate/(map_bfloat16|bfloat16_64)|simt/instantiate/float32"


def compiled(check: str) -> Path:
    """The library of the kernels, compiled with the emulator's race check ("races") or with AddressSanitizer and UBSan
    ("address"; only those of SAMPLE: "sample")."""
    folder, definitions = BUILD / check, [f"-DCHECK={check}"]
    if check == "sample":
        definitions = ["-DCHECK=address", f"-DCHECKED={SAMPLE}", f"-DOTHERS={compiled('races').parent}"]
    cmake = shutil.which("cmake")
    assert cmake, "the emulated CUDA kernels are built with CMake, and there is none on the PATH"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [cmake, "-S", str(HERE), "-B", str(folder), "-G", "Ninja", *definitions]
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers, one builds and the other waits
        for command in (configure, [cmake, "--build", str(folder)]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    return folder / "libcuda_emulation.so"


def build(check: str) -> Device:
    return Device(compiled(check))


def strides(tensor: Tensor, keep_broadcast: bool = True) -> list[int]:
    """A view's four strides; a dimension of size 1 gets 0, as in csrc/ops/make_problem.cpp."""
    return [0 if keep_broadcast and n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]


def view(pointer: int, tensor: Tensor, stride: list[int] | None = None) -> TensorView:
    return TensorView(pointer, (c_int64 * 4)(*(stride or tensor.stride())), SCALAR_TYPES.index(tensor.dtype))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Run:
    """One call on the device; holds the problem and what the forward pass left for the backward pass."""

    def __init__(
        self,
        device: Device,
        call: Call,
        rng_state: tuple[int, int],
        dropout_batches: int = 0,
        *,
        allow_tf32: bool = False,
        deterministic: bool = True,
    ) -> None:
        self.device, self.call = device, call
        self.deterministic = deterministic
        device.lib.emulation_free_all()
        q, k, v, options = call.query, call.key, call.value, call.options
        self.sizes = (q.size(0), q.size(1), q.size(2))
        self.real = accumulator(q.dtype)
        p = self.problem = AttentionProblem()
        (p.batch, p.heads, p.query_length, p.head_dim), (p.kv_heads, p.key_length) = q.shape, k.shape[1:3]
        p.value_dim, p.dtype = v.size(3), SCALAR_TYPES.index(q.dtype)
        p.query, p.key, p.value = (view(device.put(x), x, strides(x)) for x in (q, k, v))
        p.scale = 1 / math.sqrt(p.head_dim) if options.get("scale") is None else options["scale"]
        p.softcap = options.get("softcap", 0.0)
        p.window_left = options.get("window_left", UNBOUNDED)
        p.window_right = min(options.get("window_right", UNBOUNDED), 0 if options.get("is_causal") else UNBOUNDED)
        p.alignment = options.get("causal_alignment", "top_left") == "bottom_right"
        p.dropout_p = round(options.get("dropout_p", 0.0) * 65536) / 65536  # as make_problem does
        p.rng_state = device.put(torch.tensor([*rng_state, dropout_batches]))
        p.allow_tf32 = allow_tf32
        p.philox_seed, p.philox_offset, p.dropout_batches = 1, 1, 1  # must not be read
        self.place_rows()
        if (mask := options.get("attn_mask")) is not None:
            p.attn_mask = view(device.put(mask), mask, strides(mask))
        if (slopes := options.get("alibi_slopes")) is not None:
            slopes = slopes.expand(p.batch, p.heads)
            p.alibi_slopes = view(device.put(slopes), slopes, [*slopes.stride(), 0, 0])
        if (sinks := options.get("sinks")) is not None:
            sinks = sinks.expand(p.batch, p.heads)
            p.sinks = view(device.put(sinks), sinks, [*sinks.stride(), 0, 0])
        if (lengths := options.get("key_lengths")) is not None:
            p.key_lengths = device.put(lengths)

    def place_rows(self) -> None:
        """For calls whose batch entries do not have dimensions of their own: see packed.py."""

    def by_row(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor (B, H, L, D) whose storage is (B, L, H, D)."""
        b, h, n, d = tensor.shape
        return torch.empty(b, n, h, d, dtype=tensor.dtype).transpose(1, 2)

    def tiers(self) -> dict[str, str]:
        """Each tier's answer to the forward call: "+" and how it would serve it, or why it cannot."""
        return self.answers(None)

    def answers(self, backward: BackwardTensors | None) -> dict[str, str]:
        return self.answers_of(self.device.lib.emulation_tiers, backward)

    def answers_of(self, function: Any, backward: BackwardTensors | None) -> dict[str, str]:
        pointer = None if backward is None else ctypes.byref(backward)
        function.restype = c_char_p
        text = function(ctypes.byref(self.problem), pointer).decode()
        return dict(line.split(": ", 1) for line in text.splitlines())

    def forward(self) -> dict[str, Tensor]:
        device = self.device
        out = self.by_row(torch.empty(*self.sizes, self.problem.value_dim, dtype=self.call.query.dtype))
        logsumexp = torch.empty(self.sizes, dtype=self.real)
        pointers = device.empty(out), device.empty(logsumexp)
        outputs = ForwardOutputs(view(pointers[0], out, strides(out)), pointers[1])
        device.check(device.lib.emulation_forward(ctypes.byref(self.problem), ctypes.byref(outputs)))
        self.out, self.logsumexp = device.get(pointers[0], out), device.get(pointers[1], logsumexp)
        return {"out": self.out, "logsumexp": self.logsumexp}

    def backward(self, wanted: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The gradients of the named inputs; None: of all."""
        device, call, t = self.device, self.call, BackwardTensors()
        leaves = call.leaves() if wanted is None else {name: x for name, x in call.leaves().items() if name in wanted}
        grads: dict[str, Tensor] = {}
        pointers: dict[str, int] = {}

        def output(name: str, tensor: Tensor) -> int:
            grads[name], pointers[name] = tensor, device.empty(tensor)
            return pointers[name]

        t.deterministic = self.deterministic
        t.out, t.grad_out = (view(device.put(x), x, strides(x)) for x in (self.out, call.grad_out))
        t.logsumexp = device.put(self.logsumexp)
        t.grad_logsumexp = device.put(self.grad_logsumexp()) if call.grad_logsumexp is not None else None
        for name in ("query", "key", "value"):
            if name in leaves:
                grad = self.by_row(leaves[name])
                setattr(t, f"grad_{name}", view(output(f"grad_{name}", grad), grad, strides(grad)))
        if "attn_mask" in leaves:
            grad = torch.empty(leaves["attn_mask"].shape, dtype=self.real)
            t.grad_attn_mask = view(output("grad_attn_mask", grad), grad, strides(grad))
        if "alibi_slopes" in leaves:
            t.grad_alibi_slopes = output(
                "grad_alibi_slopes", torch.empty(self.problem.batch, self.sizes[1], dtype=self.real)
            )
        self.backward_tiers = self.answers(t)
        device.check(device.lib.emulation_backward(ctypes.byref(self.problem), ctypes.byref(t)))
        for name, grad in grads.items():
            device.get(pointers[name], grad)
        # What the ops layer does after the kernels.
        if "attn_mask" in leaves:
            grads["grad_attn_mask"] = grads["grad_attn_mask"].to(leaves["attn_mask"].dtype)
        if "alibi_slopes" in leaves:
            grads["grad_alibi_slopes"] = grads["grad_alibi_slopes"].sum_to_size(leaves["alibi_slopes"].shape)
        if "sinks" in leaves:
            grads["grad_sinks"] = self.grad_sinks(leaves["sinks"])
        return grads

    def grad_logsumexp(self) -> Tensor:
        assert self.call.grad_logsumexp is not None
        return self.call.grad_logsumexp.masked_fill(self.logsumexp.isinf(), 0.0)

    def grad_sinks(self, sinks: Tensor) -> Tensor:
        delta = (self.call.grad_out.to(self.real) * self.out.to(self.real)).sum(-1)
        if self.call.grad_logsumexp is not None:
            delta = delta - self.grad_logsumexp()
        share = (sinks.view(-1, 1) - self.logsumexp).exp().masked_fill(self.logsumexp.isinf(), 0.0)
        return -(share * delta).sum((0, 2))

    def keep_mask(self) -> Tensor:
        mask = torch.empty(*self.sizes, self.problem.key_length, dtype=torch.bool)
        pointer = self.device.empty(mask)
        self.device.check(self.device.lib.emulation_keep_mask(ctypes.byref(self.problem), c_void_p(pointer)))
        return self.device.get(pointer, mask)


def run_on(
    device: Device, call: Call, rng_state: tuple[int, int], **flags: bool
) -> tuple[dict[str, Any], Tensor | None]:
    """Forward and backward of one call, and the dropout mask it used. flags: Run's allow_tf32 and deterministic."""
    run = Run(device, call, rng_state, **flags)
    results = run.forward() | run.backward()
    return results, run.keep_mask() if call.options.get("dropout_p", 0.0) > 0 else None
