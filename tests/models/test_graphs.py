import inspect
import math
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import generator, tiny_lm

from ssd_repro.decoding import drafters
from ssd_repro.decoding import result as result_module
from ssd_repro.decoding import speculative as speculative_module
from ssd_repro.decoding.result import DecodeConfig
from ssd_repro.decoding.sampling import Sampler, probabilities
from ssd_repro.decoding.speculative import autoregressive, speculative
from ssd_repro.errors import InputError
from ssd_repro.models.block_draft import BlockDraft
from ssd_repro.models.draft import make_draft
from ssd_repro.models.families import small_qwen2
from ssd_repro.models.hidden_draft import HiddenDraft
from ssd_repro.models.runtimes import graphs
from ssd_repro.models.runtimes.graphs import FixedCache, StaticLM, StaticSession
from ssd_repro.models.speech_lm import SpeechLM

TARGET = tiny_lm(layers=2)
DRAFT = make_draft(TARGET, bottom=1, top=0)
PREFIX = torch.randn(1, 5, 16, generator=generator(9))
STATIC, STATIC_DRAFT = StaticLM(TARGET, 40), StaticLM(DRAFT, 40)


def config(greedy=False, **settings) -> DecodeConfig:
    sampler = Sampler(temperature=0) if greedy else Sampler(ras_window=4)
    settings = {"max_tokens": 25, "stop_ids": (12,), "tolerance": 0.0, **settings}
    return DecodeConfig(sampler=sampler, **settings)


# --- the same model in another cache ----------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    t=st.integers(1, 6),
    blocks=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), max_size=5),
)
@torch.inference_mode()
def test_logits_equal_the_dynamic_caches(t, blocks):
    """Blocks of tokens, each followed by a rollback; what lies beyond the length is never seen.

    It is overwritten with huge numbers after every rollback: seen, they would be the whole sum.
    """
    prefix = torch.randn(1, t, 16, generator=generator(t))
    dynamic, static = TARGET.session(), StaticLM(TARGET, 40).session()
    assert torch.equal(static.prefill(prefix), dynamic.prefill(prefix))
    for i, (n, drop) in enumerate(blocks):
        tokens = torch.randint(0, 13, (1, n), generator=generator(i))
        torch.testing.assert_close(static.extend(tokens), dynamic.extend(tokens), atol=1e-5, rtol=1e-5)
        for session in (dynamic, static):
            session.crop(session.length - min(drop, n))
        assert static.length == dynamic.length
        for tensor in (*static.cache.keys, *static.cache.values):
            tensor[:, :, static.length :] = 1e6


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), draft_length=st.integers(1, 6), longest=st.integers(1, 30))
def test_speculative_greedy_is_autoregressive(seed, draft_length, longest):
    prefix = torch.randn(1, 5, 16, generator=generator(seed))
    cfg = config(greedy=True, max_tokens=longest, draft_length=draft_length)
    plain = autoregressive(TARGET, prefix, cfg, generator())
    assert autoregressive(STATIC, prefix, cfg, generator()).tokens == plain.tokens
    assert speculative(STATIC, STATIC_DRAFT, prefix, cfg, generator()).tokens == plain.tokens


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), tolerance=st.sampled_from([0.0, 0.4]), draft_length=st.integers(1, 4))
def test_the_same_seed_gives_the_same_tokens(seed, tolerance, draft_length):
    """Logits differ by 1e-6: a draw that close to a border between tokens is in none of these."""
    cfg = config(tolerance=tolerance, draft_length=draft_length)
    dynamic = speculative(TARGET, DRAFT, PREFIX, cfg, generator(seed))
    static = speculative(STATIC, STATIC_DRAFT, PREFIX, cfg, generator(seed))
    assert static.tokens == dynamic.tokens and static.rounds == dynamic.rounds


