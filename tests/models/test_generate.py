"""``generate(custom_generate=speculative_generate)`` against transformers' own, as its GenerationTesterMixin does."""

import gc
import itertools

import pytest
import torch
from tiny_models import EOS, FAMILIES, PAD, tiny
from toys import generator, law_of_all_branches, p_value
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TopKLogitsWarper,
)

from ssd_repro import speculative_generate
from ssd_repro.decoding.sampling import draw
from ssd_repro.decoding.speculative import accept_probability, residual
from ssd_repro.errors import InputError
from ssd_repro.models.causal import CausalLM, CausalSession, GenerationLaw, new_cache
from ssd_repro.models.draft import make_draft
from ssd_repro.models.hidden_draft import HiddenDraft
from ssd_repro.models.runtimes import openvino


def hidden_of(model) -> HiddenDraft:
    """A hidden-state drafter as it begins: it agrees with its target now and then."""
    torch.manual_seed(0)
    return HiddenDraft(CausalLM(model), rank=8).begin_from(CausalLM(model)).eval()


MODELS = {family: tiny(family) for family in FAMILIES}
DRAFTS = {family: tiny(family, layers=2) for family in FAMILIES}
LLAMA, DRAFT = MODELS["llama"], DRAFTS["llama"]
HIDDEN = hidden_of(LLAMA)
GPT2 = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=64))
IDS = torch.randint(2, 11, (3, 6), generator=generator(4))
MASK, MASK_12 = torch.ones_like(IDS), torch.ones(1, 12, dtype=torch.int64)
MASK[1, :2] = MASK[2, :5] = 0
IDS[MASK == 0] = PAD


def speculate(model, draft, tolerance=0.0, draft_length=3, **asked):
    return model.generate(
        custom_generate=speculative_generate,
        assistant_model=draft,
        tolerance=tolerance,
        draft_length=draft_length,
        **asked,
    )


