"""The rules by their closed forms, against the bound, and against what ``verify`` says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import PREFIX_EMBEDDINGS, TableLM, generator, output_distribution, p_value

from ssd_repro.decoding import rules
from ssd_repro.decoding.result import DecodeConfig
from ssd_repro.decoding.rules import emitted, overlap, total_variation
from ssd_repro.decoding.sampling import draw
from ssd_repro.decoding.speculative import speculative, verify
from ssd_repro.errors import InputError

VOCAB = 7
EMBEDDING = torch.randn(VOCAB, 2, generator=generator(3))
PLAIN = ("paper:0", "paper:0.4", "paper:1", "ensemble:0.3", "ensemble:1", "top-k:2", "typical:0.2", "groups:0.3")
NAMES = PLAIN + ("groups:0.8", "matched paper:0.4", "matched top-k:2", "matched typical:0.2", "matched groups:0.3")
ON_THE_BOUND = [name for name in NAMES if "paper" in name or "ensemble" in name] + ["fly:0.5"]


def rule_of(name):
    return rules.named(name, EMBEDDING)


def pair(seed, rows=6):
    """p and q (rows, V), with holes as a nucleus has, some of them alike and some with nothing in common."""
    rng = generator(seed)
    laws = torch.rand(2, rows, VOCAB, generator=rng).double() ** 3 * (torch.rand(2, rows, VOCAB, generator=rng) < 0.7)
    laws[:, 0] = torch.eye(VOCAB)[[0, 1]]  # apart
    laws[1, 1] = laws[0, 1]  # the same
    laws[laws.sum(-1) == 0] = 1
    return (laws / laws.sum(-1, keepdim=True)).unbind()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from((*NAMES, "fly:0.5")))
def test_the_bound_holds_and_some_rules_meet_it(seed, name):
    p, q = pair(seed)
    if "groups" in name:
        p, q = p.float(), q.float()
    acceptance, law = emitted(rule_of(name), p, q)
    assert (law >= 0).all() and ((acceptance >= 0) & (acceptance <= 1)).all()
    ones = torch.ones_like(acceptance)
    torch.testing.assert_close(law.sum(-1), ones, atol=1e-5, rtol=0)
    excess = total_variation(law, q) - (acceptance - overlap(p, q))
    assert (excess > -1e-5).all()
    if name in ON_THE_BOUND:
        torch.testing.assert_close(excess, torch.zeros_like(excess), atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(NAMES))
def test_the_closed_form_is_that_of_accept_and_residual(seed, name):
    p, q = (law.float() for law in pair(seed))
    rule = rule_of(name)
    acceptance, law = emitted(rule, p, q)
    for i in range(len(p)):
        torch.testing.assert_close(law[i], output_distribution(p[i], q[i], rule), atol=1e-6, rtol=1e-5)
    nothing = torch.zeros_like(p)  # past the draft
    torch.testing.assert_close(rule.residual(nothing, q), q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["paper:0", "ensemble:1"])
def test_lossless_rules_leave_the_target_as_it_is(name):
    p, q = pair(1)
    acceptance, law = emitted(rule_of(name), p, q)
    torch.testing.assert_close(law, q, atol=1e-9, rtol=0)
    torch.testing.assert_close(acceptance, overlap(p, q))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(PLAIN))
def test_the_matched_residual_pays_what_its_acceptance_needs_and_never_more(seed, name):
    """TV = A - sum min(p a, q) with it; the paper's own residual is the matched one."""
    p, q = (law.float() for law in pair(seed))
    plain, matched = rule_of(name), rule_of(f"matched {name}")
    (before, law), (acceptance, better) = emitted(plain, p, q), emitted(matched, p, q)
    torch.testing.assert_close(acceptance, before)
    due = acceptance - torch.minimum(p * plain.kept(p, q), q).sum(-1)
    torch.testing.assert_close(total_variation(better, q), due, atol=1e-5, rtol=0)
    assert (total_variation(law, q) >= due - 1e-5).all()
    if name.startswith("paper"):
        torch.testing.assert_close(better, law, atol=1e-5, rtol=0)


def test_by_hand_the_papers_rule_and_membership_with_both_residuals():
    p, q = torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([[0.3, 0.3, 0.4]])
    # beta .2 keeps .5 + .2 and .75 + .2: .42 + .38; the rest, .2, is the third token's, which is owed .4
    acceptance, law = emitted(rule_of("paper:0.2"), p, q)
    torch.testing.assert_close(law, torch.tensor([[0.42, 0.38, 0.2]]))
    assert acceptance == pytest.approx(0.8) and total_variation(law, q) == pytest.approx(0.8 - 0.6)
    # the best of the target alone is the third, which the draft never says
    assert emitted(rule_of("top-k:1"), p, q)[0] == 0
    p = torch.tensor([[0.6, 0.0, 0.4]])
    plain, matched = (emitted(rule_of(name), p, q)[1] for name in ("top-k:1", "matched top-k:1"))
    torch.testing.assert_close(plain, 0.6 * q + torch.tensor([[0.0, 0.0, 0.4]]))
    torch.testing.assert_close(matched, q)  # it owed .3 and .3, and had .6 left


