"""The language model of "The cat sat on the mat." learns to look from the verb to its subject."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grammar import LONGEST, PLACES, SENTENCE, UNSEEN, VERBS, WORDS, encode, find, sentence
from language_model import LanguageModel, accuracy_at_the_verb, held_out, train
from subject_head import SubjectHead, draw, find_subject_head, map_of_the_sentence

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(steps: int, looks_back: bool) -> LanguageModel:
    torch.manual_seed(0)  # as the demo does; every seed that was tried learns it
    model = LanguageModel(looks_back=looks_back)
    train(model, seed=0, steps=steps)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return trained(300, looks_back=True)


@pytest.fixture(scope="module")
def unseen() -> Tensor:
    return held_out()


@pytest.fixture(scope="module")
def head(model: LanguageModel, unseen: Tensor) -> SubjectHead:
    return find_subject_head(model, unseen)


def test_sat_attends_most_to_cat(model: LanguageModel, head: SubjectHead) -> None:
    words, weights = map_of_the_sentence(model, head)
    assert words[1:3] == ["cat", "sat"]
    assert weights.shape == (len(words), len(words))
    assert weights[2].argmax() == 1
    assert weights[2, 1] > 0.8
    assert not weights.triu(1).any(), "no word attends to a later one"


def test_the_head_looks_at_every_subject(head: SubjectHead) -> None:
    assert head.share > 0.9


def test_the_sentence_is_completed_though_no_sentence_had_its_pair(model: LanguageModel) -> None:
    words = SENTENCE.split()
    with torch.no_grad():
        said = model(encode([words])[:, : len(words)]).argmax(-1)[0]
    assert [WORDS[number] for number in said[2:-1]] == words[3:]
    draw_words = random.Random(0)
    drawn = [sentence(draw_words) for _ in range(2000)]
    assert not any(set(UNSEEN) <= set(words) for words in drawn)
    assert any("cat" in words for words in drawn)
    assert any("sat" in words for words in drawn)


def test_predicting_at_the_verb_needs_attention(model: LanguageModel, unseen: Tensor) -> None:
    assert accuracy_at_the_verb(model, unseen) > 0.99
    # Four prepositions follow the verbs, each a quarter of the time.
    assert accuracy_at_the_verb(trained(100, looks_back=False), unseen) < 0.45


def test_every_sentence_has_a_subject_before_a_verb(unseen: Tensor) -> None:
    assert unseen.shape[1] == LONGEST
    subjects, verbs = find(unseen, tuple(PLACES)), find(unseen, VERBS)
    assert (0 < subjects).all() and (subjects < verbs).all()
    assert len(set((verbs - subjects).tolist())) > 1
    assert len(set(subjects.tolist())) > 1


def test_training_and_maps_run_on_the_kernels(model: LanguageModel, unseen: Tensor) -> None:
    calls = torch.ops.torch_attn.kernel_calls()
    model(unseen)
    assert torch.ops.torch_attn.kernel_calls() - calls == len(model.layers.layers)


def test_scripted_model_says_the_same(model: LanguageModel, unseen: Tensor, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(model).save(str(tmp_path / "model.pt"))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.pt"))(unseen), model(unseen))


@pytest.mark.parametrize("style", ["light", "dark"])
def test_figure_is_written(model: LanguageModel, head: SubjectHead, style: str, tmp_path: Path) -> None:
    file = tmp_path / "map.png"
    draw(*map_of_the_sentence(model, head), head, file, style)
    assert file.read_bytes().startswith(b"\x89PNG")
