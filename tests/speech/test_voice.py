"""The bundled voice, for real: weights, exactness, determinism, long text, broken files."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import ssd_repro
from ssd_repro.decoding.result import NumericsError
from ssd_repro.decoding.sampling import Sampler
from ssd_repro.models import checkpoints
from ssd_repro.speech import text

TEXT = "The boat is ready, and the weather is fine."


@pytest.fixture(scope="module")
def voice():
    return ssd_repro.load(device="cpu")


@pytest.mark.parametrize("draft_length", [1, 3, 6])
def test_greedy_speculative_equals_greedy_autoregressive_token_for_token(voice, draft_length):
    greedy = Sampler(temperature=0.0)
    for name in voice.names:
        phones = text.phone_ids(TEXT, text.language(name))
        made = [
            voice.decode(phones, method, name, 0.0, draft_length, torch.Generator().manual_seed(0), sampler=greedy)
            for method in ("autoregressive", "speculative")
        ]
        assert made[0].tokens == made[1].tokens
        assert 0 < made[1].accepted < made[1].drafted  # the draft's work, and not the target's
        assert made[1].target_calls < made[0].target_calls


def test_same_seed_same_tokens_and_another_seed_others(voice):
    a, b, c = (voice.speak(TEXT, seed=seed) for seed in (5, 5, 6))
    assert a.token_ids == b.token_ids != c.token_ids
    assert np.array_equal(a.audio, b.audio)


@pytest.mark.parametrize("method", ssd_repro.METHODS)
def test_a_take_says_what_it_did(voice, method):
    heard = []
    take = voice.speak(TEXT, method, "bf_emma", seed=1, on_tokens=heard.extend)
    assert tuple(heard) == take.token_ids
    assert len(take.audio) == 960 * len(take.token_ids)
    assert 1.0 < take.audio_seconds < 8.0
    assert np.abs(take.audio).max() > 0.05
    assert (take.acceptance_rate is not None) == (method == "speculative")
    assert (take.target_calls == 0) == (method == "draft")
    assert take.lm_seconds == pytest.approx(sum(take.seconds[k] for k in ("prefill", "draft", "verify", "rest")))
    assert json.loads(json.dumps(take.summary()))["token_ids"] == list(take.token_ids)
    assert "<audio" in take._repr_html_()


def test_long_text_is_spoken_piece_by_piece(voice):
    take = voice.speak(" ".join([TEXT] * 8), "draft")
    assert len(take.sentences) == 3
    assert len(take.token_ids) == sum(len(s.tokens) for s in take.sentences)


def test_no_stop_before_the_least_length_and_none_beyond_the_most(voice):
    phones = text.phone_ids(TEXT)
    config = voice.config(len(phones), 0.4, 3)
    result = voice.decode(
        phones,
        "speculative",
        "af_heart",
        0.4,
        3,
        torch.Generator().manual_seed(0),
        max_tokens=config.min_tokens,
    )
    assert len(result.tokens) == config.min_tokens and not result.stopped


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"method": "fast"}, "'fast'"),
        ({"voice": "bob"}, "'bob'"),
        ({"tolerance": -0.1}, "-0.1"),
        ({"tolerance": 1.5}, "1.5"),
        ({"tolerance": float("nan")}, "nan"),
        ({"draft_length": 0}, "0"),
        ({"draft_length": 65}, "65"),
        ({"draft_length": 2.5}, "2.5"),
        ({"seed": -1}, "-1"),
        ({"text": " "}, "empty"),
    ],
)
def test_bad_settings_are_refused_before_any_work(voice, setting, says):
    with pytest.raises(ssd_repro.InputError, match=says):
        voice.speak(**{"text": TEXT, **setting})


def test_logits_that_turn_nan_are_an_error(voice):
    broken = ssd_repro.load(device="cpu")
    with torch.no_grad():
        broken.target.head.bias[7] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        broken.speak(TEXT)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(checkpoints.BUNDLED, tmp_path / "voice")


@pytest.mark.parametrize("part", ["codec", "target", "draft"])
@pytest.mark.parametrize("harm", ["missing", "cut", "one byte"])
def test_harmed_weights_are_refused_by_name(copy, part, harm):
    path = copy / f"{part}.safetensors"
    data = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(ssd_repro.InputError, match=f"{part}.safetensors"):
        ssd_repro.load(copy)


@pytest.mark.parametrize(("content", "says"), [("{", "cannot be read"), ("{}", "cannot be read"), (None, "missing")])
def test_harmed_description_is_refused(copy, content, says):
    (copy / "voice.json").unlink()
    if content:
        (copy / "voice.json").write_text(content)
    with pytest.raises(ssd_repro.InputError, match=says):
        ssd_repro.load(copy)


def test_another_format_is_refused(copy):
    about = json.loads((copy / "voice.json").read_text())
    (copy / "voice.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(ssd_repro.InputError, match="format 99"):
        ssd_repro.load(copy)


def test_saving_and_loading_keeps_every_weight(voice, tmp_path):
    codec, target, draft, about = checkpoints.load_voice(checkpoints.BUNDLED)
    checkpoints.save_voice(tmp_path, codec, target, draft, {"voices": about["voices"]})
    again = checkpoints.load_voice(tmp_path)
    for old, new in zip((codec, target, draft), again):
        assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.state_dict().items())
    assert again[3]["sha256"] == about["sha256"]


def test_weights_stay_small():
    assert sum(p.stat().st_size for p in checkpoints.BUNDLED.rglob("*") if p.is_file()) < 80e6


def test_save_leaves_nothing_behind_when_it_fails(voice, tmp_path, monkeypatch):
    take = dataclasses.replace(voice.speak(TEXT, "draft"))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        take.save(tmp_path / "x.wav")
    assert not list(tmp_path.iterdir())
