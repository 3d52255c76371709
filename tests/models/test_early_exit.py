"""The target's own first layers as a draft: no parameter of its own, exact, on every runtime."""

import pytest
import torch
from toys import generator, law_of_all_branches, tiny_lm

from ssd_repro.decoding.result import DecodeConfig
from ssd_repro.decoding.sampling import Sampler
from ssd_repro.decoding.speculative import autoregressive, speculative
from ssd_repro.models.draft import EarlyExit
from ssd_repro.models.runtimes import RUNTIMES, with_runtime

TARGET = tiny_lm(layers=6)
PREFIX = torch.randn(1, 5, 16, generator=generator(9))


def test_it_says_what_the_target_would_after_a_third_of_its_layers():
    exit_ = EarlyExit(TARGET, lambda lm: lm)
    ours = {id(parameter) for parameter in TARGET.parameters()}
    assert all(id(parameter) in ours for parameter in exit_.lm.parameters()) and exit_.lm is exit_.lm
    after = TARGET.model(inputs_embeds=PREFIX, output_hidden_states=True).hidden_states[2]
    with torch.inference_mode():
        torch.testing.assert_close(exit_.session().prefill(PREFIX), TARGET.head(TARGET.model.norm(after))[:, -1])


@pytest.mark.parametrize("runtime", RUNTIMES[1:])
def test_greedy_tokens_are_the_targets(runtime):
    def running(lm):
        made.append(lm)
        return with_runtime(lm, runtime, "fp32", 1, 64)

    made = []
    target, early = running(TARGET), EarlyExit(TARGET, running)
    assert len(made) == 1  # it is compiled when it is asked
    cfg = DecodeConfig(sampler=Sampler(temperature=0), max_tokens=30, stop_ids=(), draft_length=3, tolerance=0.0)
    for _ in range(2):
        result = speculative(target, early, PREFIX, cfg, generator())
        assert result.tokens == autoregressive(TARGET, PREFIX, cfg, generator()).tokens
        assert 0 < result.accepted < result.drafted and len(made) == 2


def test_the_distribution_is_the_targets(monkeypatch):
    target, ras = tiny_lm(layers=3, vocab=3), Sampler(top_k=2, top_p=0.85, ras_window=3, ras_tau=0.5)
    early = EarlyExit(target, lambda lm: lm)
    cfg = DecodeConfig(sampler=ras, max_tokens=4, min_tokens=1, stop_ids=(2,), draft_length=2, tolerance=0.0)
    want = law_of_all_branches(lambda: autoregressive(target, PREFIX, cfg, generator()).tokens, monkeypatch)
    monkeypatch.undo()
    got = law_of_all_branches(lambda: speculative(target, early, PREFIX, cfg, generator()).tokens, monkeypatch)
    assert len(want) > 7 and sum(want.values()) == pytest.approx(1)
    for every in want.keys() | got.keys():
        assert got.get(every, 0.0) == pytest.approx(want.get(every, 0.0), abs=2e-6), every
