import numpy as np
import pandas as pd
import pytest
from made_rows import geometric, row, ssd, three_systems

from ssd_repro.errors import InputError
from ssd_repro.experiment import paper, report, tables


def rows():
    """Two utterances, three systems; numbers that sums and means tell apart."""
    own = {"voice": "v"}
    setting = {**own, "tolerance": 0.4, "draft_length": 3, "accepted": 10}
    first = {"word_errors": 1, "words": 2, "tokens": 25, "base_tokens": 25, "base_audio_seconds": 1.0}
    second = {"word_errors": 0, "words": 8, "tokens": 100}
    systems = ("autoregressive", 2.0, 2.0, own), ("draft", 1.0, 1.0, own), ("speculative", 1.0, 4.0, setting)
    made = []
    for method, one, two, fields in systems:
        ssd = method == "speculative"
        made.append(row(method, 0, one, 1.0, **first, **fields, **({"drafted": 10} if ssd else {})))
        made.append(row(method, 1, two, 4.0, **second, **fields, **({"drafted": 30} if ssd else {})))
    return pd.DataFrame(made)


def test_the_papers_numbers_stand_beside_the_papers_setting_alone():
    other = rows().assign(draft_length=6)
    assert np.isnan(tables.table1(other).loc["SSD"]["paper speed-up"])
    assert "paper speed-up" not in tables.table3(other).iloc[1:].dropna(axis=1)
    assert list(report.EXHIBITS["table1_paper"].table(other).paper)[4:] == ["–"] * 4


def test_ssd_otherwise_than_in_the_paper_has_labels_of_its_own_and_none_of_the_papers_numbers():
    plain = [ssd(i, [[3, 1], [3, 2]]) for i in range(2)]
    ways = {
        "SSD, hidden drafter, beta 0.4, L_d 3": {"drafter": "hidden"},
        "SSD, hidden drafter, beta 0.4, L_d 3, adaptive 0.2": {"drafter": "hidden", "confidence": 0.2},
        "SSD, paper drafter, beta 0.4, L_d 3, block": {"verification": "block"},
    }
    others = [ssd(i, [[3, 1]], **way) for way in ways.values() for i in range(3)]
    assert list(tables.by_system(pd.DataFrame(plain))) == ["SSD, beta 0.4, L_d 3"]
    found = tables.by_system(pd.DataFrame(plain + others))
    assert {label: len(of) for label, of in found.items()} == {"SSD, beta 0.4, L_d 3": 2, **dict.fromkeys(ways, 3)}
    assert [label for label, of in found.items() if len(paper.of_setting(of))] == ["SSD, beta 0.4, L_d 3"]
    assert len(tables.of_method(pd.DataFrame(plain + others), "speculative")) == 2


def test_table1_by_hand():
    line = tables.table1(rows()).loc["SSD"]
    assert line["WER %"] == pytest.approx(10.0)  # 1 of 10 words, not the mean of 50 % and 0 %
    assert line["LM-RTF"] == pytest.approx(1.0)
    assert line["speed-up"] == pytest.approx(4 / 5)  # sums: (4 s / 5 s) over (5 s / 5 s)
    assert line["speed-up per token"] == pytest.approx((2.0 + 0.5) / 2)  # median of the paired ratios
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
    shown = [label for name in table.index for label in (name, f"*{name}, paper*")]
    assert list(tables.readable(table).index) == shown
    lengths = tables.figure3(pd.concat([ssd, ssd.assign(draft_length=5, lm_seconds=1.0)], ignore_index=True))
    assert list(lengths.index) == [3, 5] and list(lengths["speed-up"]) == pytest.approx([2 / 1.5, 2])
    assert lengths.loc[3, "paper speed-up"] == pytest.approx(1.4) and np.isnan(lengths.loc[5, "paper speed-up"])


