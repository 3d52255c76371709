import math
from collections import Counter
from itertools import accumulate
from time import perf_counter, sleep

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toys import (
    PREFIX_EMBEDDINGS,
    TableLM,
    exact_law,
    generator,
    law_of_all_branches,
    output_distribution,
    p_value,
    tiny_lm,
)

from ssd_repro.decoding import drafters, sampling
from ssd_repro.decoding import speculative as speculative_module
from ssd_repro.decoding.result import DecodeConfig, NumericsError
from ssd_repro.decoding.sampling import Sampler, probabilities
from ssd_repro.decoding.speculative import Tolerance, autoregressive, speculative
from ssd_repro.errors import InputError
from ssd_repro.models.draft import make_draft

SAMPLERS = {
    "softmax": Sampler(top_k=0, top_p=1.0, ras=False),
    "nucleus": Sampler(temperature=1.3, top_k=2, top_p=0.8, ras=False),
    "ras": Sampler(top_k=2, top_p=0.85, ras_window=3, ras_tau=0.5),
    "cosyvoice": Sampler(),
    "greedy": Sampler(temperature=0),
}
TARGET = TableLM.random(3, seed=1)
DRAFT = TARGET.near(seed=2, scale=1.0)
STOP = 2


def config(sampler="softmax", **settings) -> DecodeConfig:
    settings = {"max_tokens": 5, "stop_ids": (STOP,), "tolerance": 0.0, **settings}
    return DecodeConfig(sampler=SAMPLERS[sampler], **settings)


def sequence(result) -> tuple[int, ...]:
    return result.tokens + (STOP,) * result.stopped


# --- the law of whole sequences at beta = 0 ------------------------------------------------


@pytest.fixture
def quick_sampler(monkeypatch):
    """The real ``probabilities``, each row computed once: 100,000 sequences in half a minute."""
    known = {}

    def remembered(logits, history, sampler, banned=None):
        mask = None if banned is None else tuple(banned.flatten().tolist())
        key = (tuple(logits.flatten().tolist()), tuple(history.flatten().tolist()), sampler, mask)
        if key not in known:
            known[key] = probabilities(logits, history, sampler, banned)
        return known[key]

    monkeypatch.setattr(drafters, "probabilities", remembered)


@pytest.mark.parametrize("draft_length", range(1, 7))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_law_of_whole_sequences(sampler, draft_length, quick_sampler):
    """100,800 sequences of the real loop in 24 cells (6,200 to 2,200), and 100 in each greedy one.

    Against every sequence's exact probability; stop token inside the draft, minimum length
    2, maximum length such that a full draft and a shortened one both occur. Fails when
    chi-square has p < 1e-6: with other seeds than these, falsely in 24 of 10**6 runs.
    """
    cfg = config(sampler, max_tokens=draft_length + 2, min_tokens=2, draft_length=draft_length)
    rng = generator(100 + draft_length)
    seen = Counter(
        sequence(speculative(TARGET, DRAFT, PREFIX_EMBEDDINGS, cfg, rng))
        for _ in range(100 if sampler == "greedy" else 7_000 - 800 * draft_length)
    )
    assert p_value(seen, exact_law(TARGET.table, cfg)) > 1e-6


