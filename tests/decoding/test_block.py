"""Block verification and adaptive drafts: exact by enumeration and through the whole loop, and worth their while."""

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import PREFIX_EMBEDDINGS, TableLM, ends_jointly, exact_law, generator, law_of_all_branches, p_value, tiny_lm

from ssd_repro.decoding import speculative as speculative_module
from ssd_repro.decoding.result import DecodeConfig
from ssd_repro.decoding.sampling import Sampler
from ssd_repro.decoding.speculative import (
    Tolerance,
    joint_acceptance,
    residual,
    speculative,
    verify,
    verify_block,
)
from ssd_repro.errors import InputError

SOFTMAX = Sampler(top_k=0, top_p=1.0, ras=False)
SAMPLERS = {"softmax": SOFTMAX, "ras": Sampler(top_k=2, top_p=0.85, ras_window=3, ras_tau=0.5)}
TARGET = TableLM.random(3, seed=1)
DRAFT = TARGET.near(seed=2, scale=1.0)
STOP = 2


class Trees:
    """Random p and q after every history of up to ``depth`` tokens, some tokens without mass; float64."""

    def __init__(self, seed, vocab, depth, scale):
        rng = generator(seed)
        self.p, self.q, self.vocab = {}, {}, vocab
        for n in range(depth + 1):
            for past in product(range(vocab), repeat=n):
                logits = torch.randn(2, vocab, generator=rng, dtype=torch.float64) * torch.tensor([[scale], [1.5]])
                logits[0] += logits[1]  # the draft is like the target, scale apart
                logits[torch.rand(2, vocab, generator=rng) < 0.15] = -torch.inf
                logits[:, n % vocab] = logits[:, n % vocab].clamp_min(-1)
                self.p[past], self.q[past] = logits.softmax(-1)

    def draft(self, tokens):
        """p (L, V) and q (L + 1, V) of a drafted block."""
        pasts = [tokens[:n] for n in range(len(tokens) + 1)]
        return torch.stack([self.p[x] for x in pasts[:-1]]), torch.stack([self.q[x] for x in pasts])

    def target(self, tokens):
        mass = 1.0
        for n, x in enumerate(tokens):
            mass *= float(self.q[tokens[:n]][x])
        return mass


def blocks(trees, length, confidence):
    """(block, probability that it is what is drafted), by the rule of ``Stepwise``."""
    alive = [((), 1.0)]
    while alive:
        past, trust = alive.pop()  # the trust is the probability itself: the product of p(x)
        if past and (len(past) == length or trust < confidence):
            yield past, trust
            continue
        alive += [((*past, x), trust * float(c)) for x, c in enumerate(trees.p[past]) if c > 0]


def enumerated(trees, length, confidence, block):
    """Law of the next length + 1 tokens (the target goes on after a round), and the expected accepted tokens."""
    law, accepted = Counter(), 0.0
    for tokens, mass in blocks(trees, length, confidence):
        p, q = trees.draft(tokens)
        x, size = torch.tensor(tokens), len(tokens)
        if block:
            joint, chance = joint_acceptance(p, q, x)
            ends = ends_jointly(chance)
        else:
            joint, kept = torch.ones(size + 1), Tolerance(0.0).accept(p, q[:-1], x)
            ends = torch.cat((torch.ones(1), kept)).cumprod(0) * (1 - torch.cat((kept, torch.zeros(1))))
        assert float(ends.sum()) == pytest.approx(1) and float(ends.min()) >= -1e-12
        accepted += mass * float(ends @ torch.arange(size + 1.0, dtype=ends.dtype))
        after = residual(torch.cat((p, torch.zeros_like(p[:1]))), joint[:, None] * q)
        for n, added in product(range(size + 1), range(trees.vocab)):
            chance = mass * float(ends[n] * after[n, added])
            if chance:
                said = (*tokens[:n], added)
                for rest in product(range(trees.vocab), repeat=length - n):
                    whole = (*said, *rest)
                    law[whole] += chance * trees.target(whole) / max(trees.target(said), 1e-300)
    return law, accepted


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([(2, 1), (3, 2), (4, 2), (3, 3), (2, 4)]),
    scale=st.sampled_from([0.0, 0.5, 2.0]),
    confidence=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_the_next_tokens_follow_the_target_and_more_are_accepted(seed, size, scale, confidence):
    """Every draft, every outcome, their exact probabilities."""
    vocab, length = size
    trees = Trees(seed, vocab, length, scale)
    means = []
    for block in (False, True):
        law, accepted = enumerated(trees, length, confidence, block)
        for whole in product(range(vocab), repeat=length + 1):
            assert law[whole] == pytest.approx(trees.target(whole), abs=1e-6), (whole, block)
        means.append(accepted)
    assert means[1] >= means[0] - 1e-6
    if length == 1:
        assert means[1] == pytest.approx(means[0], abs=1e-6)


