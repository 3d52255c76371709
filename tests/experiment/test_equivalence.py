"""Equivalence of word error rates: by hand, on made rows, and by simulation."""

import numpy as np
import pandas as pd
import pytest
from made_rows import row, three_systems

from ssd_repro.errors import InputError
from ssd_repro.experiment import equivalence, statistics, tables
from ssd_repro.experiment.equivalence import tost


def spoken(errors, words=10, method="autoregressive", **other):
    """One row for each utterance with as many word errors."""
    words = np.broadcast_to(words, len(errors))
    counts = zip(errors, words, strict=True)
    return pd.DataFrame(
        [row(method, i, 1.5, **{"word_errors": e, "words": w}, **other) for i, (e, w) in enumerate(counts)]
    )


def pair(dice, n, apart=0.0, spread=0.02, words=20):
    """Rows of two systems whose true rates differ by ``apart`` points; shared errors cancel."""
    shared = dice.poisson(1.0, n)
    rates = spread + np.array([apart, 0.0]) / 100
    return tuple(spoken(shared + dice.poisson(rate * words, n), words) for rate in rates)


def test_the_contributions_by_hand():
    """Words 10 and 30: rates 4/40 and 2/40, 5 points apart; each utterance by what it does to its own ratio."""
    ours, theirs = spoken([1, 3], [10, 30]), spoken([2, 0], [10, 30])
    points = equivalence.contributions(ours, theirs)
    own = 10 + 100 * np.array([1 - 0.1 * 10, 3 - 0.1 * 30]) / 20
    other = 5 + 100 * np.array([2 - 0.05 * 10, 0 - 0.05 * 30]) / 20
    assert points == pytest.approx(own - other) and points.mean() == pytest.approx(5.0)
    with pytest.raises(InputError, match="not of the same utterances"):
        equivalence.contributions(ours, theirs.iloc[:1])


def test_their_spread_is_the_standard_error_of_the_difference():
    dice = np.random.default_rng(0)
    ours, theirs = pair(dice, 200, words=dice.integers(5, 40, 200))
    points = equivalence.contributions(ours, theirs)
    low, high = (tost(ours, theirs)[f"WER difference_{end}"] for end in ("low", "high"))
    assert points.std(ddof=1) / np.sqrt(200) == pytest.approx((high - low) / (2 * 1.645), rel=0.1)


@pytest.mark.parametrize(
    ("n", "apart", "verdict"),
    [(400, 0.0, equivalence.YES), (400, 4.0, equivalence.NO), (20, 0.0, equivalence.NOT_SHOWN)],
)
def test_three_verdicts(n, apart, verdict):
    found = tost(*pair(np.random.default_rng(1), n, apart))
    assert found["equivalent"] == verdict and found["n"] == n
    assert found["WER difference"] == pytest.approx(apart, abs=3 * found["sd"] / np.sqrt(n))
    assert found["WER difference_low"] < found["WER difference"] < found["WER difference_high"]


def test_the_power_calculation():
    """z of 5 % and of the half of 20 %, 1.645 and 1.282: n = (2.926 sd / margin)^2; never fewer than a test takes."""
    assert equivalence.utterances_needed(7.6) == int(np.ceil((2.9264 * 7.6) ** 2))
    assert equivalence.utterances_needed(4.0, margin=2.0) == equivalence.utterances_needed(2.0)
    assert equivalence.utterances_needed(0.0) == statistics.LEAST


def test_as_many_utterances_as_needed_show_it_four_times_in_five():
    """Simulated: with n needed, systems that are alike are shown equivalent in 80 % of 400 trials, within 6 %; systems
    a margin apart in at most 5 %, within 3 %."""
    dice, margin = np.random.default_rng(2), 1.5
    big = tost(*pair(dice, 4000), margin, draws=200)
    n = big["n needed"]
    assert 50 < n < 150
    shown = [tost(*pair(dice, n), margin, draws=400)["equivalent"] == equivalence.YES for _ in range(400)]
    assert np.mean(shown) == pytest.approx(equivalence.POWER, abs=0.06)
    wrong = [tost(*pair(dice, n, margin), margin, draws=400)["equivalent"] == equivalence.YES for _ in range(400)]
    assert np.mean(wrong) <= equivalence.LEVEL + 0.03


def test_what_cannot_be_said():
    ours, theirs = pair(np.random.default_rng(0), statistics.LEAST - 1)
    assert tost(ours, theirs)["equivalent"] == statistics.TOO_FEW
    found = tost(ours.assign(words=np.nan), theirs)
    assert found["equivalent"] == statistics.NOT_SCORED and found["n"] == 0 and np.isnan(found["n needed"])


def test_the_table_says_lossless_first_and_concludes_on_the_fastest_of_them():
    rows = three_systems(10)
    exact = [row("speculative", i, 1.0, tolerance=0.0, draft_length=2, drafter="hidden") for i in range(10)]
    both = pd.concat([rows, pd.DataFrame(exact)], ignore_index=True)
    table = equivalence.of_rows(both)
    assert list(table.index) == ["SSD, hidden drafter, beta 0, L_d 2", "SSD, beta 0.4, L_d 3"]
    assert list(table.lossless) == ["yes", "no"] and list(table["WER difference"]) == [0, 0]
    said = equivalence.note(both)
    assert "SSD, hidden drafter, beta 0, L_d 2: 2" in said and said.endswith(
        "yes, with 10 utterances; to show it takes 8."
    )
    assert "No lossless system" in equivalence.note(rows)
    unscored = both.assign(words=np.nan)
    assert tables.markdown(equivalence.readable(equivalence.of_rows(unscored))).count("not scored") == 2
    assert equivalence.note(unscored).endswith("its WER against the target: not scored.")
