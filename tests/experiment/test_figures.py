"""Figures: titles that are computed, labels that do not touch, and tables that fit a page."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from made_rows import geometric, row, three_systems

from ssd_repro.experiment import curves, figures, report, rows, speed, statistics, style, tables, tradeoff

PAPERS = {"tolerance": 0.4, "draft_length": 3}


@pytest.fixture(autouse=True)
def quick_and_closed(monkeypatch):
    monkeypatch.setitem(statistics.bootstrap.__kwdefaults__, "draws", 50)
    plt.switch_backend("agg")
    yield
    plt.close("all")


def drawn(name, made):
    """The exhibit's figure of these rows, laid out."""
    exhibit = report.EXHIBITS[name]
    table = exhibit.table(made, **({"tolerance": 0.4, "draft_length": 3} if exhibit.at_setting else {}))
    figure, axes = plt.subplots(*exhibit.shape, figsize=exhibit.size, layout="constrained")
    exhibit.draw(table, axes)
    figure.canvas.draw()
    return figure


def title(name, made):
    return drawn(name, made).get_suptitle().replace("\n", " ").replace("\xa0", " ")


def several(slow=1.5, errors=0):
    """AR, draft, and SSD at beta 0 and .4, L_d 1 and 3, and with another drafter."""
    base = three_systems(10)
    ssd = base[base.method == "speculative"].assign(lm_seconds=slow)
    ssd["synthesis_seconds"], ssd["word_errors"] = ssd.lm_seconds + 0.5, ssd.word_errors + errors
    rounds = [[[0, 0], *[[3, 2]] * 20]]
    ssd["rounds"], ssd["pieces"] = [rounds] * len(ssd), [[60]] * len(ssd)
    other = [ssd.assign(tolerance=0.0, lm_seconds=2.5), ssd.assign(draft_length=1, lm_seconds=1.8)]
    hidden = [ssd.assign(drafter="hidden", draft_length=2, tolerance=b, lm_seconds=1.2) for b in (0.0, 0.4)]
    found = [base[base.method != "speculative"], ssd, *other, *hidden]
    return pd.concat([part if "drafter" in part else part.assign(drafter=None) for part in found], ignore_index=True)


def chosen(name, made):
    """Those rows that the exhibit's notebook decodes."""
    papers = made.drafter.isna() if "drafter" in made else True
    ssd = (made.method == "speculative") & papers
    if name in ("table1", "table1_quality", "table2", "figure1b", "figure1b_paper"):
        return made[~ssd | ((made.draft_length == 3) & (made.tolerance == 0.4))]
    return made[~ssd | (made.draft_length == 3)] if name == "table3" else made


@pytest.mark.parametrize("name", ["table1", "table3", "figure3", "figure1b", "theory", "tradeoff", "acceptance"])
def test_titles_say_what_the_rows_say(name):
    if name in ("theory", "acceptance"):
        first, second = (geometric(alpha, 3, tolerance=0.4) for alpha in (0.6, 0.9))
        second["lm_seconds"] = 1.3 * second.lm_seconds
    else:
        first, second = (chosen(name, made) for made in (several(1.5), several(1.0, errors=1)))
    before, after = title(name, first), title(name, second)
    assert re.search(r"\d", before) and before != after


def test_titles_by_hand():
    assert title("table1", chosen("table1", several())) == (
        "SSD: 1.33 times the target's speed, WER +0.0 points (the paper: 1.40, +2.0); SSD, hidden drafter, "
        r"$\beta$ = 0, $L_d$ = 2: 1.67 times the target's speed, WER +0.0 points"
    )
    assert title("tradeoff", several(errors=1)) == (
        r"SSD, $\beta$ = 0.4, $L_d$ = 3: 1.33 times the speed for +10.0 points of WER here, 1.40 times the speed for "
        r"+2.0 points of WER in the paper; lossless at best 1.67 times (hidden drafter, $\beta$ = 0, $L_d$ = 2)"
    )
    assert title("figure1b", several()).startswith("The language model takes 80 % of the target's synthesis")


def boxes(ax):
    """The boxes of an axes' own texts (points' labels, tick labels) that are seen."""
    texts = [*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels()]
    return [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text() and t.get_visible()]


