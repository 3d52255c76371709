import random

import numpy as np
import pytest
import torch

from ssd_repro import prompting
from ssd_repro.codec import Codec, CodecConfig
from ssd_repro.decoding import autoregressive
from ssd_repro.draft_data import Example, voice_target
from ssd_repro.sampling import Sampler, probabilities
from ssd_repro.speech_lm import SpeechLM, small_qwen2
from ssd_repro.text import SYMBOL_ID, SYMBOLS, TASK, TEXT_VOCABULARY, plain_phones
from ssd_repro.training import Utterance

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
    said = prompting.say_together(model, asked(), torch.Generator())
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
    said = prompting.say_together(model, [one] * 4000, torch.Generator().manual_seed(0))
    counts = np.bincount([s.speech[0] for s in said], minlength=CODES + 3) / 4000
    spread = np.sqrt(law * (1 - law) / 4000).numpy()
    assert (abs(counts - law.numpy()) <= 5.2 * spread + 1e-9).all() and (law > 0).sum() == 4


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
        assert prompting.phone_errors(Judge(), codec, example("x", text, speech)) == wrong


def test_takes_are_kept_and_none_is_made_twice(tmp_path, monkeypatch):
    model, path = target(Sampler(temperature=1.0)), tmp_path / "said.jsonl"
    codec = Codec(CodecConfig(digits=4, encoder_width=8, decoder_width=8, encoder_blocks=1, decoder_blocks=1, hint=4))
    whole = prompting.takes(model, asked(), Judge(), codec, path, seed=3, batch=2)
    assert len(whole) == 6 == len({one.id for one, _ in whole})
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    path.write_text(lines[0] + lines[2] + lines[1][:40])  # killed within a line
    calls = []
    once = prompting.say_together
    monkeypatch.setattr(prompting, "say_together", lambda *a: calls.append(1) or once(*a))
    again = prompting.takes(model, asked(), Judge(), codec, path, seed=3, batch=2)
    assert len(calls) == 1
    assert [(one.row(), wrong) for one, wrong in again] == [(one.row(), wrong) for one, wrong in whole]
    prompting.takes(model, asked(), Judge(), codec, path, seed=4, batch=2)
    assert len(calls) == 4  # another seed: all anew
    said = prompting.behind(Utterance("p", "bf_emma", [40, 41], [[7, 8, 9], [1, 2, 3]], []), "t", [20, 21])
    assert said.text.tolist() == [20, 21, TASK] and said.prompt_speech.tolist() == [7, 8, 9] and not len(said.speech)
    assert said.prompt_text.tolist()[1:3] == [40, 41]
    facts = prompting.slips([(example("a", [10] * 8, [1]), 1), (example("b", [10] * 8, [1]), 3)])
    assert facts["phone errors %"] == 25 and facts["more than a quarter wrong %"] == 50


def test_prompts_are_ranked_by_phone_errors_and_the_best_say_every_text(tmp_path, monkeypatch):
    prompts = [Utterance(str(i), "af_heart", [20 + i], [[i]], []) for i in range(4)]
    texts = [(f"t{i}", [30, 31, 32, 33]) for i in range(6)]
    asked_of = []

    def takes(model, asked, **around):
        asked_of.extend(one.id for one in asked)
        assert around == {"seed": 5} and all(one.prompt_speech.tolist() for one in asked)
        # prompt 2 looks best on every third text and is not; 1 is
        bad = {"0": 3, "1": 1, "2": 0, "3": 4}
        return [(one, 4 if one.id[3:] == "2" and one.id[1] not in "03" else bad[one.id[3:]]) for one in asked]

    monkeypatch.setattr(prompting, "takes", takes)
    ranked = prompting.rank_prompts(None, prompts, texts, 2, seed=5)
    assert [u.id for u, _ in ranked] == ["1", "2", "0", "3"]
    assert [facts["utterances"] for _, facts in ranked] == [6, 6, 2, 2]
    assert len(asked_of) == len(set(asked_of)) == 6 + 6 + 2 + 2
