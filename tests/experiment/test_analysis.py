"""Verdicts, curves and theory on rows with known answers."""

import numpy as np
import pandas as pd
import pytest
from made_rows import geometric, row, ssd, three_systems

from ssd_repro.errors import InputError
from ssd_repro.experiment import acceptance, conclusions, statistics, tables, theory
from ssd_repro.experiment.statistics import Measure

P808 = Measure("P808", "p808", None, 0.1)
WER = Measure("WER", "word_errors", "words", 1.0)


def two_systems(differences, column="p808", start=3.0):
    """A baseline, and rows whose ``column`` differs from its by ``differences``."""
    base = pd.DataFrame([row("autoregressive", i, 2.0) for i in range(len(differences))])
    base[column] = start + np.random.default_rng(7).normal(0, 0.5, len(differences))
    return base.assign(**{column: base[column] + differences}), base


# Intervals and verdicts


def ratio(a, b):
    return a.sum(-1) / b.sum(-1)


def test_the_bootstrap_draws_what_it_always_drew():
    """Committed tables are rebuilt byte for byte; scipy agrees but for the rounding of its quantile."""
    dice = np.random.default_rng(5)
    a, b, c, d = (dice.gamma(shape, 1, 25) for shape in (2, 5, 1, 4))
    assert statistics.bootstrap(statistics.ratio_of_sums, a, b) == (0.21788517807354857, 0.36582496118315877)
    found = statistics.bootstrap(statistics.corpus_speedup, a, b, c, d, level=0.9)
    assert found == (0.7064388752175896, 1.8099286036917805)
    found = statistics.bootstrap(lambda x: np.median(x, axis=-1), a, draws=500, seed=3)
    assert found == (0.7103977101647545, 1.618233268364828)
    scipy_stats = pytest.importorskip("scipy.stats")
    settings = {"paired": True, "vectorized": True, "method": "percentile", "n_resamples": 2000}
    theirs = scipy_stats.bootstrap((a, b), lambda x, y, axis: ratio(x, y), rng=np.random.default_rng(0), **settings)
    assert statistics.bootstrap(ratio, a, b) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-12)


@pytest.mark.parametrize(
    ("mean", "spread", "count", "expected"),
    [
        (0.0, 0.1, 200, statistics.SHOWN_EQUIVALENT),
        (0.05, 0.1, 200, statistics.SHOWN_EQUIVALENT),  # the interval leaves 0 out, yet lies within the margin
        (0.3, 0.1, 200, statistics.SHOWN_DIFFERENT),
        (-0.3, 0.1, 200, statistics.SHOWN_DIFFERENT),
        (0.0, 2.0, 20, statistics.NOT_SHOWN),  # too noisy to say either
        (0.1, 0.2, 30, statistics.SHOWN_DIFFERENT),  # at the margin: different, and not equivalent
        (0.0, 0.0, 3, statistics.TOO_FEW),
    ],
)
def test_verdicts_of_constructed_differences(mean, spread, count, expected):
    noise = np.random.default_rng(0).normal(0, 1, count)
    noise = (noise - noise.mean()) / (noise.std() or 1)
    ours, base = two_systems(mean + spread * noise)
    found = statistics.difference(ours, base, P808)
    assert found["verdict"] == expected and found["n"] == count
    assert found["difference"] == pytest.approx(mean) and found["low"] <= mean <= found["high"]


def test_pairing_sees_what_two_independent_samples_would_not():
    ours, base = two_systems(np.full(30, 0.02))  # the utterances differ by .5, the systems by .02
    found = statistics.difference(ours.sample(frac=1, random_state=1), base, P808)
    assert found["low"] == pytest.approx(0.02) == found["high"] and found["verdict"] == statistics.SHOWN_EQUIVALENT
    with pytest.raises(InputError, match="not of the same utterances"):
        statistics.difference(ours.iloc[1:], base, P808)


def test_tost_errs_as_often_as_it_says():
    """A true difference at the margin is called equivalent in 5 % of 300 samples: 15, at most 28 but once in 1,000."""
    wrong = 0
    for seed in range(300):
        noise = np.random.default_rng(seed).normal(0.1, 0.2, 60)
        inner = statistics.bootstrap(lambda x: x.mean(-1), noise, draws=300, level=0.9)
        wrong += statistics.verdict(inner, inner, 0.1, 60) == statistics.SHOWN_EQUIVALENT
    assert 3 <= wrong <= 28


def test_word_errors_differ_as_a_ratio_of_sums():
    base = pd.DataFrame([row("autoregressive", i, 2.0, word_errors=0, words=words) for i, words in enumerate([1, 99])])
    ours = base.assign(word_errors=[1, 0])
    assert statistics.difference(ours, base, WER)["difference"] == pytest.approx(1)  # not the mean of 100 and 0 points


