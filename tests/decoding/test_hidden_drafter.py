"""The hidden-state drafter: exact, and what it drafts from is what its training teaches it."""

from collections import Counter
from itertools import product

import pytest
import torch
from tiny_models import tiny
from toys import generator, p_value

from ssd_repro.decoding.drafters import HiddenDrafter, Tape
from ssd_repro.decoding.result import DecodeConfig
from ssd_repro.decoding.sampling import Sampler
from ssd_repro.decoding.speculative import autoregressive, speculative
from ssd_repro.models.causal import CausalLM
from ssd_repro.models.families import small_qwen2
from ssd_repro.models.hidden_draft import HiddenDraft, HiddenDraftLM
from ssd_repro.models.runtimes.openvino import OpenVINOLM
from ssd_repro.models.speech_lm import SpeechLM
from ssd_repro.training.hidden import unrolled

PREFIX = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))


def made(vocab=40, scale=0.3):
    torch.manual_seed(0)
    target = SpeechLM(small_qwen2(32, 64, 3, 4, 2, 20), vocab).eval().requires_grad_(False)
    for parameter in target.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=scale)
    return with_draft(target)


def with_draft(target):
    draft = HiddenDraft(target, rank=16).begin_from(target).eval().requires_grad_(False)
    target.taps = draft.taps
    return target, draft


TARGET, DRAFT = made()
CAUSAL = {"hidden_size": 32, "vocab": 40, "max_position_embeddings": 128, "initializer_range": 0.5}


@pytest.fixture(scope="module", params=["eager", "openvino", "gemma3", "gpt_neox"])
def models(request):
    """Target and drafter: a SpeechLM on two runtimes, and causal models of transformers, one with a window of 4."""
    if request.param == "openvino":
        return OpenVINOLM(TARGET, 1), HiddenDraftLM(DRAFT, OpenVINOLM(DRAFT.lm, 1))
    causal = request.param != "eager"
    target, draft = with_draft(CausalLM(tiny(request.param, **CAUSAL))) if causal else (TARGET, DRAFT)
    return target, HiddenDraftLM(draft, draft.lm)


@pytest.mark.parametrize("draft_length", [1, 3, 6])
def test_greedy_tokens_are_the_targets(models, draft_length, monkeypatch):
    target, draft = models
    opened, inner = [], draft.open
    monkeypatch.setattr(draft, "open", lambda: opened.append("drafter") or inner())
    config = DecodeConfig(
        sampler=Sampler(temperature=0), max_tokens=60, stop_ids=(), draft_length=draft_length, tolerance=0.0
    )
    with torch.inference_mode():
        alone = autoregressive(target, PREFIX, config, generator())
        result = speculative(target, draft, PREFIX, config, generator())
    assert result.tokens == alone.tokens and len(alone.tokens) == 60
    assert result.draft_calls > 1 and opened == ["drafter"]
    assert 0 < result.accepted < result.drafted  # both kinds of rounds were taken


@pytest.mark.parametrize("confidence", [0.0, 0.02])
def test_what_it_drafts_from_is_what_a_session_that_never_rolled_back_would_say(models, confidence):
    """After rounds of every kind, p is that of the unrolled passes of training over the whole sequence."""
    target, draft = models
    plain = target.lm if isinstance(target, OpenVINOLM) else target
    sampler, drafters = Sampler(top_k=0, top_p=1.0, ras=False), []

    class Watched(HiddenDrafter):
        def propose(self, tape, count, rng):
            tokens, p = super().propose(tape, count, rng)
            rounds.append((tape.tokens(0, tape.size + len(tokens)).clone(), tape.size, p))
            return tokens, p

    def make(prefix, session):
        drafters.append(Watched(draft, prefix, session))
        return drafters[-1]

    rounds = []
    config = DecodeConfig(
        sampler=sampler, max_tokens=40, stop_ids=(), draft_length=4, tolerance=0.3, confidence=confidence
    )
    result = speculative(target, make, PREFIX, config, generator(3))
    assert (len({len(p) for _, _, p in rounds[:-4]}) > 1) == (confidence > 0)  # the last are cut by max_tokens
    assert {r.accepted for r in result.rounds} >= {0, 1} and len(rounds) > 8
    for tokens, size, p in rounds:
        whole = torch.cat((PREFIX, plain.speech_embedding(tokens[None])), 1)
        with torch.no_grad():
            _, features = plain.with_features(whole)
            passes = unrolled(draft.draft, features, whole, len(p))
            for k, row in enumerate(p):
                place = PREFIX.shape[1] + size + k - 2
                expected = draft.draft.lm.head(passes[k][0, place]).softmax(-1)
                torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-3)


def test_the_distribution_is_the_targets():
    """The second and third token, of six; 4,000 draws, chi-squared: a right drafter fails once in 10,000 runs."""
    target, draft = made(vocab=6, scale=0.2)
    drafter = HiddenDraftLM(draft, draft.lm)
    config = DecodeConfig(
        sampler=Sampler(top_k=0, top_p=1.0, ras=False), max_tokens=3, stop_ids=(), draft_length=2, tolerance=0.0
    )
    counts, rng = Counter(), generator(5)
    for _ in range(4000):
        counts[speculative(target, drafter, PREFIX, config, rng).tokens[1:]] += 1
    law = Counter()
    with torch.no_grad():
        first = target(PREFIX)[0, -1].softmax(-1).tolist()
        for a, b, c in product(range(6), repeat=3):
            after = target(torch.cat((PREFIX, target.speech_embedding(torch.tensor([[a, b]]))), 1))[0].softmax(-1)
            law[b, c] += first[a] * float(after[-2, b] * after[-1, c])
    assert p_value(counts, law) > 1e-4


def test_its_own_parameters_are_a_small_part(models):
    own = sum(p.numel() for p in DRAFT.parameters() if p is not DRAFT.lm.speech_embedding.weight)
    assert own < 0.7 * sum(p.numel() for p in TARGET.parameters())


def test_the_tape_is_written_and_nothing_is_left_in_the_cache_of_what_was_rejected(models):
    target, draft = models
    with torch.inference_mode():
        session = target.session()
        logits = session.prefill(PREFIX)
        config = DecodeConfig(sampler=Sampler(), max_tokens=20, stop_ids=())
        tape, drafter = Tape.empty(config, logits), draft(PREFIX, session)
        tape.write(0, torch.tensor(4))
        tape.size = 1
        drafter.rollback(1)
        tokens, p = drafter.propose(tape, 3, generator())
        session.extend(tape.tokens(0, 4)[None])
        session.crop(PREFIX.shape[1] + 1)
        tape.size = 2
        drafter.rollback(2)
        assert tokens.shape == (3,) and p.shape == (3, 40) and drafter.session.length == PREFIX.shape[1]
        assert drafter.ready.shape == (1, 1, 32) and drafter.calls == 4
