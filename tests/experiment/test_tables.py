import numpy as np
import pandas as pd
import pytest
from made_rows import geometric, row, three_systems

from ssd_repro.errors import InputError
from ssd_repro.experiment import report, tables


def rows():
    """Two utterances, three systems; numbers that sums and means tell apart."""
    made = []
    for method, lm in (("autoregressive", [2.0, 2.0]), ("draft", [1.0, 1.0]), ("speculative", [1.0, 4.0])):
        for i in range(2):
            audio = [1.0, 4.0][i]
            drafted, accepted = ([10, 30][i], 10) if method == "speculative" else (0, 0)
            setting = {"tolerance": 0.4, "draft_length": 3} if method == "speculative" else {}
            made.append(row(
                method, i, lm[i], audio, word_errors=[1, 0][i], words=[2, 8][i], p808=3.0 + i, tokens=[25, 100][i],
                drafted=drafted, accepted=accepted, base_tokens=[25, 100][i], base_audio_seconds=audio, voice="v", **setting,
            ))  # fmt: skip
    return pd.DataFrame(made)


def test_the_papers_numbers_stand_beside_the_papers_setting_alone():
    other = rows().assign(draft_length=6)
    assert np.isnan(tables.table1(other).loc["SSD"]["paper speed-up"])
    assert "paper speed-up" not in tables.table3(other).iloc[1:].dropna(axis=1)
    assert list(tables.versus_table1(other).paper)[4:] == ["–"] * 4


def test_table1_by_hand():
    line = tables.table1(rows()).loc["SSD"]
    assert line["WER %"] == pytest.approx(10.0)  # 1 of 10 words, not the mean of 50 % and 0 %
    assert line["LM-RTF"] == pytest.approx(1.0)
    assert line["speed-up"] == pytest.approx(4 / 5)  # sums: (4 s / 5 s) over (5 s / 5 s)
    assert line["speed-up a token"] == pytest.approx((2.0 + 0.5) / 2)  # median of the paired ratios
    assert line["acceptance"] == pytest.approx(0.5)
    assert line["WER_low"] <= line["WER %"] <= line["WER_high"]
    assert line["paper speed-up"] == pytest.approx(0.504 / 0.360)


def test_table3_and_figure3_by_hand():
    rows = three_systems()
    ssd = rows[rows.method == "speculative"]
    lossless = ssd.assign(tolerance=0.0, lm_seconds=2.5, word_errors=0)
    table = tables.table3(pd.concat([rows[rows.method == "autoregressive"], ssd, lossless], ignore_index=True))
    assert list(table.index) == ["Autoregressive", "0", "0.4"]
    assert list(table["speed-up"]) == pytest.approx([1, 0.8, 2 / 1.5])
    assert list(table["WER %"]) == pytest.approx([15, 0, 15])
    assert list(table["paper WER %"]) == [3.67, 6.34, 5.70]
    assert list(tables.readable(table).index) == [
        "Autoregressive", "*Autoregressive, paper*", "0", "*0, paper*", "0.4", "*0.4, paper*"]  # fmt: skip
    lengths = tables.figure3(pd.concat([ssd, ssd.assign(draft_length=5, lm_seconds=1.0)], ignore_index=True))
    assert list(lengths.index) == [3, 5] and list(lengths["speed-up"]) == pytest.approx([2 / 1.5, 2])
    assert lengths.loc[3, "paper speed-up"] == pytest.approx(1.4) and np.isnan(lengths.loc[5, "paper speed-up"])


def test_stages_by_hand():
    table = tables.stages(three_systems())
    assert table.loc["Autoregressive", "RTF"] == pytest.approx((2.0 + 0.5) / 4)
    assert table.loc["Autoregressive", "LM share %"] == pytest.approx(100 * 2.0 / 2.5)
    assert table.loc["Draft", "verify"] == 0 and table.loc["Draft", "draft"] == pytest.approx(0.9 / 4)
    assert table.loc["SSD", "RTF speed-up"] == pytest.approx(2.5 / 2.0)


@pytest.mark.parametrize("versus", [tables.versus_table1, tables.versus_figure3, tables.versus_stages,
                                    tables.versus_theory, tables.versus_listen])  # fmt: skip
def test_the_papers_numbers_stand_beside_ours(versus):
    rows = three_systems(10)
    if versus is tables.versus_theory:
        rows = geometric(0.7, 3)
    table = versus(rows)
    assert list(table.columns) == ["paper", "here"]
    assert table.paper.str.contains(r"1\.40|1\.25|^3$").any()  # speed-up 1.40; of the whole 1.25, derived; best L_d
    assert table.here.str.match(r"-?[0-9]|–").all()


def test_every_exhibit_belongs_to_a_notebook_with_a_reason():
    assert {exhibit.notebook for exhibit in report.EXHIBITS.values()} == set(report.WHY)
    for notebook in report.WHY:
        assert [name for name, e in report.EXHIBITS.items() if e.notebook == notebook and name.endswith("_paper")]


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
