"""CosyVoice 2 and 3: files, prompt, sampling, and speculative decoding inside upstream's objects.

Set COSYVOICE_CHECKOUT to a checkout of FunAudioLLM/CosyVoice to run upstream's own Qwen2LM,
CosyVoice3LM, ras_sampling and CosyVoice2Model in the last tests; they are skipped without it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from tiny_cosyvoice import (
    CosyVoice,
    CosyVoice3LM,
    Qwen2LM,
    Upstream,
    ras_sampling,
    save_converted,
    save_released,
    save_tokenizer,
)
from toys import generator

from ssd_repro.decoding.result import NumericsError
from ssd_repro.decoding.sampling import Sampler, probabilities
from ssd_repro.decoding.speculative import autoregressive, speculative
from ssd_repro.errors import InputError
from ssd_repro.models import cosyvoice as cosyvoice_module
from ssd_repro.models.checkpoints import save_draft
from ssd_repro.models.cosyvoice import LAYOUTS, load_cosyvoice
from ssd_repro.models.draft import make_draft
from ssd_repro.speech.upstream import accelerate, target_of, upstream_sampling

TEXT, PROMPT_TEXT, PROMPT_SPEECH = (
    torch.tensor([3, 1, 4]),
    torch.tensor([15, 9]),
    torch.tensor([6560, 0, 42, 7]),
)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return {v: save_released(tmp_path_factory.mktemp(f"v{v}"), Upstream(v)) for v in (2, 3)}


# Files


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("form", ["released", "converted"])
def test_loaded_logits_are_those_of_upstreams_modules(version, form, tmp_path):
    upstream = Upstream(version)
    lm = load_cosyvoice({"released": save_released, "converted": save_converted}[form](tmp_path, upstream))
    edge = {2: (upstream.sos, upstream.task_id), 3: (6561, 6563)}[version]
    assert (lm.layout.version, lm.layout.sos, lm.layout.task) == (version, *edge)
    prefix = upstream.prefix(TEXT, PROMPT_TEXT, PROMPT_SPEECH)
    speech = torch.tensor([[5, 6, 7, 6559]])
    due = upstream.logits(torch.cat((prefix, upstream.speech_embedding(speech)), 1))[0, prefix.shape[1] - 1 :]
    with torch.inference_mode():
        session = lm.session()
        got = torch.cat((session.prefill(prefix), session.extend(speech[:, :1])[0], session.extend(speech[:, 1:])[0]))
    torch.testing.assert_close(got, due, rtol=1e-4, atol=1e-4)
    assert lm.head.out_features == {2: 6564, 3: 6761}[version]
    if version == 2:
        torch.testing.assert_close(lm.prefix(TEXT, PROMPT_TEXT, PROMPT_SPEECH), prefix)


def test_a_converted_head_without_bias_and_another_dtype(tmp_path):
    upstream = Upstream(2)
    lm = load_cosyvoice(save_converted(tmp_path, upstream, head_bias=False)).cast("bf16")
    assert lm.head.bias is None
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(lm.head.weight, upstream.llm_decoder.weight.bfloat16())
    assert lm.model.rotary_emb.inv_freq.dtype == torch.float32  # bf16 would turn late positions by a radian


def test_the_prompt_of_version_3_wants_its_end_of_prompt(tmp_path):
    upstream = Upstream(3, text_vocab=151_650)
    lm = load_cosyvoice(save_released(tmp_path, upstream))
    ended = torch.tensor([8, 151_646])
    torch.testing.assert_close(
        lm.prefix(TEXT, ended, PROMPT_SPEECH), upstream.prefix(TEXT, ended, PROMPT_SPEECH), rtol=0, atol=0
    )
    lm.prefix(ended, TEXT, PROMPT_SPEECH[:0])
    with pytest.raises(InputError, match="endofprompt"):
        lm.prefix(TEXT, PROMPT_TEXT, PROMPT_SPEECH)
    with pytest.raises(InputError, match="prompt speech token is 6561"):
        lm.prefix(TEXT, ended, torch.tensor([1, 6561]))
    with pytest.raises(InputError, match="text token is 151650"):
        lm.prefix(torch.tensor([151_650]), ended, PROMPT_SPEECH)
    with pytest.raises(InputError, match="no tokens"):
        lm.prefix(TEXT[:0], ended, PROMPT_SPEECH)


def test_ids_and_lengths_are_upstreams():
    two, three = LAYOUTS[2], LAYOUTS[3]
    assert (two.sos, two.task, two.eos, two.stop_ids) == (0, 1, 6561, (6561, 6562, 6563))
    assert (three.sos, three.eos, three.task) == (6561, 6562, 6563)
    assert three.stop_ids == tuple(range(6561, 6761))
    config = three.config(7, tolerance=0.2)
    assert (config.min_tokens, config.max_tokens, config.tolerance) == (14, 140, 0.2)
    assert (config.stop_ids, config.banned) == (three.stop_ids, (6561,))


def test_without_config_json_only_the_known_shape_is_loaded(tmp_path, monkeypatch):
    due = load_cosyvoice(save_released(tmp_path / "whole", Upstream(2)))
    folder = save_released(tmp_path / "bare", Upstream(2), config=False)
    with pytest.raises(InputError, match=r"config\.json is missing .* Qwen2\.5-0\.5B.* lacks llm\.model"):
        load_cosyvoice(folder)
    config = due.model.config  # now the tiny model's shape is the known one
    monkeypatch.setattr(
        cosyvoice_module, "QWEN2_05B", {name: getattr(config, name) for name in cosyvoice_module.QWEN2_05B}
    )
    lm, (text, *none) = load_cosyvoice(folder), (TEXT, TEXT[:0], TEXT[:0])
    assert torch.equal(lm(lm.prefix(text, *none)), due(due.prefix(text, *none)))


def test_the_known_shape_is_qwen2s():
    """config.json of Qwen2.5-0.5B, of which the release has a copy."""
    config = cosyvoice_module.Qwen2Config(**cosyvoice_module.QWEN2_05B)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (896, 4864, 24)
    assert (config.num_attention_heads, config.num_key_value_heads) == (14, 2)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (1e6, 1e-6)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def edited(change):
    def edit(path):
        state = torch.load(path)
        state = change(state) or state
        torch.save(state, path)

    return edit


LAYER = "llm.model.model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "damage, says",
    [
        (cut, "cut or another kind of file"),
        (pointer, "git lfs pull"),
        (lambda path: path.write_bytes(b""), "cut or another kind of file"),
        (lambda path: path.unlink(), r"neither llm\.pt nor config\.json"),
        (edited(lambda s: s.pop(LAYER) is None), f"lacks {LAYER}$"),
        (edited(lambda s: s.pop("llm_decoder.bias") is None), r"lacks llm_decoder\.bias"),
        (edited(lambda s: s.pop("llm_embedding.weight") is None), r"lacks llm_embedding\.weight"),
        (edited(lambda s: s.pop("speech_embedding.weight") is None), "no language model of CosyVoice 2 or 3"),
        (edited(lambda s: s.update({"flow.weight": s[LAYER]})), r"unexpectedly, flow\.weight"),
        (edited(lambda s: s.update({LAYER: s[LAYER][:5]})), rf"{LAYER} \(5, 32\) instead of \(64, 32\)"),
        (edited(lambda s: s.update({"speech_embedding.weight": s[LAYER]})), r"has 64 rows.* 6564 .* 6761"),
        (edited(lambda s: s.update({"note": "x"})), "note is no tensor"),
        (edited(lambda s: list(s.values())), "holds a list"),
        (edited(lambda s: {"text_encoder.embed.out.0.weight": s[LAYER]}), "CosyVoice 1"),
        (lambda path: torch.save(Upstream, path), "cannot be read as a checkpoint of tensors"),
        (lambda path: (path.parent / "CosyVoice-BlankEN/config.json").write_text("{"), "Qwen2 configuration"),
        (lambda path: (path.parent / "CosyVoice-BlankEN/config.json").write_text('{"model_type": "x"}'), "describes x"),
    ],
)
def test_bad_files_say_what_is_wrong(damage, says, tmp_path):
    damage(save_released(tmp_path, Upstream(2)) / "llm.pt")
    with pytest.raises(InputError, match=says):
        load_cosyvoice(tmp_path)


def test_a_trainers_checkpoint_by_its_own_name(tmp_path):
    path = save_released(tmp_path, Upstream(3)) / "llm.pt"
    edited(lambda s: s.update(epoch=3, step=99))(path)
    assert load_cosyvoice(path.rename(tmp_path / "epoch_3.pt")).layout.version == 3


def test_bad_converted_folders_say_what_is_wrong(tmp_path):
    folder = save_converted(tmp_path / "good", Upstream(2))
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    cut(weights)
    with pytest.raises(InputError, match="cut or another"):
        load_cosyvoice(folder)
    weights.unlink()
    with pytest.raises(InputError, match="embed_tokens.weight has 0 rows"):
        load_cosyvoice(folder)
    save_tokenizer(folder)
    with pytest.raises(InputError, match="lacks <|s_0|>"):
        load_cosyvoice(folder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 6564}))
    with pytest.raises(InputError, match="vLLM"):
        load_cosyvoice(folder)
    with pytest.raises(InputError, match="does not exist"):
        load_cosyvoice(tmp_path / "nowhere")


# The sampling


def ras_by_hand(scores, decoded, sampler, banned):
    """The distribution of upstream's ras_sampling and sampling_ids, branch by branch (float64)."""
    scores = scores.double().clone()
    if sampler.bans_by_mask:
        scores[banned] = -torch.inf
    drawn = torch.zeros(len(scores), dtype=torch.float64)
    full, nucleus, mass = scores.softmax(0), [], 0.0
    for token in full.argsort(descending=True, stable=True).tolist():
        if not (mass < sampler.top_p and len(nucleus) < sampler.top_k):
            break
        nucleus.append(token)
        mass += full[token].item()
    for token in nucleus:
        first = full[token] / mass
        if decoded[-sampler.ras_window :].count(token) >= sampler.ras_window * sampler.ras_tau:
            again = scores.clone()
            if sampler.ras_masks_repeat:
                again[token] = -torch.inf
            drawn += first * again.softmax(0)
        else:
            drawn[token] += first
    if (
        not sampler.bans_by_mask
    ):  # of 101 trials the first that is not banned: the others' distribution, divided by their mass
        drawn[banned] = 0.0
        drawn /= drawn.sum()
    return drawn


