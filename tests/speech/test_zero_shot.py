"""A tiny CosyVoice in the bundled voice's place: LibriTTS pairs, both front ends, WavLM, the profile paper."""

import json
import os
import re
import subprocess
import sys
import time
import types
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import tiny_cosyvoice
import tiny_onnx
import torch
import yaml
from conftest import ROOT
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

import ssd_repro
from ssd_repro import files
from ssd_repro.errors import InputError
from ssd_repro.experiment import metrics
from ssd_repro.experiment import rows as rows_module
from ssd_repro.experiment import run as run_module
from ssd_repro.experiment.systems import System
from ssd_repro.models import checkpoints, cosyvoice
from ssd_repro.models.draft import make_draft
from ssd_repro.speech import libritts, zero_shot
from ssd_repro.training import deployed, tokenise

FAKE_UPSTREAM = str(ROOT / "tests" / "fake_upstream")
TEXTS = ["a b c", "d c b a", "a a b", "c d", "b c d a"]


def write_libritts(folder, speakers=3, each=5):
    """Noise of 4.1 to 6 s and few words, as LibriTTS lays it out; one utterance of each speaker is too long."""
    dice = np.random.default_rng(0)
    for s in range(speakers):
        place = folder / f"{s + 100}" / "7"
        place.mkdir(parents=True)
        for i in range(each):
            seconds = 11 if i == each - 1 else 4.1 + 0.3 * i
            name = f"{s + 100}_7_{i:06d}_000000"
            sound = 0.1 * dice.standard_normal(int(24_000 * seconds))
            soundfile.write(place / f"{name}.wav", sound, 24_000)
            (place / f"{name}.normalized.txt").write_text(TEXTS[i % len(TEXTS)] + "\n")
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """-> folder with weights, draft, data, speaker: what a user brings to the profile paper."""
    root = tmp_path_factory.mktemp("released")
    weights = tiny_cosyvoice.save_released(root / "weights", tiny_cosyvoice.Upstream(2))
    tiny_cosyvoice.save_tokenizer(weights / "CosyVoice-BlankEN", size=200)
    (weights / "speech_tokenizer_v2.onnx").write_bytes(tiny_onnx.speech_tokenizer())
    target = cosyvoice.load_cosyvoice(weights)
    checkpoints.save_draft(root / "draft", make_draft(target), target, {})
    write_libritts(root / "data")
    torch.manual_seed(0)
    small = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        tdnn_dim=(16,) * 5,
        xvector_output_dim=16,
    )
    WavLMForXVector(small).save_pretrained(root / "speaker")
    Wav2Vec2FeatureExtractor().save_pretrained(root / "speaker")
    return root


def load(released, front_end, **other):
    brought = {"draft": str(released / "draft"), "data": str(released / "data")}
    return ssd_repro.load(released / "weights", "cpu", front_end=front_end, **brought, **other)


@pytest.fixture
def upstream(monkeypatch):
    monkeypatch.syspath_prepend(FAKE_UPSTREAM)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "cosyvoice"]:
        del sys.modules[name]


# LibriTTS


def test_pairs_are_of_one_speaker_and_by_seed_alone(released):
    known = libritts.index(released / "data")
    assert len(known) == 15
    chosen = libritts.pairs(known, 12, seed=1)
    assert chosen == libritts.pairs(known, 12, seed=1) != libritts.pairs(known, 12, seed=2)
    assert libritts.pairs(known, 5, seed=1) == chosen[:5]
    assert len({said.id for said, _ in chosen}) == 12  # all but the three that are too long
    assert [said.speaker for said, _ in chosen[:6]] == ["100", "101", "102"] * 2
    for said, prompt in chosen:
        assert said.speaker == prompt.speaker and said.id != prompt.id
        assert all(4 <= soundfile.info(one.audio).duration <= 10 for one in (said, prompt))
    with pytest.raises(InputError, match="from 1 to 12, got 13"):
        libritts.pairs(known, 13)


