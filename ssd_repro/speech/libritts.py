"""LibriTTS: an index of one subset, and zero-shot pairs from it (a sentence, another one of its speaker).

The layout of the release: ``<speaker>/<chapter>/<id>.wav`` beside ``<id>.normalized.txt``.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, first_line
from ..files import cache_folder


@dataclass(frozen=True)
class Spoken:
    id: str
    speaker: str
    text: str
    audio: Path


def index(source: str | Path) -> dict[str, Spoken]:
    """Every utterance of a LibriTTS folder (or of a dataset's hub name) by id, in the order of ids.

    InputError if there is none, or if the hub cannot be reached.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = from_hub(str(source))
    found = {}
    for text in sorted(folder.rglob("*.normalized.txt")):
        name = text.name.removesuffix(".normalized.txt")
        for audio in (text.with_name(f"{name}.wav"), text.with_name(f"{name}.flac")):
            if audio.is_file():
                found[name] = Spoken(name, name.split("_")[0], " ".join(text.read_text("utf-8").split()), audio)
    if not found:
        raise InputError(f"{source} has no <speaker>/<chapter>/<id>.wav with its <id>.normalized.txt, as LibriTTS has")
    return found


def pairs(known: dict[str, Spoken], count: int, seed: int = 0) -> list[tuple[Spoken, Spoken]]:
    """``count`` times (what is to be said, the prompt), by ``seed`` alone.

    The speakers take turns while theirs last; a prompt is another utterance of the same speaker. Both last 4 to
    10 s, as zero-shot papers choose from LibriSpeech test-clean. InputError if there are fewer.
    """
    dice = random.Random(seed)
    speakers: dict[str, list[Spoken]] = {}
    for utterance in known.values():
        if 4 <= seconds(utterance.audio) <= 10:
            speakers.setdefault(utterance.speaker, []).append(utterance)
    speakers = {name: own for name, own in sorted(speakers.items()) if len(own) > 1}
    for own in speakers.values():
        dice.shuffle(own)
    longest = max(map(len, speakers.values()), default=0)
    turns = [(own, i) for i in range(longest) for own in speakers.values() if i < len(own)]
    if not 1 <= count <= len(turns):
        raise InputError(
            f"sentences must be a whole number from 1 to {len(turns)}, got {count}: so many utterances of 4 to 10 s "
            "have another one of their speaker"
        )
    return [(own[i], dice.choice(own[:i] + own[i + 1 :])) for own, i in turns[:count]]


def seconds(audio: Path) -> float:
    import soundfile

    return soundfile.info(audio).duration


def from_hub(name: str) -> Path:
    """test-clean of the hub's dataset ``name`` as a LibriTTS folder in the user's cache, made once."""
    folder = cache_folder() / f"{name.replace('/', '--')}-test-clean"
    if folder.is_dir():
        return folder
    try:
        import datasets

        rows = datasets.load_dataset(name, "clean", split="test.clean")  # as mythicinfinity/libritts names it
        rows = rows.cast_column("audio", datasets.Audio(decode=False))
    except Exception as error:  # of the package, the network, the name
        raise InputError(
            f"{name} is no folder, and no dataset of the hub that can be read here ({first_line(error)}): give the "
            "folder of LibriTTS test-clean, or a hub name such as mythicinfinity/libritts after `pip install datasets`"
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        for row in rows:
            place, audio = Path(beside, "whole", *row["id"].split("_")[:2]), row["audio"]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{row['id']}.normalized.txt").write_text(row["text_normalized"], "utf-8")
            (place / f"{row['id']}.wav").write_bytes(audio["bytes"] or Path(audio["path"]).read_bytes())
        try:
            Path(beside, "whole").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder
