"""KVCache: decoding token by token, and prompts of different lengths, give what the whole sequence at once gives."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torch_attn
from torch_attn import KVCache

BATCH, HEADS, KV_HEADS, DIM, LENGTH = 3, 4, 2, 8, 12


def attend(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    return torch_attn.attention(
        query,
        keys,
        values,
        key_lengths=lengths,
        is_causal=True,
        causal_alignment="bottom_right",
        enable_gqa=True,
    )


class Layer(nn.Module):
    """Causal attention with a cache; the cache is longer than any sequence."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.projection = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * DIM, dtype=dtype)
        self.cache = KVCache(BATCH, KV_HEADS, LENGTH + 3, DIM, dtype=dtype)
        self.requires_grad_(False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> query (B, Hq, T, D), key and value (B, Hkv, T, D)."""
        heads = self.projection(x).unflatten(-1, (-1, DIM)).transpose(1, 2)
        return heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]

    def whole(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)
        return torch_attn.attention(query, key, value, is_causal=True, enable_gqa=True)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)
        return attend(query, *self.cache.update(key, value))


def decode(layer: Callable[[Tensor], Tensor], x: Tensor, steps: list[int]) -> Tensor:
    return torch.cat([layer(part) for part in x.split(steps, 1)], 2)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)


ONE_BY_ONE = [1] * LENGTH
PROMPT_AND_ONE_BY_ONE = [5] + [1] * (LENGTH - 5)
CHUNKS = [4, 1, 5, 2]


@pytest.mark.parametrize("steps", [ONE_BY_ONE, PROMPT_AND_ONE_BY_ONE, CHUNKS])
def test_decoding_gives_what_the_whole_sequence_gives(x: Tensor, steps: list[int]) -> None:
    layer = Layer()
    layer.cache.key.fill_(torch.nan)  # what is not filled is not read
    layer.cache.value.fill_(torch.nan)
    torch.testing.assert_close(decode(layer, x, steps), layer.whole(x))
    assert layer.cache.lengths.tolist() == [LENGTH] * BATCH


def test_a_cache_that_was_reset_starts_anew(x: Tensor) -> None:
    layer = Layer()
    decode(layer, torch.randn_like(x), ONE_BY_ONE)
    layer.cache.reset()
    torch.testing.assert_close(decode(layer, x, PROMPT_AND_ONE_BY_ONE), layer.whole(x))


def test_prompts_of_different_lengths(x: Tensor) -> None:
    layer = Layer()
    counts = torch.tensor([5, 1, 3])
    query, key, value = layer.project(x[:, :5])
    keys, values, lengths = layer.cache.update(key, value, counts)
    prompt = torch_attn.attention(query, keys, values, key_lengths=lengths, is_causal=True, enable_gqa=True)
    exact = layer.whole(x)
    for entry, count in enumerate(counts.tolist()):
        torch.testing.assert_close(prompt[entry, :, :count], exact[entry, :, :count])
    for step in range(6):
        token = x[torch.arange(BATCH), counts + step].unsqueeze(1)
        out = layer(token)
        torch.testing.assert_close(out[:, :, 0], exact[torch.arange(BATCH), :, counts + step])


def test_keys_and_values_are_stored_where_they_belong() -> None:
    cache = KVCache(2, 1, 6, 4, value_dim=3, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 3)
    before = cache.key.data_ptr()
    cache.update(key, value, torch.tensor([1, 2]))
    keys, values, lengths = cache.update(key, value)
    assert keys.data_ptr() == before and lengths.tolist() == [3, 4]
    for entry, start in enumerate([1, 2]):
        assert torch.equal(keys[entry, :, start : start + 2], key[entry].bfloat16())
        assert torch.equal(values[entry, :, start : start + 2], value[entry].bfloat16())


def test_gradients_do_not_reach_through_the_cache(x: Tensor) -> None:
    layer = Layer()
    keys, values, _ = layer.cache.update(*(part.requires_grad_() for part in layer.project(x)[1:]))
    assert (
        not keys.requires_grad
        and not values.requires_grad
        and layer.state_dict().keys()
        == {
            "projection.weight",
            "projection.bias",
        }
    )


def test_a_full_cache_is_an_error() -> None:
    cache = KVCache(1, 1, 3, 2)
    cache.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(IndexError, match="out of bounds"):
        cache.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))


def test_compiled_steps_neither_break_the_graph_nor_compile_anew(x: Tensor) -> None:
    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    first = compiled(x[:, :1])
    with torch.compiler.set_stance("fail_on_recompile"):
        out = torch.cat([first, decode(compiled, x[:, 1:], ONE_BY_ONE[1:])], 2)
    torch.testing.assert_close(out, layer.whole(x))


def test_an_exported_step_decodes(x: Tensor) -> None:
    layer = Layer()
    step = torch.export.export(layer, (x[:, :1],)).module()
    torch.testing.assert_close(decode(step, x, ONE_BY_ONE), layer.whole(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_cache_saved_and_loaded(x: Tensor) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache = KVCache(BATCH, KV_HEADS, LENGTH, DIM, dtype=torch.float64)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values, lengths = self.cache.update(key, value)
            return attend(query, keys, values, lengths)

    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Step()), file)
    file.seek(0)
    step, layer = torch.jit.load(file), Layer()
    parts = [layer.project(x[:, i : i + 1]) for i in range(LENGTH)]
    torch.testing.assert_close(torch.cat([step(*part) for part in parts], 2), layer.whole(x))
