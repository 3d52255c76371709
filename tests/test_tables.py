import numpy as np
import pandas as pd
import pytest

from ssd_repro import tables
from ssd_repro.errors import InputError


def rows():
    """Two utterances, three systems; numbers that sums and means tell apart."""
    made = []
    for method, lm in (("autoregressive", [2.0, 2.0]), ("draft", [1.0, 1.0]), ("speculative", [1.0, 4.0])):
        for i in range(2):
            made.append(
                {
                    "method": method, "text_id": str(i), "voice": "v", "seed": i, "word_errors": [1, 0][i],
                    "words": [2, 8][i], "p808": 3.0 + i, "ovrl": 3.0, "similarity": 0.9, "lm_seconds": lm[i],
                    "audio_seconds": [1.0, 4.0][i], "synthesis_seconds": 2 * lm[i], "tokens": [25, 100][i],
                    "drafted": 0 if method != "speculative" else [10, 30][i],
                    "accepted": 0 if method != "speculative" else [10, 10][i],
                    "tokens_per_target_call": 1.0,
                }
            )  # fmt: skip
    return pd.DataFrame(made)


def test_table1_by_hand():
    line = tables.table1(rows()).loc["SSD"]
    assert line["WER %"] == pytest.approx(10.0)  # 1 of 10 words, not the mean of 50 % and 0 %
    assert line["LM-RTF"] == pytest.approx(1.0)
    assert line["speed-up"] == pytest.approx(4 / 5)  # sums: (4 s / 5 s) over (5 s / 5 s)
    assert line["speed-up a token"] == pytest.approx((2.0 + 0.5) / 2)  # median of the paired ratios
    assert line["acceptance"] == pytest.approx(0.5)
    assert line["WER_low"] <= line["WER %"] <= line["WER_high"]
    assert line["paper speed-up"] == pytest.approx(0.504 / 0.360)


def test_pairs_are_by_utterance_and_not_by_order():
    table = tables.table1(rows())
    assert tables.table1(rows()[::-1]).equals(table)
    with pytest.raises(InputError, match="not of the same utterances"):
        tables.table1(rows().iloc[:-1])


def test_bootstrap_covers_the_mean_of_a_known_law():
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(40):  # 95 % intervals: fewer than 32 of 40 happens once in 10,000 such tests
        low, high = tables.bootstrap(lambda x: x.mean(-1), rng.normal(3.0, 1.0, 60), draws=300, seed=seed)
        inside += low <= 3.0 <= high
    assert inside >= 32


def test_put_between_replaces_only_what_is_between():
    text = "a\n<!-- t -->\nold\n<!-- /t -->\nb"
    assert tables.put_between(text, "t", "new") == "a\n<!-- t -->\nnew\n<!-- /t -->\nb"
    with pytest.raises(InputError, match="markers"):
        tables.put_between("no marks", "t", "new")
