"""The pieces of the demo in examples/speech. Words that espeak-ng speaks are tested where it is installed; the rest
takes chirps for words.
"""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

import words
from clips import BANDS, COLUMNS, LOUDEST, QUIETEST, SAMPLES, SECONDS, Clips, log_mel, make_clips, mel_filters, noise
from gallery import save_scripted
from listener import Listener, right, train
from tests.examples.conftest import EXAMPLES, assert_pictures
from word_figure import draw, frame_attention, inside
from words import RATE, TEST, TRAIN, WORDS, Spoken, say, speak, spoken_once

pytestmark = pytest.mark.usefixtures("one_thread")
needs_espeak = pytest.mark.skipif(not words.is_installed(), reason="there is no espeak-ng: apt-get install espeak-ng")


def chirps() -> Spoken:
    """For each of the ten words a tone of its own, 0.3 to 0.4 s long."""
    waves = [
        torch.sin(2 * math.pi * 300 * (1 + word) ** 0.9 * torch.arange(int((0.3 + 0.01 * word) * RATE)) / RATE)
        for word in range(len(WORDS))
    ]
    return Spoken(waves, torch.arange(len(WORDS)), ["chirp"] * len(WORDS))


def chirp_clips(seed: int = 0, times: int = 1) -> Clips:
    return make_clips(chirps(), torch.arange(len(WORDS)).repeat(times), torch.Generator().manual_seed(seed))


def test_no_test_voice_speed_or_pitch_is_in_training() -> None:
    for one, other in ((TRAIN.variants, TEST.variants), (TRAIN.speeds, TEST.speeds), (TRAIN.pitches, TEST.pitches)):
        assert not set(one) & set(other)


def test_mel_bands_cover_all_frequencies_evenly() -> None:
    filters = mel_filters()
    assert filters.shape == (BANDS, 257)
    assert (filters >= 0).all() and (filters <= 1).all()
    peaks = filters.argmax(1)
    assert (peaks.diff() >= 0).all() and peaks[-1] > 230
    assert filters.sum(1).min() > 0, "no band is without a frequency"


