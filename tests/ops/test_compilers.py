"""Every route into a compiled or saved program keeps the operators whole and their answers equal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

import torch_attn

from ..cases import CASE_BY_NAME, small

ops = torch.ops.torch_attn
OPCHECK_NAMES = ["plain", "grouped_query", "causal", "float_mask_over_heads"]
OPCHECK_NAMES += ["key_lengths", "alibi", "sinks", "dropout"]


class Block(torch.nn.Module):
    """Self-attention as a user writes it around the functional call."""

    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(dim, 3 * dim)
        self.out = torch.nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch_attn.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        return self.out(y.transpose(1, 2).reshape(n, length, dim))


def gradients(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    module(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", OPCHECK_NAMES)
@pytest.mark.parametrize("op", ["attention", "attention_with_logsumexp", "attention_forward"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_forward_operators(op: str, name: str, requires_grad: bool) -> None:
    case = small(CASE_BY_NAME[name])
    options = case.kwargs(torch.float32)
    if "dropout_p" in options and requires_grad:
        pytest.skip("opcheck compares two random draws of the gradient")
    if op != "attention_forward":
        options["enable_gqa"] = True
    inputs = [x.requires_grad_(requires_grad) for x in case.tensors(torch.float32)]
    torch.library.opcheck(getattr(ops, op).default, tuple(inputs), options, test_utils=opcheck_tests(options))


def opcheck_tests(options: dict) -> tuple[str, ...]:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    return tests[:3] if "dropout_p" in options else tests


@pytest.mark.parametrize("name", OPCHECK_NAMES)
def test_opcheck_backward(name: str) -> None:
    case = small(CASE_BY_NAME[name])
    options = case.kwargs(torch.float32)
    query, key, value = case.tensors(torch.float32)
    out, logsumexp, rng_state = ops.attention_forward(query, key, value, **options)
    wanted = [True, True, True, "attn_mask" in options, "alibi_slopes" in options, "sinks" in options]
    for grad_logsumexp in (None, torch.randn_like(logsumexp)):
        args = (torch.randn_like(out), grad_logsumexp, query, key, value, out, logsumexp, rng_state)
        torch.library.opcheck(ops.attention_backward.default, args, {**options, "output_mask": wanted})


def test_opcheck_dropout_keep_mask() -> None:
    torch.library.opcheck(ops.dropout_keep_mask.default, (torch.tensor([3, 0, 0]), 2, 2, 5, 7, 0.5))


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_saves_the_operator_and_trains_after_load(how: str) -> None:
    module, x = Block(), torch.randn(2, 7, 16)
    scripted = torch.jit.script(module) if how == "script" else torch.jit.trace(module, x)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    # By its public name when scripted; a trace records what that name decomposes to.
    assert any(name.startswith("torch_attn::") for name in torch.jit.export_opnames(loaded))
    for _ in range(3):  # the profiling executor rewrites the graph on its first calls
        for a, b in zip(gradients(loaded, x), gradients(module, x), strict=True):
            torch.testing.assert_close(a, b)


def test_freeze_and_optimize_for_inference() -> None:
    module, x = Block().eval(), torch.randn(2, 7, 16)
    scripted = torch.jit.script(module)
    for frozen in (torch.jit.freeze(scripted), torch.jit.optimize_for_inference(torch.jit.script(module))):
        torch.testing.assert_close(frozen(x), module(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_has_no_graph_break_and_stays_dynamic(backend: str) -> None:
    torch._dynamo.reset()
    module = Block()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((2, 7), (3, 12), (5, 33)):
            x = torch.randn(batch, length, 16)
            for a, b in zip(gradients(compiled, x), gradients(module, x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_export_keeps_batch_and_length_dynamic(tmp_path: Path) -> None:
    module = Block().eval()
    shapes = ({0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=512)},)
    program = torch.export.export(module, (torch.randn(3, 7, 16),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2")
    assert any("torch_attn" in str(node.target) for node in loaded.graph.nodes)
    for batch, length in ((1, 1), (2, 31)):
        x = torch.randn(batch, length, 16)
        torch.testing.assert_close(loaded.module()(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_inputs_and_keeps_logsumexp(dtype: torch.dtype) -> None:
    inputs = [torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", dtype=dtype):
        out, logsumexp = torch_attn.attention(*inputs, attn_mask=torch.randn(9, 9), return_logsumexp=True)
    assert out.dtype == dtype and logsumexp.dtype == torch.float32
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_replays_dropout(use_reentrant: bool) -> None:
    inputs = [torch.randn(1, 2, 33, 8, requires_grad=True) for _ in range(3)]

    def function(*args: Tensor) -> Tensor:
        return torch_attn.attention(*args, dropout_p=0.5)

    torch.manual_seed(3)
    plain = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    torch.manual_seed(3)
    if use_reentrant:
        checkpoint(function, *inputs, use_reentrant=True).square().sum().backward()
        replayed = [x.grad for x in inputs]
    else:
        replayed = torch.autograd.grad(checkpoint(function, *inputs, use_reentrant=False).square().sum(), inputs)
    for a, b in zip(replayed, plain, strict=True):
        assert torch.equal(a, b)


def test_fake_tensors_have_the_real_layout() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = [torch.randn(2, 3, 5, 4) for _ in range(3)]
    out, logsumexp, rng_state = ops.attention_forward(*real)
    with FakeTensorMode() as mode:
        fake = ops.attention_forward(*(mode.from_tensor(x) for x in real))
    for a, b in zip(fake, (out, logsumexp, rng_state), strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
