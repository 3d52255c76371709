"""Sessions of transformers' causal models, and the law that their processors make."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import EOS, FAMILIES, SLIDING, tiny, uncached
from toys import generator
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import logits_process as hf

from ssd_repro.errors import InputError
from ssd_repro.models import causal
from ssd_repro.models.causal import CausalSession, GenerationLaw, check_cache, new_cache
from ssd_repro.models.draft import make_draft, own_parameters, split_of

MODELS = {family: tiny(family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(
    t=st.integers(1, 7),
    blocks=st.lists(
        st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 5)), min_size=1, max_size=5
    ),
    static=st.booleans(),
)
@torch.inference_mode()
def test_cached_logits_equal_uncached(family, t, blocks, static):
    """Runs of forwards, each run followed by a rollback of some tokens: windows of 4 and 5 are passed and come back."""
    model, rng = MODELS[family], generator(t)
    static = static and family not in SLIDING
    cache = StaticCache(config=model.config, max_cache_len=70) if static else new_cache(model)
    check_cache(cache, "the")
    session, kept = CausalSession(model, cache, (1, 3)), torch.randint(0, 11, (1, t), generator=rng)
    torch.testing.assert_close(session.prefill(kept), uncached(model, kept)[:, -1], atol=1e-4, rtol=1e-4)
    for run, drop in blocks:
        whole = kept
        for n in run:
            whole = torch.cat((whole, torch.randint(0, 11, (1, n), generator=rng)), 1)
            got = session.extend(whole[:, -n:])
            torch.testing.assert_close(got, uncached(model, whole)[:, -n:], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(session.features, features(model, whole)[:, -n:], atol=1e-4, rtol=1e-4)
        kept = whole[:, : max(kept.shape[1], whole.shape[1] - drop)]
        session.crop(kept.shape[1])
        assert session.length == kept.shape[1] == int(session.cache.get_seq_length())


def features(model, ids):
    """After the first layer, and what the head reads: (1, T, 2 x hidden)."""
    read = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0]))
    states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    return torch.cat((states[1], read[0]), -1)


@torch.inference_mode()
def test_without_recording_a_window_that_was_passed_cannot_be_put_back():
    """What the adapter prevents: transformers refuses the crop, which a cache without windows would do silently."""
    model, cache = MODELS["mistral"], new_cache(MODELS["mistral"])
    model(torch.arange(8)[None], past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


@pytest.mark.parametrize(
    "cache, name",
    [
        (lambda: StaticCache(config=MODELS["mistral"].config, max_cache_len=20), "StaticSlidingWindowLayer"),
        (lambda: DynamicCache(config=MODELS["llama"].config, offloading=True), "DynamicCache"),
    ],
)
def test_caches_that_cannot_be_rolled_back_say_so(cache, name, monkeypatch):
    monkeypatch.setattr(torch, "Stream", lambda: None)  # an offloaded cache asks for one
    with pytest.raises(InputError, match=name):
        check_cache(cache(), "the model's")


# --- the law ---------------------------------------------------------------------------------

PROMPT = torch.tensor([3, 4, 5, 4])
PROCESSORS = {
    "none": [],
    "warpers": [hf.TemperatureLogitsWarper(1.3), hf.TopKLogitsWarper(5), hf.TopPLogitsWarper(0.8)],
    "min_p": [hf.MinPLogitsWarper(0.2), hf.LogitNormalization()],
    "penalty": [hf.RepetitionPenaltyLogitsProcessor(1.5), hf.TopKLogitsWarper(4)],
    "lengths": [
        hf.MinNewTokensLengthLogitsProcessor(4, 2, torch.tensor([EOS])),
        hf.ForcedEOSTokenLogitsProcessor(8, EOS),
    ],
    "n-grams": [hf.NoRepeatNGramLogitsProcessor(2), hf.NoBadWordsLogitsProcessor([[4, 6]], torch.tensor([EOS]))],
    "decay": [
        hf.ExponentialDecayLengthPenalty((1, 1.5), torch.tensor([EOS]), 4),
        hf.SuppressTokensAtBeginLogitsProcessor([7], 4),
        hf.SequenceBiasLogitsProcessor([[[5, 3], 2.0]]),
    ],
}


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", PROCESSORS)
def test_law_of_a_block_is_the_processors_one_by_one(name, greedy):
    processors, tokens = LogitsProcessorList(PROCESSORS[name]), torch.tensor([4, 6, 5])
    logits = 2 * torch.randn(3, 11, generator=generator(1))
    before = logits.clone()
    got = GenerationLaw(list(processors), PROMPT, greedy)(logits, tokens)  # after 1, 2 and 3 of the tokens
    for i in range(3):
        past = torch.cat((PROMPT, tokens[: i + 1]))[None]
        scores = processors(past, before[i : i + 1].clone())[0]
        want = torch.nn.functional.one_hot(scores.argmax(), 11).float() if greedy else scores.softmax(-1)
        torch.testing.assert_close(got[i], want)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("greedy", [False, True])
def test_law_keeps_nan_and_takes_the_first_of_equals(greedy):
    law = GenerationLaw([], PROMPT, greedy)
    assert law(torch.tensor([[0.0, torch.nan, 1.0]]), PROMPT).isnan().any()
    assert law(torch.full((1, 3), -torch.inf), PROMPT).isnan().any()
    if greedy:
        assert law(torch.tensor([[0.0, 2.0, 2.0]], dtype=torch.bfloat16), PROMPT).tolist() == [[0, 1, 0]]


class Own(hf.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + 1


def test_unknown_processors_are_refused_by_name():
    for one in (Own(), hf.WatermarkLogitsProcessor(11, "cpu"), type("Sub", (hf.TopKLogitsWarper,), {})(3)):
        with pytest.raises(InputError, match=type(one).__name__):
            GenerationLaw([one], PROMPT, False)
    Own.stateless = True
    try:
        GenerationLaw([Own()], PROMPT, False)(torch.zeros(1, 3), PROMPT)
    finally:
        del Own.stateless


def test_rows_of_a_batch_have_their_own_padding():
    penalty = hf.RepetitionPenaltyLogitsProcessor(2.0, torch.tensor([0, 2]))
    ids, logits = torch.tensor([[0, 0, 4], [0, 0, 4]]), torch.ones(2, 6)
    want = penalty(ids, logits).softmax(-1)
    for row in range(2):
        law = causal.law_of_row([penalty], row, ids[row], False)
        torch.testing.assert_close(law(logits[:1], ids[0, :0])[0], want[row])


# --- the draft -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_make_draft_of_any_family(family, tied, tmp_path):
    target = tiny(family, layers=6, tie_word_embeddings=tied)
    before = {name: p.clone() for name, p in target.named_parameters()}
    draft = make_draft(target, bottom=2, top=2)
    theirs = {id(p) for p in target.parameters()}
    shared = {name for name, p in draft.named_parameters() if id(p) in theirs}
    mine = dict(draft.named_parameters()).keys() - shared
    places = {name.split("layers.")[1][0] for name in mine if "layers." in name}
    assert places == {"0", "1"} and own_parameters(draft).keys() == mine
    assert len(draft.get_output_embeddings().weight) == 11 and not draft.config.tie_word_embeddings
    assert {name for name in mine if "layers." not in name} <= {"lm_head.weight", "lm_head.bias", "embed_out.weight"}
    assert split_of(draft) == {"bottom": 2, "top": 2} and target.config.num_hidden_layers == 6
    with torch.no_grad():
        for p in own_parameters(draft).values():
            p.add_(0.01)
    assert all(torch.equal(p, before[name]) for name, p in target.named_parameters())

    draft.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(list(draft.parameters()))  # each tensor once
    read, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation=target.config._attn_implementation
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.randint(2, 11, (2, 9), generator=generator(1))
    torch.testing.assert_close(uncached(read, ids), uncached(draft, ids), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_of_every_layer_is_the_target(family):
    target = tiny(family, layers=4)
    draft, ids = make_draft(target, bottom=1, top=3), torch.arange(9)[None]
    assert torch.equal(uncached(draft, ids), uncached(target, ids))
    session, whole = CausalSession(draft, new_cache(draft)), uncached(draft, ids)
    with torch.inference_mode():
        session.prefill(ids[:, :4])
        torch.testing.assert_close(session.extend(ids[:, 4:]), whole[:, 4:], atol=1e-4, rtol=1e-4)


def test_no_draft_of_what_is_not_one_stack():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    with pytest.raises(InputError, match="T5ForConditionalGeneration is not one stack"):
        make_draft(t5)
    with pytest.raises(InputError, match="2 bottom"):
        make_draft(tiny("llama"), bottom=2, top=6)
