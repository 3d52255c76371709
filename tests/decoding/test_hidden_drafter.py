"""The drafters on the target's hidden states: exact, and what they draft from is what their training teaches."""

import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny
from toys import generator, law_of_all_branches

from ssd_repro.decoding.drafters import Tape
from ssd_repro.decoding.result import DecodeConfig
from ssd_repro.decoding.sampling import Sampler
from ssd_repro.decoding.speculative import autoregressive, speculative
from ssd_repro.models import checkpoints
from ssd_repro.models.block_draft import BlockDraft
from ssd_repro.models.causal import CausalLM
from ssd_repro.models.draft import own_parameters
from ssd_repro.models.families import small_qwen2
from ssd_repro.models.hidden_draft import HiddenDraft
from ssd_repro.models.runtimes.graphs import StaticLM
from ssd_repro.models.runtimes.openvino import OpenVINOLM
from ssd_repro.models.speech_lm import SpeechLM
from ssd_repro.training.block import BlockTask
from ssd_repro.training.hidden import HiddenTask

PREFIX = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
KINDS = {"hidden": (HiddenDraft, HiddenTask), "block": (BlockDraft, BlockTask)}  # a drafter, and what trains it


def made(drafting, vocab=40, scale=0.3):
    torch.manual_seed(0)
    target = SpeechLM(small_qwen2(32, 64, 3, 4, 2, 20), vocab).eval().requires_grad_(False)
    for parameter in target.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=scale)
    return with_draft(target, drafting, scale)


def with_draft(target, drafting, scale=0.3):
    draft = KINDS[drafting][0](target, rank=16).begin_from(target).eval().requires_grad_(False)
    if drafting == "block":  # a head that hears the tokens from the start
        draft.carry.weight.normal_(std=scale / 3)
    target.taps = draft.taps
    return target, draft


SAMPLERS = {
    "softmax": Sampler(top_k=0, top_p=1.0, ras=False),
    "ras": Sampler(top_k=2, top_p=0.85, ras_window=3, ras_tau=0.5),
}
MADE = {drafting: made(drafting) for drafting in KINDS}
RUNTIMES = {"eager": lambda lm: lm, "graphs": lambda lm: StaticLM(lm, 120), "openvino": lambda lm: OpenVINOLM(lm, 1)}


CAUSAL = {"hidden_size": 32, "vocab": 40, "max_position_embeddings": 128, "initializer_range": 0.5}


@pytest.fixture(scope="module", params=[*product(KINDS, RUNTIMES), ("hidden", "gemma3"), ("hidden", "gpt_neox")])
def models(request):
    """Target and drafter: a SpeechLM on each runtime, and causal models of transformers, one with a window of 4."""
    drafting, where = request.param
    run = RUNTIMES.get(where, RUNTIMES["eager"])
    known = where in RUNTIMES
    target, draft = MADE[drafting] if known else with_draft(CausalLM(tiny(where, **CAUSAL)), drafting)
    return run(target), draft.on(run(draft.lm)), (drafting, target, draft)


@pytest.mark.parametrize("draft_length", [1, 3, 8])
def test_greedy_tokens_are_the_targets(models, draft_length, monkeypatch):
    target, draft, (drafting, *_) = models
    opened, inner = [], draft.open
    monkeypatch.setattr(draft, "open", lambda: opened.append("drafter") or inner())
    config = DecodeConfig(
        sampler=Sampler(temperature=0), max_tokens=60, stop_ids=(), draft_length=draft_length, tolerance=0.0
    )
    with torch.inference_mode():
        alone = autoregressive(target, PREFIX, config, generator())
        result = speculative(target, draft, PREFIX, config, generator())
    assert result.tokens == alone.tokens and len(alone.tokens) == 60
    drafted = [r.drafted for r in result.rounds]
    assert result.draft_calls == 1 + (sum(map(bool, drafted)) if drafting == "block" else sum(drafted))
    assert opened == ["drafter"] and max(drafted) == min(draft_length, 6 if drafting == "block" else 8)
    assert 0 < result.accepted < result.drafted  # both kinds of rounds were taken


