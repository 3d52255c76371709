import re
from pathlib import Path

import numpy as np
import pytest

from ssd_repro.errors import InputError
from ssd_repro.speech import sentences
from ssd_repro.speech import text as text_module
from ssd_repro.speech.sentences import Utterance
from ssd_repro.training import corpus


class Teacher:
    """Speaks one sample a character; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def create(self, text, voice, speed, lang):
        self.asked.append((text, voice, lang))
        return np.linspace(-1.2, 1.2, len(text)), corpus.SAMPLE_RATE


LINES = [
    Utterance(f"{voice}_LJ{i}", f"sentence number {i} of the list", voice)
    for i, voice in enumerate((*text_module.VOICES, "af_heart", "bf_emma"))
]


def test_build_resumes_and_keeps_every_row_once(tmp_path):
    out, first, second = tmp_path / "c", Teacher(), Teacher()
    corpus.build(first, LINES[:5], out)
    with (out / "metadata.csv").open("a") as index:
        index.write("half a li")  # of a killed run
    made = corpus.build(second, LINES, out)
    assert list(made.rows) == [one.text_id for one in LINES]
    assert len(second.asked) == 3
    import soundfile

    for row in made.rows.values():
        pcm, rate = soundfile.read(made.path(row["id"]), dtype="int16")
        assert rate == corpus.SAMPLE_RATE and len(pcm) == int(row["samples"])
        assert corpus.digest(pcm) == row["sha256_int16_24k"]


def test_british_voices_are_asked_for_british_speech():
    teacher = Teacher()
    pcm = corpus.teach(teacher, next(one for one in LINES if one.voice == "bf_emma"))
    assert teacher.asked[0][2] == "en-gb"
    assert pcm.dtype == np.int16 and pcm.max() == 32767 and pcm.min() == -32767  # clipped, not wrapped


def test_manifest_is_whole_and_shares_no_sentence_or_phrase_with_the_evaluation():
    rows = corpus.read_metadata(corpus.MANIFEST)
    assert len({row["id"] for row in rows}) == len(rows) > 1500
    assert {row["voice"] for row in rows} == set(text_module.VOICES)

    def phrases(text):
        words = re.findall(r"[a-z']+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    trained = set().union(*(phrases(row["text"]) for row in rows))
    for _, text in sentences.evaluation_sentences():
        assert not phrases(text) & trained, text


def test_metadata_survives_writing_and_reading(tmp_path):
    rows = corpus.read_metadata(corpus.MANIFEST)[:20]
    rows[0]["text"] = 'he said "no" \\ | yes'
    corpus.write_metadata(tmp_path / "m.csv", rows)
    assert corpus.read_metadata(tmp_path / "m.csv") == rows


def test_missing_teacher_and_voices_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.onnx"):
        corpus.find_teacher(str(Path("nowhere.onnx")))
    with pytest.raises(InputError, match="kokoro-js"):
        corpus.find_voices("", tmp_path)
    with pytest.raises(InputError, match="run notebook 10 first"):
        corpus.Corpus.read(tmp_path)