def test_stages_by_hand():
    table = tables.stages(three_systems())
    assert table.loc["Autoregressive", "RTF"] == pytest.approx((2.0 + 0.5) / 4)
    assert table.loc["Autoregressive", "LM share %"] == pytest.approx(100 * 2.0 / 2.5)
    assert table.loc["Draft", "target"] == 0 and table.loc["Draft", "draft"] == pytest.approx(0.9 / 4)
    assert table.loc["SSD", "RTF speed-up"] == pytest.approx(2.5 / 2.0)


@pytest.mark.parametrize("name", ["table1", "table3", "figure3", "figure1b", "theory", "listen"])
def test_the_papers_numbers_stand_beside_ours(name):
    rows = geometric(0.7, 3) if name == "theory" else three_systems(10)
    table = report.EXHIBITS[f"{name}_paper"].table(rows)
    assert list(table.columns) == ["paper", "here"]
    assert table.paper.str.contains(r"1\.40|1\.25").any()  # speed-up 1.40; of the whole 1.25, derived
    assert table.here.str.match(r"-?[0-9]|–").all()


EMPTY = {"empty": True, "tokens": 0, "pieces": [0], "token_kinds": "", "audio_seconds": 0.0, "drafted": 0}
EMPTY |= {"accepted": 0, "acceptance_rate": None, "p808": np.nan, "similarity": np.nan}


def with_empty(rows, chosen):
    """The rows, of which those ``chosen`` came out empty."""
    return pd.DataFrame([{**r, **EMPTY} if hit else r for r, hit in zip(rows.to_dict("records"), chosen, strict=True)])


@pytest.mark.filterwarnings("error")
def test_empty_utterances_are_counted_and_nothing_divides_by_them(tmp_path):
    rows = three_systems(10)
    two = with_empty(rows, (rows.method == "speculative") & rows.text_id.isin(["0", "1"]))
    line, before = tables.table1(two).loc["SSD"], tables.table1(rows).loc["SSD"]
    assert line["LM-RTF"] == pytest.approx(15 / 32) and line["n"] == 10  # their time counts, they have no sound
    assert line["speed-up per token"] == before["speed-up per token"]  # of those that say something
    assert "SSD: 2 of 30 rows are empty utterances." in report.caveats(two) and not report.caveats(rows)
    assert not report.caveats(rows.drop(columns="empty"))  # rows made before there was the field
    for name in ("table1", "table1_paper", "figure1b", "figure1b_paper", "figure3", "figure3_paper"):
        report.EXHIBITS[name].table(two)
    none = with_empty(rows, rows.method == "speculative")
    assert tables.table1(none).loc["SSD", ["LM-RTF", "RTF", "speed-up", "speed-up per token"]].isna().all()
    for name in ("table1", "table1_paper", "figure1b", "figure3", "theory", "theory_paper", "listen_paper"):
        exhibit = report.EXHIBITS[name]
        text = tables.markdown(exhibit.readable(exhibit.table(none)))
        assert "–" in text and "nan" not in text and "inf" not in text, name
    assert report.findings(none).startswith("Timed on")  # no sentence of what is not known


def test_pairs_are_by_utterance_and_not_by_order():
    table = tables.table1(rows())
    assert tables.table1(rows()[::-1]).equals(table)
    with pytest.raises(InputError, match="not of the same utterances"):
        tables.table1(rows().iloc[:-1])


def test_bootstrap_covers_the_mean_of_a_known_distribution():
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(40):  # 95 % intervals: fewer than 32 of 40 happens once in 10,000 such tests
        low, high = tables.bootstrap(lambda x: x.mean(-1), rng.normal(3.0, 1.0, 60), draws=300, seed=seed)
        inside += low <= 3.0 <= high
    assert inside >= 32


def test_put_between_replaces_only_what_is_between():
    text = "a\n<!-- t -->\nold\n<!-- /t -->\nb"
    assert report.put_between(text, "t", "new") == "a\n<!-- t -->\nnew\n<!-- /t -->\nb"
    with pytest.raises(InputError, match="markers"):
        report.put_between("no marks", "t", "new")