@pytest.mark.parametrize("confidence", [0.0, 0.02])
def test_what_it_drafts_from_is_what_a_session_that_never_rolled_back_would_say(models, confidence):
    """After rounds of every kind, p is that of the passes of training over the whole sequence."""
    target, draft, (drafting, whole_target, own) = models
    sampler, rounds = Sampler(top_k=0, top_p=1.0, ras=False), []

    def make(prefix, session):
        drafter = draft(prefix, session)
        inner = drafter.propose

        def propose(tape, count, rng):
            tokens, p = inner(tape, count, rng)
            rounds.append((tape.tokens(0, tape.size + len(tokens)).clone(), tape.size, p))
            return tokens, p

        drafter.propose = propose
        return drafter

    config = DecodeConfig(
        sampler=sampler, max_tokens=40, stop_ids=(), draft_length=4, tolerance=0.3, confidence=confidence
    )
    result = speculative(target, make, PREFIX, config, generator(3))
    assert (len({len(p) for _, _, p in rounds[:-4]}) > 1) == (confidence > 0)  # the last are cut by max_tokens
    assert len({0} | {r.accepted for r in result.rounds}) > 2 and len(rounds) > 8
    task = KINDS[drafting][1](SimpleNamespace(lm=whole_target), begin=own)
    for tokens, size, p in rounds:
        whole = torch.cat((PREFIX, whole_target.speech_embedding(tokens[None])), 1)
        with torch.no_grad():
            _, features = whole_target.with_features(whole)
            everywhere = torch.ones(1, whole.shape[1] - 1, dtype=torch.bool)
            passes = task.made(features, whole, everywhere)
            for k, row in enumerate(p):
                expected = passes[k][PREFIX.shape[1] + size + k - 2].softmax(-1)
                torch.testing.assert_close(row, expected, atol=1e-4, rtol=5e-3)


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("drafting", KINDS)
def test_the_distribution_is_the_targets(drafting, sampler, verification, monkeypatch):
    """To six digits: the real loop through every branch that it can take, beside the target's own."""
    target, draft = made(drafting, vocab=3, scale=0.2)
    config = DecodeConfig(
        sampler=SAMPLERS[sampler], max_tokens=4, min_tokens=1, stop_ids=(2,), draft_length=2, tolerance=0.0,
        verification=verification,
    )  # fmt: skip
    drafter = draft.on(draft.lm)
    want = law_of_all_branches(lambda: autoregressive(target, PREFIX, config, generator()).tokens, monkeypatch)
    monkeypatch.undo()
    got = law_of_all_branches(lambda: speculative(target, drafter, PREFIX, config, generator()).tokens, monkeypatch)
    assert len(want) > 7 and sum(want.values()) == pytest.approx(1)
    for every in want.keys() | got.keys():
        assert got.get(every, 0.0) == pytest.approx(want.get(every, 0.0), abs=2e-6), every


@pytest.mark.parametrize("drafting", KINDS)
def test_its_own_parameters_are_at_most_12_percent_of_the_bundled_targets(drafting):
    about = json.loads((checkpoints.BUNDLED / "voice.json").read_text("utf-8"))
    with torch.device("meta"):
        target = SpeechLM(small_qwen2(**about["target"]), about["speech_vocab"])
        draft = KINDS[drafting][0](target)
    own = sum(p.numel() for p in own_parameters(draft).values())
    assert 0.05 < own / sum(p.numel() for p in target.parameters()) < 0.12


def test_the_tape_is_written_and_nothing_is_left_in_the_cache_of_what_was_rejected(models):
    target, draft, (drafting, *_) = models
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
        assert drafter.ready.shape == (1, 1, 32) and drafter.calls == (2 if drafting == "block" else 4)
