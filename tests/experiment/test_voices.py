"""Notebooks 14 and 15: what a voice is scored by, and which rows are used again."""

import json
from dataclasses import replace

import fake_voice
import numpy as np
import pandas as pd
import pytest
from notebook_code import run_notebook

from ssd_repro.decoding.sampling import Sampler
from ssd_repro.experiment import metrics, provenance, voices
from ssd_repro.speech.sentences import Utterance
from ssd_repro.training import codec, corpus


@pytest.fixture
def voice(fake, monkeypatch):
    fake.front.about |= {"references": {"af_heart": "x.flac"}, "sha256": {"codec.safetensors": "c" * 64}}
    monkeypatch.setattr(metrics, "speaker_similarity", lambda *_: 0.5)
    return fake


@pytest.fixture
def again(voice, tmp_path):
    """Score the same utterance under two systems -> the systems that were rendered."""

    def score(weights="a", sampler=None, whisper=""):
        made = []

        def render(one, system):
            made.append(system)
            return np.ones(9, np.float32), True, 1.0

        systems = {"teacher": {"weights": "Kokoro"}, "target": {"weights": weights, **vars(sampler or Sampler())}}
        said = [Utterance("t", "a text", "af_heart")]
        rows = voices.score(voice, systems, render, said, tmp_path, "voice", whisper)
        assert list(rows.system) == list(systems)
        return made

    return score


def test_a_row_is_used_again_until_what_it_depends_on_changes(voice, again, monkeypatch):
    both = ["teacher", "target"]
    assert again() == both
    assert again() == []
    assert again(weights="b") == ["target"]  # a new target leaves the teacher's
    assert again(sampler=Sampler(temperature=0.5)) == ["target"]
    assert again(whisper="large") == both
    voice.front.about["references"] = {"af_heart": "y.flac"}
    assert again() == both
    assert again() == []
    monkeypatch.setattr(provenance, "PROTOCOL", 99)
    assert again() == both
    monkeypatch.setattr(provenance, "_processor", lambda: "another")
    assert again() == both


def test_a_row_says_by_which_protocol_and_machine_it_was_made(again, tmp_path):
    again()
    row = json.loads((tmp_path / "rows" / "voice.jsonl").read_text().splitlines()[0])
    assert row["protocol"] == provenance.PROTOCOL and {"device", "chip", "threads", "torch"} <= row.keys()


def test_table_counts_errors_over_words_not_over_utterances():
    rows = pd.DataFrame({
        "system": ["teacher"] * 2, "word_errors": [1, 0], "words": [2, 8], "p808": [3.0, 4.0], "ovrl": [3.0, 3.0],
        "similarity": [0.9, 0.9], "own_voice": [True, True], "length_ratio": [1.0, 1.4], "stopped": [True, False],
    })  # fmt: skip
    line = voices.table(rows).loc["teacher"]
    assert line["WER %"] == 10.0 and line["P808"] == 3.5
    assert line["within 25 %"] == 0.5 and line["ended by itself"] == 0.5


def test_notebook_14_scores_teacher_codec_and_target(voice, tmp_path, monkeypatch):
    class Teacher:
        def create(self, text, voice, speed, lang):
            return fake_voice.tone(len(text) / 15), corpus.SAMPLE_RATE

    for name in ("find_teacher", "find_voices"):
        monkeypatch.setattr(corpus, name, lambda *_: None)
    monkeypatch.setattr(corpus, "load_teacher", lambda *_: Teacher())
    monkeypatch.setattr(codec, "Hint", lambda *_: None)
    monkeypatch.setattr(codec, "resynthesise", lambda codec, audio, *_: audio)
    run_notebook("14_voice", sentences=2, hint="none", work=str(tmp_path), out=str(tmp_path))
    table = pd.read_csv(tmp_path / "tables" / "voice.csv", index_col=0)
    assert list(table.index) == ["teacher", "codec", "autoregressive"] and set(table.n) == {2}
    rows = [json.loads(line) for line in (tmp_path / "rows" / "voice.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "provenance.json").read_text())["14_voice"]["keys"] == [row["key"] for row in rows]


def test_notebook_15_measures_the_deployed_sampler_again_on_other_utterances(voice, tmp_path):
    voice.sampler = replace(voice.sampler, ras_tau=0.3, temperature=0.8)
    space = run_notebook("15_sampler", sentences=1, out=str(tmp_path))
    tables = (pd.read_csv(tmp_path / "tables" / f"{name}.csv") for name in ("samplers", "samplers_again"))
    first, again = tables
    assert list(first.system) == list(space["samplers"])
    assert again.system[0] == "RAS .8/25, tau .3, temperature .8" and 2 <= len(again) <= 3
    rows = [json.loads(line) for line in (tmp_path / "rows" / "samplers.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == len(first) + len(again)
    assert len({row["voice"] for row in rows}) == 2