def test_what_was_not_scored_is_left_out_and_counted():
    ours, base = two_systems(np.zeros(20))
    ours.loc[3, "p808"] = np.nan
    base.loc[4, "p808"] = np.nan
    assert statistics.difference(ours, base, P808)["n"] == 18
    nothing = statistics.difference(ours.assign(p808=np.nan), base, P808)
    assert nothing["verdict"] == statistics.NOT_SCORED and nothing["n"] == 0


def test_quality_has_every_measure_of_every_system():
    table = tables.quality(three_systems(10))
    assert list(table.index.unique()) == ["Draft", "SSD, beta 0.4, L_d 3"]
    measures = ["WER, points", "CER, points", "P808 (NMOS)", "OVRL", "SIG", "BAK", "SS", "length ratio"]
    assert list(table.loc["Draft"].measure) == measures
    assert list(table.loc["Draft"].margin.dropna()) == [1.0, 0.1, 0.02]
    same = table[table.measure == "length ratio"].iloc[0]
    assert same.difference == 1 and same.verdict == statistics.NOT_SHOWN
    text = tables.readable_quality(table)
    assert "0" in set(text["SSD or draft - autoregressive"]) and "± 0.02" in set(text.margin)


# Curves


def test_judged_drafts_by_hand():
    """Tokens 0..6; the first from the prefill. 2 of 3 kept; 0 of 3 kept; then an accepted end of speech."""
    rounds = [[0, 0], [3, 2], [3, 0], [3, 3]]
    events = list(acceptance.piece_events(rounds, 7))
    first, last = [(1, 1, True), (2, 2, True), (3, 3, False)], [(1, 5, True), (2, 6, True), (3, 7, True)]
    assert events == [*first, (1, 4, False), *last]
    stopped = list(acceptance.piece_events([[0, 0], [3, 2]], 2))  # after the end the third draft is not judged
    assert stopped == [(1, 1, True), (2, 2, True)]
    resampled = list(acceptance.piece_events([[0, 0], [3, 1]], 2))  # the end was resampled in place of a rejected draft
    assert resampled == [(1, 1, True), (2, 2, False)]


def test_kinds_of_tokens():
    b = "boundary"
    assert acceptance.kinds("ss..ss") == ["speech", b, b, b, b, "speech"]
    assert acceptance.kinds("...sss") == ["silence", "silence", b, b, "speech", "speech"]
    assert acceptance.kinds("s") == ["speech"] and acceptance.kinds("") == []
    line = ssd(0, [[3, 2], [3, 0]])  # 4 tokens: 2 accepted, 1 for the rejected, 1 for another rejected
    events = acceptance.row_events({**line, "token_kinds": "..ss"})
    found = [(position, kind, accepted) for position, _, kind, accepted in events]
    assert found == [(1, "silence", True), (2, b, True), (3, b, False), (1, "speech", False)]
    assert {kind for _, _, kind, _ in acceptance.row_events({**line, "token_kinds": ""})} == {"unknown"}


def test_two_sentences_of_one_text_are_kept_apart():
    rounds = [[[0, 0], [3, 0]], [[0, 0], [3, 1]]]
    line = ssd(0, [[3, 3]]) | {"rounds": rounds, "pieces": [2, 3], "tokens": 5, "token_kinds": "ss..."}
    found = [(round(along, 2), kind) for _, along, kind, _ in acceptance.row_events(line)]
    assert found == [(0.2, "speech"), (0.6, "silence"), (0.8, "silence")]


def test_rates_over_each_setting():
    parts = [geometric(0.6, 3, tolerance=b, seed=i) for i, b in enumerate((0.0, 0.4))]
    parts += [geometric(0.9, 6, tolerance=0.4, seed=5), geometric(0.3, 3, tolerance=0.4, temperature=0.7, seed=6)]
    table = acceptance.acceptance(pd.concat(parts, ignore_index=True), 0.4, 3)
    assert list(table.loc["beta", "value"]) == [0.0, 0.4] and list(table.loc["L_d", "value"]) == [3, 6]
    heat = table.loc["temperature"]
    assert list(heat["value"]) == [0.7, 1.0]
    for line, alpha in zip(heat.itertuples(), (0.3, 0.6), strict=True):
        assert line.acceptance == pytest.approx(alpha, abs=0.03) and line.low < line.acceptance < line.high
    assert list(table.loc["position in the draft", "value"]) == [1, 2, 3, 4, 5, 6]  # of the longest draft
    assert (abs(table.loc["position in the draft", "acceptance"] - 0.9) < 0.05).all()
    assert len(table.loc["along the utterance"]) == acceptance.PARTS
    assert list(table.loc["voice", "value"]) == ["a", "b"]
    beta = table.loc["beta"].iloc[1]
    kept = sum(0.6**i for i in (1, 2, 3)) / 3
    assert beta.of_drafted == pytest.approx(kept, abs=0.03) and beta.n == 40


# Theory