def test_labels_of_table1_do_not_touch():
    """Also where the paper's value and the next system's are the same."""
    near = tables.table1(chosen("table1", several()))
    near["WER %"] = [5.2, 9.1, 5.9, 5.5, 5.7]
    near["WER_low"], near["WER_high"] = near["WER %"] - 1.5, near["WER %"] + 1.5
    figure, axes = plt.subplots(1, 2, figsize=report.EXHIBITS["table1"].size, layout="constrained")
    figures.table1(near, axes)
    figure.canvas.draw()
    for ax in axes:
        found = boxes(ax)
        assert len(found) >= 8
        for i, (text, box) in enumerate(found):
            for other, against in found[:i]:
                assert not box.overlaps(against), (text, other)
    assert not any(box.overlaps(figure._suptitle.get_window_extent()) for ax in axes for _, box in boxes(ax))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["table1", "figure1b", "figure3", "theory", "tradeoff"])
def test_what_was_not_spoken_is_drawn_all_the_same(name):
    made = chosen(name, geometric(0.6, 3) if name == "theory" else several()).reset_index(drop=True)
    silent = made.method == "speculative"
    empty = {"tokens": 0, "audio_seconds": 0.0, "drafted": 0, "accepted": 0}
    made.loc[silent, list(empty)] = list(empty.values())
    made["pieces"] = [[0] if gone else pieces for gone, pieces in zip(silent, made.pieces, strict=True)]
    made["rounds"] = [[[]] if gone else rounds for gone, rounds in zip(silent, made.rounds, strict=True)]
    assert "nan" not in title(name, made)


def test_a_system_has_one_colour_and_the_papers_points_are_hollow():
    names = "Autoregressive", "Draft", "SSD", "SSD, hidden drafter, beta 0, L_d 2", "transformers generate"
    assert len({tuple(np.ravel(style.colour(name))) for name in names}) == len(names)
    for one, same in (
        ("SSD", "SSD, beta 0.4, L_d 3"),
        ("SSD", "ours, SSD, beta 0 (eager)"),
        ("Draft", "the paper's draft"),
        ("SSD, hidden drafter, beta 0.4, L_d 2", "ours, hidden-state drafter, beta 0 (eager)"),
        ("Autoregressive", "ours, autoregressive (openvino)"),
    ):
        assert style.colour(one) == style.colour(same)
    assert style.hollow("SSD")["markerfacecolor"] == "white" and style.hollow("SSD")["color"] == style.colour("SSD")
    assert style.maths("SSD, beta 0.4, L_d 3, alphabet") == r"SSD, $\beta$ = 0.4, $L_d$ = 3, alphabet"


# Tables on a page


def test_numbers_on_a_page():
    assert tables.number(1.0, 2, 1.0, 1.0) == "1"  # a system beside itself
    assert tables.number(1.001, 2, 0.999, 1.004) == "1.00"  # its interval would say the same again
    assert tables.number(-0.001, 2, -0.02, 0.01) == "0.00 [-0.02, 0.01]" and tables.number(-0.0001, 2) == "0.00"
    assert tables.number(np.nan, 2) == "–"
    one = tables.speed_columns(several().iloc[[0]])
    assert one["speed-up"] == 1 and np.isnan(one["speed-up_low"])  # of one utterance no interval


def test_pages_have_at_most_seven_columns_and_the_csv_has_all(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda *_: None)
    about = dict.fromkeys(("date", "device", "chip", "torch", "weights", "profile", "commit"), "x") | {"dirty": False}
    about |= {"threads": 1, "parameters": PAPERS}
    made = several().assign(base_lm_seconds=2.0001)
    for name in ("table1", "table1_quality", "table1_paper", "table2", "table3_quality", "figure1b", "figure1b_paper"):
        text = report.show(name, chosen(name, made), tmp_path, about).data
        head = text.splitlines()[0]
        assert head.count("|") - 1 <= 7, name
        assert not re.search(r"-0\.?0*(?![.\d])", text.partition("\n\n")[0]), name
        assert not re.search(r"(\d+\.\d+) \[\1, \1\]", text), name
        assert len(pd.read_csv(tmp_path / "tables" / f"{name}.csv").columns) >= head.count("|") - 1
    assert "CER %" in pd.read_csv(tmp_path / "tables" / "table1.csv") and "CER" not in report.EXHIBITS["table1"].page


# The trade-off


def test_tradeoff_by_hand():
    table = tradeoff.of_rows(several(errors=1))
    here = table[table["of"] == "here"]
    assert list(here.index[:2]) == ["Autoregressive", "Draft"] and len(here) == 7
    line = here.loc["SSD, beta 0.4, L_d 3"]
    assert line["speed-up"] == pytest.approx(2 / 1.5) and line["WER rise"] == pytest.approx(10)
    assert (line["WER_low"], line["WER_high"]) < (line["WER %"], 100)
    paper = table[table["of"] == "paper"]
    assert len(paper) == 7 and paper.loc["the paper's SSD, beta 0.4, L_d 3", "WER rise"] == pytest.approx(5.70 - 3.67)
    unscored = several().assign(words=[np.nan if r == 1 else 10 for r in several().draft_length])
    assert "SSD, beta 0.4, L_d 1" not in tradeoff.of_rows(unscored).index