# --- greedy: the tokens of generate -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generates_greedy(family, dtype):
    """A left-padded batch of 3; windows of 4 and 5 are passed; whatever the tolerance. As in bf16, on these seeds."""
    model, draft = tiny(family, dtype=dtype), tiny(family, layers=2, dtype=dtype)
    asked = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 14, "do_sample": False}
    got = speculate(model, draft, tolerance=0.4, **asked)
    assert got.dtype == IDS.dtype and torch.equal(got, model.generate(**asked))
    again = speculate(model, model, **asked, return_dict_in_generate=True)  # every drafted token is right
    assert torch.equal(again.sequences, got) and again.acceptance_rate == pytest.approx(1, abs=0.15)
    hidden = speculate(model, hidden_of(model), tolerance=0.4, draft_length=2, **asked, return_dict_in_generate=True)
    assert torch.equal(hidden.sequences, got) and sum(result.draft_calls for result in hidden.results) > 3


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_a_hidden_drafter_begins_from_a_prompt_of_one_token(family, length):
    asked = {"input_ids": IDS[:1, :length], "max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    assert torch.equal(speculate(MODELS[family], hidden_of(MODELS[family]), **asked), MODELS[family].generate(**asked))


@pytest.mark.parametrize("longest", range(1, 9))
@pytest.mark.parametrize("draft", [LLAMA, DRAFT, HIDDEN], ids=["itself", "another", "hidden"])
def test_max_length_inside_the_draft(longest, draft):
    asked = {"input_ids": IDS[:1], "max_new_tokens": longest, "do_sample": False, "eos_token_id": None}
    for draft_length in (1, 3, 9):
        got = speculate(LLAMA, draft, draft_length=draft_length, **asked)
        assert torch.equal(got, LLAMA.generate(**asked)) and got.shape == (1, 6 + longest)


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("more", [[], [8, 9]], ids=["one", "several"])
def test_eos_inside_the_draft(place, more):
    """Each place of a greedy sequence as the end in turn: which one of several ends it stands in the result."""
    asked = {"input_ids": IDS[:1], "max_new_tokens": 9, "do_sample": False}
    whole = LLAMA.generate(**asked, eos_token_id=None)
    asked["eos_token_id"] = [int(whole[0, 6 + place]), *more]
    got = speculate(LLAMA, LLAMA, draft_length=4, **asked, return_dict_in_generate=True)
    assert torch.equal(got.sequences, LLAMA.generate(**asked))
    assert got.results[0].stopped and got.results[0].stop == got.sequences[0, -1]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 8},
        {"min_length": 12},
        {"max_length": 13, "max_new_tokens": None},
        {"bad_words_ids": [[3], [4, 5]], "suppress_tokens": [6]},
        {"forced_eos_token_id": 7, "begin_suppress_tokens": [2]},
        {"exponential_decay_length_penalty": (2, 1.3)},
        {"sequence_bias": [[[3, 4], 5.0]], "renormalize_logits": True},
        {"generation_config": GenerationConfig(max_new_tokens=5, eos_token_id=[1, 3], pad_token_id=9)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_mean_what_they_mean_to_transformers(settings):
    asked = {"input_ids": IDS, "attention_mask": MASK, **settings}
    if "generation_config" not in settings:
        asked = {"max_new_tokens": 12, "do_sample": False, **asked}
    assert torch.equal(speculate(LLAMA, DRAFT, **asked), LLAMA.generate(**asked))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("hidden", [False, True], ids=["paper's", "hidden"])
def test_inputs_embeds(family, with_ids, hidden):
    """Embeddings alone, and with the ids that they are of; left-padded; the draft of equal embeddings."""
    model = MODELS[family]
    asked = {"inputs_embeds": model.get_input_embeddings()(IDS).detach(), "attention_mask": MASK}
    asked |= {"max_new_tokens": 8, "do_sample": False} | ({"input_ids": IDS} if with_ids else {})
    got = speculate(model, hidden_of(model) if hidden else DRAFTS[family], **asked)
    assert torch.equal(got, model.generate(**asked)) and got.shape[1] <= 8 + 6 * with_ids


def test_static_cache():
    asked = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 9, "do_sample": False}
    want = LLAMA.generate(**asked)
    for draft in (DRAFT, HIDDEN):
        assert torch.equal(speculate(LLAMA, draft, **asked, cache_implementation="static"), want)
    cache = StaticCache(config=LLAMA.config, max_cache_len=14)  # 6 + 9 - 1: the last token is never fed
    asked = {"input_ids": IDS[:1], "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    for _ in range(2):
        got = speculate(LLAMA, DRAFT, **asked, past_key_values=cache, return_dict_in_generate=True)
        assert got.past_key_values is cache and int(cache.get_seq_length()) == 14
        cache.reset()  # in place, outside of inference mode
        assert torch.equal(LLAMA.generate(**asked, past_key_values=cache), got.sequences)
        cache.reset()


def test_return_dict_has_the_books():
    got = speculate(
        LLAMA, DRAFT, 0.4, input_ids=IDS, attention_mask=MASK, do_sample=True, max_new_tokens=12,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert len(got.results) == 3 and got.past_key_values is None
    drafted, accepted = sum(r.drafted for r in got.results), sum(r.accepted for r in got.results)
    assert got.acceptance_rate == accepted / drafted
    for row, result in zip(got.sequences[:, 6:].tolist(), got.results, strict=True):
        said = [*result.tokens, *([result.stop] if result.stopped else [])]
        assert row == said + [PAD] * (len(row) - len(said)) and result.target_calls == len(result.rounds)
    one = speculate(LLAMA, DRAFT, input_ids=IDS[:1], max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(one.past_key_values, DynamicCache)
    assert one.past_key_values.get_seq_length() == one.sequences.shape[1] - 1


class Streamer:
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, tokens):
        self.got.append(tokens.flatten().tolist())

    def end(self):
        self.ended += 1


def test_streamer_gets_the_prompt_and_every_round():
    streamer = Streamer()
    torch.manual_seed(3)
    got = speculate(
        LLAMA, DRAFT, 0.4, input_ids=IDS[:1], streamer=streamer, do_sample=True, max_new_tokens=40,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert streamer.got[0] == IDS[0].tolist() and streamer.ended == 1
    assert sum(streamer.got, []) == got.sequences[0].tolist()
    assert got.results[0].stopped and max(map(len, streamer.got[1:])) > 1


def test_the_global_seed_decides():
    asked = {"input_ids": IDS, "attention_mask": MASK, "do_sample": True, "max_new_tokens": 12, "eos_token_id": None}
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(speculate(LLAMA, DRAFT, 0.4, **asked))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    torch.manual_seed(1)
    alone = speculate(LLAMA, DRAFT, 0.4, input_ids=IDS[:1], do_sample=True, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(alone, made[0][:1])  # a row of a batch is decoded as if it were alone


# --- the law of what is sampled -----------------------------------------------------------------

VOCAB = 4
SMALL = {family: (tiny(family, vocab=VOCAB), tiny(family, vocab=VOCAB, layers=2, seed=1)) for family in FAMILIES}
SAMPLING = {
    "plain": {"top_k": 0},
    "warped": {"temperature": 1.4, "top_k": 3, "top_p": 0.9, "min_p": 0.05},
    "history": {"top_k": 0, "repetition_penalty": 1.3, "min_new_tokens": 2},
}


def steps(model, ids, mask, **sampling):
    """By transformers alone: of every sequence of 3 tokens after each row, the law of its steps, (rows, V^2, 3, V).

    In one padded forward, and by the processors that ``generate`` prepares.
    """
    every = torch.tensor(list(itertools.product(range(VOCAB), repeat=2)))
    rows, n = len(ids), len(every)
    whole = torch.cat((ids.repeat_interleave(n, 0), every.repeat(rows, 1)), 1)
    seen = torch.nn.functional.pad(mask.repeat_interleave(n, 0), (0, 2), value=1)
    with torch.no_grad():
        logits = model(whole, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp_min(0)).logits[:, -3:]
    prepared = []

    def take(_, input_ids, logits_processor, stopping_criteria, generation_config, **others):
        prepared.append(logits_processor)
        return input_ids

    model.generate(whole[:, :-2], attention_mask=seen[:, :-2], custom_generate=take, max_new_tokens=3, do_sample=True,
                   **sampling)  # fmt: skip
    ends = range(ids.shape[1], ids.shape[1] + 3)
    laws = [prepared[0](whole[:, :end], logits[:, i].float().clone()).softmax(-1) for i, end in enumerate(ends)]
    return torch.stack(laws, 1).view(rows, n, 3, VOCAB)


def sequence_law(laws) -> dict:
    """laws (V^2, 3, V) -> of every sequence of at most 3 tokens that ends with EOS, or is 3 long, the probability."""
    law = {}
    for x, y in itertools.product(range(VOCAB), repeat=2):
        first, second, third = laws[x * VOCAB + y].double()
        for z in range(VOCAB):
            said = (x,) if x == EOS else (x, y) if y == EOS else (x, y, z)
            mass = {1: first[x], 2: first[x] * second[y]}.get(len(said), first[x] * second[y] * third[z])
            law[said] = float(mass)
    return law


CASES = [*((family, "plain") for family in FAMILIES), ("llama", "warped"), ("gemma3", "history")]
CASES += [(family, "plain", "hidden") for family in FAMILIES] + [("qwen2", "history", "hidden")]
CASES += [("qwen3", "warped", "hidden", "block"), ("llama", "plain", "paper", "block")]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_law_of_generate_without_chance(case, monkeypatch):
    """At beta = 0, to six digits: ``generate`` itself, through every branch that its loop can take."""
    family, name, drafter, verification = (*case, *("paper", "token")[len(case) - 2 :])
    sampling = SAMPLING[name]
    model, draft = SMALL[family]
    draft = hidden_of(model) if drafter == "hidden" else draft
    ids = torch.tensor([[3, 2, 0, 2, 3]])
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": True}

    def run():
        return tuple(speculate(model, draft, **asked, verification=verification, **sampling)[0, 5:].tolist())

    got = law_of_all_branches(run, monkeypatch)
    want = sequence_law(steps(model, ids, asked["attention_mask"], **sampling)[0])
    for said in got.keys() | want.keys():
        assert got.get(said, 0.0) == pytest.approx(want.get(said, 0.0), abs=3e-6), said
    assert sum(want.values()) == pytest.approx(1)


def tables(model, draft, row, sampling):
    """What the loop sees after ``row`` (1, T), by the real sessions, for each token x or pair of tokens x, y.

    p (V, V): the draft's law after x. q (V^2, 3, V): the target's of three tokens, in a block as verified.
    """
    taken = []

    def take(_, input_ids, logits_processor, stopping_criteria, generation_config, **others):
        taken.append(logits_processor)
        return input_ids

    model.generate(row, custom_generate=take, attention_mask=torch.ones_like(row), do_sample=True, max_new_tokens=3,
                   **sampling)  # fmt: skip
    law, p, q = GenerationLaw(list(taken[0]), row[0], False), [], []
    target, assistant = (CausalSession(one, new_cache(one)) for one in (model, draft))
    with torch.inference_mode():
        first, start = law(target.prefill(row), row[0, :0]), row.shape[1]
        assistant.prefill(row)
        for x, y in itertools.product(range(VOCAB), repeat=2):
            said = torch.tensor([x, y])
            q.append(torch.cat((first, law(target.extend(said[None])[0], said))))
            target.crop(start)
            if y == 0:
                p.append(law(assistant.extend(said[None, :1])[0], said[:1])[0])
                assistant.crop(start)
    return torch.stack(p).clone(), torch.stack(q).clone()


def simulate(p, q, draws, rng):
    """``draws`` runs of the loop with max_new_tokens 3, at once: x from the target, y drafted and judged, then z."""
    x = draw(q[0, 0].expand(draws, VOCAB), rng)
    q_y = q[x * VOCAB, 1]
    y = draw(p[x], rng)
    kept = torch.rand(draws, generator=rng) < accept_probability(p[x], q_y, y, 0.0)
    y = torch.where(kept, y, draw(residual(p[x], q_y), rng))
    z = draw(q[x * VOCAB + y, 2], rng)
    places = torch.stack((x, y, z), 1)
    code, count = (places * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1).unique(return_counts=True)
    seen = {}
    for value, times in zip(code.tolist(), count.tolist(), strict=True):
        x, y, z = value // VOCAB**2, value // VOCAB % VOCAB, value % VOCAB
        said = (x,) if x == EOS else (x, y) if y == EOS else (x, y, z)
        seen[said] = seen.get(said, 0) + times
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_law_of_200_000_sequences(family, tied, dtype):
    """200,000 draws for each row of a left-padded batch of 3, and of the first row alone, against transformers' law.

    Chi-square, p > 1e-6 each: the 4 x 32 of them fail falsely with probability 1.3e-4, for other seeds than
    these. In bf16 the law is that of bf16 logits, which a block and a padded batch round differently: the law of
    reference is then that of the sessions, and stays within .03 of transformers'.
    """
    model = tiny(family, vocab=VOCAB, tie_word_embeddings=tied, dtype=dtype)
    draft = tiny(family, vocab=VOCAB, layers=2, seed=1, tie_word_embeddings=tied, dtype=dtype)
    ids, mask = (
        torch.tensor([[3, 2, 0, 2, 3, 3], [PAD, PAD, 3, 0, 0, 2], [PAD, 2, 2, 3, 2, 0]]),
        torch.ones(3, 6).long(),
    )
    mask[1, :2] = mask[2, :1] = 0
    sampling = SAMPLING["plain"]
    batch = steps(model, ids, mask, **sampling)
    alone = steps(model, ids[:1], mask[:1], **sampling)[0]
    for i, want in enumerate([*batch, alone]):
        row = ids[i % 3][mask[i % 3].bool()][None]
        p, q = tables(model, draft, row, sampling)
        if dtype == torch.bfloat16:
            torch.testing.assert_close(q, want, atol=0.03, rtol=0)
            want = q
        assert p_value(simulate(p, q, 200_000, generator(i)), sequence_law(want)) > 1e-6
    assert (p[0] - q[0, 1]).abs().max() > 0.02  # the draft is another: what was tested is not trivial


def test_a_wrong_law_is_seen():
    """The test above can fail: draws at beta = .4 are not the target's."""
    p, q = tables(*SMALL["llama"], torch.tensor([[3, 2, 0]]), SAMPLING["plain"])
    assert p_value(simulate(p, q.roll(1, -1), 200_000, generator()), sequence_law(q)) < 1e-6


# --- on OpenVINO ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("hidden", [False, True], ids=["paper's", "hidden"])
def test_openvino_says_what_eager_says(family, hidden):
    """Greedy as ``generate``, sampled as on eager with the same seed; weights that change are seen."""
    pytest.importorskip("openvino")
    model = tiny(family)
    draft = hidden_of(model) if hidden else tiny(family, layers=2)
    asked = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 12}
    for _ in range(2):
        got = speculate(model, draft, runtime="openvino", do_sample=False, **asked)
        assert torch.equal(got, model.generate(do_sample=False, **asked))
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    taken = []
    for runtime in ("eager", "openvino"):
        torch.manual_seed(3)
        how = {"tolerance": 0.4, "do_sample": True, "return_dict_in_generate": True}
        taken.append(speculate(model, draft, runtime=runtime, **how, **asked))
    assert torch.equal(taken[0].sequences, taken[1].sequences) and taken[1].past_key_values is None


def test_openvino_compiles_once_and_forgets_with_the_model():
    pytest.importorskip("openvino")
    model, count = tiny("llama"), len(openvino._CAUSAL)
    first = openvino.causal(model)
    model.model.embed_tokens.weight.data.mul_(1.0)  # not in the graph
    assert openvino.causal(model) is first and len(openvino._CAUSAL) == count + 1
    draft = hidden_of(model)
    for _ in range(2):
        speculate(model, draft, runtime="openvino", input_ids=IDS[:1], max_new_tokens=4)
    kept = openvino._CAUSAL[draft], openvino._CAUSAL[model]
    speculate(model, draft, runtime="openvino", input_ids=IDS[:1], max_new_tokens=4)
    assert kept == (openvino._CAUSAL[draft], openvino._CAUSAL[model]) and kept[1][1] is not first  # it has taps now
    assert openvino.causal(model) is kept[1][1]  # whoever wants none is served by it
    del model, first, draft, kept
    gc.collect()
    assert len(openvino._CAUSAL) == count


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"runtime": "tensorrt"}, "runtime is 'tensorrt'; choose eager or openvino"),
        ({"runtime": "openvino", "model": MODELS["mistral"]}, "knows Qwen2, Llama and Qwen3 .* not MistralModel"),
        ({"runtime": "openvino", "model": GPT2, "draft": GPT2}, "not GPT2Model .activation another"),
        ({"runtime": "openvino", "model": tiny("llama", dtype=torch.bfloat16)}, "the model is torch.bfloat16"),
        ({"runtime": "openvino", "past_key_values": DynamicCache()}, "caches of its own"),
    ],
)
def test_what_openvino_refuses(asked, words):
    pytest.importorskip("openvino")
    with pytest.raises(InputError, match=words):
        speculate(**{"model": LLAMA, "draft": DRAFT, "input_ids": IDS[:1], "max_new_tokens": 3, **asked})


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def no_forward(monkeypatch):
    """Any forward of a causal model fails the test."""

    def forward(*_, **__):
        raise AssertionError("a forward came before the refusal")

    for model in {*MODELS.values(), *DRAFTS.values(), OTHER_VOCAB, OTHER_TOKENIZER, WIDE, HALF, HIDDEN.lm.model}:
        monkeypatch.setattr(model, "forward", forward)


