import math
import random

import numpy as np
import pytest
import torch

from ssd_repro import preference
from ssd_repro.codec import Codec, CodecConfig
from ssd_repro.decoding import autoregressive
from ssd_repro.draft_data import Example, voice_target
from ssd_repro.sampling import Sampler, probabilities
from ssd_repro.speech_lm import SpeechLM, small_qwen2
from ssd_repro.text import SYMBOL_ID, SYMBOLS, TASK, TEXT_VOCABULARY, VOICES, language, plain_phones
from ssd_repro.training import Schedule, Utterance

CODES = 81
GREEDY = Sampler(temperature=0.0, ras=False)


def target(sampler=GREEDY, ratio=(1.2, 2.6)):
    torch.manual_seed(3)
    lm = SpeechLM(small_qwen2(32, 64, 3, 2, 1, TEXT_VOCABULARY), CODES + 3).eval()
    with torch.no_grad():
        for weight in (lm.speech_embedding.weight, lm.model.embed_tokens.weight, lm.head.weight):
            weight.mul_(8)  # far from uniform: rounding changes no greedy choice
    return voice_target(lm, CODES, sampler, ratio)


def example(name, phones, speech=(), before=(5, 6)):
    ids = (np.array(list(part), np.int32) for part in ([*phones, TASK], speech, (20, *before), before))
    return Example(name, *ids)


def asked(count=6):
    rng = random.Random(1)
    return [
        example(str(i), [rng.randrange(10, 60) for _ in range(3 + 5 * i)], before=range(2 + i % 3))
        for i in range(count)
    ]


@pytest.mark.parametrize("ratio", [(1.2, 2.6), (0.0, 1.0)])
def test_a_batch_says_what_each_would_say_alone(ratio):
    model = target(ratio=ratio)
    said = preference.say_together(model, asked(), torch.Generator())
    for one in said:
        alone = autoregressive(model.lm, model.embed(one), model.config(len(one.text)), torch.Generator())
        assert one.speech.tolist() == list(alone.tokens) and one.stopped == alone.stopped
    assert len({len(one.speech) for one in said}) > 2


def test_a_batch_samples_by_the_deployed_law():
    """The first token's frequencies over 4,000 draws; a right law fails once in 10^6 runs."""
    sampler = Sampler(temperature=4.0, top_k=4, top_p=0.99, ras=False)
    model = target(sampler)
    one = asked(1)[0]
    with torch.inference_mode():
        logits = model.lm(model.embed(one))[0, -1]
    banned = torch.arange(CODES + 3) >= CODES
    law = probabilities(logits, torch.full((1,), -1), sampler, banned)
    said = preference.say_together(model, [one] * 4000, torch.Generator().manual_seed(0))
    counts = np.bincount([s.speech[0] for s in said], minlength=CODES + 3) / 4000
    spread = np.sqrt(law * (1 - law) / 4000).numpy()
    assert (abs(counts - law.numpy()) <= 5.2 * spread + 1e-9).all() and (law > 0).sum() == 4


def test_requests_are_for_another_voice_of_the_same_accent():
    texts = [Utterance(f"{v}_{i}", v, [20 + i, 30], [[1, 2]], []) for v in VOICES for i in range(3)]
    shown = {v: [Utterance(f"p{v}", v, [40, 41], [[7, 8, 9]], [])] for v in VOICES}
    made = preference.requests(texts, shown, 18, seed=2)
    assert len({one.id for one in made}) == 18
    for one in made:
        text, voice = one.id.split("/")
        was = next(u for u in texts if u.id == text)
        assert voice != was.voice and language(voice) == language(was.voice)
        assert one.text.tolist() == [*was.phones, TASK] and one.prompt_speech.tolist() == [7, 8, 9]
        assert {40, 41} <= set(one.prompt_text.tolist()) and not len(one.speech)
    ids = [one.id for one in preference.requests(texts, shown, 5, seed=2)]
    assert ids == [one.id for one in preference.requests(texts, shown, 5, seed=2)]


class Judge(torch.nn.Module):
    """Hears in the code k (all digits alike) the k-th of three phones, and a blank in the others."""

    PHONES = [SYMBOL_ID[s] for s in "bdf"]

    def forward(self, digits):
        heard = torch.full((*digits.shape[:2], len(SYMBOLS) + 1), -9.0)
        heard[..., -1] = 0
        for level, phone in zip((-1, 0, 1), self.PHONES, strict=True):
            heard[..., phone] = torch.where((digits == level).all(-1), 5.0, -9.0)
        return heard


def test_phone_errors_are_counted_on_tokens_without_stress_space_and_repeats():
    codec = Codec(CodecConfig(encoder_width=8, decoder_width=8, encoder_blocks=1, decoder_blocks=1, hint=4))
    b, d, f = codec.to_code(torch.tensor([[[-1.0] * 8, [0.0] * 8, [1.0] * 8]]))[0].tolist()
    text = [SYMBOL_ID[s] for s in ("b", " ", "d", "f", ".")]
    assert plain_phones(text) == Judge.PHONES
    for speech, wrong in (([b, b, d, f], 0), ([b, f], 1), ([b, d, f, 1, d, f], 2), ([], 3)):
        assert preference.phone_errors(Judge(), codec, example("x", text, speech)) == wrong


def test_pairs_are_the_best_and_the_worst_take_where_they_differ():
    made = [example(name, [10], [n]) for name, n in (("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5))]
    said = list(zip(made, [2, 0, 7, 4, 5], strict=True))
    (pair,) = preference.choose_pairs(said, 3)
    assert (pair.better.speech[0], pair.worse.speech[0], pair.errors) == (2, 3, (0, 7))
    ran_away = example("b", [10], [6])
    object.__setattr__(ran_away, "stopped", False)
    found = preference.choose_pairs([*said, (ran_away, 0)], 3)
    assert found[1].worse is ran_away and found[1].better.speech[0] == 4


def test_preference_raises_the_better_over_the_worse_and_leaves_embeddings(tmp_path):
    model, rng = target(), np.random.default_rng(0)
    pairs = [
        preference.Pair(*(example(str(i), rng.integers(10, 60, 5), rng.integers(0, CODES, 9)) for _ in "bw"), (0, 5))
        for i in range(8)
    ]
    kept = model.lm.speech_embedding.weight.clone(), model.lm.model.embed_tokens.weight.clone()
    model.lm.requires_grad_(False)  # as a loaded voice's
    trainer = preference.PreferenceTrainer(model)
    first = trainer.loss(trainer.with_reference(pairs), random.Random(0))
    assert float(first["dpo"].detach()) == pytest.approx(math.log(2), abs=2e-3)
    schedule = Schedule(60, batch=4, learning_rate=3e-3, warmup=3, save_every=30)
    lm, rows = preference.prefer(model, pairs, pairs, schedule, tmp_path / "c", log=lambda _: None)
    assert rows[-1]["dev_right"] == 1 and rows[-1]["dev_dpo"] < 0.3 and rows[-1]["dev_ce"] < float(first["ce"].detach())
    assert torch.equal(lm.speech_embedding.weight, kept[0]) and torch.equal(lm.model.embed_tokens.weight, kept[1])


def test_log_probabilities_are_of_the_speech_and_its_stop():
    model = target()
    one = example("a", [12, 13], [3, 4, 5])
    with torch.inference_mode():
        prefix = model.embed(one)
        rows = model.lm(torch.cat([prefix, model.lm.speech_embedding(torch.tensor([[3, 4, 5]]))], 1))[0].log_softmax(-1)
    begin = prefix.shape[1] - 1
    wanted = sum(float(rows[begin + i, token]) for i, token in enumerate((3, 4, 5, CODES)))
    found = preference.PreferenceTrainer(model).log_probabilities([one, example("b", [12], [9] * 7)])
    assert float(found[0].detach()) == pytest.approx(wanted, rel=0.02)  # bf16


def test_takes_are_kept_and_none_is_made_twice(tmp_path, monkeypatch):
    model, path = target(Sampler(temperature=1.0)), tmp_path / "said.jsonl"
    codec = Codec(CodecConfig(digits=4, encoder_width=8, decoder_width=8, encoder_blocks=1, decoder_blocks=1, hint=4))
    whole = preference.takes(model, asked(), 2, Judge(), codec, path, seed=3, batch=5)
    assert len(whole) == 12 and len({one.id for one, _ in whole}) == 6
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    path.write_text(lines[0] + lines[2] + lines[1][:40])  # killed within a line
    calls = []
    once = preference.say_together
    monkeypatch.setattr(preference, "say_together", lambda *a: calls.append(1) or once(*a))
    again = preference.takes(model, asked(), 2, Judge(), codec, path, seed=3, batch=5)
    assert len(calls) == 1
    assert [(one.row(), wrong) for one, wrong in again] == [(one.row(), wrong) for one, wrong in whole]
    preference.takes(model, asked(), 2, Judge(), codec, path, seed=4, batch=5)
    assert len(calls) == 4  # another seed: all anew
    facts = preference.slips([(example("a", [10] * 8, [1]), 1), (example("b", [10] * 8, [1]), 3)])
    assert facts["phone errors %"] == 25 and facts["more than a quarter wrong %"] == 50


def test_strength_goes_a_part_of_the_way(tmp_path):
    """Half the way is in the middle of none and all, whether the run was resumed or not."""
    rng = np.random.default_rng(0)
    pairs = [
        preference.Pair(*(example(str(i), rng.integers(10, 60, 5), rng.integers(0, CODES, 9)) for _ in "bw"), (0, 5))
        for i in range(4)
    ]
    schedule = Schedule(4, batch=2, learning_rate=1e-2, warmup=1, save_every=2)
    ends = []
    for strength, name in ((0.0, "a"), (1.0, "a"), (0.5, "a"), (0.5, "b")):
        lm, _ = preference.prefer(target(), pairs, pairs, schedule, tmp_path / name, strength, lambda _: None)
        ends.append(lm.model.layers[0].mlp.up_proj.weight.detach())
    none, whole, half, anew = ends
    assert torch.equal(none, target().lm.model.layers[0].mlp.up_proj.weight) and (whole - none).abs().max() > 1e-3
    torch.testing.assert_close(half, (none + whole) / 2)
    torch.testing.assert_close(half, anew)


def test_prompts_are_ranked_by_phone_errors_and_the_best_say_every_text(tmp_path, monkeypatch):
    prompts = [Utterance(str(i), "af_heart", [20 + i], [[i]], []) for i in range(4)]
    texts = [(f"t{i}", [30, 31, 32, 33]) for i in range(6)]
    asked_of = []

    def takes(model, asked, count, **around):
        asked_of.extend(one.id for one in asked)
        assert around == {"seed": 5} and count == 1 and all(one.prompt_speech.tolist() for one in asked)
        # prompt 2 looks best on every third text and is not; 1 is
        bad = {"0": 3, "1": 1, "2": 0, "3": 4}
        return [(one, 4 if one.id[3:] == "2" and one.id[1] not in "03" else bad[one.id[3:]]) for one in asked]

    monkeypatch.setattr(preference, "takes", takes)
    ranked = preference.rank_prompts(None, prompts, texts, 2, seed=5)
    assert [u.id for u, _ in ranked] == ["1", "2", "0", "3"]
    assert [facts["utterances"] for _, facts in ranked] == [6, 6, 2, 2]
    assert len(asked_of) == len(set(asked_of)) == 6 + 6 + 2 + 2
