"""The OpenVINO runtime says what the eager one says: same contract, same logits but for rounding."""

import copy
import inspect
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import generator, tiny_lm

from ssd_repro.decoding import drafters
from ssd_repro.decoding.result import DecodeConfig
from ssd_repro.decoding.sampling import Sampler
from ssd_repro.decoding.speculative import autoregressive, speculative
from ssd_repro.errors import InputError
from ssd_repro.models.checkpoints import pack, unpack
from ssd_repro.models.draft import make_draft
from ssd_repro.models.families import small_decoder, small_qwen2
from ssd_repro.models.runtimes import openvino as runtime
from ssd_repro.models.speech_lm import SpeechLM

pytest.importorskip("openvino")
torch.manual_seed(0)
TARGET = tiny_lm(layers=4)
DRAFT = make_draft(TARGET, bottom=1, top=1)
FAST, FAST_DRAFT = (runtime.OpenVINOLM(lm, threads=1) for lm in (TARGET, DRAFT))
WIDE = SpeechLM(small_qwen2(256, 512, 2, 4, 2, vocab=5, initializer_range=0.1), 13).eval()  # two of GROUP
PRECISIONS_HERE = [
    "fp32",
    "int8",
    *["bf16"] * ("BF16" in runtime.capabilities()),
    *["w8a8"] * runtime.multiplies_int8(),
]


def config(greedy=False, **other) -> DecodeConfig:
    sampler = Sampler(temperature=0) if greedy else Sampler(ras_window=4)
    return DecodeConfig(**{"sampler": sampler, "max_tokens": 25, "stop_ids": (12,), "tolerance": 0.0, **other})


@settings(max_examples=40, deadline=None)
@given(t=st.integers(1, 6), blocks=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=6))
@torch.inference_mode()
def test_logits_are_the_eager_ones(t, blocks):
    """Blocks of tokens, each followed by a rollback; what was rolled back is never seen again."""
    prefix = torch.randn(1, t, 16, generator=generator(t))
    eager, fast = TARGET.session(), FAST.session()
    torch.testing.assert_close(fast.prefill(prefix), eager.prefill(prefix), atol=1e-4, rtol=1e-4)
    for i, (n, drop) in enumerate(blocks):
        tokens = torch.randint(0, 13, (1, n), generator=generator(i))
        torch.testing.assert_close(fast.extend(tokens), eager.extend(tokens), atol=1e-4, rtol=1e-4)
        for session in (eager, fast):
            session.crop(max(1, session.length - drop))
        assert fast.length == eager.length


@torch.inference_mode()
def test_used_pages_are_clean_and_grow(monkeypatch):
    monkeypatch.setattr(runtime, "ROOM", 4)
    model, prefix = runtime.OpenVINOLM(TARGET, threads=1), torch.randn(1, 7, 16, generator=generator())
    first, second = model.session(), model.session()
    assert first.pages is not second.pages
    wanted, used, tokens = first.prefill(prefix), first.pages, torch.randint(0, 13, (1, 80), generator=generator())
    grown = first.extend(tokens)
    torch.testing.assert_close(grown, one_by_one(model, prefix, tokens), atol=1e-4, rtol=1e-4)
    assert used.room >= 87
    first.feed(torch.full((1, 40, 16), float("nan")))
    del first
    again = model.session()
    assert again.pages is used and torch.equal(again.prefill(prefix), wanted)
    with pytest.raises(RuntimeError):
        again.prefill(prefix)
    with pytest.raises(ValueError):
        again.crop(8)


@torch.inference_mode()
def test_a_forward_that_fails_gives_no_logits_of_an_earlier_one(monkeypatch):
    """OpenVINO's ``infer`` may fail without a word: the loop then stops at a NaN (``NumericsError``)."""
    session = FAST.session()
    session.prefill(torch.randn(1, 5, 16, generator=generator()))
    assert not session.extend(torch.tensor([[1, 2]])).isnan().any()
    failing = SimpleNamespace(infer=lambda **_: None, output_tensors=session.pages.request.output_tensors)
    monkeypatch.setattr(session.pages, "request", failing)
    assert session.extend(torch.tensor([[3, 4]])).isnan().any(-1).all()