OTHER_VOCAB, OTHER_TOKENIZER = tiny("llama", vocab=12), tiny("llama", bos_token_id=5)
WIDE, HALF = tiny("llama", hidden_size=32), tiny("llama")
HIDDEN_OF_HALF = hidden_of(HALF)
HALF.bfloat16()
CLOCK = type("Clock", (), {"__call__": lambda self, ids, scores: False})


def cache_of(family="llama", length=40, static=True):
    config = MODELS[family].config
    return StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"draft": None}, "assistant_model is NoneType"),
        ({"draft": OTHER_VOCAB}, "vocab_size 12, the model 11"),
        ({"draft": hidden_of(OTHER_VOCAB)}, "hidden-state drafter, has a vocabulary of 12, the model 11"),
        ({"draft": hidden_of(WIDE)}, "hidden-state drafter, has width 32, the model 16"),
        ({"draft": hidden_of(tiny("llama"))}, "another model's hidden states: make it by load_draft"),
        ({"model": make_draft(LLAMA, bottom=1, top=1), "draft": HIDDEN}, "another model's hidden states"),
        ({"model": HALF, "draft": HIDDEN_OF_HALF}, "assistant_model is torch.float32, the model torch.bfloat16"),
        ({"draft": HIDDEN, "inputs_embeds": torch.zeros(1, 6, 8)}, "width 8, the draft's embeddings 16"),
        ({"draft": OTHER_TOKENIZER}, "bos_token_id 5, the model 2: a draft must have its tokenizer"),
        ({"tolerance": 1.5}, "tolerance is 1.5"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"draft_length": 0}, "draft_length is 0"),
        ({"num_beams": 2}, "num_beams 2"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"input_ids": IDS, "streamer": Streamer()}, "streamer was given with 3 sequences"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"use_cache": False}, "use_cache is False"),
        ({"max_time": 3.0}, "MaxTimeCriteria"),
        ({"stopping_criteria": StoppingCriteriaList([CLOCK()])}, "Clock"),
        ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [3]}, "PrefixConstrainedLogitsProcessor"),
        ({"encoder_repetition_penalty": 1.2}, "EncoderRepetitionPenaltyLogitsProcessor"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "pad prompts on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]])}, "pad prompts on the left"),
        ({"attention_mask": torch.zeros(1, 6).long()}, "pad prompts on the left"),
        ({"position_ids": torch.arange(1, 7)[None]}, "position_ids"),
        ({"past_key_values": cache_of(length=14)}, "need 15 positions; the static cache has 14"),
        ({"model": MODELS["mistral"], "past_key_values": cache_of("mistral")}, "StaticSlidingWindowLayer"),
        ({"input_ids": IDS, "past_key_values": cache_of(static=False)}, "serves one"),
        ({"inputs_embeds": torch.zeros(1, 6, 16), "draft": WIDE}, "width 16, the draft's embeddings 32"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_one_sentence_before_any_forward(asked, words, no_forward):
    asked = {"model": LLAMA, "draft": DRAFT, "input_ids": IDS[:1], "max_new_tokens": 10, **asked}
    with pytest.raises(InputError, match=words) as caught:
        speculate(**asked)
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


def test_a_cache_that_holds_something_is_refused():
    cache = LLAMA(IDS[:1], use_cache=True).past_key_values
    with pytest.raises(InputError, match="holds 6 positions"):
        speculate(LLAMA, DRAFT, input_ids=IDS[:1], past_key_values=cache, max_new_tokens=3, attention_mask=MASK_12)


def test_an_encoder_decoder_is_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
                                             decoder_start_token_id=0))  # fmt: skip
    with pytest.raises(InputError, match="T5ForConditionalGeneration"):
        speculate(t5, DRAFT, input_ids=IDS[:1], max_new_tokens=3)
    with pytest.raises(InputError, match="T5ForConditionalGeneration"):
        speculate(LLAMA, t5, input_ids=IDS[:1], max_new_tokens=3)


def test_stop_strings_are_refused_by_transformers_itself():
    """It hands no tokenizer on to a ``custom_generate``, and says that one is missing."""
    with pytest.raises(ValueError, match="stop strings"):
        speculate(LLAMA, DRAFT, input_ids=IDS[:1], max_new_tokens=3, stop_strings=["a"])


def test_several_samples_of_a_prompt_are_refused_by_transformers_itself():
    with pytest.raises(ValueError, match="num_return_sequences has to be 1"):
        speculate(LLAMA, DRAFT, input_ids=IDS[:1], max_new_tokens=3, do_sample=True, num_return_sequences=2)


def test_own_limits_and_processors_count():
    asked = {"input_ids": IDS[:1], "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    asked |= {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(9)])}
    asked |= {"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])}
    assert torch.equal(speculate(LLAMA, DRAFT, **asked), LLAMA.generate(**asked))
