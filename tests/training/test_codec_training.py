import numpy as np
import pytest
import soundfile
import torch
from tiny_corpus import SMALL, features

from ssd_repro.models.codec import Codec, analyse, long_term_spectrum
from ssd_repro.speech.text import SYMBOLS, VOICES
from ssd_repro.training import codec as codec_module
from ssd_repro.training.codec import Features
from ssd_repro.training.loop import Settings


def test_viterbi_finds_the_path_that_was_put_in():
    path = [0, 0, 1, 1, 1, 2, 3, 3]
    labels = [4, 7, 7, 5]  # a repeated label needs a blank between
    frames = [4, 4, 7, 7, 9, 7, 5, 5]
    log_probs = torch.full((8, 10), -10.0)
    log_probs[range(8), frames] = 0.0
    assert codec_module.align(log_probs, labels, blank=9) == path


def test_viterbi_puts_a_blank_between_equal_labels():
    log_probs = torch.full((4, 10), -10.0)
    log_probs[:, 7] = 0.0
    log_probs[1, 9] = -1.0  # the best place for it
    assert codec_module.align(log_probs, [7, 7], blank=9) == [0, 0, 1, 1]


def test_calibration_gives_the_decoded_envelope_the_teachers_mean_and_spread():
    torch.manual_seed(0)
    codec, rng = Codec(SMALL).eval(), np.random.default_rng(0)
    audio = {str(k): (0.1 * rng.standard_normal(24_000)).astype(np.float32) for k in range(3)}
    worlds = {name: torch.from_numpy(analyse(sound)[:200]) for name, sound in audio.items()}
    items = [Features(name, VOICES[0], world, torch.zeros(50, 8).half(), []) for name, world in worlds.items()]
    codec_module.calibrate(codec, items, audio.get)
    codes = [codec_module.codes_of(codec, f) for f in items]
    made = torch.stack([codec.features(c, 0)[:, :40].std(0) for c in codes]).mean(0)
    wanted = torch.stack([f.world[:, :40].std(0) for f in items]).mean(0)
    assert torch.allclose(made, wanted, rtol=1e-3)
    found = long_term_spectrum([codec.decode(c, 0) for c in codes])
    ratio = 10 * np.log10(long_term_spectrum(list(audio.values())) / found)[20:460]
    assert abs(np.convolve(ratio, np.ones(40) / 40, "valid")).max() < 1.5  # dB, in any 0.9 kHz
    assert torch.equal(codec.scale[1], torch.ones(40))  # of a voice without speech nothing is known


def test_codec_trains_and_gives_tokens_on_every_grid(tmp_path):
    items, settings = features(), Settings(60, batch=4, warmup=5, learning_rate=3e-3)
    task, rows = codec_module.train_codec(items, items[:2], settings, tmp_path, config=SMALL)
    assert rows[-1]["envelope"] < rows[0]["envelope"]
    assert rows[-1]["dev_phone_error_rate"] >= 0
    made = codec_module.token_row(task, items[0])
    assert [len(codes) for codes in made["codes"]] == [20, 19, 19, 19]
    assert [len(c) for c in made["codes"]] == [len(a) for a in made["aligned"]]
    assert all(0 <= phone < len(SYMBOLS) for phone, _ in made["aligned"][0])


def test_a_kept_codec_stays_as_it_is_and_its_phone_head_learns(tmp_path):
    torch.manual_seed(1)
    items, kept = features(), Codec(SMALL)
    kept.mean.fill_(0.25)
    before = {name: value.clone() for name, value in kept.state_dict().items()}
    settings = Settings(60, batch=4, warmup=5, learning_rate=1e-2, weight_decay=0.1)
    task, rows = codec_module.train_codec(items, items, settings, tmp_path, kept=kept, config=SMALL)
    assert all(torch.equal(value, before[name]) for name, value in task.codec.state_dict().items())
    assert rows[-1]["ctc"] < rows[0]["ctc"]
    codes = [codec_module.codes_of(codec.eval(), items[0]).tolist() for codec in (task.codec, kept)]
    assert codes[0] == codes[1]


def test_the_phone_error_rate_counts_edits_over_phones():
    task = codec_module.CodecTask(features(), SMALL, 0.25).eval()
    logits = torch.full((1, 8, len(SYMBOLS) + 1), -9.0)
    logits[0, range(8), [20, 20, len(SYMBOLS), 20, 21, 22, 22, len(SYMBOLS)]] = 9.0  # reads 20 20 21 22
    found = task._phones(logits, torch.tensor([8]), [[20, 20, 30, 22, 23]])
    assert float(found["phone_error_rate"]) == pytest.approx(2 / 5)  # one replaced, one left out


def test_features_are_kept_by_what_made_them(tmp_path, monkeypatch):
    made = []

    class Hint:
        def __init__(self, digest):
            self.digest = digest

        def __call__(self, audio, tokens):
            made.append(self.digest)
            return np.full((2 * tokens, 384), len(made), np.float32)

    row = {"id": "a", "voice": VOICES[0], "text": "Hello."}
    rng, first, audio = np.random.default_rng(0), Hint("one"), tmp_path / "a.flac"

    def again(states):
        made.clear()
        found = codec_module.featurise(audio, row, states, tmp_path / "features")
        return found, len(made)

    soundfile.write(audio, 0.1 * rng.standard_normal(9600), 24_000)
    fresh, count = again(first)
    assert count == 1 and len(fresh) == 10 and fresh.hint.shape == (20, 384)
    kept, count = again(first)
    assert count == 0 and torch.equal(kept.world, fresh.world) and torch.equal(kept.hint, fresh.hint)
    assert again(Hint("two"))[1] == 1, "another hint model"
    soundfile.write(audio, 0.1 * rng.standard_normal(9600), 24_000)
    assert again(first)[1] == 1, "other audio of the same id"
    monkeypatch.setattr(codec_module, "FEATURES_VERSION", 2)
    assert again(first)[1] == 1, "another analysis"


def test_the_hint_leaves_torch_its_threads():
    from ssd_repro.training.recipe import find_hint

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        hint = codec_module.Hint(find_hint())
        assert torch.get_num_threads() == 2 and len(hint.digest) == 12
    finally:
        torch.set_num_threads(before)