@pytest.mark.parametrize("masks_repeat", [True, False])
@pytest.mark.parametrize("bans_by_mask", [True, False])
def test_the_closed_form_is_the_distribution_of_upstreams_procedure(masks_repeat, bans_by_mask):
    rng = generator(5)
    for case in range(60):
        sampler = Sampler(
            top_k=[25, 3][case % 2],
            ras_tau=[0.1, 0.2, 0.3][case % 3],
            ras_masks_repeat=masks_repeat,
            bans_by_mask=bans_by_mask,
        )
        scores = 1.5 * torch.randn(9, generator=rng)
        decoded = torch.randint(0, 9, (case % 14,), generator=rng).tolist()
        banned = torch.zeros(9, dtype=torch.bool)
        banned[[6, 8][: case % 3]] = True
        history = torch.tensor(([-1] * 10 + decoded)[-10:])
        due = ras_by_hand(scores, decoded, sampler, banned)
        got = probabilities(scores, history, sampler, banned)
        torch.testing.assert_close(got.double(), due, rtol=0, atol=3e-6)


def test_upstreams_procedure_draws_from_that_distribution():
    """The re-implemented procedure of tests/tiny_cosyvoice.py against the enumeration, 4,000 draws.

    One outcome of at most 9 may stray by 5 standard errors: false failure below 1e-5.
    """
    torch.manual_seed(0)
    scores, decoded = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, -1.0, 0.5, -2.0, 1.0]), [0, 3, 8]
    counts = torch.zeros(9)
    for _ in range(4000):
        counts[ras_sampling(scores.clone(), decoded, 25)] += 1
    due = ras_by_hand(scores, decoded, Sampler(), torch.zeros(9, dtype=torch.bool))
    assert ((counts / 4000 - due).abs() <= 5 * (due * (1 - due) / 4000).sqrt()).all()


