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
from ssd_repro.models.draft import make_draft
from ssd_repro.models.families import small_qwen2
from ssd_repro.models.runtimes.graphs import StaticLM
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
    fed, step = [], StaticLM._step
    monkeypatch.setattr(StaticLM, "_step", lambda model, n: fed.append(n) or step(model, n))
    speculative(StaticLM(TARGET, 40), DRAFT, PREFIX, config(draft_length=draft_length, stop_ids=()), generator())
    assert max(fed) == draft_length + 1


# --- compiled -----------------------------------------------------------------------------------


def test_one_compilation_for_each_number_of_tokens(monkeypatch):
    """torch.compile without its C++: how often it traces, in one graph without a break.

    As with CUDA graphs, what a compiled forward returned is worth nothing after the next one,
    and the caches are inputs whose addresses stay.
    """
    graphs, asked, outputs, fixed, real = [], [], [], [], torch.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def without_inductor(function, *, mode, fullgraph, dynamic, isolate_recompiles):
        asked.append((mode, fullgraph, dynamic, isolate_recompiles))
        compiled = real(function, backend=backend, fullgraph=True, dynamic=False, isolate_recompiles=True)

        def replay(*inputs):
            for old in outputs:
                old.fill_(math.nan)
            outputs[:] = [compiled(*inputs)]
            return outputs[0]

        return replay

    monkeypatch.setattr(torch._dynamo, "mark_static_address", fixed.append)
    monkeypatch.setattr(torch, "compile", without_inductor)
    models = [StaticLM(lm, 40, compile=True) for lm in (TARGET, DRAFT)]
    for seed in range(2):
        cfg = config(stop_ids=(), max_tokens=20 + seed)
        kept = [speculative(*models, PREFIX, cfg, generator(seed))]
        kept.append(autoregressive(models[0], PREFIX, cfg, generator(seed)))
        assert kept[0].tokens == speculative(TARGET, DRAFT, PREFIX, cfg, generator(seed)).tokens
        assert kept[1].tokens == autoregressive(TARGET, PREFIX, cfg, generator(seed)).tokens
        held = models[0].session()  # open: the next request gets another cache
        held.prefill(PREFIX)
        logits = held.extend(torch.tensor([[1]]))
        held.extend(torch.tensor([[2]]))
        assert logits.isfinite().all()  # kept over the next forward
    counts = sum(model.step.cache_info().currsize for model in models)
    assert 4 <= counts <= 8 and len(graphs) == counts
    assert len(fixed) == sum(len(lm.model.layers) * 2 for lm in (TARGET, TARGET, DRAFT))
    assert set(asked) == {("reduce-overhead", True, False, True)}


def test_compiled_by_inductor():
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("torch.compile needs a C++ compiler on the CPU and none is found")
    torch.manual_seed(0)
    lm = SpeechLM(small_qwen2(16, 32, 1, 4, 2, vocab=5, initializer_range=0.3), 13).eval()
    model = StaticLM(lm, 16, compile=True)
    dynamic, static = lm.session(), model.session()
    with torch.inference_mode():
        assert torch.equal(static.prefill(PREFIX), dynamic.prefill(PREFIX))
        for tokens in ([3, 4], [6, 7]):
            got, want = (session.extend(torch.tensor([tokens])) for session in (static, dynamic))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            for session in (dynamic, static):
                session.crop(session.length - 1)


def test_an_old_torch_says_so(monkeypatch):
    def compile(model=None, *, fullgraph=False, dynamic=None, mode=None): ...

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(InputError, match="isolate_recompiles"):
        StaticLM(TARGET, 20, compile=True)


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
