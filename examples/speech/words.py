"""The spoken words: espeak-ng says ten words in many voices, speeds and pitches, some of which are for testing only.

    apt-get install espeak-ng

It speaks by formant synthesis, without recordings, so a voice is what its parameters make it. What it said is kept in
a file, since a thousand words take half a minute.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")  # Warden 2018, "Speech Commands"
RATE = 22050  # samples a second, espeak-ng's
HEADER = 44  # bytes of a WAV file before its samples
SILENCE = 0.02  # of the loudest sample: quieter ends are cut off


@dataclass(frozen=True)
class Manner:
    """Ways to speak: voices are an accent with a variant; words a minute; pitch from 0 to 99."""

    accents: tuple[str, ...]
    variants: tuple[str, ...]
    speeds: tuple[int, ...]
    pitches: tuple[int, ...]


ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-029")
# The accents are the same; the speakers within them (variants), speeds and pitches are not.
# fmt: off
TRAIN = Manner(
    ACCENTS,
    variants=("m1", "m3", "m4", "m6", "m7", "f1", "f3", "f5", "klatt2", "klatt4", "Alex", "Andrea", "Denis", "Gene",
              "Hugo", "Lee", "Marco", "Mike", "linda", "paul", "rob", "victor"),
    speeds=(140, 165, 190),
    pitches=(35, 50, 65),
)
TEST = Manner(
    ACCENTS,
    variants=("m2", "m5", "m8", "f2", "f4", "klatt", "klatt3", "Andy", "Annie", "Diogo", "Mario", "Michael", "robert",
              "steph"),
    speeds=(125, 150, 180, 205),
    pitches=(28, 43, 58, 72),
)
# fmt: on


@dataclass
class Spoken:
    """Words as espeak-ng said them: ``waves[i]`` holds samples around -1 to 1 of WORDS[labels[i]], in voices[i]."""

    waves: list[Tensor]
    labels: Tensor
    voices: list[str]


def is_installed() -> bool:
    return shutil.which("espeak-ng") is not None


def say(word: str, voice: str, speed: int, pitch: int) -> Tensor:
    """(samples,), the loudest at 1, without the silence before and after."""
    command = ["espeak-ng", "-z", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    sound = subprocess.run(command, check=True, capture_output=True).stdout
    wave = torch.frombuffer(bytearray(sound[HEADER:]), dtype=torch.int16).float()
    wave = wave / wave.abs().max()
    loud = (wave.abs() > SILENCE).nonzero().flatten()
    return wave[loud[0] : loud[-1] + 1]


def speak(manner: Manner, a_word: int, seed: int, label: str) -> Spoken:
    """Each word ``a_word`` times, each time with a voice, speed and pitch of the manner, drawn at random."""
    if not is_installed():
        raise SystemExit("this example needs espeak-ng to speak its words: apt-get install espeak-ng")
    draw = random.Random(seed)
    calls = [
        (word, f"{draw.choice(manner.accents)}+{draw.choice(manner.variants)}", *map(draw.choice, rest))
        for word in WORDS
        for rest in [(manner.speeds, manner.pitches)] * a_word
    ]
    with ThreadPoolExecutor(2) as pool:
        waves = list(tqdm(pool.map(lambda call: say(*call), calls), total=len(calls), desc=label, unit="word"))
    return Spoken(waves, torch.arange(len(WORDS)).repeat_interleave(a_word), [voice for _, voice, *_ in calls])


def spoken_once(manner: Manner, a_word: int, seed: int, label: str, file: Path) -> Spoken:
    """What `speak` says, from the file if that was asked for before."""
    asked = repr((WORDS, manner, a_word, seed))
    if file.exists():
        kept = torch.load(file)
        if kept["asked"] == asked:
            return Spoken(kept["waves"], kept["labels"], kept["voices"])
    spoken = speak(manner, a_word, seed, label)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"asked": asked, **vars(spoken)}, file)
    return spoken