@pytest.mark.parametrize("draft", [DRAFT, drafters.NGramDrafter], ids=["model", "n-gram"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("draft_length, longest", [(1, 3), (2, 4), (3, 4)])
def test_law_without_chance(draft, sampler, draft_length, longest, monkeypatch, quick_sampler):
    """The same law to six digits: the real loop through every branch that it can take."""
    cfg = config(sampler, max_tokens=longest, min_tokens=2, draft_length=draft_length)
    got = law_of_all_branches(
        lambda: sequence(speculative(TARGET, draft, PREFIX_EMBEDDINGS, cfg, generator())),
        monkeypatch,
    )
    want = exact_law(TARGET.table, cfg)
    for every in want.keys() | got.keys():
        assert got.get(every, 0.0) == pytest.approx(want.get(every, 0.0), abs=2e-6), every


def test_n_grams_follow_the_longest_ending_said_before_and_their_own_drafts():
    tape = drafters.Tape.empty(config(max_tokens=20), torch.zeros(1, 10))
    drafter = drafters.NGramDrafter(PREFIX_EMBEDDINGS, None)
    for said, wanted in (([4], [4, 4, 4]), ([3, 5, 6, 7, 5, 6, 8, 3, 5, 6], [7, 5, 6]), ([1, 2, 9, 1], [2, 9, 1])):
        tape.size = len(said)
        for position, token in enumerate(said):
            tape.write(position, torch.tensor(token))
        drafted, p = drafter.propose(tape, 3, generator())
        assert drafted.tolist() == wanted == tape.tokens(tape.size, tape.size + 3).tolist()
        assert torch.equal(p, torch.eye(10)[wanted])
    assert drafter.calls == 0


@pytest.mark.parametrize("sampler", ["softmax", "cosyvoice"])
def test_law_with_tolerance(sampler, monkeypatch):
    """At beta = 0.4 the first drafted position follows ``output_distribution`` of what p and q really are."""
    cfg = config(sampler, max_tokens=3, draft_length=1, tolerance=0.4, stop_ids=())
    got, want = Counter(), Counter()
    every = law_of_all_branches(
        lambda: sequence(speculative(TARGET, DRAFT, PREFIX_EMBEDDINGS, cfg, generator())),
        monkeypatch,
    )
    monkeypatch.undo()
    for tokens, mass in every.items():
        got[tokens[:2]] += mass
    first = exact_law(TARGET.table, config(sampler, max_tokens=1, stop_ids=()))
    for (x,), mass in first.items():
        history = torch.tensor([-1] * 9 + [x])
        p, q = (probabilities(lm.table[3, x], history, cfg.sampler) for lm in (DRAFT, TARGET))
        for y, chance in enumerate(output_distribution(p, q, Tolerance(0.4)).tolist()):
            want[x, y] = mass * chance
    assert all(got[key] == pytest.approx(want[key], abs=2e-6) for key in want)
    assert sum(want.values()) == pytest.approx(1)


# --- the loop, on random settings ----------------------------------------------------------

TABLES = [TableLM.random(6, seed) for seed in range(4)]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    table=st.integers(0, 3),
    distance=st.sampled_from([0.0, 0.7, 5.0]),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    draft_length=st.integers(1, 8),
    longest=st.integers(1, 25),
    shortest=st.integers(0, 25),
    tolerance=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_loop_keeps_its_books(seed, table, distance, sampler, draft_length, longest, shortest, tolerance):
    """Caches after each round, lengths, stop tokens, streaming, counts; same seed, same result."""
    target, draft = TABLES[table], TABLES[table].near(seed, distance)
    cfg = config(
        sampler,
        max_tokens=longest,
        min_tokens=min(shortest, longest),
        draft_length=draft_length,
        tolerance=tolerance,
    )
    streamed, caches = [], []

    def after_round(new):
        streamed.extend(new)
        caches.append((target.sessions[-1].held(), draft.sessions[-1].held()))

    rng = generator(seed)
    result = speculative(target, draft, PREFIX_EMBEDDINGS, cfg, rng, after_round)
    tokens, rounds = result.tokens, result.rounds
    assert list(tokens) == streamed and STOP not in tokens
    sizes = accumulate(r.emitted for r in rounds)
    for (held, held_by_draft), size in zip(caches, sizes, strict=False):
        assert held == streamed[: size - 1]
        assert held_by_draft == streamed[: len(held_by_draft)]
        assert len(held_by_draft) < size <= len(held_by_draft) + (3 if size == longest else 2)
    assert target.sessions[-1].held() == list(sequence(result)[:-1])
    assert cfg.min_tokens <= len(tokens) <= longest
    assert result.stopped or len(tokens) == longest
    assert sum(r.emitted for r in rounds) == len(sequence(result))
    assert all(0 <= r.accepted <= r.drafted <= draft_length for r in rounds)
    assert result.target_calls == len(rounds)
    assert result.draft_calls == 1 + result.drafted
    assert len(result.origins) == len(tokens)
    assert result.origins.count("accepted") == result.accepted - (rounds[-1].kind == "stopped")
    for r in rounds:
        assert r.emitted == r.accepted + (r.kind != "stopped")
        assert (r.kind == "bonus") == (r.accepted == r.drafted > 0 and r.kind != "stopped")
        assert (r.kind == "resampled") == (r.rejected is not None)
    if distance == 0 or tolerance == 1:
        assert all(r.kind != "resampled" for r in rounds)
    if draft_length == 1 or result.drafted == 0:
        assert (result.acceptance_rate is None) == (result.drafted == 0)
    if sampler == "greedy" and tolerance == 0:
        plain = autoregressive(target, PREFIX_EMBEDDINGS, cfg, generator(1))
        assert plain.tokens == tokens and plain.stopped == result.stopped
    again = speculative(target, draft, PREFIX_EMBEDDINGS, cfg, generator(seed))
    assert again.tokens == tokens and again.rounds == rounds


class Scripted:
    """A drafter that knows the right sequence and is wrong at the given positions."""

    def __init__(self, truth, wrong, vocab):
        self.truth, self.wrong, self.vocab, self.calls = truth, wrong, vocab, 0

    def propose(self, tape, count, rng):
        first = tape.size
        for i in range(first, first + count):
            right = self.truth[i] if i < len(self.truth) else 0
            tape.write(i, torch.tensor((right + (i in self.wrong)) % self.vocab))
        tokens = tape.tokens(first, first + count)
        return tokens, torch.nn.functional.one_hot(tokens, self.vocab).float()

    def rollback(self, size):
        pass


@settings(max_examples=100, deadline=None)
@given(
    table=st.integers(0, 3),
    draft_length=st.integers(1, 6),
    longest=st.integers(2, 20),
    wrong=st.sets(st.integers(1, 20)),
)
@example(table=0, draft_length=3, longest=12, wrong=set())
@example(table=0, draft_length=3, longest=12, wrong={1})
@example(table=0, draft_length=3, longest=12, wrong={2})
@example(table=0, draft_length=3, longest=12, wrong={3})
def test_rejection_at_each_position(table, draft_length, longest, wrong):
    target = TABLES[table]
    cfg = config("greedy", max_tokens=longest, draft_length=draft_length, stop_ids=(STOP,))
    plain = autoregressive(target, PREFIX_EMBEDDINGS, cfg, generator())
    truth = sequence(plain)
    result = speculative(target, lambda prefix, _: Scripted(truth, wrong, 6), PREFIX_EMBEDDINGS, cfg, generator())
    assert result.tokens == plain.tokens and result.stopped == plain.stopped

    position, expected = 1, [(0, 0, "sampled")]
    while position < len(truth):
        count = min(draft_length, longest - position - 1)
        drafted = range(position, position + count)
        n = next((i for i, place in enumerate(drafted) if place in wrong), count)
        left = len(truth) - position
        kind = "resampled" if n < count else "bonus" if count else "sampled"
        if n >= left:  # the stop token was drafted and accepted
            n, kind = left, "stopped"
        expected.append((count, n, kind))
        position += n + 1
    assert [(r.drafted, r.accepted, r.kind) for r in result.rounds] == expected
    resampled = [r for r in result.rounds if r.kind == "resampled"]
    assert all(r.rejected is not None for r in resampled)
    assert result.accepted == sum(n for _, n, _ in expected)


def test_counts_by_hand():
    """A -> B -> C -> A ...; the draft is right but for the 3rd drafted token, then stops."""
    target, truth = TABLES[0], (0, 1, 3, 4, 5, STOP)
    table = torch.full((7, 7, 6), -9.0)
    for before, after in zip((6, *truth), truth, strict=False):
        table[:, before, after] = 9.0
    target = TableLM(table)
    cfg = config("greedy", max_tokens=20, draft_length=3)
    result = speculative(target, lambda prefix, _: Scripted(truth, {3}, 6), PREFIX_EMBEDDINGS, cfg, generator())
    assert result.tokens == (0, 1, 3, 4, 5) and result.stopped
    assert result.origins == ("sampled", "accepted", "accepted", "resampled", "accepted")
    assert [(r.drafted, r.accepted, r.emitted, r.kind, r.rejected) for r in result.rounds] == [
        (0, 0, 1, "sampled", None),
        (3, 2, 3, "resampled", 5),
        (3, 2, 2, "stopped", None),
    ]
    assert (result.drafted, result.accepted, result.acceptance_rate) == (6, 4, 4 / 6)
    assert result.target_calls == 3 and result.tokens_per_target_call == 2


def test_autoregressive_is_rounds_without_a_draft():
    result = autoregressive(TARGET, PREFIX_EMBEDDINGS, config(max_tokens=9, stop_ids=()), generator(1))
    assert len(result.tokens) == result.target_calls == 9 and result.tokens_per_target_call == 1
    assert result.acceptance_rate is None and result.draft_calls == 0 and not result.stopped
    assert set(result.origins) == {"sampled"}
    assert set(result.seconds) == {"prefill", "draft", "verify", "rest"}
    assert result.lm_seconds == sum(result.seconds.values()) > 0


def test_a_stop_token_is_banned_inside_the_draft():
    """A draft that would say nothing but stop proposes none before the minimum length."""
    eager = TableLM(DRAFT.table.clone())
    eager.table[..., STOP] += 50
    proposals = []

    class Watched(speculative_module.ModelDrafter):
        def propose(self, tape, count, rng):
            tokens, p = super().propose(tape, count, rng)
            proposals.extend(enumerate(tokens.tolist(), tape.size))
            return tokens, p

    cfg = config(max_tokens=9, min_tokens=6, draft_length=4)
    for seed in range(20):
        speculative(TARGET, lambda prefix, _: Watched(eager, prefix), PREFIX_EMBEDDINGS, cfg, generator(seed))
    assert {token == STOP for at, token in proposals if at < 6} == {False}
    assert {token == STOP for at, token in proposals if at >= 6} == {True}


def test_time_in_the_callback_is_not_the_models():
    cfg = config(max_tokens=4, stop_ids=())
    began = perf_counter()
    result = autoregressive(TARGET, PREFIX_EMBEDDINGS, cfg, generator(), lambda _: sleep(0.05))
    assert result.lm_seconds < perf_counter() - began - 0.19


# --- real transformers ----------------------------------------------------------------------

LM = tiny_lm(layers=12)
LM_DRAFT = make_draft(LM)
LM_PREFIX = torch.randn(1, 5, 16, generator=generator(9))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    draft_length=st.integers(1, 6),
    longest=st.integers(1, 20),
    greedy=st.booleans(),
    tolerance=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_both_caches_hold_exactly_the_accepted_tokens(seed, draft_length, longest, greedy, tolerance):
    """After each round: next logits by each cache against a fresh uncached forward."""
    opened = {"target": [], "draft": []}

    def recording(lm, name):
        class Recording:
            def session(self):
                opened[name].append(lm.session())
                return opened[name][-1]

        return Recording()

    said, ended = [], []

    @torch.inference_mode()
    def after_round(new):
        said.extend(new)
        for name, lm in (("target", LM), ("draft", LM_DRAFT)):
            (session,) = opened[name]
            held = session.length - LM_PREFIX.shape[1]
            assert session.length == session.cache.get_seq_length()
            ended.append(held == len(said))  # the newest token is then a stop, not heard here
            if ended[-1]:
                continue
            assert len(said) - held == 1 or (name == "draft" and 1 < len(said) - held <= 3)
            missing = torch.tensor([said[held:]])
            whole = torch.cat((LM_PREFIX, lm.speech_embedding(torch.tensor([said]))), 1)
            got = session.extend(missing)[:, -1]
            session.crop(session.length - missing.shape[1])
            torch.testing.assert_close(got, lm(whole)[:, -1], atol=1e-4, rtol=1e-4)

    sampler = Sampler(temperature=0) if greedy else Sampler(ras_window=4)
    cfg = DecodeConfig(
        sampler=sampler,
        max_tokens=longest,
        stop_ids=(12,),
        draft_length=draft_length,
        tolerance=tolerance,
    )
    models = recording(LM, "target"), recording(LM_DRAFT, "draft")
    result = speculative(*models, LM_PREFIX, cfg, generator(seed), after_round)
    assert list(result.tokens) == said
    assert not any(ended[:-2]) and (result.stopped or not any(ended))
    if greedy and tolerance == 0:
        assert result.tokens == autoregressive(LM, LM_PREFIX, cfg, generator()).tokens


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device, on a CPU too.

    ``tolist`` and its like read a CPU tensor without any operator; those are counted as
    functions (``Reads``), all others as operators.
    """

    OPERATORS = {"item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select", "equal"}
    FUNCTIONS = {"tolist", "numpy", "cpu", "__array__"}

    def __init__(self):
        super().__init__()
        self.count = 0
        outer = self

        class Reads(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                outer.count += getattr(function, "__name__", "") in outer.FUNCTIONS
                return function(*args, **(kwargs or {}))

        self.reads = Reads()

    def __enter__(self):
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.reads.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += name in self.OPERATORS or by_mask
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: int(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x[x[0]],
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: list(range(8))[x[0]],
    ],
)
def test_the_counter_of_host_reads_counts(read):
    with torch.inference_mode(), HostReads() as reads:
        x = torch.arange(4) + 1
        assert reads.count == 0
        read(x)
    assert reads.count == 1


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(ras=False), Sampler(temperature=0)])
@pytest.mark.parametrize("method", ["autoregressive", "speculative"])
def test_at_most_one_host_read_a_round(monkeypatch, sampler, method):
    monkeypatch.setattr(sampling, "on_host", lambda _: False)  # as on a GPU
    cfg = DecodeConfig(sampler=sampler, max_tokens=30, min_tokens=8, stop_ids=(12,))
    with HostReads() as reads:
        if method == "speculative":
            result = speculative(LM, LM_DRAFT, LM_PREFIX, cfg, generator(3))
        else:
            result = autoregressive(LM, LM_PREFIX, cfg, generator(3))
    assert len(result.rounds) > 2
    assert reads.count <= len(result.rounds)


def test_a_read_more_is_noticed(monkeypatch):
    monkeypatch.setattr(sampling, "on_host", lambda _: False)
    plain = drafters.Tape.probabilities

    def curious(tape, logits, first):
        return plain(tape, logits, first + int(logits.isnan().any()))

    monkeypatch.setattr(drafters.Tape, "probabilities", curious)
    with HostReads() as reads:
        result = speculative(LM, LM_DRAFT, LM_PREFIX, config(max_tokens=9), generator(3))
    assert reads.count > len(result.rounds)


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["target", "draft"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nan_is_an_error(who, sampler):
    broken = TableLM(TARGET.table.clone())
    broken.table[:3, :, 1] = math.nan  # from the second token on
    models = (broken, DRAFT) if who == "target" else (TARGET, broken)
    heard = []
    with pytest.raises(NumericsError, match="NaN") as caught:
        speculative(*models, PREFIX_EMBEDDINGS, config(sampler, stop_ids=(), max_tokens=30), generator(), heard.extend)
    assert isinstance(caught.value, InputError) and 1 <= len(heard) <= 5


@pytest.mark.parametrize(
    "bad, name",
    [
        ({"draft_length": 0}, "draft_length"),
        ({"draft_length": 65}, "draft_length"),
        ({"draft_length": 2.5}, "draft_length"),
        ({"draft_length": True}, "draft_length"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"tolerance": 1.01}, "tolerance"),
        ({"tolerance": "0.4"}, "tolerance"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6}, "min_tokens"),
        ({"stop_ids": [2]}, "stop_ids"),
        ({"stop_ids": (-1,)}, "stop_ids"),
        ({"sampler": None}, "sampler"),
    ],
)
def test_bad_settings_say_so(bad, name):
    settings = {"max_tokens": 5, "stop_ids": (2,), "sampler": Sampler(), **bad}
    with pytest.raises(InputError, match=name):
        DecodeConfig(**settings)


def test_a_stop_token_outside_the_vocabulary():
    with pytest.raises(InputError, match="stop_ids has 3"):
        autoregressive(TARGET, PREFIX_EMBEDDINGS, config(stop_ids=(3,)), generator())
