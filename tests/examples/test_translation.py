"""The pieces of the demo in examples/translation, and a few steps of its training instead of a thousand."""

from __future__ import annotations

import runpy
from datetime import date
from pathlib import Path

import pytest
import torch

from alignment_figure import maps, on_the_month
from dates import (
    HELD_OUT,
    LANGUAGES,
    LONGEST_SOURCE,
    LONGEST_TARGET,
    Calendar,
    Sentence,
    decode,
    sources,
    targets,
)
from gallery import save_scripted
from tests.examples.conftest import EXAMPLES, assert_pictures
from translator import Translator, exact, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def calendar() -> Calendar:
    return Calendar()


def test_no_test_date_shares_year_or_day_of_the_year_with_training(calendar: Calendar) -> None:
    assert not {day.year for day in calendar.train} & {day.year for day in calendar.test}
    assert not {(day.month, day.day) for day in calendar.train} & {(day.month, day.day) for day in calendar.test}
    every_day = 800 * 365.2425
    assert len(calendar.test) == pytest.approx(HELD_OUT**2 * every_day, rel=0.1)
    assert len(calendar.train) == pytest.approx((1 - HELD_OUT) ** 2 * every_day, rel=0.1)


def test_every_month_and_weekday_is_in_training_and_in_the_test(calendar: Calendar) -> None:
    for days in (calendar.train, calendar.test):
        assert len({day.month for day in days}) == 12
        assert len({day.weekday() for day in days}) == 7


def test_every_sentence_of_the_calendar_survives_encoding(calendar: Calendar) -> None:
    sentences = calendar.test_sentences(40)
    sentences += [Sentence(day, language) for language in LANGUAGES for day in calendar.train[:365]]
    source, target = sources(sentences), targets(sentences)
    assert source.shape == (len(sentences), LONGEST_SOURCE) and target.shape == (len(sentences), LONGEST_TARGET)
    assert decode(source) == [sentence.source for sentence in sentences]
    assert decode(target) == [sentence.target for sentence in sentences]
    assert not target[:, -1].any(), "a translation that ends is told from one that goes on"


@pytest.mark.parametrize("language", LANGUAGES)
def test_months_are_found_where_they_stand(language: str, calendar: Calendar) -> None:
    months = set()
    for day in calendar.test:
        sentence = Sentence(day, language)
        months.add((day.month, sentence.source[sentence.month_place()]))
        assert sentence.target[sentence.month_place(in_target=True)] == f"{day:%B}"
    assert len(months) == len({month for month, _ in months}) == 12


@pytest.mark.parametrize("one_vector", [False, True], ids=["attention", "one vector"])
def test_model_learns_and_saves_as_it_is(one_vector: bool, calendar: Calendar, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Translator(dim=32, heads=2, layers=1, one_vector=one_vector).eval()
    sentences = calendar.test_sentences(2)
    source, target = sources(sentences), targets(sentences)

    @torch.no_grad()
    def loss() -> float:
        return torch.nn.functional.cross_entropy(model(source, target).flatten(0, 1), target.flatten()).item()

    before = loss()
    calls = torch.ops.torch_attn.kernel_calls()
    train(model, calendar, seed=0, steps=20)
    assert torch.ops.torch_attn.kernel_calls() > calls
    assert loss() < 0.9 * before
    loaded = save_scripted(model, tmp_path / "translator.pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(source, target), model(source, target))
    assert torch.equal(loaded.translate(source), model.translate(source))


def test_translation_says_each_likeliest_character_after_those_before(calendar: Calendar) -> None:
    model = Translator(dim=32, heads=2, layers=1).eval()
    source = sources(calendar.test_sentences(1))
    with torch.no_grad():
        said = model.translate(source)
        torch.testing.assert_close(model(source, said).argmax(2), said)


@pytest.mark.parametrize("one_vector", [False, True], ids=["attention", "one vector"])
def test_padding_of_the_source_changes_nothing(one_vector: bool, calendar: Calendar) -> None:
    model = Translator(dim=32, heads=2, layers=1, one_vector=one_vector).eval()
    sentences = [Sentence(calendar.test[0], "fr")]
    source, target = sources(sentences), targets(sentences)
    with torch.no_grad():
        before = model(source, target)
        model.source_places[len(sentences[0].source) :] += 1.0
        torch.testing.assert_close(model(source, target), before)


def test_one_vector_is_the_same_model_but_for_what_it_may_look_at(calendar: Calendar) -> None:
    models = [Translator(one_vector=one_vector) for one_vector in (False, True)]
    shapes = [{name: x.shape for name, x in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    source = sources(calendar.test_sentences(1))
    assert [model.read(source)[0].size(1) for model in models] == [LONGEST_SOURCE, 1]


def test_attention_to_the_month_is_counted(calendar: Calendar) -> None:
    sentences = [Sentence(date(2026, 3, 17), language) for language in ("de", "hu")]
    assert [sentence.source for sentence in sentences] == ["Dienstag, 17. März 2026", "2026. március 17., kedd"]
    weights = torch.zeros(2, LONGEST_TARGET, LONGEST_SOURCE)
    weights[0, len("Tuesday, "), len("Dienstag, 17. M")] = 0.75
    weights[1, len("Tuesday, "), len("2026.")] = 1.0  # the space before the month
    weights[1, len("Tuesday, M"), len("2026. ")] = 1.0  # the month's second letter
    assert on_the_month(weights, sentences) == (0.375, (4 / 23 + 7 / 23) / 2)


def test_maps_are_the_last_layers(calendar: Calendar) -> None:
    model = Translator(dim=32, heads=2, layers=2).eval()
    sentences = calendar.test_sentences(1)
    weights = maps(model, sentences)
    assert weights.shape == (len(sentences), LONGEST_TARGET, LONGEST_SOURCE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(sentences), LONGEST_TARGET))
    before = weights.clone()
    model.decoder.layers[-1].multihead_attn.in_proj_weight.data *= 2
    assert not torch.equal(maps(model, sentences), before)


def test_demo_prints_its_table_and_draws_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps teach nothing, which the demo must say."""
    arguments = ["demo.py", "--steps", "2", "--dates", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="are translated exactly, and the demo asks for 85%"):
        runpy.run_path(str(EXAMPLES / "translation" / "demo.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert all(f"\n  {language} " in said for language in LANGUAGES.values())
    assert "and no translation does" in said
    assert_pictures(tmp_path, "translation")


def test_exactness_is_of_whole_texts(calendar: Calendar, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = calendar.test_sentences(1)[:2]
    said = targets(sentences)
    said[1, 3] += 1
    model = Translator(dim=32, heads=2, layers=1)
    monkeypatch.setattr(model, "translate", lambda source: said)
    assert exact(model, sentences).tolist() == [True, False]
