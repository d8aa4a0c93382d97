"""The pieces of both demos in examples/shakespeare, and a few steps of their training instead of hundreds."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bert_figure
import bert_training
import gpt_figure
import gpt_training
from bert_model import LONGEST, MASK, MaskedModel
from fixed_mixing import FixedMixing, fix_mixing
from gallery import save_scripted
from gpt_model import GPT, write
from plays import VOCABULARY, Plays, joined, read, speeches
from tests.examples.conftest import EXAMPLES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plays() -> Plays:
    return Plays.load(only=2)


@pytest.fixture(scope="module")
def few(plays: Plays) -> Plays:
    """To measure on in a moment."""
    return replace(plays, held_out=plays.held_out[:200])


def gpt(**options: bool) -> GPT:
    torch.manual_seed(0)
    model = GPT(VOCABULARY, dim=32, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCABULARY, shape)


# The text


def test_held_out_plays_survive_encoding_though_the_vocabulary_has_not_seen_them(plays: Plays) -> None:
    text = plays.decode(joined(plays.held_out))
    assert len(text) == plays.held_out_characters
    assert text.startswith("Hamlet\n\nACT I\n")
    assert "To be, or not to be: that is the question:\n" in text
    assert "To-morrow, and to-morrow, and to-morrow,\n" in text


def test_no_held_out_line_is_in_training(plays: Plays) -> None:
    train = plays.decode(joined(plays.train))
    assert "HAMLET" not in train and "MACBETH" not in train
    assert plays.tokenizer.get_vocab_size() == VOCABULARY


def test_speeches_joined_are_the_text_again(tmp_path: Path) -> None:
    file = tmp_path / "play.md"
    file.write_text("# A Play\n\n**FOOL**  \nNay, _sweet_ lord:  \nnay!\n\n\n_Exit_\n")
    assert read(file) == "A Play\n\nFOOL\nNay, sweet lord:\nnay!\n\nExit\n\n"
    assert "".join(speeches(read(file))) == read(file)
    assert len(speeches(read(file))) == 3


def test_a_mask_in_the_text_is_one_token(plays: Plays) -> None:
    tokens = plays.encode("to love the [MASK] that")
    assert (tokens == MASK).sum() == 1
    assert plays.decode(tokens[tokens != MASK]) == "to love the that"


# The GPT


@pytest.mark.parametrize("looks_at_content", [True, False], ids=["attention", "fixed"])
def test_the_cache_changes_nothing(looks_at_content: bool) -> None:
    model, tokens = gpt(looks_at_content=looks_at_content), random_tokens(2, 40)
    whole, kept = model(tokens)
    first, past = model(tokens[:, :25])
    second, past = model(tokens[:, 25:39], past)
    third, past = model(tokens[:, 39:], past)
    torch.testing.assert_close(torch.cat([first, second, third], dim=1), whole)
    torch.testing.assert_close(past, kept)
    start = tokens[:1, :5]
    written = write(model, start, 40, seed=1)
    assert torch.equal(written, write(model, start, 40, seed=1, cached=False))
    assert written.shape == (1, 45) and torch.equal(written[:, :5], start)
    assert not torch.equal(written, write(model, start, 40, seed=2))


def test_no_token_sees_a_later_one() -> None:
    model, tokens = gpt(), random_tokens(1, 30)
    other = tokens.clone()
    other[:, 20:] = random_tokens(1, 10)
    torch.testing.assert_close(model(tokens)[0][:, :20], model(other)[0][:, :20])
    assert not torch.allclose(model(tokens)[0][:, 20:], model(other)[0][:, 20:])


def test_only_the_baseline_mixes_alike_whatever_it_reads() -> None:
    texts = random_tokens(2, 1, 20)
    for looks in (True, False):
        first, second = (gpt_figure.maps(gpt(looks_at_content=looks), text)[0] for text in texts)
        assert torch.allclose(first, second) != looks


def test_scripted_gpt_says_and_writes_the_same(tmp_path: Path) -> None:
    model, tokens = gpt(), random_tokens(2, 20)
    loaded = save_scripted(model, tmp_path / "gpt.pt")
    for ours, theirs in zip(model(tokens), loaded(tokens), strict=True):
        torch.testing.assert_close(theirs, ours)
    assert torch.equal(write(loaded, tokens[:1], 20, seed=0), write(model, tokens[:1], 20, seed=0))


def test_places_to_copy_from_follow_the_same_token() -> None:
    again = gpt_training.follows_again(torch.tensor([[7, 8, 7, 9, 7]]))[0]
    assert again.nonzero().tolist() == [[2, 1], [4, 1], [4, 3]]


def test_bits_are_told_apart_by_whether_the_pair_came_before(few: Plays) -> None:
    """A model that copies, for which only repeated pairs are cheap."""

    class Copies(nn.Module):
        def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
            again = gpt_training.follows_again(tokens).float()
            return 9 * (again @ nn.functional.one_hot(tokens, VOCABULARY).float()).clamp(max=1), None

    bits = gpt_training.bits_per_character(Copies(), few)
    assert bits.repeated < 2 < bits.everywhere < bits.new


def test_windows_cover_the_held_out_plays_once(plays: Plays) -> None:
    text, cut = joined(plays.held_out), gpt_training.windows(plays)
    assert torch.equal(cut[:, :-1].flatten(), text[: cut[:, :-1].numel()])
    assert torch.equal(cut[:, 1:].flatten(), text[1 : cut[:, 1:].numel() + 1])
    assert len(text) - cut[:, 1:].numel() <= gpt_training.WINDOW


def test_bits_of_a_model_that_knows_nothing(few: Plays) -> None:
    model = gpt().float()
    nn.init.zeros_(model.tokens.weight)
    bits = gpt_training.bits_per_character(model, few)
    tokens = gpt_training.windows(few)[:, 1:].flatten()
    characters_per_token = len(few.decode(tokens)) / len(tokens)
    assert bits.everywhere == pytest.approx(10 / characters_per_token)  # 1,024 tokens: 10 bits each
    assert bits.repeated != bits.new


def test_gpt_learns_on_the_kernels(few: Plays) -> None:
    calls = torch.ops.torch_attn.kernel_calls()
    before, after = (gpt_training.trained(few, True, seed=0, steps=steps, label="test") for steps in (1, 12))
    assert torch.ops.torch_attn.kernel_calls() >= calls + 13 * 2
    loss = [gpt_training.bits_per_character(model, few).everywhere for model in (before, after)]
    assert loss[1] < loss[0] - 0.2


# The masked model


def test_padding_changes_no_answer(plays: Plays) -> None:
    model = MaskedModel(VOCABULARY).double().eval()
    texts = bert_training.passages(plays.held_out, plays)[:20]
    _, tokens = bert_training.batch(texts, torch.Generator())
    assert len({len(text) for text in texts}) > 3
    together = model(tokens)
    for row, text in enumerate(texts):
        torch.testing.assert_close(together[row, : len(text)], model(text[None])[0])


def test_passages_are_speech_without_names(plays: Plays) -> None:
    texts = [plays.decode(text) for text in bert_training.passages(plays.held_out, plays)]
    assert any(text.startswith("To be, or not to be: that is the question:") for text in texts)
    assert not any(text.startswith(("HAMLET", "MACBETH\n")) for text in texts)
    lengths = [len(text) for text in bert_training.passages(plays.held_out, plays)]
    assert min(lengths) == bert_training.SHORTEST and max(lengths) == LONGEST


def test_masks_hide_no_padding_and_their_share_of_the_rest(plays: Plays) -> None:
    seen, tokens = bert_training.batch(bert_training.passages(plays.held_out, plays), torch.Generator().manual_seed(0))
    assert torch.equal(seen[seen != MASK], tokens[seen != MASK])
    assert not (seen[tokens == 0] == MASK).any()
    share = (seen == MASK).sum() / (tokens != 0).sum()
    assert share.item() == pytest.approx(bert_training.MASKED, rel=0.05)


def test_guessing_the_most_frequent_is_counted(plays: Plays) -> None:
    often = bert_training.most_frequent(plays)
    assert 0.02 < often.first < often.first_five < 0.3


def test_masked_model_learns_on_the_kernels(plays: Plays) -> None:
    calls = torch.ops.torch_attn.kernel_calls()
    before, after = (bert_training.trained(plays, True, seed=0, steps=steps, label="test") for steps in (1, 10))
    assert torch.ops.torch_attn.kernel_calls() >= calls + 11 * 2
    seen, tokens = next(bert_training.batches(plays))
    hidden = seen == MASK
    with torch.no_grad():
        loss = [nn.functional.cross_entropy(model(seen)[hidden], tokens[hidden]) for model in (before, after)]
    assert loss[1] < loss[0] - 0.2


def test_scripted_masked_model_says_the_same(plays: Plays, tmp_path: Path) -> None:
    model = MaskedModel(VOCABULARY).eval()
    seen, _ = next(bert_training.batches(plays))
    with torch.no_grad():
        torch.testing.assert_close(save_scripted(model, tmp_path / "bert.pt")(seen), model(seen))


def test_a_masked_word_looks_to_both_sides_but_for_the_heads_of_one(plays: Plays) -> None:
    tokens = plays.encode(bert_figure.SENTENCE)
    weights = bert_figure.looks_from_the_mask(MaskedModel(VOCABULARY).eval(), tokens)
    place = int((tokens == MASK).nonzero()[0, 1])
    assert weights.shape == (8, tokens.size(1))
    torch.testing.assert_close(weights.sum(1), torch.ones(8))
    left, right = (weights[:, side].sum(1) > 0.02 for side in (slice(place), slice(place + 1, None)))
    assert left.tolist() == [True, False, True, True] * 2
    assert right.tolist() == [False, True, True, True] * 2


# The baseline that both digits_vit and the masked model use


def test_fixed_mixing_has_one_map_whatever_it_reads_but_skips_padding() -> None:
    mixing = FixedMixing(16, 2, length=6)
    first, second = torch.randn(2, 3, 6, 16)
    assert torch.equal(mixing(first, first, first)[1], mixing(second, second, second)[1])
    padding = torch.tensor([[False] * 4 + [True] * 2]).expand(3, -1)
    _, weights = mixing(first, first, first, key_padding_mask=padding)
    assert not weights[..., 4:].any() and (weights[..., :4] > 0).all()
    output, _ = mixing(first, first, first)
    assert not torch.allclose(output, mixing(second, second, second)[0])


def test_fixed_mixing_serves_every_layer_in_training_and_evaluation() -> None:
    model = MaskedModel(VOCABULARY)
    fix_mixing(model.encoder, LONGEST)
    assert all(type(layer.self_attn) is FixedMixing for layer in model.encoder.layers)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens), model.train()(tokens))


# Whole demos, which a few steps teach nothing, and which must say so


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_demo_prints_its_table_and_draws_its_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"gpt": ["--tokens", "10"], "bert": []}[name]
    script = EXAMPLES / "shakespeare" / f"{name}_demo.py"
    few = ["--steps", "2", "--plays", "2", "--speeches", "300"]
    monkeypatch.setattr("sys.argv", [script.name, *few, *short, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="and the demo asks for"):
        runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert "\n  attention " in said and "\n  fixed mixing " in said
    assert "scripted, saved and loaded, its logits differ by 0.0e+00" in said
    for style in ("light", "dark"):
        assert (tmp_path / f"{name}_{style}.png").read_bytes().startswith(b"\x89PNG")
