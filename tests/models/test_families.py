"""Decoders of every family behind one SpeechLM: exact sessions, drafts on shared parameters, voice folders."""

import pytest
import torch
from toys import generator

from ssd_repro.decoding.result import DecodeConfig
from ssd_repro.decoding.sampling import Sampler
from ssd_repro.decoding.speculative import autoregressive, speculative
from ssd_repro.errors import InputError
from ssd_repro.models import checkpoints
from ssd_repro.models.codec import Codec, CodecConfig
from ssd_repro.models.draft import make_draft, own_parameters
from ssd_repro.models.families import FAMILIES, UNGROUPED, final_norm, sizes_of, small_decoder
from ssd_repro.models.runtimes import with_runtime
from ssd_repro.models.speech_lm import SpeechLM

PREFIX = torch.randn(1, 4, 16, generator=generator(1))


def tiny(family: str, vocab: int = 13) -> SpeechLM:
    torch.manual_seed(0)
    kv_heads = 4 if family in UNGROUPED else 2
    model = small_decoder(family, 16, 32, 6, 4, kv_heads, vocab=5, initializer_range=0.3)
    return SpeechLM(model, vocab).eval().requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def lm(request) -> SpeechLM:
    return tiny(request.param)


@torch.inference_mode()
def test_a_session_says_what_a_plain_forward_says(lm):
    """Blocks of one and of several tokens, with rollbacks, against transformers' own causal mask."""
    session, kept = lm.session(), []
    session.prefill(PREFIX)
    for block, drop in (([3, 7, 1], 2), ([4], 0), ([5, 9, 2, 2], 1), ([8], 1), ([6, 6], 0)):
        tokens = torch.tensor([kept + block])
        whole = lm.model(inputs_embeds=torch.cat((PREFIX, lm.speech_embedding(tokens)), 1)).last_hidden_state
        got = session.extend(torch.tensor([block]))
        torch.testing.assert_close(got, lm.head(whole)[:, -len(block) :], atol=1e-4, rtol=1e-4)
        kept += block[: len(block) - drop]
        session.crop(4 + len(kept))


@torch.inference_mode()
def test_greedy_speculative_tokens_are_the_targets(lm):
    draft = make_draft(lm)
    greedy = {"sampler": Sampler(temperature=0), "tolerance": 0.0}
    config = DecodeConfig(**greedy, max_tokens=25, stop_ids=(12,), draft_length=3)
    plain = autoregressive(lm, PREFIX, config, generator())
    made = speculative(lm, draft, PREFIX, config, generator())
    assert made.tokens == plain.tokens and len(plain.tokens) > 3 and made.drafted


def test_a_draft_shares_all_but_its_bottom_layers_and_head(lm):
    draft = make_draft(lm, bottom=1, top=2)
    own, theirs = own_parameters(draft), {id(p) for p in lm.parameters()}
    assert all((id(p) in theirs) != (name in own) for name, p in draft.named_parameters())
    assert final_norm(draft.model).weight is final_norm(lm.model).weight
    assert all(name.startswith(("model.layers.0.", "head.")) for name in own)


def test_a_voice_folder_keeps_the_family(lm, tmp_path):
    lm, family = tiny(lm.model.config.model_type, vocab=6564), lm.model.config.model_type
    small = CodecConfig(encoder_width=8, decoder_width=8, encoder_blocks=1, decoder_blocks=1, hint=8)
    draft = make_draft(lm)
    checkpoints.save_voice(tmp_path, Codec(small), lm, draft, {})
    _, target, again, about = checkpoints.load_voice(tmp_path)
    assert about["target"].get("family", "qwen2") == family and sizes_of(target.model.config) == about["target"]
    for made, kept in ((target, lm), (again, draft)):
        assert type(made.model) is FAMILIES[family][1]
        torch.testing.assert_close(made(PREFIX), kept(PREFIX), atol=0.05, rtol=0.05)  # fp16


@pytest.mark.parametrize("runtime, known", [("openvino", ("qwen2", "llama", "qwen3")), ("graphs", ("qwen2",))])
def test_the_others_have_no_other_runtime_than_eager(runtime, known):
    pytest.importorskip("openvino")
    for family in set(FAMILIES) - {*known}:
        with pytest.raises(InputError, match=rf"{runtime} knows Qwen2.*choose runtime eager"):
            with_runtime(tiny(family), runtime, "fp32", 1, 64)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_on_openvino_they_say_what_they_say_on_eager(family):
    """After a prefix, a block, a rollback and another token; a model of another activation is refused."""
    pytest.importorskip("openvino")
    eager = tiny(family)
    sessions = eager.session(), with_runtime(eager, "openvino", "fp32", 1, 64).session()
    with torch.inference_mode():
        said = [[s.prefill(PREFIX[:1]), s.extend(torch.tensor([[1, 2, 3]]))] for s in sessions]
        for session, of in zip(sessions, said, strict=True):
            session.crop(session.length - 2)
            of.append(session.extend(torch.tensor([[4]])))
    for theirs, ours in zip(*said, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    eager.model.config.hidden_act = "gelu"
    with pytest.raises(InputError, match=r"activation gelu.*choose runtime eager"):
        with_runtime(eager, "openvino", "fp32", 1, 64)


def test_what_no_family_has_is_refused():
    with pytest.raises(InputError, match="family 'gpt2' is unknown: choose one of qwen2, llama"):
        small_decoder("gpt2", 16, 32, 2, 4, 4, 5)
    with pytest.raises(InputError, match="kv_heads is 2; gpt_neox has as many as heads, 4"):
        small_decoder("gpt_neox", 16, 32, 2, 4, 2, 5)
