"""The bundled voice, for real: weights, exactness, determinism, long text, broken files."""

import importlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fake_voice import FakeVoice

import ssd_repro
from ssd_repro import cli, files
from ssd_repro.decoding.result import PHASES, DecodeResult, NumericsError, Round
from ssd_repro.decoding.sampling import Sampler
from ssd_repro.errors import InputError
from ssd_repro.models import checkpoints
from ssd_repro.speech import bundled, text
from ssd_repro.speech.text import VOICES
from ssd_repro.speech.voice import Voice

load_module = importlib.import_module("ssd_repro.speech.load")

TEXT = "The boat is ready, and the weather is fine."


@pytest.fixture(scope="module")
def voice():
    return ssd_repro.load(device="cpu")


@pytest.mark.parametrize("name", VOICES)
def test_greedy_speculative_equals_greedy_autoregressive_token_for_token(voice, name):
    phones = text.phone_ids("The boat is ready, and so am I.", text.language(name))
    settings = {"sampler": Sampler(temperature=0.0), "max_tokens": 40}

    def decode(method, draft_length):
        return voice.decode(phones, method, name, 0.0, draft_length, torch.Generator().manual_seed(0), **settings)

    alone = decode("autoregressive", 3)
    for draft_length in (1, 3, 6) if name == VOICES[0] else (3,):
        made = decode("speculative", draft_length)
        assert made.tokens == alone.tokens and len(alone.tokens) > 20
        assert 0 < made.accepted < made.drafted  # the draft's work, and not the target's
        assert made.target_calls < alone.target_calls


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
    counts = [len(piece.tokens) for piece in take.sentences]
    assert len(counts) == 3 and len(take.token_ids) == sum(counts)
    assert len(take.audio) == 960 * sum(counts) + 2 * 4800


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
        ({"verification": "joint"}, "'joint'"),
        ({"verification": "block"}, "tolerance is 0.4"),
        ({"confidence": -1}, "-1"),
        ({"seed": -1}, "-1"),
        ({"text": " "}, "empty"),
    ],
)
def test_bad_settings_are_refused_before_any_work(voice, setting, says):
    with pytest.raises(ssd_repro.InputError, match=says):
        voice.speak(**{"text": TEXT, **setting})


@pytest.mark.parametrize("method", ["autoregressive", "speculative"])
def test_a_streamed_text_is_the_spoken_one_sample_for_sample_and_begins_early(voice, monkeypatch, method):
    said, counts = voice.speak(f"{TEXT} So am I.", method, seed=3), []
    vocode = voice.vocode
    monkeypatch.setattr(voice, "vocode", lambda tokens, name: counts.append(len(tokens)) or vocode(tokens, name))
    chunks = list(voice.stream(f"{TEXT} So am I.", method, seed=3))
    assert len(chunks) > 3 and all(len(chunk) for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate(chunks), said.audio)
    first = len(said.sentences[0].tokens)
    assert counts[0] < first / 2 and sum(n for n in counts if n <= first) < 3 * first  # made anew at most twice


def test_jointly_verified_adaptive_drafts_are_spoken_streamed_and_said_of_the_take(voice):
    how = {"tolerance": 0.0, "draft_length": 4, "drafter": "hidden", "verification": "block", "confidence": 0.15}
    heard = []
    take = voice.speak("So am I.", seed=3, on_tokens=heard.extend, **how)
    np.testing.assert_array_equal(np.concatenate(list(voice.stream("So am I.", seed=3, **how))), take.audio)
    assert {take.summary()[name] for name in ("verification", "confidence")} == {"block", 0.15}
    assert tuple(heard) == take.token_ids
    assert {r.drafted for r in take.sentences[0].rounds} == {0, 1, 2, 3, 4}  # none in the first


def test_a_stream_refuses_bad_settings_at_once_and_has_no_sound_where_none_is(voice):
    with pytest.raises(ssd_repro.InputError, match="method 'x' is unknown"):
        voice.stream(TEXT, "x")
    silent = FakeVoice()
    silent.rounds = lambda *_, **__: iter(())
    assert list(silent.stream("One. Two.")) == []