def test_a_nucleus_of_banned_tokens_alone_is_an_error_not_a_token(released):
    """Upstream gave up after 100 trials there ('sampling reaches max_trials')."""
    lm = load_cosyvoice(released[2])
    lm.head.bias.data[6561] = 1e3
    prefix = lm.prefix(TEXT, PROMPT_TEXT, PROMPT_SPEECH)
    with pytest.raises(NumericsError, match="nothing to draw"):
        autoregressive(lm, prefix, lm.layout.config(2, sampler=Sampler(bans_by_mask=False)), generator())
    assert len(autoregressive(lm, prefix, lm.layout.config(2), generator()).tokens) == 4  # masked: min_tokens


def old_sampling_ids(below):
    def sampling_ids(self, weighted_scores, decoded_tokens, sampling, ignore_eos=True):
        while True:
            token = self.sampling(weighted_scores, decoded_tokens, sampling)
            if not ignore_eos or (token < self.speech_token_size if below else token != self.speech_token_size):
                return token

    return sampling_ids


def ras_sampling_of_2024(scores, decoded, sampling, top_p=0.8, top_k=25, win_size=10, tau_r=0.1):
    return ras_sampling(scores.clone(), decoded, sampling, top_p, top_k, win_size, tau_r) if not decoded else 0