def test_ensemble_says_the_mixture():
    p, q = pair(5)
    _, law = emitted(rule_of("ensemble:0.3"), p, q)
    torch.testing.assert_close(law, 0.3 * q + 0.7 * p)


def test_top_k_and_typical_by_hand():
    p, q = torch.full((1, 4), 0.25), torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    assert rules.TopK(2).kept(p, q).tolist() == [[1, 1, 0, 0]]
    assert rules.TopK(9).kept(p, q).tolist() == [[1, 1, 1, 0]]  # never what the target cannot say
    # H = 1.03 nats: exp(-H) = .357, times the root of .49: .25; of .04 the root gives .071, and .04 is less
    assert rules.Typical(0.49).kept(p, q).tolist() == [[1, 1, 0, 0]]
    assert rules.Typical(0.04).kept(p, q).tolist() == [[1, 1, 1, 0]]


def test_groups_by_hand():
    """Tokens 0 and 1 point one way, 2 another: two groups of {0, 1}, one of {2}."""
    embedding = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])
    groups = rules.named("groups:0.9", embedding)
    assert groups.counts.tolist() == [2, 2, 1]
    p, q = torch.tensor([[0.8, 0.0, 0.2]]), torch.tensor([[0.1, 0.3, 0.6]])
    torch.testing.assert_close(groups.kept(p, q), torch.tensor([[0.5, 0.5, 1.0]]))  # .4 of the target over .8
    torch.testing.assert_close(groups.residual(p, q), torch.tensor([[0.0, 0.0, 1.0]]))
    same = rules.named("groups:1", EMBEDDING)  # everyone alone: lossless
    p, q = (law.float() for law in pair(2))
    torch.testing.assert_close(emitted(same, p, q)[1], q)


def test_groups_are_those_of_every_pair():
    embedding = torch.randn(700, 3, generator=generator())  # more than one block of rows
    unit = torch.nn.functional.normalize(embedding, dim=-1)
    due = (unit @ unit.T > 0.7).fill_diagonal_(True).float()
    groups = rules.named("groups:0.7", embedding)
    torch.testing.assert_close(groups.members.to_dense(), due)
    torch.testing.assert_close(groups.counts, due.sum(0))


@pytest.mark.parametrize("name", ["matched typical:0.2", "ensemble:0.3", "top-k:2", "groups:0.3"])
def test_verify_follows_the_closed_form(name):
    """2,000 rounds; chi-square, p > 1e-6: fails falsely once in 10**6 seeds."""
    rng, rule = generator(7), rule_of(name)
    p, q = (law.float()[2:4] for law in pair(11))
    seen = torch.zeros(VOCAB)
    for token in draw(p[:1].expand(2000, 1, VOCAB), rng):
        n, added = verify(p[:1], q, token, rule, rng)
        seen[token[0] if n > 0 else added] += 1
    _, law = emitted(rule, p[0], q[0])
    assert seen[law < 1e-6].sum() == 0
    due = {i: mass for i, mass in enumerate(law.tolist()) if mass >= 1e-6}
    assert p_value({i: c for i, c in enumerate(seen.tolist()) if c}, due) > 1e-6


def flys_law(p, q, rule):
    """Of a draft of two with rejections forgiven by a window of two: the exact law of its first two tokens.

    Branch by branch: p, q (3, V) whatever stands before them. The second is the next round's (None) where none stands.
    """
    law, unsure = {}, bool(torch.special.entr(q[0]).sum() >= rule.entropy)
    a = [(q[i] / p[i]).clamp_max(1.0) for i in range(2)]
    rest = [rule.residual(p[i : i + 1], q[i : i + 1])[0] for i in range(2)]

    def add(first, second, mass):
        law[first, second] = law.get((first, second), 0.0) + float(mass)

    for x in p[0].nonzero()[:, 0].tolist():
        stands = p[0, x] * a[0][x]
        for y in p[1].nonzero()[:, 0].tolist():
            add(x, y, stands * p[1, y] * a[1][y])
            if unsure:
                add(x, y, p[0, x] * (1 - a[0][x]) * p[1, y] * a[1][y])
        for y in range(VOCAB):
            add(x, y, stands * (1 - (p[1] * a[1]).nansum()) * rest[1][y])
        out = p[0, x] * (1 - a[0][x]) * (1 - (p[1] * a[1]).nansum() if unsure else 1)
        for z in range(VOCAB):
            add(z, None, out * rest[0][z])
    return law


