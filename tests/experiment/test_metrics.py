"""Metrics against known answers and against the packages that they come from."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_repro import files
from ssd_repro.errors import InputError
from ssd_repro.experiment import metrics
from ssd_repro.models import checkpoints
from ssd_repro.speech.audio import read_audio

pytest.importorskip("speechmos", reason="the extra eval is not installed")
RATE = 24_000
DISTILLMOS = metrics.util.find_spec("distillmos") is not None
REFERENCES = checkpoints.BUNDLED / "references"


def voiced(seconds=3.0, pitch=120.0, seed=0):
    """A buzz with changing formants: no speech, but neither DNSMOS nor GE2E refuse it."""
    t = np.arange(int(seconds * RATE)) / RATE
    sound = sum(np.sin(2 * math.pi * pitch * k * t) / k for k in range(1, 20))
    noise = np.random.default_rng(seed).normal(size=len(t))
    return (0.1 * sound * (0.6 + 0.4 * np.sin(8 * t)) + 0.002 * noise).astype(np.float32)


@pytest.mark.parametrize(
    ("reference", "transcript", "errors", "words"),
    [
        ("The colour of Mr. Brown's 2 coats.", "the color of mister browns two coats", 0, 7),
        ("I don't know twenty-one people.", "I do not know 21 people", 0, 6),
        ("one small step", "one step", 1, 3),
        ("one small step", "one small extra step here", 2, 3),
        ("one small step", "", 3, 3),
    ],
)
def test_word_errors_after_whispers_normaliser(reference, transcript, errors, words):
    found = metrics.text_errors(reference, transcript)
    if "Brown's" in reference:  # the normaliser keeps the possessive apart: "brown s"
        assert found["words"] > 0 and found["word_errors"] <= 2
    else:
        assert (found["word_errors"], found["words"]) == (errors, words)


def test_british_and_american_spellings_are_one():
    found = metrics.text_errors("the colour grey travelled", "the color gray traveled")
    assert found == {"word_errors": 0, "words": 4, "char_errors": 0, "chars": 23}


def test_dnsmos_is_what_speechmos_says():
    import soxr
    from speechmos import dnsmos

    sound = voiced(10.5)
    ours = metrics.dnsmos(sound, RATE)
    theirs = dnsmos.run(np.clip(soxr.resample(sound, RATE, 16_000), -1, 1), 16_000)
    for name in ("p808", "sig", "bak", "ovrl"):
        assert ours[name] == pytest.approx(theirs[f"{name}_mos"], abs=2e-3)


def test_without_sound_there_is_no_score():
    nothing, silence = np.zeros(0, np.float32), np.zeros(RATE, np.float32)
    assert all(math.isnan(score) for score in metrics.dnsmos(nothing, RATE).values())
    assert math.isnan(metrics.speaker_similarity(nothing, voiced(), RATE))
    assert math.isnan(metrics.speaker_similarity(silence, voiced(), RATE))
    assert metrics.transcribe(nothing, RATE) == ""
    scores = metrics.measure(nothing, RATE, "three words here", voiced())
    assert (scores["transcript"], scores["word_errors"], scores["words"]) == ("", 3, 3)


@pytest.mark.skipif(not DISTILLMOS, reason="distillmos is not installed (metrics.py says how)")
def test_distillmos_hears_noise_and_is_no_must(monkeypatch):
    speech = read_audio(next(REFERENCES.glob("*.flac")), RATE)
    noisy = speech + np.random.default_rng(0).normal(0, 0.1, len(speech)).astype(np.float32)
    clean = metrics.distillmos(speech, RATE)
    assert 5 > clean > metrics.distillmos(noisy, RATE) + 0.5 > 1
    assert math.isnan(metrics.distillmos(speech[:0], RATE))
    found = metrics.util.find_spec
    monkeypatch.setattr(metrics.util, "find_spec", lambda name: None if name == "distillmos" else found(name))
    assert math.isnan(metrics.distillmos(speech, RATE)) and "distillmos_sha256" not in metrics.models()


def test_similarity_is_one_with_itself_and_less_with_another():
    a, b = voiced(pitch=110), voiced(pitch=210, seed=1)
    assert metrics.speaker_similarity(a, a, RATE) == pytest.approx(1, abs=1e-4)
    assert metrics.speaker_similarity(a, b, RATE) < 0.95


def whisper_folder(path, content):
    path.mkdir()
    (path / "model.bin").write_bytes(content)
    return str(path)


def test_where_whisper_comes_from(monkeypatch, tmp_path):
    tiny, small = (whisper_folder(tmp_path / name, b"") for name in ("tiny", "small"))
    monkeypatch.setenv(metrics.WHISPER_VARIABLE, small)
    assert metrics.find_whisper(tiny) == Path(tiny) and metrics.find_whisper() == Path(small)
    monkeypatch.delenv(metrics.WHISPER_VARIABLE)
    monkeypatch.setattr(metrics, "WHISPER_PARTS", ("no_such_package_1", "no_such_package_2"))
    with pytest.raises(InputError, match=r"no Whisper model found.*SSD_REPRO_WHISPER"):
        metrics.find_whisper()


def test_rows_name_their_metric_models_by_content(monkeypatch, tmp_path):
    """Two models of one name are two models."""
    monkeypatch.delenv(metrics.WHISPER_VARIABLE, raising=False)
    plain = metrics.models()
    assert (plain["whisper"], plain["speaker"]) == ("base", "GE2E")
    for model, count in [("whisper", 1), ("speaker", 1), ("dnsmos", 2), *[("distillmos", 1)] * DISTILLMOS]:
        assert re.fullmatch(" ".join(["[0-9a-f]{12}"] * count), plain[f"{model}_sha256"])
    folder = whisper_folder(tmp_path / "own", b"one")
    monkeypatch.setenv(metrics.WHISPER_VARIABLE, folder)
    first = metrics.models()
    (tmp_path / "own" / "model.bin").write_bytes(b"another")
    second = metrics.models()
    assert first["whisper"] == second["whisper"] == folder
    assert len({about["whisper_sha256"] for about in (plain, first, second)}) == 3


def test_the_digest_of_a_wavlm_is_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_wavlm", lambda name: None)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    about = metrics.models(speaker=str(tmp_path))
    assert about["speaker"] == str(tmp_path)
    assert about["speaker_sha256"] == files.sha256(tmp_path / "model.safetensors")[:12]


@pytest.mark.parametrize("package", ["speechmos", "resemblyzer"])
def test_a_missing_metric_model_is_one_sentence(monkeypatch, package):
    found = metrics.util.find_spec
    monkeypatch.setattr(metrics.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(InputError, match=f"(?i){package} is missing: install the extra `ssd-repro.eval.`"):
        metrics.models()


GOLDEN = json.loads((Path(__file__).parent / "golden_metrics.json").read_text("utf-8"))


@pytest.mark.skipif(not REFERENCES.is_dir(), reason="no bundled voice in this checkout")
@pytest.mark.parametrize("name", GOLDEN)
def test_the_metrics_of_stored_audio_stay_as_they_are(name):
    """If they change on purpose: raise provenance.PROTOCOL, and write the new values into golden_metrics.json."""
    expected = dict(GOLDEN[name])
    audio, reference = (read_audio(REFERENCES / f"{file}.flac", RATE) for file in (name, expected.pop("reference")))
    found = metrics.measure(audio, RATE, expected.pop("text"), reference)
    assert set(found) == set(expected)
    # Whisper's int8 sums differ from processor to processor: they have moved a full stop, which no score counts.
    clean = metrics.normaliser()
    assert clean(found.pop("transcript")) == clean(expected.pop("transcript"))
    for score in ("word_errors", "words", "char_errors", "chars"):
        assert found[score] == expected[score]
    for score in ("p808", "sig", "bak", "ovrl", "similarity", *["distillmos"] * DISTILLMOS):
        assert found[score] == pytest.approx(expected[score], abs=2e-3)


def test_a_whisper_that_cannot_be_loaded_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot load the Whisper model"):
        metrics.transcribe(voiced(1.0), RATE, str(tmp_path))


def test_loading_whisper_leaves_torchs_threads_alone():
    """CTranslate2 sets them: a voice that decodes in one thread was then timed in two."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        metrics._whisper.cache_clear()
        metrics.load()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_two_halves_are_joined_once_and_again_if_cut_short(monkeypatch, tmp_path):
    halves = []
    for number, content in ((1, b"left"), (2, b"right")):
        half = tmp_path / f"part{number}"
        half.mkdir()
        (half / f"model.bin.part{number}").write_bytes(content)
        halves.append(half)
    (halves[0] / "config.json").write_text("{}")
    monkeypatch.setattr(metrics, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(metrics.metadata, "version", lambda _: "1")
    folder = metrics._joined(halves)
    assert (folder / "model.bin").read_bytes() == b"leftright"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.bin"]
    made = (folder / "model.bin").stat().st_mtime_ns
    assert (metrics._joined(halves) / "model.bin").stat().st_mtime_ns == made
    (folder / "model.bin").write_bytes(b"lef")
    assert (metrics._joined(halves) / "model.bin").read_bytes() == b"leftright"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["whisper-base-1"]


def test_whisper_hears_the_installed_model():
    """The whole chain once: the joined Whisper on noise-free silence hears (next to) nothing."""
    assert len(metrics.transcribe(np.zeros(2 * RATE, np.float32), RATE).split()) <= 3
