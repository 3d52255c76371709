import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import generator, p_value

from ssd_repro.decoding import sampling
from ssd_repro.decoding.sampling import Sampler, draw, probabilities
from ssd_repro.errors import InputError

PLAIN = Sampler(top_k=0, top_p=1.0, ras=False)


def cosyvoice_law(logits, history, sampler):
    """The law of CosyVoice's ras_sampling(), followed literally, one token at a time, in float64."""
    full = (torch.tensor(logits, dtype=torch.float64) / sampler.temperature).softmax(0).tolist()
    nucleus, mass = {}, 0.0
    for token in sorted(range(len(full)), key=lambda x: -full[x]):
        if mass < sampler.top_p and len(nucleus) < (sampler.top_k or len(full)):
            mass += full[token]
            nucleus[token] = full[token]
        else:
            break
    law = [0.0] * len(full)
    for y, chance in nucleus.items():
        chance /= mass
        count = history[-sampler.ras_window :].count(y)
        if sampler.ras and count >= sampler.ras_window * sampler.ras_tau - 1e-9:
            others = {x: f for x, f in enumerate(full) if x != y}
            for x, f in others.items():
                law[x] += chance * f / math.fsum(others.values())
        else:
            law[y] += chance
    return law


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(2, 30),
    scale=st.sampled_from([0.3, 2.0, 6.0]),
    filled=st.integers(0, 12),
    sampler=st.builds(
        Sampler,
        temperature=st.sampled_from([0.5, 1.0, 1.7]),
        top_k=st.sampled_from([0, 1, 3, 25]),
        top_p=st.sampled_from([0.3, 0.81, 1.0]),
        ras=st.booleans(),
        ras_window=st.sampled_from([1, 4, 10]),
        ras_tau=st.sampled_from([0.1, 0.3, 1.0]),
    ),
)
def test_law_is_cosyvoices(seed, vocab, scale, filled, sampler):
    rng = generator(seed)
    logits = scale * torch.randn(3, vocab, generator=rng)
    history = torch.randint(0, min(vocab, 4), (3, 12), generator=rng)
    history[:, : 12 - filled] = -1
    got = probabilities(logits, history, sampler)
    want = [cosyvoice_law(*row, sampler) for row in zip(logits.tolist(), history.tolist(), strict=True)]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(want), atol=2e-5, rtol=2e-4)


def test_padding_is_not_token_zero():
    logits = torch.tensor([2.0, 1.0, 0.0])
    free = probabilities(logits, torch.full((10,), -1), Sampler(top_p=1.0))
    torch.testing.assert_close(free, logits.softmax(0))
    seen = probabilities(logits, torch.tensor([-1] * 9 + [0]), Sampler(top_p=1.0))
    assert seen[0] < free[0]


def test_a_certain_token_is_redrawn_while_anything_else_is_left():
    """f(y) rounds to 1 in float32, but CosyVoice would leave the repetition: so do we."""
    history = torch.tensor([-1] * 9 + [1])
    law = probabilities(torch.tensor([0.0, 50.0, 1.0]), history, Sampler())
    torch.testing.assert_close(law, torch.tensor([1, 0, math.e]) / (1 + math.e))
    # Two tokens repeat, one of them certain: nothing may be lost by cancellation.
    history = torch.tensor([-1] * 8 + [1, 2])
    law = probabilities(torch.tensor([0.0, 20.0, 1.0]), history, Sampler())
    torch.testing.assert_close(law, torch.tensor([1, 0, math.e]) / (1 + math.e))


def test_a_certain_token_stays_when_nothing_else_is_left():
    history = torch.tensor([-1] * 9 + [1])
    law = probabilities(torch.tensor([-math.inf, 3.0, -math.inf]), history, Sampler())
    assert law.tolist() == [0, 1, 0]


@pytest.mark.parametrize("sampler", [Sampler(), PLAIN, Sampler(temperature=0)])
def test_banned_tokens_never_come(sampler):
    banned = torch.tensor([[False, True, False], [False, False, False]])
    logits, history = torch.tensor([[0.0, 9.0, 1.0]] * 2), torch.full((2, 10), 2)
    law = probabilities(logits, history, sampler, banned)
    assert law[0, 1] == 0 and law[1, 1] > 0.5
    torch.testing.assert_close(law.sum(-1), torch.ones(2))


def test_greedy_is_the_most_likely_token():
    law = probabilities(torch.tensor([0.0, 2.0, 1.0]), torch.full((10,), 1), Sampler(temperature=0))
    assert law.tolist() == [0, 1, 0]


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(ras=False), PLAIN, Sampler(temperature=0)])
@pytest.mark.parametrize("bad", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
def test_broken_logits_stay_broken(sampler, bad):
    law = probabilities(torch.tensor(bad), torch.full((10,), 1), sampler)
    assert law.sum().isnan()
    assert 0 <= draw(law, generator()) < 3  # an index all the same: the loop looks at NaN later


def test_draw_follows_the_law():
    """20,000 draws from 7 tokens; chi-square p > 1e-6, so it fails falsely once in 10**6 seeds."""
    probs = torch.tensor([0.0, 0.3, 0.05, 0.0, 0.4, 0.25, 0.0])
    counts = draw(probs.expand(200, 100, 7), generator(3)).flatten().bincount(minlength=7)
    assert counts[probs == 0].sum() == 0
    law = dict(enumerate(probs.tolist()))
    assert p_value(dict(enumerate(counts.tolist())), law) > 1e-6
    again = draw(probs.expand(200, 100, 7), generator(3)).flatten().bincount(minlength=7)
    assert again.tolist() == counts.tolist()


@pytest.mark.parametrize("uniform, want", [(0.0, 1), (1 - 2**-53, 2)])
def test_draw_at_the_ends_of_the_unit_interval(uniform, want, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, uniform, dtype=torch.float64))
    assert draw(torch.tensor([0.0, 0.5, 0.5, 0.0]), generator()) == want


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"ras": 1}, "ras"),
        ({"ras_window": 0}, "ras_window"),
        ({"ras_window": 2.5}, "ras_window"),
        ({"ras_tau": 0}, "ras_tau"),
        ({"ras_tau": math.inf}, "ras_tau"),
    ],
)
def test_bad_settings_say_so(settings, name):
    with pytest.raises(InputError, match=name) as caught:
        Sampler(**settings)
    assert repr(*settings.values()) in str(caught.value)


@pytest.mark.parametrize("masks_repeat", [True, False])
def test_what_a_cpu_leaves_out_where_nothing_repeats_changes_nothing(monkeypatch, masks_repeat):
    sampler, rng = Sampler(ras_tau=0.2, ras_masks_repeat=masks_repeat), torch.Generator().manual_seed(0)
    logits, history = 2 * torch.randn(60, 1, 40, generator=rng), torch.randint(-1, 20, (60, 1, 10), generator=rng)
    short = [probabilities(*pair, sampler) for pair in zip(logits, history, strict=True)]
    monkeypatch.setattr(sampling, "on_host", lambda _: False)
    whole = [probabilities(*pair, sampler) for pair in zip(logits, history, strict=True)]
    torch.testing.assert_close(torch.stack(short), torch.stack(whole), atol=1e-7, rtol=1e-6)
    assert 10 < sum(int((p > 0).sum() <= 25) for p in whole) < 50  # both cases are among them