@pytest.mark.parametrize("entropy", [0.0, 20.0])
def test_fly_is_its_law_branch_by_branch_and_on_the_bound(entropy):
    """2,000 rounds of ``verify``; chi-square, p > 1e-6. Unsure everywhere, and nowhere: then it is lossless."""
    rng, rule = generator(7), rules.FLy(entropy)
    p, q = (torch.softmax(torch.randn(3, VOCAB, generator=generator(seed)), -1) for seed in (4, 9))
    law, seen = flys_law(p, q, rule), {}
    for tokens in zip(draw(p[:1].expand(2000, 1, VOCAB), rng), draw(p[1:2].expand(2000, 1, VOCAB), rng), strict=True):
        drafted = torch.cat(tokens)
        n, added = verify(p[:2], q, drafted, rule, rng)
        said = [*drafted[:n].tolist(), int(added), None][:2] if n else [int(added), None]
        seen[tuple(said)] = seen.get(tuple(said), 0) + 1
    assert p_value(seen, {pair: mass for pair, mass in law.items() if mass}) > 1e-6
    first = torch.zeros(VOCAB)
    for (x, _), mass in law.items():
        first[x] += mass
    acceptance, emits = emitted(rule, p[:2], q[:2])  # q of the second place is the same whatever the first is
    torch.testing.assert_close(emits[0], first, atol=1e-6, rtol=0)
    assert total_variation(first, q[0]) == pytest.approx(float(acceptance[0] - overlap(p, q)[0]), abs=1e-6)
    assert (total_variation(first, q[0]) > 0.05) == (entropy == 0.0)


def test_after_a_forgiven_token_comes_what_both_models_like():
    p, q = (torch.softmax(torch.randn(3, VOCAB, generator=generator(seed)), -1) for seed in (4, 9))
    forgiven = flys_law(p, q, rules.FLy(0.0)), flys_law(p, q, rules.FLy(20.0))
    x = int((p[0] - q[0]).argmax())
    more = torch.tensor([forgiven[0][x, y] - forgiven[1][x, y] for y in range(VOCAB)])
    both = torch.minimum(p[1], q[1])
    torch.testing.assert_close(more / more.sum(), both / both.sum(), atol=1e-5, rtol=0)


def test_fly_forgives_by_hand():
    q = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    sure, unsure = rules.FLy(0.7), rules.FLy(0.6, window=3)  # H is .693 or 0
    kept = torch.tensor([False, False, True, False, True])
    assert rules.FLy(0.6).forgive(kept, q).tolist() == [False, False, True, True, True]  # the second place is sure
    assert rules.FLy(0.0).forgive(kept, q).tolist() == [False, True, True, True, True]  # the first is not alone
    assert sure.forgive(kept, q).tolist() == kept.tolist()
    kept = torch.tensor([[False, True, True, False, True], [True, True, False, True, True]])
    due = [[True, True, True, False, True], [True, True, True, True, True]]
    assert unsure.forgive(kept, q.expand(2, 5, 2)).tolist() == due
    last = torch.tensor([True, True, True, True, False])
    assert rules.FLy(0.0).forgive(last, q).tolist() == last.tolist()  # nothing follows within the draft


def test_the_loop_takes_a_rule():
    target = TableLM.random(5, seed=1)
    draft = target.near(seed=2, scale=1.5)
    lengths = {"max_tokens": 40, "stop_ids": (), "tolerance": 0.4}

    def tokens(**settings):
        return speculative(target, draft, PREFIX_EMBEDDINGS, DecodeConfig(**lengths | settings), generator()).tokens

    assert tokens(rule=rules.Paper(0.4)) == tokens() != tokens(rule=rules.Paper(0.0))
    assert tokens(rule=rules.Paper(0.0)) == tokens(tolerance=0.0)
    assert tokens(rule=rules.Ensemble(0.0), draft_length=1) != tokens(draft_length=1)
    assert tokens(rule=rules.FLy(20.0)) == tokens(tolerance=0.0) != tokens(rule=rules.FLy(0.0))
    with pytest.raises(InputError, match="window of the rule fly is 1; it must be a whole number from 2"):
        rules.FLy(0.0, window=1)
    with pytest.raises(InputError, match="rule is 'paper'; it must have the methods accept and residual"):
        tokens(rule="paper")


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("nobody:1", "rule 'nobody:1' is unknown: choose KIND:NUMBER with one of paper, ensemble"),
        ("matched nobody:1", "rule 'nobody:1' is unknown"),
        ("paper", "rule 'paper' needs a number behind its kind"),
        ("top-k:2.5", "rule 'top-k:2.5' needs a number"),
        ("top-k:0", "k of the rule top-k is 0; it must be a whole number from 1"),
        ("paper:2", r"beta of the rule paper is 2.0; it must be a number from 0.0 to 1.0"),
        ("typical:nan", "epsilon of the rule typical is nan"),
        ("matched fly:1", "fly's own residual is the matched one, choose fly:1"),
        ("fly:-1", "h of the rule fly is -1.0; it must be a number from 0.0"),
    ],
)
def test_names_that_are_none_are_one_sentence(text, about):
    with pytest.raises(InputError, match=about):
        rule_of(text)
