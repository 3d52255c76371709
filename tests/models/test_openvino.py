"""The OpenVINO runtime says what the eager one says: same contract, same logits but for rounding."""

import copy
import inspect
from collections import Counter

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
TARGET = tiny_lm(layers=4)
DRAFT = make_draft(TARGET, bottom=1, top=1)
FAST, FAST_DRAFT = (runtime.OpenVINOLM(lm, threads=1) for lm in (TARGET, DRAFT))


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
def test_a_used_request_is_clean_and_caches_grow(monkeypatch):
    monkeypatch.setattr(runtime, "ROOM", 4)
    model, prefix = runtime.OpenVINOLM(TARGET, threads=1), torch.randn(1, 7, 16, generator=generator())
    first, second = model.session(), model.session()
    wanted, tokens = first.prefill(prefix), torch.randint(0, 13, (1, 9), generator=generator())
    after, used = first.extend(tokens), dict(first.requests)
    assert set(used) == {7, 9} and first.cache.shape[2] == 16
    assert torch.equal(second.prefill(prefix), wanted) and second.requests[7] is not used[7]
    del first
    again = model.session()
    assert torch.equal(again.prefill(prefix), wanted) and again.requests[7] is used[7]
    assert torch.equal(again.extend(tokens), after) and again.requests[9] is used[9]
    with pytest.raises(RuntimeError):
        again.prefill(prefix)
    with pytest.raises(ValueError):
        again.crop(17)


@pytest.mark.parametrize("n", [16, 17, 40, 70])
@torch.inference_mode()
def test_wide_blocks_are_cut_and_filled_up(n, monkeypatch):
    """What fills a block up is never seen: neither by its own rows nor by later ones."""
    monkeypatch.setattr(runtime, "MOST", 64)
    eager, fast = TARGET.session(), FAST.session()
    prefix, tokens = torch.randn(1, n, 16, generator=generator()), torch.randint(0, 13, (1, n), generator=generator())
    for session in (eager, fast):
        session.prefill(prefix)
        session.crop(n - 3)
    torch.testing.assert_close(fast.extend(tokens), eager.extend(tokens), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast.extend(tokens[:, :2]), eager.extend(tokens[:, :2]), atol=1e-4, rtol=1e-4)
    assert fast.length == eager.length and (runtime.ANY in fast.requests) == (n > runtime.NARROW)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), draft_length=st.integers(1, 6), longest=st.integers(1, 30))
def test_greedy_speculative_is_greedy_autoregressive(seed, draft_length, longest):
    prefix = torch.randn(1, 5, 16, generator=generator(seed))
    cfg = config(greedy=True, max_tokens=longest, draft_length=draft_length)
    eager = autoregressive(TARGET, prefix, cfg, generator())
    assert autoregressive(FAST, prefix, cfg, generator()).tokens == eager.tokens
    assert speculative(FAST, FAST_DRAFT, prefix, cfg, generator()).tokens == eager.tokens


def test_a_draft_that_stands_whole_brings_up_every_graph_of_a_decoding():
    """What ``Voice.warm_up`` counts on: nothing is compiled later, while the clock runs."""
    target, draft = (runtime.OpenVINOLM(lm, threads=1) for lm in (TARGET, DRAFT))
    prefix, sure = torch.randn(1, 20, 16, generator=generator()), {"stop_ids": (), "draft_length": 3}
    speculative(target, draft, prefix, config(tolerance=1.0, max_tokens=16, **sure), generator())
    assert {runtime.ANY, 4} <= set(target._compiled) and set(draft._compiled) == {runtime.ANY, 1, 2}
    for seed in range(3):
        speculative(target, draft, prefix, config(tolerance=0.0, max_tokens=16, **sure), generator(seed))
    assert set(draft._compiled) == {runtime.ANY, 1, 2}
    assert set(target._compiled) <= {runtime.ANY, 1, 2, 3, 4}  # below 4: where max_tokens cuts the last draft short


def test_the_same_seed_gives_the_same_tokens():
    prefix, cfg = torch.randn(1, 5, 16, generator=generator(9)), config(tolerance=0.4)
    first, second = (speculative(FAST, FAST_DRAFT, prefix, cfg, generator(3)) for _ in range(2))
    assert first.tokens == second.tokens and first.rounds == second.rounds


def test_the_plugin_finds_its_patterns():
    """The rotary embedding of queries and keys is one kernel a layer, a norm another, a projection with its bias."""
    kinds = Counter(str(op.get_rt_info()["layerType"].value) for op in FAST.compiled(4).get_runtime_model().get_ops())
    assert (
        kinds["RoPE"] == 4 and kinds["RMS"] == 9 and kinds["FullyConnected"] == 4 * 4 + 1 and kinds["MatMul"] == 4 * 4
    )


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


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@torch.inference_mode()
def test_fewer_bits_are_near(precision):
    if precision == "bf16" and "BF16" not in runtime.capabilities():
        pytest.skip("this CPU does not compute in bf16")
    prefix, tokens = torch.randn(1, 5, 16, generator=generator()), torch.tensor([[1, 2, 3]])
    fast, exact = runtime.OpenVINOLM(TARGET, 1, precision).session(), FAST.session()
    near = fast.prefill(prefix) - exact.prefill(prefix), fast.extend(tokens) - exact.extend(tokens)
    assert all(0 < error.abs().max() < 0.3 for error in near)


@torch.inference_mode()
def test_weights_of_a_byte_stand_as_they_are_and_no_others():
    """In fp32 nothing is rounded: a voice's files hold int8 and a scale of each row, and so does the graph."""
    whole = copy.deepcopy(TARGET)
    whole.load_state_dict(unpack(pack(TARGET.state_dict())))
    prefix, tokens = torch.randn(1, 5, 16, generator=generator()), torch.tensor([[1, 2, 3]])
    eager, fast = whole.session(), (small := runtime.OpenVINOLM(whole, threads=1)).session()
    assert small.weight_bytes == 1 and FAST.weight_bytes == 4
    kinds = Counter(str(op.get_element_type()) for op in small.graph.get_ops() if op.get_type_name() == "Constant")
    assert sum(count for kind, count in kinds.items() if "int8" in kind) == 4 * 4 + 1
    torch.testing.assert_close(fast.prefill(prefix), eager.prefill(prefix), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.extend(tokens), eager.extend(tokens), atol=1e-5, rtol=1e-5)
    whole.model.layers[2].mlp.up_proj.weight[1, 0] *= 1.001  # one number that is none of these
    assert runtime.OpenVINOLM(whole, threads=1).weight_bytes == 4


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