def test_a_tone_is_loudest_in_its_band() -> None:
    seconds = torch.arange(SAMPLES) / RATE
    tones = torch.stack([torch.sin(2 * math.pi * hertz * seconds) for hertz in (500.0, 2000.0, 6000.0)])
    tones[:, : SAMPLES // 2] = 0  # what does not change is taken out
    loudest = log_mel(tones + 0.01 * torch.randn_like(tones))[:, :, 3 * COLUMNS // 4].argmax(1)
    mel = 2595 * torch.log10(1 + torch.tensor([500.0, 2000.0, 6000.0]) / 700)
    expected = mel / (2595 * math.log10(1 + RATE / 2 / 700)) * (BANDS + 1) - 1
    assert (loudest - expected).abs().max() <= 1


def test_noise_has_the_loudness_it_is_measured_by() -> None:
    x = noise(8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.square().mean(1), torch.ones(8))


def test_the_word_lies_in_its_span_as_loud_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clips.noise", lambda count, generator: torch.zeros(count, SAMPLES))
    monkeypatch.setattr("clips.log_mel", lambda waves: waves)
    clips = chirp_clips(times=3)
    assert (clips.decibels >= QUIETEST).all() and (clips.decibels <= LOUDEST).all()
    assert (clips.spans >= 0).all() and (clips.spans <= SECONDS).all()
    for wave, (begin, end), decibels in zip(clips.spectrograms, clips.spans.tolist(), clips.decibels, strict=True):
        word = wave[round(begin * RATE) : round(end * RATE)]
        torch.testing.assert_close(10 * word.square().mean().log10(), decibels, rtol=0, atol=1e-3)
        assert wave.count_nonzero() == word.count_nonzero() > 0.9 * len(word)


def test_same_generator_makes_the_same_clips() -> None:
    one, again, other = (chirp_clips(seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(vars(one).values(), vars(again).values(), strict=True))
    assert not torch.equal(one.spans, other.spans)


def test_a_word_in_training_is_stretched_as_far_as_asked() -> None:
    spoken, rows = chirps(), torch.zeros(50, dtype=torch.long)
    spans = make_clips(spoken, rows, torch.Generator().manual_seed(0), stretch=0.15).spans
    lengths = (spans[:, 1] - spans[:, 0]) * RATE / len(spoken.waves[0])
    assert 0.84 < lengths.min() < 0.9 and 1.1 < lengths.max() < 1.16


@pytest.mark.parametrize("attends", [True, False], ids=["attention", "mean"])
def test_listener_learns_chirps_and_saves_as_it_is(attends: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Listener(dim=32, attends=attends)
    test = chirp_clips(seed=10, times=4)
    calls = torch.ops.torch_attn.kernel_calls()
    train(model, chirps(), seed=0, steps=40 if attends else 2)
    assert (torch.ops.torch_attn.kernel_calls() > calls) == attends
    if attends:
        assert right(model, test).float().mean() > 0.4, "a guess is right in 10 %"
    loaded = save_scripted(model, tmp_path / "listener.pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(test.spectrograms), model(test.spectrograms))


def test_attention_inside_the_span_is_counted() -> None:
    weights = torch.zeros(2, 8)
    weights[0, 2], weights[0, 7], weights[1, 3] = 0.75, 0.25, 1.0
    spans = torch.tensor([[2.0, 3.5], [0.0, 2.5]]) * SECONDS / 8
    assert inside(weights, spans).tolist() == [0.75, 0.0]


def test_figure_is_written(tmp_path: Path) -> None:
    model = Listener(dim=32).eval()
    clips = chirp_clips()
    weights = frame_attention(model, clips)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(WORDS)))
    draw(model, Clips(*(each[:2] for each in vars(clips).values())), tmp_path)
    assert_pictures(tmp_path, "speech")


def test_without_espeak_the_demo_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("words.is_installed", lambda: False)
    with pytest.raises(SystemExit, match="apt-get install espeak-ng"):
        speak(TRAIN, a_word=1, seed=0, label="test")


@needs_espeak
def test_espeak_says_different_words_slower_and_faster() -> None:
    slow, fast = (say("stop", "en-us+m3", speed, pitch=50) for speed in (120, 240))
    assert 0.2 * RATE < len(fast) < 0.8 * len(slow) < RATE
    assert slow.abs().max() == 1 and slow[0].abs() > words.SILENCE and slow[-1].abs() > words.SILENCE
    assert not torch.equal(slow, say("stop", "en-us+f3", 120, pitch=50))


@needs_espeak
def test_what_was_spoken_is_kept_until_something_else_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "words.pt"
    spoken = spoken_once(TEST, a_word=1, seed=0, label="test", file=file)
    assert len(spoken.waves) == len(spoken.voices) == len(WORDS)
    written = file.stat().st_mtime_ns
    kept = spoken_once(TEST, a_word=1, seed=0, label="test", file=file)
    assert file.stat().st_mtime_ns == written
    assert all(torch.equal(x, y) for x, y in zip(spoken.waves, kept.waves, strict=True))
    assert spoken_once(TEST, a_word=1, seed=1, label="test", file=file).voices != spoken.voices
    assert file.stat().st_mtime_ns != written


@needs_espeak
def test_demo_prints_its_table_and_draws_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps teach nothing, which the demo must say."""
    monkeypatch.setattr("sys.argv", ["demo.py", "--steps", "2", "--words", "4", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="the accuracy is .*, and the demo asks for 90%"):
        runpy.run_path(str(EXAMPLES / "speech" / "demo.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "40 clips of 2 s" in said and "of the attention lies in the word's own span" in said
    assert_pictures(tmp_path, "speech")
