"""Several sequences at once: each says what it says by itself."""

import math

import pytest
import torch
from toys import generator, tiny_lm

from ssd_repro.decoding import batch
from ssd_repro.decoding.result import DecodeConfig, NumericsError
from ssd_repro.decoding.sampling import Sampler, probabilities
from ssd_repro.decoding.speculative import autoregressive, speculative
from ssd_repro.errors import InputError
from ssd_repro.models.draft import make_draft

TARGET = tiny_lm(layers=3)
DRAFT = make_draft(TARGET, bottom=1, top=1)
GREEDY = Sampler(temperature=0)


def prefixes(*lengths):
    return [torch.randn(1, n, 16, generator=generator(n)) for n in lengths]


def config(sampler=GREEDY, **settings) -> DecodeConfig:
    return DecodeConfig(sampler=sampler, **{"max_tokens": 20, "stop_ids": (12,), "tolerance": 0.0, **settings})


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_greedy_rows_are_the_loops(drafting, rows):
    given = prefixes(3, 9, 5, 4, 12)[:rows]
    configs = [config(max_tokens=3 + 6 * i, min_tokens=2 * i) for i in range(rows)]
    draft = DRAFT if drafting else None
    found = batch.decode(TARGET, draft, given, configs, [generator(i) for i in range(rows)])
    for prefix, cfg, result in zip(given, configs, found, strict=True):
        want = autoregressive(TARGET, prefix, cfg, generator())
        assert (result.tokens, result.stopped, result.stop) == (want.tokens, want.stopped, want.stop)
        if drafting:
            one = speculative(TARGET, DRAFT, prefix, cfg, generator())
            assert result.target_calls <= one.target_calls + 1 and sum(r.emitted for r in result.rounds) == sum(
                r.emitted for r in one.rounds
            )


def test_a_draft_that_is_the_target_is_always_right():
    found = batch.decode(TARGET, TARGET, prefixes(3, 6), [config(stop_ids=(), max_tokens=17)] * 2, [generator()] * 2)
    for result in found:
        assert all(r.accepted == r.drafted for r in result.rounds[:-1]) and len(result.tokens) == 17
        assert result.target_calls == 5  # one token of the prefill, then four a call


@pytest.mark.parametrize("drafting", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(drafting):
    sampler, draft = Sampler(ras_window=4), DRAFT if drafting else None
    given = prefixes(3, 9, 5, 4)
    configs = [config(sampler, max_tokens=n, tolerance=0.3) for n in (24, 4, 11, 30)]
    together = batch.decode(TARGET, draft, given, configs, [generator(i) for i in range(4)])
    for i in range(4):
        alone = batch.decode(TARGET, draft, [given[i]], [configs[i]], [generator(i)])[0]
        assert alone.tokens == together[i].tokens and alone.rounds == together[i].rounds


def test_the_distribution_is_the_targets():
    """Two tokens of two rows at beta 0, beside a row that ends at once, 6,000 draws each: counts of the pairs.

    Of a multinomial's chi-square the test asks for less than mean + 6 standard deviations, which a right decoder
    misses in less than one run of ten thousand.
    """
    sampler, draws = Sampler(top_k=4, top_p=1.0, ras=False), 6000
    given, cfg = prefixes(3, 5), config(sampler, max_tokens=2, stop_ids=(), draft_length=1)
    short = config(sampler, max_tokens=1, stop_ids=(), draft_length=1)
    counts = [torch.zeros(13, 13) for _ in given]
    for first in range(0, draws, 500):
        rows = [given[i % 2] for i in range(1000)] + [given[0]]
        configs = [cfg] * 1000 + [short]
        seeds = [generator(10_000 + 2 * first + i) for i in range(1001)]
        for i, result in enumerate(batch.decode(TARGET, DRAFT, rows, configs, seeds)[:1000]):
            counts[i % 2][result.tokens] += 1
    for prefix, seen in zip(given, counts, strict=True):
        expected = draws * pairs(prefix, sampler)
        assert seen[expected == 0].sum() == 0
        likely = expected > 0
        chi = ((seen - expected)[likely] ** 2 / expected[likely]).sum()
        free = int(likely.sum()) - 1
        assert chi < free + 6 * math.sqrt(2 * free) + 6


def pairs(prefix, sampler):
    """P(first, second) by the target alone, (V, V)."""
    none = torch.full((1, 1), -1)
    with torch.inference_mode():
        first = probabilities(TARGET(prefix)[:, -1], none, sampler)[0]
        made = torch.zeros(13, 13)
        for token in first.nonzero()[:, 0]:
            embedded = torch.cat((prefix, TARGET.speech_embedding(token[None, None])), 1)
            made[token] = first[token] * probabilities(TARGET(embedded)[:, -1], none, sampler)[0]
    return made


def test_what_cannot_be_a_batch_is_refused():
    given, seeds = prefixes(3, 4), [generator(), generator()]
    with pytest.raises(InputError, match="2 prefixes, 1 configs and 2 generators"):
        batch.decode(TARGET, None, given, [config()], seeds)
    with pytest.raises(InputError, match="may differ in max_tokens and min_tokens alone"):
        batch.decode(TARGET, None, given, [config(), config(tolerance=0.1)], seeds)
    with pytest.raises(InputError, match="verification 'token' and confidence 0"):
        batch.decode(TARGET, DRAFT, given, [config(confidence=0.5)] * 2, seeds)


def test_a_row_of_nan_is_named():
    given = prefixes(3, 4)
    given[1][:] = math.nan
    with pytest.raises(NumericsError, match="at speech token 0 of sequence 1 of the batch"):
        batch.decode(TARGET, None, given, [config()] * 2, [generator(), generator()])