def test_expected_tokens():
    assert theory.expected_tokens(0.0, 3) == 1 and theory.expected_tokens(1.0, 3) == 4
    assert theory.expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / 0.2)
    assert theory.leviathan_speedup(0.8, 4, 0.1) == pytest.approx((1 - 0.8**5) / 0.2 / 1.4)
    assert theory.expected_tokens_by_position([0.5, 0.5]) == pytest.approx(theory.expected_tokens(0.5, 2))


def test_theory_is_exact_on_simulated_geometric_acceptance():
    rows = geometric(0.7, 3, utterances=200, draft=0.005, verify=0.02, target=0.02)
    found = theory.predict(rows, 3)
    assert found["alpha"] == pytest.approx(0.7, abs=0.01)
    assert found["measured / costs"] == pytest.approx(1, abs=1e-9)  # nothing but drafts and verifications took time
    assert found["measured / formula"] == pytest.approx(1, abs=0.02)  # alpha is estimated
    assert found["measured"] == pytest.approx(theory.leviathan_speedup(0.7, 3, 0.25), rel=0.02)
    for name in ("prefill %", "loop %", "left %"):
        assert found[name] == pytest.approx(0, abs=1e-6)


def test_the_residue_is_named():
    """A verification of two target steps explains all of a residue; time in prefill and loop is named as such."""
    dear = theory.predict(geometric(0.7, 3, verify=0.04, target=0.02), 3)
    assert dear["verification / target step"] == pytest.approx(2)
    assert dear["measured / formula"] < 0.8 and dear["measured / costs"] == pytest.approx(1)
    rows = geometric(0.7, 3)
    rows["seconds"] = [
        s | {"prefill": 0.1 * lm, "rest": 0.05 * lm} for s, lm in zip(rows.seconds, rows.lm_seconds, strict=True)
    ]
    rows["lm_seconds"] = rows.lm_seconds * 1.15
    slow = theory.predict(rows, 3)
    assert slow["prefill %"] == pytest.approx(100 * 0.1 / 1.15) and slow["loop %"] == pytest.approx(100 * 0.05 / 1.15)
    assert slow["left %"] == pytest.approx(0, abs=1e-6) and slow["measured / costs"] == pytest.approx(1 / 1.15)


def test_a_round_cut_short_by_the_end_judges_no_further_position():
    """Two tokens and an accepted end of speech out of [3 drafted]: nothing was rejected."""
    rows = pd.DataFrame([ssd(0, [[3, 3], [3, 1]]), row("speculative", 1, 1.0, rounds=[[[0, 0], [3, 3]]], pieces=[3])])
    assert theory.acceptance_by_position(rows, 3) == pytest.approx([1, 0.5, 1])


def test_speakers_of_prompts_and_too_few_for_an_interval():
    rows = geometric(0.5, 3, utterances=9)
    rows["voice"], rows["front_end"] = [f"{i // 8}_{i}_x" for i in range(9)], "upstream"
    by = acceptance.acceptance(rows, 0.4, 3).loc["voice"].set_index("value")
    assert list(by.index) == ["0", "1"] and list(by.n) == [8, 1]
    assert by.low["0"] < by.acceptance["0"] < by.high["0"] and np.isnan(by.low["1"])


def test_acceptance_that_falls_with_the_position_is_seen():
    dice = np.random.default_rng(0)
    lines = []
    for i in range(50):
        kept = np.cumprod(dice.random((100, 2)) < [0.9, 0.1], -1).sum(-1)
        lines.append(ssd(i, [[2, int(k)] for k in kept], length=2))
    rates = theory.acceptance_by_position(pd.DataFrame(lines), 2)
    assert rates == pytest.approx([0.9, 0.1], abs=0.02)


# Conclusions


def test_conclusions_say_what_the_intervals_show():
    line = {"speed-up": 1.128, "speed-up_low": 1.1, "speed-up_high": 1.15, "WER %": 5.0}
    assert conclusions.value(line, "speed-up") == "1.13 [1.10, 1.15]" and conclusions.value(line, "WER %") == "5.0"
    assert conclusions.conclude("It is", "so.").data == "**Conclusion.** It is so."
    verdicts = {
        (1.01, 1.2): "faster",
        (0.8, 0.99): "slower",
        (0.9, 1.1): "not shown to be faster or slower",
        (np.nan, np.nan): "not shown to be faster or slower",
    }
    for (low, high), verdict in verdicts.items():
        assert conclusions.faster({"speed-up": 1.0, "speed-up_low": low, "speed-up_high": high}) == verdict


def test_a_conclusion_takes_table_1_from_its_folder(tmp_path):
    assert "has not run" in conclusions.of_table1(tmp_path)
    rows = three_systems()
    tables.save(tables.table1(rows), tmp_path, "table1", "")
    said = conclusions.of_table1(tmp_path)
    assert ": 1.33" in said and said.endswith("times as fast as the target, over 4 utterances.")