def test_a_joint_verdict_accepts_strictly_more_and_a_wrong_one_is_noticed():
    """Also: the mistake of vllm-ascend #7807, acceptance by the joint ratio alone with the residual of one token."""
    trees = Trees(3, 3, 3, 1.0)
    law, accepted = enumerated(trees, 3, 0.0, block=True)
    assert accepted > enumerated(trees, 3, 0.0, block=False)[1] + 0.02
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "joint_acceptance", lambda p, q, x: (b := joint_acceptance_of(p, q, x), b[1:]))
        wrong, _ = enumerated(trees, 3, 0.0, block=True)
    assert max(abs(wrong[whole] - law[whole]) for whole in law) > 0.01


def joint_acceptance_of(p, q, tokens):
    return torch.cat((torch.ones(1), (q[:-1] / p).gather(-1, tokens[:, None])[:, 0].cumprod(0).clamp_max(1)))


def test_joint_acceptance_by_hand():
    """p always (1/2, 1/2); q (3/4, 1/4), then (1/4, 3/4), then anything: drafted 0, 0."""
    p, q = torch.full((2, 2), 0.5), torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])
    joint, chance = joint_acceptance(p, q, torch.tensor([0, 0]))
    assert joint.tolist() == [1, 1, 0.5] and chance.tolist() == [1, 0.5]
    joint, chance = joint_acceptance(p, q, torch.tensor([1, 1]))
    # b_1 = 1/2: S = max(0, 3/8 - 1/2) + max(0, 1/8 - 1/2) = 0; b_2 = min(1, 1/2 * 3/2)
    assert joint.tolist() == [1, 0.5, 0.75] and chance.tolist() == [0, 0.75]


def test_a_sampled_verdict_follows_its_closed_form():
    """2,000 rounds of one draft: accepted counts and the token after them.

    chi-square, p > 1e-6 for each of 5: fails falsely 5 times in 10**6 seeds.
    """
    trees, rng, tokens = Trees(7, 4, 3, 0.7), generator(5), (1, 0, 1)
    p, q = (x.float() for x in trees.draft(tokens))
    x = torch.tensor(tokens)
    joint, chance = joint_acceptance(p, q, x)
    ends = ends_jointly(chance)
    counts, after = torch.zeros(4), torch.zeros(4, 4)
    for _ in range(2000):
        n, added = verify_block(p, q, x, rng)
        assert n.dtype == added.dtype == torch.int64 and n.shape == added.shape == ()
        counts[n] += 1
        after[n, added] += 1
    laws = residual(torch.cat((p, torch.zeros_like(p[:1]))), joint[:, None] * q)
    for seen, due in ((counts, ends), *zip(after, laws, strict=True)):
        assert seen[due < 1e-6].sum() == 0
        assert not seen.sum() or p_value(dict(enumerate(seen.tolist())), dict(enumerate(due.tolist()))) > 1e-6


@pytest.mark.parametrize("length", [0, 1])
def test_of_one_token_or_none_it_is_the_usual_verdict(length):
    trees = Trees(1, 4, 1, 0.5)
    p, q = (x.float() for x in trees.draft((2,)))
    for seed in range(20):
        given_ = (p[:length], q[: length + 1], torch.tensor([2])[:length])
        jointly = verify_block(*given_, generator(seed))
        assert jointly == verify(*given_, Tolerance(0.0), generator(seed))


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_sure_tokens_stand_up_to_an_impossible_one(place):
    tokens = torch.arange(3)
    p, q = torch.eye(5)[tokens], torch.eye(5)[torch.tensor([0, 1, 2, 4])]
    if place < 3:
        q[place] = torch.eye(5)[3]
    n, added = verify_block(p, q, tokens, generator())
    assert n == place and added == (3 if place < 3 else 4)


# --- the whole loop ------------------------------------------------------------------------


def config(sampler="softmax", **fields) -> DecodeConfig:
    return DecodeConfig(sampler=SAMPLERS[sampler], **{"stop_ids": (STOP,), "tolerance": 0.0, "min_tokens": 2, **fields})


def sequence(result) -> tuple[int, ...]:
    return result.tokens + (STOP,) * result.stopped


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("how", [("block", 0.0), ("token", 0.5), ("block", 0.5)])
def test_law_without_chance(sampler, how, monkeypatch):
    """The law of whole sequences to six digits: the real loop, L_d 2, through every branch that it can take."""
    cfg = config(sampler, max_tokens=4, draft_length=2, verification=how[0], confidence=how[1])
    lengths = set()

    def run():
        result = speculative(TARGET, DRAFT, PREFIX_EMBEDDINGS, cfg, generator())
        lengths.update(r.drafted for r in result.rounds)
        return sequence(result)

    got, want = law_of_all_branches(run, monkeypatch), exact_law(TARGET.table, cfg)
    assert lengths == {0, 1, 2}
    for every in want.keys() | got.keys():
        assert got.get(every, 0.0) == pytest.approx(want.get(every, 0.0), abs=2e-6), every