def one_by_one(model, prefix, tokens):
    session = model.session()
    session.prefill(prefix)
    return torch.cat([session.extend(token[None, None]) for token in tokens[0]], 1)


@pytest.mark.parametrize("precision", runtime.APART)
@torch.inference_mode()
def test_a_verification_has_the_logits_of_steps_to_the_bit(precision):
    """Where rounding is coarse: else beta 0 would not be exact. Over the ends of pages, too."""
    if precision not in PRECISIONS_HERE:
        pytest.skip(f"this CPU does not compute in {precision}")
    model, prefix = runtime.OpenVINOLM(WIDE, 1, precision), torch.randn(1, 30, 256, generator=generator())
    session, tokens = model.session(), torch.randint(0, 13, (1, 40), generator=generator(1))
    session.prefill(prefix)
    session.extend(torch.randint(0, 13, (1, 3), generator=generator(2)))
    session.crop(30)
    lengths = [1, 4, 2, 1, 1, 30, 1]
    blocks = torch.cat([session.extend(block) for block in tokens.split(lengths, 1)], 1)
    assert torch.equal(blocks, one_by_one(model, prefix, tokens))
    assert session.length == 70


@pytest.mark.parametrize("precision", ["fp32", *runtime.APART])
@torch.inference_mode()
def test_a_batch_has_the_logits_of_its_sequences(precision):
    """Each at its own length, over rollbacks, and after rows have left."""
    if precision not in PRECISIONS_HERE:
        pytest.skip(f"this CPU does not compute in {precision}")
    model, exact = runtime.OpenVINOLM(WIDE, 1, precision), {} if precision in runtime.APART else {"atol": 1e-4}
    prefixes = [torch.randn(1, t, 256, generator=generator(t)) for t in (40, 3, 31, 64)]
    alone = [model.session() for _ in prefixes]
    batch, logits = model.batch(prefixes, room=50)
    close = partial(torch.testing.assert_close, **{"rtol": 0, "atol": 0, **exact})
    close(logits, torch.cat([session.prefill(prefix) for session, prefix in zip(alone, prefixes, strict=True)]))
    for turn, (n, drop) in enumerate([(1, (0, 0, 0, 0)), (4, (3, 0, 1, 2)), (2, (0, 1, 0, 1)), (4, (0, 0, 0, 0))]):
        tokens = torch.randint(0, 13, (len(alone), n), generator=generator(turn))
        logits = batch.extend(tokens)
        close(logits, torch.cat([session.extend(row[None]) for session, row in zip(alone, tokens, strict=True)]))
        batch.lengths = batch.lengths - torch.tensor(drop[: len(alone)])
        for session, back in zip(alone, drop, strict=False):
            session.crop(session.length - back)
        if turn == 1:
            batch.keep(torch.tensor([0, 2, 3]))
            del alone[1]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), draft_length=st.integers(1, 6), longest=st.integers(1, 30))
def test_greedy_speculative_is_greedy_autoregressive(seed, draft_length, longest):
    prefix = torch.randn(1, 5, 16, generator=generator(seed))
    cfg = config(greedy=True, max_tokens=longest, draft_length=draft_length)
    eager = autoregressive(TARGET, prefix, cfg, generator())
    assert autoregressive(FAST, prefix, cfg, generator()).tokens == eager.tokens
    assert speculative(FAST, FAST_DRAFT, prefix, cfg, generator()).tokens == eager.tokens


def test_the_same_seed_gives_the_same_tokens():
    prefix, cfg = torch.randn(1, 5, 16, generator=generator(9)), config(tolerance=0.4)
    first, second = (speculative(FAST, FAST_DRAFT, prefix, cfg, generator(3)) for _ in range(2))
    assert first.tokens == second.tokens and first.rounds == second.rounds


