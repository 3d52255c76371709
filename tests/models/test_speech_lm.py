import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import generator, tiny_lm
from transformers import DynamicCache

from ssd_repro.errors import InputError
from ssd_repro.models.draft import draft_layers, make_draft

LM = tiny_lm()


def uncached(lm, prefix, tokens):
    """Logits after the prefix and after each token, (1, 1 + n, V), without a cache."""
    whole = torch.cat((prefix, lm.speech_embedding(torch.tensor([tokens], dtype=torch.int64))), 1)
    return lm(whole)[:, prefix.shape[1] - 1 :]


def a_prefix(length, seed=0, width=16):
    return torch.randn(1, length, width, generator=generator(seed))


@settings(max_examples=40, deadline=None)
@given(t=st.integers(1, 6), blocks=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), max_size=6))
@torch.inference_mode()
def test_cached_logits_equal_uncached(t, blocks):
    """Blocks of tokens, each followed by a rollback of some of them."""
    prefix, session, kept = a_prefix(t), LM.session(), []
    torch.testing.assert_close(session.prefill(prefix), uncached(LM, prefix, [])[:, -1], atol=1e-4, rtol=1e-4)
    for i, (n, drop) in enumerate(blocks):
        block = torch.randint(0, 13, (n,), generator=generator(i)).tolist()
        got = session.extend(torch.tensor([block]))
        want = uncached(LM, prefix, kept + block)[:, -n:]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        kept += block[: max(0, n - drop)]
        session.crop(t + len(kept))
        assert session.length == session.cache.get_seq_length() == t + len(kept)


@torch.inference_mode()
def test_the_cache_is_cropped_only_to_shorten_it(monkeypatch):
    """In transformers 5.0.0 crop(0) empties the cache, from 5.20 on it does nothing: it must never come."""
    asked, crop = [], DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda cache, length: asked.append(length) or crop(cache, length))
    session = LM.session()
    session.prefill(a_prefix(3))
    session.crop(3)
    session.extend(torch.tensor([[4, 7]]))
    for length in (5, 4, 4):
        session.crop(length)
    assert asked == [-1] and session.cache.get_seq_length() == 4


@torch.inference_mode()
def test_one_model_serves_several_sequences():
    first, second = LM.session(), LM.session()
    first.prefill(a_prefix(3))
    second.prefill(a_prefix(5, seed=1))
    tokens = torch.tensor([[4, 7]])
    got = first.extend(tokens)
    second.extend(torch.tensor([[1]]))
    torch.testing.assert_close(got, uncached(LM, a_prefix(3), [4, 7])[:, 1:], atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError):
        first.prefill(a_prefix(3))
    with pytest.raises(ValueError):
        first.crop(6)


@pytest.mark.parametrize(
    "layers, asked, want",
    [
        (12, {}, (3, 1)),
        (24, {}, (2, 6)),
        (16, {}, (4, 1)),
        (6, {}, (1, 1)),
        (2, {}, (1, 1)),
        (12, {"depth": 4}, (3, 1)),
        (12, {"depth": 1}, (1, 0)),
        (24, {"depth": 8}, (2, 6)),
        (12, {"depth": 6, "bottom": 3}, (3, 3)),
        (12, {"bottom": 2, "top": 0}, (2, 0)),
    ],
)
def test_draft_layers(layers, asked, want):
    assert draft_layers(layers, **asked) == want


@pytest.mark.parametrize("asked", [{"bottom": 0}, {"top": 12}, {"depth": 13}, {"depth": 4, "bottom": 1, "top": 1}])
def test_drafts_that_do_not_fit_say_so(asked):
    with pytest.raises(InputError, match="12 layers"):
        draft_layers(12, **asked)


def test_make_draft_shares_what_the_paper_shares():
    target = tiny_lm(layers=12)
    target.head.bias.data.fill_(0.3)
    before = {name: p.clone() for name, p in target.named_parameters()}
    draft = make_draft(target)
    layers = draft.model.layers
    assert len(layers) == 4 and [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    for place, source in enumerate([0, 1, 2, 11]):
        ours = dict(layers[place].named_parameters())
        for name, theirs in target.model.layers[source].named_parameters():
            assert (ours[name] is theirs) == (place > 2) and torch.equal(ours[name], theirs)
    assert draft.speech_embedding.weight is target.speech_embedding.weight
    assert draft.model.embed_tokens.weight is target.model.embed_tokens.weight
    assert draft.model.norm.weight is target.model.norm.weight
    assert draft.head.weight is not target.head.weight
    trained = {
        name.split(".")[0] if "head" in name else name[: len("model.layers.0")]
        for name, p in draft.named_parameters()
        if p.requires_grad
    }
    assert trained == {"head", "model.layers.0", "model.layers.1", "model.layers.2"}

    optimiser = torch.optim.SGD([p for p in draft.parameters() if p.requires_grad], lr=0.1)
    draft(torch.randn(2, 5, 16)).square().sum().backward()
    optimiser.step()
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, before[name]), f"training the draft moved the target's {name}"
    assert not torch.equal(draft.head.weight, target.head.weight)


@torch.inference_mode()
def test_a_draft_has_its_own_cache_places():
    draft = make_draft(tiny_lm(layers=12))
    session, prefix = draft.session(), a_prefix(4)
    session.prefill(prefix)
    assert len(session.cache.layers) == 4
    got = session.extend(torch.tensor([[3, 1, 4]]))
    torch.testing.assert_close(got, uncached(draft, prefix, [3, 1, 4])[:, 1:], atol=1e-4, rtol=1e-4)


def test_a_draft_of_every_layer_is_the_target():
    target = tiny_lm(layers=4)
    draft = make_draft(target, bottom=1, top=3)
    x = torch.randn(1, 6, 16)
    torch.testing.assert_close(draft(x), target(x))
    assert draft.model.layers[0].self_attn.q_proj.weight is not target.model.layers[0].self_attn.q_proj.weight
