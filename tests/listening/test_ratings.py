"""Ratings files in, Table 2 out. All ratings here are synthetic, and say so in every row."""

import json
import shutil

import fake_voice
import numpy as np
import pandas as pd
import pytest
from made_ratings import asked, make_test, session, write
from scipy import stats

from ssd_repro import cli
from ssd_repro.experiment import captions, provenance, report, statistics
from ssd_repro.listening import analyse, ratings
from ssd_repro.listening.power import Plan

pytest.importorskip("statsmodels", reason="the extra listen is not installed")
pytest.importorskip("pyloudnorm", reason="the extra listen is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    return make_test(fake_voice.FakeVoice(), folder), folder


@pytest.fixture
def key(built, tmp_path):
    """That of a test in tmp_path/test, made from the rows in tmp_path/results."""
    shutil.copytree(built[1], tmp_path, dirs_exist_ok=True)
    return built[0]


def sessions(key, count, seed=0, **about):
    dice = np.random.default_rng(seed)
    return [session(key, listener, dice, **about) for listener in range(1, count + 1)]


def analysed(capsys, folder, *more):
    """-> exit code, stdout, stderr."""
    code = cli.main(["listening-test", "analyse", str(folder), *map(str, more)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def changed(made, **answer):
    """The session with its first answer changed."""
    return made | {"answers": [made["answers"][0] | answer, *made["answers"][1:]]}


def first_of(key, part):
    return next(name for name, trial in asked(key, 1).items() if trial["part"] == part and not trial["check"])


def test_every_bad_file_is_left_out_by_name_with_its_reason(key, tmp_path):
    good = sessions(key, 3)
    one = good[0]
    foreign = next(name for name, trial in key["trials"].items() if 0 not in trial["groups"])
    same = {"answers": [a | {"value": 3} if key["trials"][a["trial"]]["system"] else a for a in one["answers"]]}
    bad = {
        "broken": ("{", "it is not JSON"),
        "notes": ('{"a": 1}', "it is no ratings file of this listening test"),
        "list": ("[1, 2]", "it is no ratings file of this listening test"),
        "other": (one | {"build": "fedcba"}, f"it is of build 'fedcba', not of {key['build']}"),
        "nobody": (one | {"listener": "Ann"}, "its listener is 'Ann', not a whole number from 1 on"),
        "no_answers": (one | {"answers": 5}, "its answers are not a list of objects"),
        "half": (one | {"answers": one["answers"][:-5]}, "5 of its 66 trials have no answer"),
        "twice": (one | {"answers": [*one["answers"], one["answers"][0]]}, "it answers a trial more than once"),
        "foreign": (changed(one, trial=foreign), f"it answers trial '{foreign}', which listener 1 was not asked"),
        "doubled": (good[1], "listener 2 has already rated in"),
        "all_3": (one | same, "its listener rated every sample of the part NAT 3"),
        "careless": (
            session(key, 9, np.random.default_rng(1), failed=2),
            "failed 2 of 6 attention checks, 1 is allowed",
        ),
    }
    for value in (0, 6, 3.0, 2.5, "3", True, None):
        number = sum(name.startswith("value") for name in bad)
        wrong = f"its answer to trial {one['answers'][0]['trial']} is {value!r}, not one of 1, 2, 3, 4, 5"
        assert key["trials"][one["answers"][0]["trial"]]["part"] != "ABX"
        bad[f"value_{number}"] = changed(one, value=value), wrong
    folder = tmp_path / "ratings"
    write(folder, good[1:])
    for name, (content, _) in bad.items():
        (folder / f"z_{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    heard = ratings.read([folder], key)
    assert heard.listeners == 2 and set(heard.rows.listener) == {2, 3} and heard.synthetic == len(heard.rows) == 2 * 66
    assert set(heard.left_out) == {str(folder / f"z_{name}.json") for name in bad}
    for name, (_, reason) in bad.items():
        assert reason in heard.left_out[str(folder / f"z_{name}.json")], name


def test_screening_allows_one_failed_check_and_refuses_one_rating_for_all(key, tmp_path):
    one_failed = session(key, 1, np.random.default_rng(0), failed=1)
    flat = session(key, 2, np.random.default_rng(0), spread=(0.0, 0.0, 0.0))
    heard = ratings.read(write(tmp_path / "ratings", [one_failed, flat]), key)
    assert set(heard.rows.listener) == {1}
    assert [*heard.left_out.values()] == ["its listener rated every sample of the part NAT 4"]


def test_too_few_listeners_get_no_means_and_are_told_how_many_more(key, tmp_path, capsys):
    folder = tmp_path / "test" / "ratings"
    write(folder, sessions(key, 5))
    (folder / "broken.json").write_text("{")
    code, out, err = analysed(capsys, folder)
    assert code == 2 and "MOS" not in out and f"left out: {folder / 'broken.json'}: it is not JSON" in out
    assert err == (
        "ssd-repro: 5 listeners count, 48 are needed to show equivalence within ± 0.25 with power 0.8: 43 more; no "
        "means until then\n"
    )


def test_a_test_of_too_few_utterances_says_so(fake, tmp_path, capsys):
    key = make_test(fake, tmp_path, 4)
    write(tmp_path / "test" / "ratings", sessions(key, 8))
    assert key["listeners"] is None
    code, _, err = analysed(capsys, tmp_path / "test" / "ratings")
    assert code == 2 and "no number of them is enough" in err and "build a test of more; no means until then" in err


def test_the_whole_analysis_carries_the_mark_of_synthetic_ratings(key, tmp_path, capsys):
    folder = tmp_path / "test" / "ratings"
    write(folder, sessions(key, 48, effects={"Draft": -0.8}, told=0.75))
    code, out, _ = analysed(capsys, folder)
    assert code == 0
    assert out.count("**SYNTHETIC RATINGS: 3168 of 3168 rows were given by no listener.**") == 2
    assert out.startswith("**SYNTHETIC") and "3.79 ± 0.15" in out and "3.92 ± 0.14" in out  # the paper's
    lines = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("|")}
    assert "shown equivalent" in lines["NAT-MOS"] and "shown equivalent" in lines["SIM-MOS"]
    draft, base = (float(lines[name].split("|")[3].split()[0]) for name in ("Draft", "Autoregressive"))
    assert base - draft == pytest.approx(0.8, abs=0.25)
    assert " 75 % [" in out or " 7" in out.split("X was told in")[1]
    code, _, err = analysed(capsys, folder, "--results", tmp_path / "results")
    assert code == 2 and "3168 ratings are synthetic: they do not go into" in err
    assert not (tmp_path / "results" / report.LISTENED).exists()


def test_ratings_that_are_not_marked_reach_table_2(key, tmp_path, capsys, monkeypatch):
    """The mark is taken off on reading, as if people had rated."""
    folder, results = tmp_path / "test" / "ratings", tmp_path / "results"
    write(folder, sessions(key, 48))
    read = ratings.read

    def unmarked(*arguments):
        heard = read(*arguments)
        heard.rows["synthetic"] = False
        return heard

    monkeypatch.setattr(analyse, "read", unmarked)
    code, out, _ = analysed(capsys, folder, "--results", results)
    assert code == 0 and "SYNTHETIC" not in out
    rows, about = report.rows_of_run(results, "01_table1")
    rows = rows.assign(words=np.nan, p808=3.9, ovrl=3.1, similarity=0.9, word_errors=0, char_errors=0, chars=1)
    text = report.show("table2", rows, results, about).data
    saved = pd.read_csv(results / report.LISTENED, index_col="system")
    assert f"{saved['NAT-MOS']['SSD']:.2f} [" in text and "not yet rated" not in text and "3.92 ± 0.14" in text
    newer = about | {"weights": "newer"}
    assert "not yet rated" in report.show("table2", rows, results, newer).data  # not of this voice
    entry = provenance.all_provenance(results)
    entry["01_table1"]["weights"] = "newer"
    (results / "provenance.json").write_text(json.dumps(entry))
    code, _, err = analysed(capsys, folder, "--results", results)
    assert code == 2 and "is not of voice fake, which the test is of" in err


def test_the_key_is_found_beside_or_above_or_named(key, tmp_path, capsys):
    files = write(tmp_path / "elsewhere", sessions(key, 1))
    code, _, err = analysed(capsys, files[0])
    assert code == 2 and "key.json is not the key.json of a listening test: give the one of the test with --key" in err
    assert "1 listeners count" in analysed(capsys, files[0], "--key", tmp_path / "test" / "key.json")[2]
    (tmp_path / "test" / "ratings").mkdir()
    assert "holds no ratings" in analysed(capsys, tmp_path / "test" / "ratings")[2]
    moved = files[0].rename(tmp_path / "test" / "ratings" / files[0].name)
    assert "1 listeners count" in analysed(capsys, moved)[2] + analysed(capsys, moved.parent)[2]


# statistics


def made_up(listeners, texts=24, difference=0.0, sd=(0.2, 0.2, 0.8), seed=0):
    """Ratings (not rounded) of two of four systems in a Latin square, by the plan's own model."""
    dice = np.random.default_rng(seed)
    by_listener, by_text = dice.normal(0, sd[0], listeners), dice.normal(0, sd[1], texts)
    own, text_own = dice.normal(0, 0.5, listeners), dice.normal(0, 0.3, texts)
    rows = [
        (n, t, ("Autoregressive", "Draft", "SSD", "other")[(t + n) % 4]) for n in range(listeners) for t in range(texts)
    ]
    frame = pd.DataFrame([row for row in rows if row[2] in ("Autoregressive", "SSD")])
    frame.columns = ["listener", "text", "system"]
    half = np.where(frame.system == "SSD", 0.5, -0.5)
    effect = difference + by_listener[frame.listener] + by_text[frame.text]
    noise = dice.normal(0, sd[2], len(frame))
    frame["value"] = 3.5 + own[frame.listener] + text_own[frame.text] + half * effect + noise
    return frame.assign(part="NAT", check=False)


def test_the_mixed_model_finds_what_was_put_in():
    """The mean difference of 4 sets is off by 0.08 / sqrt(4) = 0.04: a false failure of 1 in 5,000."""
    found = [analyse.mixed_model(made_up(48, difference=0.5, seed=seed), 0.25) for seed in range(4)]
    assert np.mean([fit["difference"] for fit in found]) == pytest.approx(0.5, abs=0.15)
    assert np.mean([fit["error"] for fit in found]) == pytest.approx(Plan(24).error(48), rel=0.2)
    assert np.mean([fit["sd"][0] for fit in found]) == pytest.approx(0.8, rel=0.1)
    for fit in found:  # by hand, from difference and error
        lower, upper = ((fit["difference"] + sign * 0.25) / fit["error"] for sign in (1, -1))
        assert fit["tost"] == pytest.approx(max(stats.norm.sf(lower), stats.norm.cdf(upper)))
        assert fit["p"] == pytest.approx(2 * stats.norm.sf(abs(fit["difference"]) / fit["error"]))
    assert analyse.mixed_model(made_up(48, seed=9), 0.25)["tost"] < 0.05 < min(fit["tost"] for fit in found)


def test_the_power_is_what_was_stated():
    """200 simulated tests of the planned listeners: the share shown equivalent has a sd of 0.03, four are allowed."""
    plan = Plan(24)
    assert plan.listeners() == 48 and plan.power_with(48) >= 0.8 > plan.power_with(44)
    means = [made_up(48, seed=seed).groupby("system").value.mean() for seed in range(200)]
    found = np.array([mean["SSD"] - mean["Autoregressive"] for mean in means])
    assert found.std() == pytest.approx(plan.error(48), rel=0.2)  # its own sd: 5 %
    shown = np.abs(found) + stats.norm.isf(plan.level) * plan.error(48) < plan.margin
    assert shown.mean() == pytest.approx(plan.power_with(48), abs=0.12)


def test_power_grows_with_listeners_and_texts_alone_limit_it():
    assert Plan(24).power_with(200) > Plan(24).power_with(48) > Plan(24).power_with(24) >= 0
    assert Plan(48).listeners() < Plan(24).listeners() and Plan(4).listeners() is None
    assert Plan(24, margin=0.5).listeners() < 24
    error = np.sqrt(0.2**2 / 48 + 0.2**2 / 24 + 2 * 0.8**2 / (48 * 6))
    assert Plan(24).error(48) == pytest.approx(error)


def test_the_bootstrap_resamples_both_listeners_and_texts():
    """Of one listener's own level alone, or one text's, the interval is that of the mean of so many of them."""
    listeners, texts = 40, 24
    grid = pd.DataFrame([(n, t) for n in range(listeners) for t in range(texts)], columns=["listener", "text"])
    grid = grid.assign(part="NAT", system="SSD", check=False)
    dice = np.random.default_rng(0)
    for column, count in (("listener", listeners), ("text", texts)):
        own = dice.normal(0, 1, count)
        draws = analyse.resampled(grid.assign(value=own[grid[column]]))["NAT", "SSD"]
        assert draws.std() == pytest.approx(own.std() / np.sqrt(count), rel=0.1)  # 2,000 draws: 1.6 % is one sd
        assert draws.mean() == pytest.approx(own.mean(), abs=0.02)


def test_abx_against_chance(key, tmp_path):
    heard = ratings.read(write(tmp_path / "ratings", sessions(key, 8, told=1.0)), key)
    text = analyse.abx(heard)
    assert "X was told in 96 of 96 trials, 100 % [96, 100]" in text and f"p = {2 * 0.5**96:.3g}" in text


def test_agreement_of_the_two_predictors():
    rows = pd.DataFrame({"distillmos": [1.0, 2.0, 3.0, 4.0, np.nan], "p808": [2.0, 4.0, 6.0, 8.0, 1.0]})
    assert "Correlation of DistillMOS with P808_MOS over 4 rows: 1." in report.machine_listeners(rows)
    assert report.machine_listeners(rows[["p808"]]) == captions.MACHINES
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    assert statistics.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