# --- room ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_before_any_work():
    small = StaticLM(TARGET, 20)
    for models in ((small, DRAFT), (TARGET, StaticLM(DRAFT, 20))):
        with pytest.raises(InputError, match="need 21 positions; the static cache has max_length 20"):
            speculative(*models, PREFIX, config(max_tokens=16), generator(), pytest.fail)
    with pytest.raises(InputError, match="max_length 20"):
        autoregressive(small, PREFIX, config(max_tokens=16), generator(), pytest.fail)
    full = config(greedy=True, max_tokens=15, stop_ids=())
    assert len(speculative(small, StaticLM(DRAFT, 20), PREFIX, full, generator()).tokens) == 15
    session = small.session()
    with pytest.raises(InputError, match="needs 21 positions"):
        session.prefill(torch.zeros(1, 21, 16))
    session.prefill(torch.zeros(1, 17, 16))
    with pytest.raises(InputError, match="needs 21 positions"):
        session.extend(torch.zeros(1, 4, dtype=torch.int64))
    assert session.extend(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 13)
    with pytest.raises(InputError, match="max_length is 0"):
        StaticLM(TARGET, 0)


@torch.inference_mode()
def test_caches_are_used_again_and_clean():
    model = StaticLM(TARGET, 20)
    first, second = model.session(), model.session()
    assert first.cache is not second.cache
    want = first.prefill(PREFIX), first.extend(torch.tensor([[3, 4]]))
    used = first.cache
    for tensor in (*used.keys, *used.values):
        tensor.fill_(math.nan)  # as after weights that are broken
    del first
    again = model.session()
    assert again.cache is used
    assert torch.equal(again.prefill(PREFIX), want[0])
    assert torch.equal(again.extend(torch.tensor([[3, 4]])), want[1])


@pytest.mark.parametrize("draft_length", [1, 2, 3])
def test_a_verification_is_fed_as_long_as_it_is(draft_length, monkeypatch):
    """Padded to 4 positions, as it was once, a verification at L_d 2 has the price of L_d 3."""
    fed, feed = [], StaticSession._feed
    monkeypatch.setattr(StaticSession, "_feed", lambda session, x: fed.append(x.shape[1]) or feed(session, x))
    speculative(StaticLM(TARGET, 40), DRAFT, PREFIX, config(draft_length=draft_length, stop_ids=()), generator())
    assert max(fed[1:]) == draft_length + 1


