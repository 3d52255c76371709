import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import generator, output_distribution, p_value, total_variation

from ssd_repro.decoding.sampling import draw
from ssd_repro.decoding.speculative import Tolerance, accept_probability, residual, verify

P = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.8, 0.0], [0.0, 0.4, 0.3, 0.3]])
Q = torch.tensor([[0.2, 0.6, 0.2, 0.0], [0.4, 0.1, 0.2, 0.3], [0.1, 0.4, 0.0, 0.5], [0, 0, 0.5, 0.5]])


def test_accept_probability_is_equation_5():
    tokens = torch.tensor([0, 2, 3])
    torch.testing.assert_close(accept_probability(P, Q[:3], tokens, 0.0), torch.tensor([0.4, 0.25, 1]))
    torch.testing.assert_close(accept_probability(P, Q[:3], tokens, 0.4), torch.tensor([0.8, 0.65, 1]))
    never = accept_probability(P, Q[:3], torch.tensor([3, 3, 0]), 0.0)  # p(x) = 0
    assert never.tolist() == [0, 1, 1]


def test_residual_is_equation_6_and_guarded():
    want = torch.tensor([[0, 1, 0, 0], [0.5, 0, 0, 0.5], [1 / 3, 0, 0, 2 / 3]])
    torch.testing.assert_close(residual(P, Q[:3]), want)
    torch.testing.assert_close(residual(Q, Q), Q)


def random_distribution(seed, vocab=5, rows=1):
    logits = 2 * torch.randn(rows, vocab, generator=generator(seed))
    law = logits.softmax(-1) * (logits > -1)  # some tokens have no mass, as in a nucleus
    return law / law.sum(-1, keepdim=True) if (law.sum(-1) > 0).all() else logits.softmax(-1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), beta=st.sampled_from([0.0, 0.1, 0.4, 1.0]))
def test_output_distribution(seed, beta):
    p, q = random_distribution(seed)[0], random_distribution(seed + 1)[0]
    law = output_distribution(p, q, Tolerance(beta))
    torch.testing.assert_close(law.sum(), torch.tensor(1.0))
    if beta == 0:
        torch.testing.assert_close(law, q)
    if beta == 1:
        torch.testing.assert_close(law, p)
    accepted = sum(p[x] * accept_probability(p, q, torch.tensor(x), beta) for x in range(5))
    # What acceptance gains over sum min(p, q) is paid for in distance (paper/field.md).
    assert total_variation(law, q) >= accepted - torch.minimum(p, q).sum() - 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_verify_follows_its_closed_form(beta):
    """10,000 rounds of 3: the law of the first token is output_distribution, the count and bonus as due.

    chi-square, p > 1e-6 for each of 3: fails falsely 3 times in 10**6 seeds.
    """
    rng, rounds = generator(5), 10_000
    firsts, counts, bonus = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    drafts = draw(P.expand(rounds, 3, 4), rng)
    for tokens in drafts:
        n, added = verify(P, Q, tokens, Tolerance(beta), rng)
        assert n.dtype == added.dtype == torch.int64 and n.shape == added.shape == ()
        firsts[tokens[0] if n > 0 else added] += 1
        counts[n] += 1
        bonus[added] += n == 3
    rates = [
        (P[i] * accept_probability(P[i].expand(4, 4), Q[i].expand(4, 4), torch.arange(4), beta)).sum() for i in range(3)
    ]
    kept = torch.cat((torch.ones(1), torch.stack(rates).cumprod(0)))  # P(n >= i)
    expected = kept - torch.cat((kept[1:], torch.zeros(1)))
    law = output_distribution(P[0], Q[0], Tolerance(beta))
    for seen, due in ((firsts, law), (counts, expected), (bonus, Q[3])):
        assert seen[due < 1e-6].sum() == 0
        assert p_value(dict(enumerate(seen.tolist())), dict(enumerate(due.tolist()))) > 1e-6


def test_verify_without_a_draft_is_a_plain_step():
    n, added = verify(P[:0], Q[3:], torch.zeros(0, dtype=torch.int64), Tolerance(0.4), generator())
    assert n == 0 and added in (2, 3)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_verify_ends_at_the_first_rejection(place):
    """Sure tokens before, an impossible one at ``place``, sure ones after."""
    tokens = torch.arange(3)
    p = torch.eye(5)[tokens]
    q = torch.eye(5)[torch.tensor([0, 1, 2, 4])]
    if place < 3:
        q[place] = torch.eye(5)[3]
    n, added = verify(p, q, tokens, Tolerance(0.0), generator())
    assert n == place and added == (3 if place < 3 else 4)


def test_other_rules_fit_the_same_contract():
    class Never(Tolerance):
        def accept(self, p, q, tokens):
            return torch.zeros(tokens.shape)

        def residual(self, p, q):
            return q

    n, _ = verify(P, Q, torch.tensor([0, 1, 2]), Never(0.0), generator())
    assert n == 0
    torch.testing.assert_close(output_distribution(P[0], Q[0], Never(0.0)), Q[0])