def test_logits_that_turn_nan_are_an_error(voice):
    broken = ssd_repro.load(device="cpu", runtime="eager")
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
    hidden = checkpoints.load_others(checkpoints.BUNDLED, target, about)["hidden"]
    checkpoints.save_voice(
        tmp_path, codec, target, draft, {"voices": about["voices"]}, int8=True, others={"hidden": hidden}
    )
    again = checkpoints.load_voice(tmp_path)
    drafter = checkpoints.load_others(tmp_path, again[1], again[3])["hidden"]
    for old, new in zip((codec, target, draft, hidden), (*again[:3], drafter), strict=True):
        state = {k: v for k, v in old.state_dict().items() if old is not hidden or "embed_tokens" not in k}  # unused
        assert all(torch.allclose(v, new.state_dict()[k], rtol=1e-6) for k, v in state.items())
    assert again[3]["sha256"]["codec.safetensors"] == about["sha256"]["codec.safetensors"]


def test_weights_of_one_byte_are_the_nearest_of_255_steps_and_stay_when_saved_again(tmp_path):
    codec, target, draft, about = checkpoints.load_voice(checkpoints.BUNDLED)
    with torch.no_grad():
        target.head.weight[0].zero_()
        target.head.weight[1].mul_(1e-6)
    once, twice = tmp_path / "once", tmp_path / "twice"
    checkpoints.save_voice(once, codec, target, draft, {"voices": about["voices"]}, int8=True)
    loaded = checkpoints.load_voice(once)
    for old, new in ((target, loaded[1]), (draft, loaded[2])):
        for name, value in old.state_dict().items():
            found = new.state_dict()[name]
            step = value.abs().amax(-1, keepdim=True) / 127 if value.dim() == 2 else value.abs() / 512
            assert ((found - value).abs() <= 0.501 * step).all(), name
    checkpoints.save_voice(twice, *loaded[:3], {"voices": about["voices"]}, int8=True)
    again = checkpoints.load_voice(twice)
    assert all(torch.allclose(v, again[1].state_dict()[k], rtol=1e-6) for k, v in loaded[1].state_dict().items())
    assert (once / "target.safetensors").stat().st_size < 0.55 * target_bytes()


def target_bytes() -> int:
    """Of the bundled target as float16."""
    return 2 * sum(value.numel() for value in checkpoints.load_voice(checkpoints.BUNDLED)[1].state_dict().values())


def test_weights_stay_small():
    assert sum(p.stat().st_size for p in checkpoints.BUNDLED.rglob("*") if p.is_file()) < 130e6


def test_save_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    take = FakeVoice().speak(TEXT, "draft")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ssd_repro.InputError, match="x.wav: No space left on device; what was there is kept"):
        take.save(tmp_path / "x.wav")
    assert not list(tmp_path.iterdir())


