"""On a GPU: modules train as PyTorch's do, under autocast, torch.compile, TorchScript and CUDA graphs, on any stream,
and the derivatives that have no CUDA kernel of their own are right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import torch_attn

from ..cases import CASE_BY_NAME, small
from .test_on_gpu import pytestmark as needs_gpu

pytestmark = needs_gpu
SIZES = {"d_model": 128, "nhead": 4, "dim_feedforward": 256, "dropout": 0.0, "batch_first": True}


def encoder(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**SIZES), 2, enable_nested_tensor=False).to("cuda", dtype)


def replaced(model: nn.Module) -> nn.Module:
    torch_attn.replace_mha(model)
    return model


def step(model: nn.Module, x: Tensor, **options: object) -> list[Tensor]:
    """Output and gradients."""
    model.zero_grad()
    out = model(x, **options)
    out.float().square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded_causal"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_training_step_is_that_of_pytorch(autocast: torch.dtype | None, masked: bool) -> None:
    theirs, ours = encoder(), replaced(encoder())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 150, 128, device="cuda")
    options = {}
    if masked:
        options["mask"] = nn.Transformer.generate_square_subsequent_mask(150, device="cuda")
        options["src_key_padding_mask"] = torch.arange(150, device="cuda") >= torch.tensor([[150], [90], [33]]).cuda()
        options["src_key_padding_mask"] = (
            options["src_key_padding_mask"].float().masked_fill(options["src_key_padding_mask"], -torch.inf)
        )
    exact_model = encoder(torch.float64)
    exact_model.load_state_dict(theirs.state_dict())
    exact_options = {n: m.double() for n, m in options.items()}
    exact = step(exact_model, x.double(), **exact_options)
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        expected, actual = (step(model, x, **options) for model in (theirs, ours))
    for a, e, right in zip(actual, expected, exact, strict=True):
        scale = right.abs().max().item()
        ours_error, their_error = ((y.double() - right).abs().max().item() for y in (a, e))
        assert ours_error <= 2 * their_error + 1e-5 * scale, (ours_error, their_error, scale)


def test_weights_are_those_of_pytorch() -> None:
    theirs = nn.MultiheadAttention(128, 4, batch_first=True, device="cuda")
    ours = torch_attn.MultiheadAttention(128, 4, batch_first=True, device="cuda")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 70, 128, device="cuda")
    for average in (True, False):
        expected, actual = (m(x, x, x, average_attn_weights=average)[1] for m in (theirs, ours))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiler", ["inductor", "torchscript"])
def test_a_compiled_module_does_what_it_does_eagerly(compiler: str) -> None:
    model = torch_attn.MultiheadAttention(128, 4, batch_first=True, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 100, 128, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(model) if compiler == "inductor" else torch.jit.script(model)

    def gradients(module: nn.Module) -> list[Tensor]:
        out = module(x, x, x, need_weights=False)[0]
        return [out.detach(), *torch.autograd.grad(out.float().square().mean(), list(model.parameters()))]

    for a, e in zip(gradients(compiled), gradients(model), strict=True):
        assert (a - e).abs().max() <= 0.02 * e.abs().max()


def test_a_training_step_is_captured_and_replayed() -> None:
    model = replaced(encoder(torch.bfloat16))
    x = torch.randn(2, 300, 128, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(model, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = step(model, x)
    for a, e in zip(captured, expected, strict=True):
        assert (a - e).abs().max() <= 0.02 * e.abs().max() + 1e-6


def test_calls_run_on_the_current_stream() -> None:
    """The other stream sleeps before it writes the operands: a kernel elsewhere would read what was there before."""
    stream = torch.cuda.Stream()
    query = torch.zeros(1, 2, 200, 64, device="cuda", dtype=torch.bfloat16)
    wanted = torch.randn(1, 2, 200, 64, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        query.copy_(wanted)
        out = torch_attn.attention(query, query, query)
    torch.cuda.synchronize()
    assert torch.equal(out, torch_attn.attention(wanted, wanted, wanted))


@pytest.mark.parametrize("name", ["plain", "float_mask_causal", "everything"])
def test_second_derivatives_and_forward_mode_agree_with_finite_differences(name: str) -> None:
    case = small(CASE_BY_NAME[name])
    options = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in case.kwargs(torch.float64).items()}
    tensors = tuple(x.cuda().requires_grad_() for x in case.tensors(torch.float64))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.cuda.manual_seed(17)  # the same dropout bits at every evaluation
        return torch.ops.torch_attn.attention_forward(query, key, value, **options)[0]

    assert gradcheck(attention, tensors, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    assert gradgradcheck(attention, tensors, fast_mode=True)


def test_large_calls_index_beyond_two_to_the_31() -> None:
    """5 GiB of query in one tensor: its last heads lie past what 32 bits count."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    query = torch.randn(40, 1, 1 << 19, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(40, 1, 64, 128, device="cuda", dtype=torch.bfloat16)
    out = torch_attn.attention(query, key, key)
    last = torch_attn.attention(query[-1:].clone(), key[-1:].clone(), key[-1:].clone())
    assert torch.equal(out[-1:], last)