ras_sampling_of_2024.__name__ = "ras_sampling"


@pytest.mark.parametrize("make", [Qwen2LM, CosyVoice3LM])
def test_the_sampling_is_read_off_upstreams_code(make):
    state = torch.get_rng_state()
    llm = make(top_p=0.7, tau_r=0.3)
    assert upstream_sampling(llm) == (Sampler(top_p=0.7, ras_tau=0.3), (6561,))
    for below, banned in ((False, (6561,)), (True, tuple(llm.stop_token_ids))):
        old = type(make.__name__, (make,), {"sampling_ids": old_sampling_ids(below)})()
        assert upstream_sampling(old) == (Sampler(bans_by_mask=False), banned)
    old.sampling = ras_sampling_of_2024
    assert upstream_sampling(old)[0] == Sampler(bans_by_mask=False, ras_masks_repeat=False)
    old.sampling = lambda *_: 0
    with pytest.raises(InputError, match="only upstream's ras_sampling"):
        upstream_sampling(old)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    upstream_sampling(llm)
    assert torch.equal(state, torch.get_rng_state())


# Inside upstream's objects

SURE = {"top_k": 1, "tau_r": 1.0}  # one choice at each step, unless a token came ten times in a row
ASKED = {
    "prompt_text": PROMPT_TEXT[None],
    "llm_prompt_speech_token": PROMPT_SPEECH[None],
    "text": torch.tensor([[3, 1]]),
}


def spoken(cosyvoice, **other) -> list[int]:
    return [token for part in cosyvoice.model.tts(**(ASKED | other)) for token in part["tokens"]]


def ends_soon(llm):
    """Leans towards the ends, so that texts stop between their shortest and longest length."""
    llm.llm_decoder.weight[6561:] *= {2: 2.0, 3: 1.2}[llm.version]
    return llm