@pytest.mark.parametrize("confidence", [0.0, 0.3])
def test_law_of_whole_sequences(confidence):
    """1,000 sequences of the real loop against every sequence's exact probability, L_d 3, verified jointly.

    Fails when chi-square has p < 1e-6: with other seeds than these, falsely in 2 of 10**6 runs.
    """
    cfg = config(max_tokens=5, draft_length=3, verification="block", confidence=confidence)
    rng = generator(11)
    seen = Counter(sequence(speculative(TARGET, DRAFT, PREFIX_EMBEDDINGS, cfg, rng)) for _ in range(1000))
    assert p_value(seen, exact_law(TARGET.table, cfg)) > 1e-6


@pytest.mark.parametrize("verification", ["token", "block"])
def test_a_draft_ends_where_it_trusts_itself_no_more(verification, monkeypatch):
    """At each round: all but the last drafted token kept the product of p(x) up, the last one did not or is L_d's."""
    target = TableLM.random(6, 3)
    cfg = config(max_tokens=80, stop_ids=(), draft_length=5, confidence=0.3, verification=verification)
    products = []

    class Watched(speculative_module.ModelDrafter):
        def propose(self, tape, count, rng):
            tokens, p = super().propose(tape, count, rng)
            assert 1 <= len(tokens) == len(p) <= count
            products.append((p.gather(-1, tokens[:, None])[:, 0].cumprod(0).tolist(), count))
            return tokens, p

    draft = target.near(1, 0.5)
    result = speculative(target, lambda prefix, _: Watched(draft, prefix), PREFIX_EMBEDDINGS, cfg, generator(2))
    assert len(result.tokens) == 80
    for trust, count in products:
        assert all(each >= 0.3 for each in trust[:-1]) and (trust[-1] < 0.3 or len(trust) == count)
    drafted = [r.drafted for r in result.rounds[1:]]
    assert len(set(drafted)) > 2 and result.draft_calls == 1 + sum(drafted)
    assert all(r.accepted <= r.drafted and r.kind != "stopped" for r in result.rounds)


def test_without_confidence_and_jointly_it_is_still_one_host_read_a_round(monkeypatch):
    from test_loop import HostReads

    monkeypatch.setattr("ssd_repro.decoding.sampling.on_host", lambda _: False)  # as on a GPU
    lm, prefix = tiny_lm(), torch.randn(1, 5, 16, generator=generator(9))
    cfg = DecodeConfig(max_tokens=30, min_tokens=8, stop_ids=(12,), tolerance=0.0, verification="block")
    with HostReads() as reads:
        result = speculative(lm, lm, prefix, cfg, generator(3))
    assert len(result.rounds) > 2 and result.accepted == result.drafted  # its own draft
    assert reads.count <= len(result.rounds)


def test_nan_is_an_error_jointly_too():
    broken = TableLM(TARGET.table.clone())
    broken.table[:3, :, 1] = float("nan")  # from the second token on
    for models in ((broken, DRAFT), (TARGET, broken)):
        for confidence in (0.0, 0.5):
            cfg = config(max_tokens=30, stop_ids=(), verification="block", confidence=confidence)
            with pytest.raises(InputError, match="NaN"):
                speculative(*models, PREFIX_EMBEDDINGS, cfg, generator())


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"verification": "joint"}, "verification is 'joint'; it must be token or block"),
        ({"verification": None}, "verification is None"),
        ({"verification": "block", "tolerance": 0.4}, "tolerance is 0.4; with block verification"),
        ({"verification": "block", "tolerance": 0, "rule": Tolerance(0)}, "block verification has a rule of its own"),
        ({"confidence": -0.1}, "confidence is -0.1"),
        ({"confidence": 1.1}, "confidence is 1.1"),
        ({"confidence": "0.4"}, "confidence is '0.4'"),
    ],
)
def test_bad_settings_say_so(bad, says):
    with pytest.raises(InputError, match=says):
        config(max_tokens=5, **bad)


def test_adaptive_drafts_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(speculative_module, "on_host", lambda _: False)
    with pytest.raises(InputError, match="confidence is 0.5 and the device"):
        speculative(TARGET, DRAFT, PREFIX_EMBEDDINGS, config(max_tokens=5, confidence=0.5), generator())