def test_a_folder_without_libritts_and_a_hub_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"has no <speaker>/<chapter>"):
        libritts.index(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        libritts.index("mythicinfinity/libritts")

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(InputError, match="no route"):
        libritts.index("mythicinfinity/libritts")


def test_the_hubs_rows_become_the_same_folder(released, tmp_path, monkeypatch):
    known = libritts.index(released / "data")
    rows = [
        {"id": one.id, "text_normalized": one.text, "audio": {"bytes": one.audio.read_bytes(), "path": None}}
        for one in known.values()
    ]

    class Rows(list):
        def cast_column(self, name, kind):
            assert (name, kind) == ("audio", "undecoded")
            return self

    calls = []

    def load_dataset(*arguments, **settings):
        calls.append((arguments, settings))
        return Rows(rows)

    fake = types.SimpleNamespace(load_dataset=load_dataset, Audio=lambda decode: "undecoded" if not decode else "")
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(libritts, "cache_folder", lambda: tmp_path / "cache")
    for _ in range(2):  # the second time from the cache
        found = libritts.index("someone/libritts")
        assert calls == [(("someone/libritts", "clean"), {"split": "test.clean"})]
    assert {n: (s.text, s.audio.read_bytes()) for n, s in found.items()} == {
        n: (s.text, s.audio.read_bytes()) for n, s in known.items()
    }


# CosyVoice as a voice


@pytest.mark.parametrize("front_end", ["upstream", "tokens"])
def test_speaks_as_the_bundled_voice_does(released, upstream, front_end):
    voice = load(released, front_end)
    said = voice.utterances(1)[0]
    takes = [voice.speak(said.text, m, said.voice, seed=3) for m in ssd_repro.METHODS]
    for take in takes:
        words = len(said.text.split())
        assert 2 * words <= len(take.token_ids) <= 20 * words and max(take.token_ids) < 6561
        assert take.audio.dtype == np.float32 and take.sample_rate == 24_000
    assert takes[0].token_ids == voice.speak(said.text, "autoregressive", said.voice, seed=3).token_ids
    prompt = voice.front.enrol(said.voice)
    seconds = soundfile.info(voice.front.known[said.voice].audio).duration
    assert abs(len(prompt.speech) - 25 * seconds) <= 1 and len(prompt.text) == len(
        voice.front.known[said.voice].text.split()
    )
    assert voice.prefix([1, 2], said.voice).shape == (1, 4 + len(prompt.text) + len(prompt.speech), 32)
    assert voice.audible == (front_end == "upstream") == bool(takes[0].audio.any())


@pytest.mark.parametrize("method", ssd_repro.METHODS)
def test_a_stop_token_first_is_an_empty_take(released, method):
    """CosyVoice bans 6561 alone before the shortest length: its other stop tokens may come at once."""
    voice = load(released, "tokens", runtime="eager")  # its weights are those of the modules
    for lm in (voice.target, voice.draft):
        lm.head.bias.data[6562] = 1e4
    take = voice.speak("a b c", method, voice.names[0])
    assert take.token_ids == () and len(take.audio) == 0 and take.lm_rtf is None and take.stopped
    assert take.lm_seconds > 0 and json.loads(json.dumps(take.summary()))["tokens"] == 0
    assert "0 tokens" in take._repr_html_() and take.wav()[:4] == b"RIFF"


@pytest.mark.parametrize("method", ssd_repro.METHODS)
def test_enrolling_a_prompt_is_in_no_time(released, monkeypatch, method):
    voice = load(released, "tokens")
    tokens = voice.front.speech_tokens
    monkeypatch.setattr(voice.front, "speech_tokens", lambda audio: time.sleep(2) or tokens(audio))
    assert sum(voice.speak("a b", method, voice.names[1]).seconds.values()) < 2


def test_upstreams_pieces_are_joined_without_a_pause(released, upstream):
    voice = load(released, "upstream")
    take = voice.speak("a b. c d.", "autoregressive", voice.names[0])
    kept = [len(zero_shot.without_long_silence(r.tokens, [7])) for r in take.sentences]
    assert len(kept) == 2 and len(take.audio) == 960 * sum(kept)
    assert zero_shot.without_long_silence([7] * 8 + [1] + [7] * 2, [7]) == [7] * 5 + [1, 7, 7]


def test_the_tokens_front_end_is_not_measured(released, tmp_path):
    voice = load(released, "tokens")
    systems = [System("autoregressive"), System("speculative", 0.4, 3)]
    rows = run_module.run(voice, systems, voice.utterances(2), tmp_path, "table1", repeats=1)
    assert (rows.front_end == "tokens").all() and rows.p808.isna().all() and rows.word_errors.isna().all()
    assert (rows.audio_seconds == rows.tokens / 25).all() and (rows.lm_seconds > 0).all()
    assert (rows.token_kinds == "").all()


def test_what_is_missing_is_said(released, monkeypatch):
    with pytest.raises(InputError, match="also needs draft"):
        ssd_repro.load(released / "weights", "cpu")
    with pytest.raises(InputError, match="package cosyvoice cannot be imported"):
        load(released, "upstream")
    with pytest.raises(InputError, match="choose upstream or tokens"):
        load(released, "magic")
    with pytest.raises(InputError, match="leave draft and data empty"):
        ssd_repro.load(device="cpu", draft="x")


def test_tokenised_libritts_is_what_train_draft_reads(released, tmp_path):
    out = tmp_path / "rows"
    for rank in range(2):
        process = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0,
                                  wait_for_everyone=lambda: None)  # fmt: skip
        tokenise.tokenise(released / "weights", released / "data", out, process, log=lambda _: None)
    part = out / "00001.jsonl"
    whole = part.read_bytes()
    assert whole.count(b"\n") == 3  # every second one of those that the first process left
    part.write_bytes(whole[: len(whole) // 2])  # killed in the middle; goes on as one process
    assert tokenise.tokenise(released / "weights", released / "data", out, log=lambda _: None) == 15
    rows = deployed.load_target(released / "weights").read(out)
    assert sorted(group[0].id for group in rows) == list(libritts.index(released / "data"))
    voice = load(released, "tokens")
    for (one,) in rows:
        prompt = voice.front.enrol(one.id)
        assert one.speech.tolist() == prompt.speech and one.text.tolist() == prompt.text


# WavLM


def test_wavlm_is_transformers_own(released):
    dice = np.random.default_rng(0)
    a, b = dice.standard_normal((2, 16_000)).astype(np.float32)
    speaker = str(released / "speaker")
    model, extractor = WavLMForXVector.from_pretrained(speaker).eval(), Wav2Vec2FeatureExtractor()
    with torch.no_grad():
        both = [model(**extractor(x, sampling_rate=16_000, return_tensors="pt")).embeddings[0] for x in (a, b)]
    expected = torch.cosine_similarity(*both, dim=0).item()
    assert metrics.speaker_similarity(a, b, 16_000, speaker) == pytest.approx(expected, abs=1e-5)
    assert metrics.speaker_similarity(a, a, 16_000, speaker) == pytest.approx(1, abs=1e-5)
    assert np.isnan(metrics.speaker_similarity(a, 0 * b, 16_000, speaker))
    with pytest.raises(InputError, match="microsoft/wavlm-base-plus-sv"):
        metrics.speaker_similarity(a, b, 16_000, str(released / "nothing"))


# The profile paper


def run(released, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([FAKE_UPSTREAM, str(ROOT)])}
    command = [
        sys.executable,
        "-m",
        "ssd_repro",
        "run",
        "--profile",
        "paper",
        "--only",
        "00",
        "01",
        "--out",
        "out",
        *arguments,
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_profile_paper_says_what_is_missing(tmp_path):
    done = run(None, tmp_path, "-p", "data", "somewhere")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.startswith("ssd-repro: the profile leaves weights, draft open: add -p weights VALUE -p draft")
    assert done.stderr.count("\n") == 1


def test_the_profile_paper_runs_end_to_end(released, tmp_path):
    """All of it but its size, two models that need a network (base for large-v3, a tiny WavLM), and the
    compiler: static caches, but forwards as they are (test_graphs traces and compiles them)."""
    own = {name: released / name for name in ("weights", "draft", "data", "speaker")}
    own |= {"whisper": "", "sentences": 2, "text": "a b c", "device": "cpu"}
    done = run(released, tmp_path, *(str(x) for name, value in own.items() for x in ("-p", name, value)))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    rows = rows_module.to_frame(files.read_rows(out / "rows" / "table1.jsonl"))
    assert len(rows) == 6 and set(rows.method) == set(ssd_repro.METHODS) and rows.repeatable.all()
    wanted = {"front_end": "upstream", "precision": "bf16", "runtime": "graphs", "repeats": 2}
    assert all((rows[name] == value).all() for name, value in wanted.items())
    ssd = rows[rows.method == "speculative"]
    assert (ssd.tolerance == 0.4).all() and (ssd.draft_length == 3).all() and (ssd.drafted > 0).all()
    assert rows.similarity.between(-1, 1).all() and rows.p808.between(1, 5).all()
    about = json.loads((out / "provenance.json").read_text())["01_table1"]
    assert about["profile"] == "paper" and about["parameters"]["tolerance"] == 0.4
    assert {p.stem for p in out.glob("*.ipynb")} == {"00_algorithm", "00_listen", "01_table1"}
    assert (out / "tables" / "table1.csv").exists() and (out / "figures" / "timeline.png").exists()


# conda


def test_the_conda_environment_has_the_pins_of_constraints():
    """What environment.yml has pip install, all that it brings included, stands in constraints.txt at this version."""
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    assert pip == ["-c constraints.txt", "-e .[all,test]"]
    python = next(entry for entry in conda if str(entry).startswith("python="))
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    project = (ROOT / "pyproject.toml").read_text()
    wanted = SpecifierSet(re.search(r'requires-python = "(.*)"', project)[1])
    version = python.removeprefix("python=")
    assert f"{version}.0" in wanted
    here = {"python_version": version, "python_full_version": f"{version}.0", "extra": ""}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(r.name): r for r in pins if r.marker is None or r.marker.evaluate(here)}
    seen, todo = set(), [Requirement(f"ssd-repro[{extras}]") for extras in re.findall(r"\[(.*)\]", pip[1])]
    while todo:
        asked = todo.pop()
        name = canonicalize_name(asked.name)
        if (name, tuple(asked.extras)) in seen:
            continue
        seen.add((name, tuple(asked.extras)))
        if name != "ssd-repro":
            assert name in pinned, f"constraints.txt lacks {name}"
            assert asked.specifier.contains(str(pinned[name].specifier).removeprefix("=="), prereleases=True), asked
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform or Python than this one
            continue
        for need in map(Requirement, needs):
            extras = asked.extras or {""}
            if need.marker is None or any(need.marker.evaluate(here | {"extra": e}) for e in extras):
                todo.append(need)
    assert len(seen) > 100