@pytest.mark.parametrize("make", [Qwen2LM, CosyVoice3LM])
def test_accelerated_tokens_are_upstreams_where_its_sampling_leaves_no_choice(make):
    """top_k = 1, tolerance 0: the uncached loop of the double and ours must say the same, tokens and ends."""
    cosyvoice = CosyVoice(ends_soon(make(**SURE)))
    texts = [torch.tensor([words]) for words in ([3, 1, 4], [2, 7], [9])]
    due = [spoken(cosyvoice, text=text) for text in texts]
    results = []
    with_draft = make_draft(target_of(cosyvoice), bottom=3, top=1)
    with torch.no_grad():  # a draft that errs now and then
        with_draft.head.weight.add_(0.1 * torch.randn(with_draft.head.weight.shape, generator=generator()))
    handle = accelerate(cosyvoice, with_draft, tolerance=0.0, on_result=lambda _, result: results.append(result))
    for stream in (False, True):
        assert [spoken(cosyvoice, text=text, stream=stream) for text in texts] == due
    together = {}
    jobs = [
        threading.Thread(target=lambda i=i, text=text: together.update({i: spoken(cosyvoice, text=text)}))
        for i, text in enumerate(texts)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [together[i] for i in range(len(texts))] == due
    handle.undo()
    assert "inference_wrapper" not in vars(cosyvoice.model.llm)
    assert [spoken(cosyvoice, text=text) for text in texts] == due
    assert len(results) == 3 * len(texts)
    rates = [result.acceptance_rate for result in results if result.drafted]
    assert 0 < min(rates) <= max(rates) <= 1
    assert any(result.stopped for result in results)


def test_a_shortest_length_and_a_longest_length_hold_under_acceleration():
    llm = Qwen2LM(**SURE)
    llm.llm_decoder.bias[6561] = 1e3
    cosyvoice = CosyVoice(llm)
    assert len(spoken(cosyvoice)) == 4
    accelerate(cosyvoice, make_draft(target_of(cosyvoice)), tolerance=0.0)
    assert len(spoken(cosyvoice)) == 4  # 2 for each of the text's 2 tokens, the prompt's not counted
    llm.llm_decoder.bias[6561:] = -1e3
    assert len(spoken(cosyvoice)) == 40
    assert list(llm.inference_wrapper(torch.zeros(1, 2, 32), 25, 0, 0, "")) == []


def test_accelerated_decoding_is_speculative_decoding_of_the_loaded_model(released, tmp_path):
    """From a draft's folder, with upstream's sampling, seed after seed; and draft=None is autoregressive."""
    cosyvoice, lm = CosyVoice(Qwen2LM()), load_cosyvoice(released[2])
    draft = make_draft(lm)
    with torch.no_grad():
        draft.head.weight.mul_(0.9)
    save_draft(tmp_path / "draft", draft, lm, {})
    prefix = lm.prefix(ASKED["text"][0], PROMPT_TEXT, PROMPT_SPEECH)
    config = lm.layout.config(2, draft_length=2, tolerance=0.3)
    with_draft = [speculative(lm, draft, prefix, config, generator(seed)).tokens for seed in (11, 12)]
    alone = autoregressive(lm, prefix, config, generator(11)).tokens
    handle = accelerate(cosyvoice, tmp_path / "draft", tolerance=0.3, draft_length=2, seed=11)
    assert [tuple(spoken(cosyvoice)), tuple(spoken(cosyvoice, stream=True))] == with_draft
    handle.undo()
    accelerate(cosyvoice, None, seed=11)
    assert tuple(spoken(cosyvoice)) == alone != with_draft[0]


def test_tokens_come_as_they_are_accepted_and_half_precision_runs():
    ended = []
    cosyvoice = CosyVoice(Qwen2LM(), fp16=True)
    accelerate(cosyvoice, make_draft(target_of(cosyvoice)), on_result=lambda *seen: ended.append(seen))
    parts = [(part, torch.tensor([part.shape[1]])) for part in (ASKED["text"], PROMPT_TEXT[None], PROMPT_SPEECH[None])]
    tokens = cosyvoice.model.llm.inference(*(x for pair in parts for x in pair), None, uuid="u")
    assert isinstance(next(tokens), int)
    assert not torch.is_inference_mode_enabled()  # a generator that waits leaves nothing switched on
    assert not ended
    rest = list(tokens)
    assert ended[0][0] == "u"
    assert list(ended[0][1].tokens[1:]) == rest
    assert len(spoken(cosyvoice)) >= 4


def test_what_accelerate_refuses(released):
    cosyvoice = CosyVoice(Qwen2LM())
    draft = make_draft(target_of(cosyvoice))
    for bad, says in (
        (SimpleNamespace(), "cannot be accelerated"),
        (CosyVoice(Upstream(2)), "class Upstream"),
        (CosyVoice(type("Qwen2LM", (CosyVoice3LM,), {})()), "200 stop tokens"),
    ):
        with pytest.raises(InputError, match=says):
            accelerate(bad, draft)
    with pytest.raises(InputError, match=r"speech vocabulary.* is \(6761, 32\)"):
        accelerate(cosyvoice, make_draft(load_cosyvoice(released[3])))
    with pytest.raises(InputError, match="torch.bfloat16 on cpu, the target.s"):
        accelerate(cosyvoice, make_draft(load_cosyvoice(released[2]).cast("bf16")))
    with pytest.raises(InputError, match="draft is 7"):
        accelerate(cosyvoice, 7)
    with pytest.raises(InputError, match="tolerance is 1.5"):
        accelerate(cosyvoice, draft, tolerance=1.5)
    assert "inference_wrapper" not in vars(cosyvoice.model.llm)  # a refusal leaves the object alone
    assert "tts" not in vars(cosyvoice.model)
    handle = accelerate(cosyvoice, draft)
    with pytest.raises(InputError, match="accelerated already"):
        accelerate(cosyvoice, draft)
    with pytest.raises(InputError, match="streaming text"):
        spoken(cosyvoice, text=(part for part in ASKED["text"]))
    handle.undo()
    assert "tts" not in vars(cosyvoice.model)
    with pytest.raises(InputError, match="undone already"):
        handle.undo()
    cosyvoice.model.llm.vllm = object()
    with pytest.raises(InputError, match="load_vllm=False"):
        accelerate(cosyvoice, draft)


# Upstream itself, where a checkout is at hand


@pytest.fixture(scope="module")
def upstream():
    """Upstream's modules (llm, common, model), on stand-ins for the audio libraries that they import."""
    folder = os.environ.get("COSYVOICE_CHECKOUT")
    if not folder:
        pytest.skip("COSYVOICE_CHECKOUT names no checkout of FunAudioLLM/CosyVoice")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi", "onnxruntime"):
            patch.setitem(sys.modules, name, MagicMock())
        names = {
            "llm": "cosyvoice.llm.llm",
            "common": "cosyvoice.utils.common",
            "model": "cosyvoice.cli.model",
        }
        yield SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})