# --- recorded -----------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """Recording as a CUDA graph does it: what the host knew is frozen, memory is read when it is played.

    A replay runs the block with the host's numbers of its recording, on the caches and the tape as they are
    now, and puts its results where those of the recording were. -> the keys of what was recorded
    """
    made = []

    def capture(block, holders, _=None):
        if not holders:  # a prefill
            output = block()
            return lambda: outputs(output, block()), output
        frozen = [dict(vars(holder)) for holder in holders]
        state = holders[0].kept.generator.get_state()
        output = block()  # CUDA computes nothing here: what this drew is drawn again
        holders[0].kept.generator.set_state(state)
        after = [dict(vars(holder)) for holder in holders]
        objects = list(holders)
        made.append(block)

        def replay():
            now = [dict(vars(each)) for each in objects]
            for each, old in zip(objects, frozen, strict=True):
                vars(each).update(old)
            outputs(output, block())
            for each, old, was in zip(objects, after, now, strict=True):
                for name, value in old.items():
                    fresh = vars(each)[name]
                    if isinstance(value, torch.Tensor) and fresh is not value and value.shape == fresh.shape:
                        value.copy_(fresh)
                vars(each).update(was)

        return replay, output

    def outputs(kept, new):
        for old, fresh in zip(kept, new, strict=True) if isinstance(kept, tuple) else [(kept, new)]:
            if old is not None:
                old.copy_(fresh)

    monkeypatch.setattr(graphs, "capture", capture)
    return made


def one_cache(lm):
    """One cache for all sequences, as where they come one after another; here the recordings hold the sessions."""
    model, cache = StaticLM(lm, 60, record=True), FixedCache(lm, 60)

    def take():
        for tensor in (*cache.layers, cache.at):
            tensor.zero_()
        return cache

    model.take = take
    return model


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("least", [0, 9])
def test_recorded_blocks_say_what_the_loop_says(recorded, verification, least):
    target, draft = one_cache(TARGET), one_cache(DRAFT)
    for seed in range(12):
        prefix = torch.randn(1, 3 + seed % 4, 16, generator=generator(seed))
        cfg = config(max_tokens=20 + seed, min_tokens=least, verification=verification)
        want = speculative(TARGET, DRAFT, prefix, cfg, generator(seed))
        mine = generator(seed)
        found = speculative(target, draft, prefix, cfg, mine)
        assert found.tokens == want.tokens and found.rounds == want.rounds
        assert (found.target_calls, found.draft_calls) == (want.target_calls, want.draft_calls)
        plain, theirs = autoregressive(TARGET, prefix, cfg, generator(seed)), generator(seed)
        assert autoregressive(target, prefix, cfg, theirs).tokens == plain.tokens
        assert torch.rand(1, generator=theirs) != torch.rand(1, generator=generator(seed))  # it went on
    # a draft of 3 after a rejection, one after a full acceptance, their verification, a step of one token
    assert len(recorded) == 4


@pytest.mark.parametrize("kind", [HiddenDraft, BlockDraft])
def test_recorded_blocks_with_a_drafter_on_hidden_states(recorded, kind):
    torch.manual_seed(3)
    lm = SpeechLM(small_qwen2(16, 32, 3, 4, 2, vocab=5, initializer_range=0.3), 13).eval().requires_grad_(False)
    hidden = kind(lm, rank=8).begin_from(lm).eval().requires_grad_(False)
    lm.taps = hidden.taps
    target, drafter = one_cache(lm), hidden.on(one_cache(hidden.lm))
    for seed in range(10):
        prefix = torch.randn(1, 4 + seed % 3, 16, generator=generator(seed))
        cfg = config(max_tokens=18 + seed, draft_length=2 + 5 * (seed % 2))  # 7: a block is of 6
        want = speculative(lm, hidden.on(hidden.lm), prefix, cfg, generator(seed))
        found = speculative(target, drafter, prefix, cfg, generator(seed))
        assert found.tokens == want.tokens and found.rounds == want.rounds
    assert len(recorded) <= 40


def test_a_recorded_target_with_a_draft_that_is_not(recorded):
    target = one_cache(TARGET)
    for seed in range(4):
        want = speculative(TARGET, DRAFT, PREFIX, config(max_tokens=20 + seed), generator(seed))
        assert speculative(target, DRAFT, PREFIX, config(max_tokens=20 + seed), generator(seed)).tokens == want.tokens
    assert recorded


def test_what_cannot_be_recorded_runs_as_it_stands(recorded):
    target, draft = one_cache(TARGET), one_cache(DRAFT)
    cfg = config(confidence=0.5)
    want = speculative(TARGET, DRAFT, PREFIX, cfg, generator(5))
    assert speculative(target, draft, PREFIX, cfg, generator(5)).tokens == want.tokens and not recorded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("drafting", ["paper", "hidden", "block"])
@torch.inference_mode()
def test_cuda_graphs_say_what_eager_says(drafting):
    """Nothing is recorded after the first utterances, and no memory is taken from the driver."""
    torch.manual_seed(4)
    lm = SpeechLM(small_qwen2(64, 128, 6, 2, 1, vocab=5, initializer_range=0.1), 99).eval().requires_grad_(False)
    hidden = (BlockDraft if drafting == "block" else HiddenDraft)(lm).begin_from(lm).eval().requires_grad_(False)
    draft = make_draft(lm, bottom=1, top=1)
    lm.taps = hidden.taps
    for model in (lm, hidden, draft):
        model.cuda()
    plain = draft if drafting == "paper" else hidden.on(hidden.lm)
    target, own = StaticLM(lm, 200), StaticLM(draft if drafting == "paper" else hidden.lm, 200)
    static = own if drafting == "paper" else hidden.on(own)
    counts, taken, cuda = [], [], torch.Generator("cuda")
    for seed in range(12):
        prefix = torch.randn(1, 8 + seed % 4, 64, generator=generator(seed)).cuda()
        cfg = DecodeConfig(sampler=Sampler(), max_tokens=90 + seed, stop_ids=(97,), min_tokens=20, tolerance=0.2)
        want = speculative(lm, plain, prefix, cfg, cuda.manual_seed(seed))
        found = speculative(target, static, prefix, cfg, cuda.manual_seed(seed))
        assert found.tokens == want.tokens and found.rounds == want.rounds
        want = autoregressive(lm, prefix, cfg, cuda.manual_seed(seed))
        assert autoregressive(target, prefix, cfg, cuda.manual_seed(seed)).tokens == want.tokens
        counts.append(len(target._free[0].recordings.blocks))
        taken.append(torch.cuda.memory_reserved())
    assert counts[-1] == counts[5] and taken[-1] == taken[5]


# --- bf16 ---------------------------------------------------------------------------------------


@torch.inference_mode()
def test_bf16_changes_parameters_and_not_the_angles():
    torch.manual_seed(1)
    target = SpeechLM(small_qwen2(64, 128, 4, 2, 1, vocab=5, max_position_embeddings=2048), 13).eval()
    draft = make_draft(target, bottom=1, top=3)
    prefix = torch.randn(1, 900, 64, generator=generator(1))
    tokens = torch.tensor([[3, 1, 4]])
    want = target(torch.cat((prefix, target.speech_embedding(tokens)), 1))[:, -3:]
    assert target.cast("bf16") is target and draft.cast("bf16") is draft
    assert {p.dtype for lm in (target, draft) for p in lm.parameters()} == {torch.bfloat16}
    assert draft.model.layers[1].mlp.up_proj.weight is target.model.layers[1].mlp.up_proj.weight
    assert draft.head.weight is not target.head.weight
    assert target.model.rotary_emb.inv_freq.dtype == draft.model.rotary_emb.inv_freq.dtype == torch.float32
    for model in (target, StaticLM(target, 1000)):
        session = model.session()
        session.prefill(prefix.bfloat16())
        got = session.extend(tokens)
        assert got.dtype == torch.bfloat16
        assert (got - want).abs().max() < 0.05 * want.std()
    law = probabilities(got[0], torch.full((3, 10), -1), Sampler())
    assert law.dtype == torch.float32
    torch.testing.assert_close(law.sum(-1), torch.ones(3))
    result = speculative(model, draft, prefix.bfloat16(), config(), generator())
    assert result.tokens == speculative(model, draft, prefix.bfloat16(), config(), generator()).tokens
    with pytest.raises(InputError, match="precision 'fp16' is unknown: choose fp32 or bf16"):
        target.cast("fp16")


# --- the clock ----------------------------------------------------------------------------------


class FakeEvent:
    """A torch.cuda.Event whose device needs one millisecond from each record to the next."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        assert stream == "the device's stream"
        self.at, self.done = next(self.ticks), False

    def synchronize(self):
        FakeEvent.waits += 1

    def elapsed_time(self, end):
        assert FakeEvent.waits, "read before the device was there"
        return float(end.at - self.at)