def test_saved_files_have_the_mode_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        FakeVoice().speak(TEXT, "draft").save(tmp_path / "x.wav")
        files.write_text(tmp_path / "x.json", "{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


# Prefill: all that comes before the first token


@pytest.mark.parametrize("method", ssd_repro.METHODS)
def test_embedding_the_prompt_is_prefill(voice, monkeypatch, method):
    embed = voice.target.prefix
    monkeypatch.setattr(voice.target, "prefix", lambda *ids: time.sleep(0.3) or embed(*ids))
    take = voice.speak("Yes.", method)
    assert 0.3 <= take.seconds["prefill"] < take.lm_seconds
    assert take.lm_seconds == pytest.approx(sum(take.seconds[k] for k in ("prefill", "draft", "verify", "rest")))


# A text that comes out empty


EMPTY = DecodeResult((), True, (Round(0, 0, 1, "sampled"),), 1, 0, dict.fromkeys(PHASES, 0.1))


def test_a_text_that_comes_out_empty_is_a_take_without_sound(tmp_path):
    voice = FakeVoice()
    voice.decode = lambda *_, **__: EMPTY
    take = Voice.speak(voice, "One. Two.")
    assert take.token_ids == () and take.audio.shape == (0,) and take.audio.dtype == np.float32
    assert take.lm_rtf is None and take.rtf is None and take.acceptance_rate is None
    assert take.tokens_per_target_call == 1 and take.stopped and take.lm_seconds == pytest.approx(0.4)
    assert take.synthesis_seconds >= take.lm_seconds
    facts = json.loads(json.dumps(take.summary(), allow_nan=False))
    assert facts["tokens"] == facts["audio_seconds"] == 0 and facts["lm_rtf"] is None
    assert soundfile.info(take.save(tmp_path / "x.wav")).frames == 0
    assert "0 tokens, 0.00 s of audio" in take._repr_html_()
    assert "the text came out empty" in cli._described(take, None)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_piece_has_neither_sound_nor_pause(empty):
    voice = FakeVoice()
    decode, voice.front.pieces = voice.decode, lambda *_: [[0, 1], [1, 1], [2, 1]]
    voice.decode = lambda piece, *rest, **other: EMPTY if piece[0] == empty else decode(piece, *rest, **other)
    take = voice.speak("One, two, three.")
    counts = [len(piece.tokens) for piece in take.sentences]
    assert counts[empty] == 0 and all(count for i, count in enumerate(counts) if i != empty)
    assert len(take.audio) == 960 * sum(counts) + 4800


# Threads


@pytest.fixture
def threads(monkeypatch):
    """torch's own number of threads, whatever this environment says; and back."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(load_module, "TORCH_THREADS", 3)
    torch.set_num_threads(2)
    yield monkeypatch
    torch.set_num_threads(before)


def test_a_small_model_decodes_in_one_thread(threads):
    assert ssd_repro.load(device="cpu", runtime="eager").threads == torch.get_num_threads() == 1
    threads.setattr(load_module, "SMALL_MODEL", 1_000_000)  # now the bundled voice is a large one
    assert ssd_repro.load(device="cpu", runtime="eager").threads == torch.get_num_threads() == 3


def test_threads_that_the_user_sets_are_left_alone(threads):
    assert ssd_repro.load(device="cpu", runtime="eager", threads=4).threads == torch.get_num_threads() == 4
    threads.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    assert ssd_repro.load(device="cpu", runtime="eager").threads == torch.get_num_threads() == 2


def test_nothing_but_load_sets_torchs_threads():
    """Loading Whisper puts them back: CTranslate2 had set them (test_metrics); growth puts back what it varies."""
    package = Path(ssd_repro.__file__).parent
    found = [path for path in package.rglob("*.py") if "set_num_threads" in path.read_text()]
    experiment = {package / "experiment" / name for name in ("metrics.py", "growth.py")}
    assert set(found) == {package / "speech" / "load.py", *experiment}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"max_length": 0}, "max_length is 0"),
        ({"precision": "fp16"}, "precision 'fp16' is unknown to the runtime openvino: choose fp32"),
        ({"front_end": "magic"}, "front_end 'magic' is unknown: choose upstream or tokens"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"draft": "x"}, "leave draft and data empty"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(monkeypatch, option, says):
    monkeypatch.setattr(checkpoints, "load_voice", lambda folder: pytest.fail("the weights were read"))
    with pytest.raises(ssd_repro.InputError, match=says):
        ssd_repro.load(**{"device": "cpu"} | option)


def test_texts_together_are_what_each_is_alone(voice, monkeypatch):
    monkeypatch.setattr(bundled, "sentences", lambda text: text.split(" | "))
    texts = ["Good morning. | And you?", "Yes.", "The boat is ready."]  # the first one in two pieces
    for method in ("autoregressive", "speculative"):
        how = {"method": method, "voices": ["af_heart", "bf_emma", "af_heart"]}
        together = voice.speak_together(texts, **how, seeds=[3, 4, 5])
        assert [len(take.sentences) for take in together] == [2, 1, 1] and together[1].voice == "bf_emma"
        for i, take in enumerate(together):
            alone = voice.speak_together([texts[i]], method, how["voices"][i], seeds=3 + i)[0]
            assert alone.token_ids == take.token_ids and np.array_equal(alone.audio, take.audio)
            assert take.summary()["method"] == method and take.audio_seconds > 0.2


@pytest.mark.parametrize(
    "texts, settings, sentence",
    [
        ("Yes.", {}, "texts is 'Yes.': give a list of at least one text"),
        (["Yes."], {"seeds": [1, 2]}, "seeds has 2 entries for 1 texts"),
        (["Yes."], {"method": "draft"}, "method 'draft' is not one of a batch"),
        (["Yes.", ""], {}, "text is empty"),
    ],
)
def test_a_batch_that_cannot_be_is_one_sentence(voice, texts, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        voice.speak_together(texts, **settings)