class Uncached(torch.nn.Module):
    """Qwen2Encoder without its cache, whose mask is wrong in transformers 5: cache = all that was fed."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward_one_step(self, xs, masks, cache=None):
        cache = xs if cache is None else torch.cat((cache, xs), 1)
        return self.model(inputs_embeds=cache, output_hidden_states=True).hidden_states[-1], cache


def real_cosyvoice(upstream, version, **settings):
    """Upstream's own CosyVoice2Model or CosyVoice3Model with tiny weights; only the sound is left out."""
    tiny = Upstream(version)
    name = {2: "Qwen2LM", 3: "CosyVoice3LM"}[version]
    sampling = partial(upstream.common.ras_sampling, **settings)
    llm = getattr(upstream.llm, name)(32, 32, 6561, Uncached(tiny.llm.model), sampling)
    llm.load_state_dict(tiny.state_dict(), strict=True)
    model = getattr(upstream.model, f"CosyVoice{version}Model")(
        llm.requires_grad_(False).eval(), SimpleNamespace(pre_lookahead_len=3), None
    )

    def token2wav(token, token_offset, finalize, **_):  # the last 3 tokens of a chunk are only looked at
        return token[:, token_offset:] if finalize else token[:, token_offset:-3]

    model.token2wav = token2wav
    return SimpleNamespace(model=model)


@pytest.mark.parametrize("version", [2, 3])
def test_upstreams_own_objects(upstream, version):
    cosyvoice = real_cosyvoice(upstream, version, **SURE)
    eop = {"prompt_text": torch.tensor([[15, 151_646]])} if version == 3 else {}
    if version == 3:
        cosyvoice.model.llm.llm.model.resize_token_embeddings(151_650)
    due, *none = (part["tts_speech"] for part in cosyvoice.model.tts(**(ASKED | eop)))
    assert due.shape[1] >= 28  # 25 + 3: long enough for a chunk before the end
    assert not none
    handle = accelerate(cosyvoice, make_draft(target_of(cosyvoice)), tolerance=0.0)
    for stream in (False, True):
        parts = [part["tts_speech"] for part in cosyvoice.model.tts(**(ASKED | eop), stream=stream)]
        assert torch.equal(torch.cat(parts, 1), due)
        assert len(parts) == 1 + stream
    handle.undo()
    assert "inference_wrapper" not in vars(cosyvoice.model.llm)


def test_upstreams_own_ras_draws_from_our_distribution(upstream):
    """20,000 draws, two histories; an outcome may stray by 5 standard errors: false failure below 1e-5."""
    torch.manual_seed(1)
    llm = real_cosyvoice(upstream, 2).model.llm
    sampler = upstream_sampling(llm)[0]
    scores = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, -1.0, 0.5, -2.0, 1.0])
    for decoded in ([], [0, 3, 8, 8]):
        counts = torch.zeros(9)
        for _ in range(10_000):
            counts[llm.sampling(scores.clone(), decoded, 25)] += 1
        due = probabilities(scores, torch.tensor(([-1] * 10 + decoded)[-10:]), sampler).double()
        assert ((counts / 10_000 - due).abs() <= 5 * (due * (1 - due) / 10_000).sqrt() + 1e-7).all()