def test_cuda_events_time_the_phases_and_wait_once(monkeypatch):
    FakeEvent.waits, FakeEvent.ticks = 0, count()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the device's stream")
    clock = result_module.Clock(torch.device("cuda"))
    for phase in ("prefill", "draft", "verify", "rest", None, "draft", "verify", "rest"):
        clock.lap(phase)
    assert FakeEvent.waits == 0
    assert clock.seconds() == {"prefill": 0.001, "draft": 0.002, "verify": 0.002, "rest": 0.002}
    assert FakeEvent.waits == 1


def test_the_decoder_times_by_events_on_cuda(monkeypatch):
    """The loop as on a CUDA device, timed by fake events: one tick a phase."""
    FakeEvent.waits, FakeEvent.ticks = 0, count()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the device's stream")
    real = result_module.Clock
    monkeypatch.setattr(speculative_module, "Clock", lambda device: real(torch.device("cuda")))
    result = speculative(TARGET, DRAFT, PREFIX, config(), generator(), lambda new: None)
    rounds = len(result.rounds)
    assert result.seconds == pytest.approx(
        {"prefill": 1e-3, "draft": 1e-3 * rounds, "verify": 1e-3 * rounds, "rest": 1e-3 * rounds}
    )
    assert FakeEvent.waits == 1


def test_the_phases_sum_to_the_whole(monkeypatch):
    ticks = count()
    monkeypatch.setattr(result_module.time, "perf_counter", lambda: float(next(ticks)))
    result = speculative(TARGET, DRAFT, PREFIX, config(), generator())
    assert result.lm_seconds == next(ticks) - 1 == 1 + 3 * len(result.rounds)


def test_static_models_keep_the_contract():
    """What drafting.Session asks for, with the same parameters."""

    for name in ("prefill", "extend", "crop"):
        ours, contract = getattr(STATIC.session(), name), getattr(drafters.Session, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(contract).parameters)[1:]