def test_the_plugin_finds_its_patterns():
    """Attention is the paged kernel, the rotary embedding one, too; without them a step takes twice its time."""
    kinds = Counter(str(op.get_rt_info()["layerType"].value) for op in FAST.compiled.get_runtime_model().get_ops())
    assert kinds["PagedAttention"] == 4 and kinds["RoPE"] == 8 and kinds["RMS"] == 9


@pytest.mark.parametrize("heads, kv_heads, bias", [(14, 2, False), (2, 2, True)])
@torch.inference_mode()
def test_other_geometries(heads, kv_heads, bias):
    """CosyVoice's share of heads, and as many keys as queries; a head without a bias."""
    torch.manual_seed(0)
    lm = SpeechLM(small_qwen2(heads * 4, 32, 2, heads, kv_heads, vocab=5, initializer_range=0.3), 13, bias=bias).eval()
    prefix, tokens = torch.randn(1, 5, heads * 4, generator=generator()), torch.tensor([[1, 2, 3]])
    eager, fast = lm.session(), runtime.OpenVINOLM(lm, threads=2).session()
    torch.testing.assert_close(fast.prefill(prefix), eager.prefill(prefix), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast.extend(tokens), eager.extend(tokens), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_int8_is_of_weights_alone():
    """Weights that are int8 and a scale already lose nothing, on whatever CPU; w8a8 rounds what goes into products."""
    lm = copy.deepcopy(WIDE)
    lm.load_state_dict(unpack(pack(lm.state_dict())))
    prefix, said = torch.randn(1, 5, 256, generator=generator()), {}
    for precision in {"fp32", "int8", "w8a8"} & set(PRECISIONS_HERE):
        model, tokens = runtime.OpenVINOLM(lm, 1, precision), torch.tensor([[1, 2, 3]])
        session = model.session()
        session.prefill(prefix)
        said[precision] = session.extend(tokens)
        # a verification sees the steps' own logits: else beta 0 would not be exact
        torch.testing.assert_close(one_by_one(model, prefix, tokens), said[precision], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said["int8"], said["fp32"], atol=1e-4, rtol=1e-4)
    assert "w8a8" not in said or 1e-3 < (said["w8a8"] - said["fp32"]).abs().max() < 0.3


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@torch.inference_mode()
def test_fewer_bits_are_near(precision):
    if precision not in PRECISIONS_HERE:
        pytest.skip(f"this CPU does not compute in {precision}")
    prefix, tokens = torch.randn(1, 5, 16, generator=generator()), torch.tensor([[1, 2, 3]])
    fast, exact = runtime.OpenVINOLM(TARGET, 1, precision).session(), FAST.session()
    near = fast.prefill(prefix) - exact.prefill(prefix), fast.extend(tokens) - exact.extend(tokens)
    assert all(0 < error.abs().max() < 0.3 for error in near)


def test_it_keeps_the_contract():
    for name in ("prefill", "extend", "crop"):
        ours, contract = getattr(FAST.session(), name), getattr(drafters.Session, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(contract).parameters)[1:]


def test_what_it_cannot_run_is_said(monkeypatch):
    turned = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for family, other, words in (
        ("gpt_neox", {}, "not GPTNeoXModel"),
        ("llama", {"rope_parameters": turned}, "dynamic"),
    ):
        decoder = small_decoder(family, 8, 8, 1, 2, 2, 5, **other)
        with pytest.raises(InputError, match=words):
            runtime.OpenVINOLM(SpeechLM(decoder, 13), threads=1)
    monkeypatch.setattr(runtime, "capabilities", lambda: ("FP32",))
    for precision in ("bf16", "fp64"):
        with pytest.raises(InputError, match=f"no precision '{precision}'"):
            runtime.OpenVINOLM(TARGET, 1, precision)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(InputError, match="'w8a8' needs a CPU that multiplies int8"):
        runtime.OpenVINOLM(TARGET, 1, "w8a8")