def test_tradeoff_compares_the_same_utterances_and_counts_its_own():
    """A notebook may have taken more utterances than another: they count for the WER, not for its rise."""
    more = row("speculative", 99, 1.5, word_errors=0, tolerance=0.4, draft_length=3, drafted=80, accepted=60)
    line = tradeoff.of_rows(pd.concat([several(), pd.DataFrame([more])])).loc["SSD, beta 0.4, L_d 3"]
    assert line["n"] == 11 and line["WER rise"] == 0 and line["WER %"] == pytest.approx(100 * 45 / 110)


def test_tradeoff_has_the_scored_rows_of_all_notebooks_of_its_voice(tmp_path):
    import json

    made = several().assign(key=[f"{i:016}" for i in range(len(several()))])
    first = made[made.draft_length.isna() | (made.drafter == "hidden")]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "all.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in json.loads(made.to_json(orient="records")))
    )
    about = {"weights": "x", "keys": list(first.key)}
    ran = {"01_table1": about, "02_tolerance": {"weights": "x", "keys": list(made.key)}}
    (tmp_path / "provenance.json").write_text(json.dumps(ran))
    assert len(report.scored_rows(tmp_path, first, about)) == len(made)
    ran["02_tolerance"]["weights"] = "another"
    (tmp_path / "provenance.json").write_text(json.dumps(ran))
    assert len(report.scored_rows(tmp_path, first, about)) == len(first)


# The timeline


def test_rounds_and_sound_of_the_timeline():
    line = {"rounds": [[[0, 0], [3, 2], [3, 3]]], "pieces": [8], "gap_seconds": 0.2, "token_kinds": "ss.sssss"}
    events = figures.timeline_events(line)
    assert list(events[events.kind == "accepted"]["round"]) == [1, 1, 2, 2, 2]
    seconds, heights = zip(*figures.envelope(line), strict=True)
    assert seconds[2] == pytest.approx(0.08) and heights[2] < heights[0] == heights[3]
    loud = figures.envelope({**line, "loudness": "zzazzzzt"})
    assert loud[0][1] == 1 and loud[2][1] < 0.01 and loud[7][1] == pytest.approx(10 ** (-6 * rows.DECIBELS / 20))
    assert figures.envelope({**line, "token_kinds": ""}) == []


def test_figures_of_speed_say_what_they_show():
    sizes = pd.DataFrame(
        {
            "size": ["2x128", "4x128"],
            "drafter": "one layer",
            "weights, MB": [1.0, 4.0],
            **{"predicted speed-up": [0.9, 1.6], "c": 0.2, "c's floor": 0.1, "V": 1.2, "V's floor": 1.0},
            **{"threads": [1, 2], "L_d": [1, 3]},
        }
    )
    lengths = pd.DataFrame(
        {
            **{
                f"{system}, {unit}": [1.0, 2.0] for system in ("autoregressive", "SSD") for unit in ("ms / token", "MB")
            },
            **{"speed-up": [1.1, 1.3], "floor, ms": 0.5, "cache, MB": 1.0, "both caches, MB": 1.5},
        },
        index=[5.0, 60.0],
    )
    for draw, table, said in (
        (speed.draw_sizes, sizes, "0.90 to 1.60 with one layer"),
        (speed.draw_settings, sizes, "1.60: $L_d$ = 3, threads: 2"),
        (speed.draw_lengths, lengths, "1.10 for 5 s, 1.30 for 60 s"),
    ):
        figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
        draw(table, axes)
        assert said in figure.get_suptitle().replace("\n", " ").replace("\xa0", " ")


def test_losses_are_in_words_and_units():
    log = pd.DataFrame({"step": [1, 2], "speech": [3.0, 2.5], "dev_speech": [np.nan, 2.6]})
    ax = plt.figure().subplots()
    figures.losses(log, "speech", ax)
    assert "nats" in ax.get_ylabel() and ax.get_xlabel() == "training step"
    assert ax.get_title("left") == "held out: from 2.60 to 2.60"
    assert set(curves.PREDICTIONS) <= set(tables.measured_and_predicted(geometric(0.6, 3)))
