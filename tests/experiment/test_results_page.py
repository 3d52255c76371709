"""The results page: its numbers are those of the tables, it asks for nothing outside, and it works in a Chromium."""

import json
import os
import re
import shutil

import fake_voice
import pandas as pd
import pytest

from ssd_repro import cli
from ssd_repro.errors import InputError
from ssd_repro.experiment import metrics, page, provenance, report, run, samples, systems, tables, theory
from ssd_repro.experiment.systems import AUTOREGRESSIVE, System
from ssd_repro.speech import load, sentences

POINT = {"tolerance": 0.4, "draft_length": 3}
SSD = System("speculative", 0.4, 3)
GRIDS = {
    "01_table1": ("table1", [AUTOREGRESSIVE, System("draft"), SSD]),
    "02_tolerance": ("tolerance", [AUTOREGRESSIVE, *systems.grid([0.0, 0.4, 1.0])]),
    "03_draft_length": ("draft_length", systems.grid((), [1, 3, 5], scored=False)),
}
EVIL = "</script><img src=x onerror=alert(1)>"


def misheard(audio, rate, text, *_):
    """One word in three utterances is heard as markup."""
    wrong = len(audio) % 3 == 0
    transcript = f"{text.rpartition(' ')[0]} {EVIL}" if wrong else text
    return fake_voice.fake_measure(audio, rate, text, None) | {"word_errors": int(wrong), "transcript": transcript}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of four notebooks, their samples, and what ``report`` makes of them."""
    folder, voice = tmp_path_factory.mktemp("page") / "results", fake_voice.FakeVoice()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load", lambda *_, **__: voice)
        patch.setattr(metrics, "measure", misheard)
        patch.setattr(metrics, "load", lambda *_: None)
        patch.setattr(metrics, "models", lambda *_: {"whisper": "base", "speaker": "GE2E"})
        patch.setattr(provenance.LoadMeter, "other_load", lambda _: 0.0)
        for notebook, (name, grid) in GRIDS.items():
            rows = run.run(voice, grid, sentences.utterances(12, voice.names), folder, name, repeats=1)
            provenance.write_provenance(folder, notebook, voice, "quick", POINT, rows.key)
        assert cli.main(["samples", "--out", str(folder), "--sentences", "4"]) == 0
        patch.setattr(load, "load", lambda *_, **__: pytest.fail("a model was loaded"))
        assert cli.main(["report", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "results")


def text_of(folder):
    return (folder / page.NAME).read_text("utf-8")


def csv(folder, name):
    return pd.read_csv(folder / "tables" / f"{name}.csv", index_col=0)


def test_one_file_that_asks_for_nothing(folder):
    text = text_of(folder)
    asked = re.findall(r"""(?:src|href|action|data)=["']?([^"'\s>]+)|url\(([^)]+)\)|@import (\S+)""", text)
    asked = ["".join(each) for each in asked]
    local = re.compile(r"data:|#|https://arxiv\.org/abs/2505\.15380$")
    assert len(asked) > 20 and {each for each in asked if not local.match(each)} == {"x"}  # x: EVIL's, escaped
    assert EVIL not in text and len(text.encode()) < 6e6 and "<!-- " not in text
    assert len(set(re.findall(r'\bid="(.+?)"', text))) == len(re.findall(r'\bid="', text))


def test_numbers_are_those_of_the_tables(folder):
    text = text_of(folder)
    one = csv(folder, "table1").loc["SSD"]
    quality = csv(folder, "table1_quality").query("measure == 'WER, points'").loc["SSD, beta 0.4, L_d 3"]
    assert f"{one['speed-up']:.2f}× <small>[{one['speed-up_low']:.2f}, {one['speed-up_high']:.2f}]" in text
    assert f"WER {quality.difference:+.1f} points [{quality.low:+.1f}, {quality.high:+.1f}]" in text.replace("−", "-")
    assert "<b>1.40×</b>, WER +2.0 points" in text
    rows, _ = report.rows_of_run(folder, "01_table1")
    found = theory.predict(rows[rows.method == "speculative"], 3)
    draft, verify = found["draft / target step"], found["verification / target step"]
    values = [found["tokens per round"], one["tokens per target call"], draft, verify, 3 * draft + verify]
    assert "".join(f"<td>{value:.2f}</td>" for value in [*values, found["costs"]]) in text
    for name in ("table3", "figure3"):
        found = re.search(rf'id="slider-{name}".+?json">(.+?)</script>', text)[1]
        measured = csv(folder, name).drop(index="Autoregressive", errors="ignore")
        assert [float(each["at"]) for each in json.loads(found)] == [float(setting) for setting in measured.index]
        for setting, line in zip(json.loads(found), measured.to_dict("records"), strict=True):
            low, high = line["speed-up_low"], line["speed-up_high"]
            assert setting["here"][0] == tables.number(line["speed-up"], 2, low, high)
            assert setting["here"][-1] == f"{line['tokens per target call']:.2f}"
    for name in ("table1", "table3_quality", "figure3"):
        assert f'id="table-{name}"' in text and (name == "table3_quality" or f'id="figure-{name}"' in text)
    about = provenance.all_provenance(folder)["01_table1"]
    assert about["weights"] in text and about["chip"] in text and "ssd-repro run --profile quick --only 01" in text


def test_samples_are_the_rows_own_sound(folder):
    listed = json.loads((folder / "samples" / "samples.json").read_text())
    found = {row["key"]: row for row in map(json.loads, (folder / "rows" / "table1.jsonl").read_text().splitlines())}
    assert len(listed["samples"]) == 4 * 3 and listed["weights"] == "fake"
    import soundfile

    for sample in listed["samples"]:
        row = found[sample["key"]]
        sound = soundfile.info(folder / "samples" / sample["file"])
        assert sound.duration == pytest.approx(row["audio_seconds"], abs=0.1) and sound.channels == 1
        assert (sample["transcript"], sample["word_errors"]) == (row["transcript"], row["word_errors"])
        assert [kind for kind, _ in sample["heard"]] == (["", "wrong"] if row["word_errors"] else [""])
        if sample["rounds"][0]:
            kept = sum(accepted for _, accepted in sample["rounds"][0])
            assert f"accepted {kept}," in samples.timeline(sample)
    errors = [s["word_errors"] for s in listed["samples"] if s["system"].startswith("SSD")]
    assert errors == sorted(errors) and errors[-2:] == [1, 1]  # best first; two that failed


def test_samples_by_rule_alone():
    rows = [{"text_id": f"{i}", "voice": "a", "seed": i, "method": "speculative"} for i in range(10)]
    counts = {"tokens": [5] * 9 + [0], "words": 10, "word_errors": [0, 4, 0, 0, 1, 0, 0, 0, 0, 9]}
    systems = {"SSD": pd.DataFrame(rows).assign(**counts).set_index(samples.SAME, drop=False)}
    seeds = {count: [seed for *_, seed in samples.choose(systems, count)] for count in (1, 2, 4, 9, 50)}
    assert seeds == {1: [0], 2: [0, 1], 4: [0, 8, 4, 1], 9: seeds[50], 50: [0, 2, 3, 5, 6, 7, 8, 4, 1]}
    with pytest.raises(InputError, match="no utterance"):
        samples.choose({"SSD": systems["SSD"].assign(words=float("nan"))}, 4)


def test_wrong_and_missing_words_are_marked():
    text = "There's one, and there's another: the Dudley."
    assert samples.marked(text, text) == [["", text]]
    heard = samples.marked(text, "there is one and there's the dotly")
    assert heard == [["", "there is one and there's"], ["missing", "another:"], ["", "the"], ["wrong", "dotly"]]
    assert samples.marked("Good morning.", "") == [["missing", "Good morning."]]


def test_samples_of_another_voice_are_refused(copy, fake, capsys):
    fake.weights_id = "another"
    assert cli.main(["samples", "--out", str(copy)]) == 2
    assert "the rows are of voice fake, but the loaded one is another" in capsys.readouterr().err


def test_what_is_missing_is_left_out(copy):
    for path in (copy / "tables").glob("table3*"):
        path.unlink()
    listed = copy / "samples" / "samples.json"
    listed.write_text(listed.read_text().replace('"key": "', '"key": "x', 3))
    page.write(copy)
    assert "slider-table3" not in text_of(copy) and "slider-figure3" in text_of(copy)
    assert "3 samples are of rows that are no longer here" in text_of(copy)
    shutil.rmtree(copy / "samples")
    about = provenance.all_provenance(copy)
    (copy / "provenance.json").write_text(json.dumps({"03_draft_length": about["03_draft_length"]}))
    page.write(copy)
    assert samples.NOT_MADE in text_of(copy) and "Table 1 has not been run" in text_of(copy)
    assert 'id="table-table1"' not in text_of(copy) and 'id="table-figure3"' in text_of(copy)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
SCREENSHOTS = os.environ.get("SSD_REPRO_SCREENSHOTS")  # a folder: to look at what the test sees


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install your system's, such as chromium")
@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_page_in_a_browser(folder, size, scheme):
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra test is not installed: no playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] * (os.geteuid() == 0))
        opened, wrong = browser.new_page(viewport=SIZES[size], color_scheme=scheme), []
        opened.set_default_timeout(20_000)
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        opened.on("request", lambda asked: wrong.append(asked.url) if asked.url[:5] not in ("file:", "data:") else None)
        opened.goto((folder / page.NAME).as_uri())
        look(opened, f"{size}-{scheme}")
        check_players(opened)
        check_sliders(opened)
        check_sorting(opened)
        check_accessibility(opened)
        assert wrong == []
        browser.close()


def look(opened, name):
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert opened.locator("img").count() == 0 and opened.locator("mark").count() > 2  # EVIL is text
    if SCREENSHOTS:
        opened.screenshot(path=f"{SCREENSHOTS}/page-{name}.png", full_page=True)


def check_players(opened):
    """Sound in every player; the line moves along the tokens, and a click on them plays from there."""
    opened.wait_for_function("() => [...document.querySelectorAll('audio')].every(audio => audio.duration > 0)")
    assert opened.locator("audio").count() == 12 and opened.locator(".timeline path.accepted").count() == 4
    strip, at = (
        opened.locator(".timeline svg").first,
        "() => +document.querySelector('.timeline .head').getAttribute('x1')",
    )
    assert opened.evaluate(at) == 0 and opened.locator(".timeline p").first.text_content().startswith("tokens: ")
    box = strip.bounding_box()
    strip.click(position={"x": box["width"] / 2, "y": 10})
    begin = opened.evaluate("[...document.querySelectorAll('audio')].map(audio => audio.duration)[2]") * 25 / 2
    opened.wait_for_function(f"() => ({at})() > {0.9 * begin}")
    assert re.match(r"token \d+: ", opened.locator(".timeline p").first.text_content())
    opened.evaluate("document.querySelectorAll('audio')[5].play()")
    opened.wait_for_function(
        "() => [...document.querySelectorAll('audio')].filter(audio => !audio.paused).length === 1"
    )


def check_sliders(opened):
    for name, first, last in (("table3", "0", "1"), ("figure3", "1", "5")):
        knob, box = opened.locator(f"#range-{name}"), opened.locator(f"#slider-{name}")
        knob.press("Home")
        begin = box.locator("dd b").all_text_contents()
        assert box.locator("output").text_content() == first and all(begin)
        knob.press("End")
        assert box.locator("output").text_content() == last == knob.get_attribute("aria-valuetext")
        assert box.locator("dd b").all_text_contents() != begin


def check_sorting(opened):
    """Up, then down, by the numbers; the paper's lines stay below ours."""
    head = opened.locator("#table-table1 thead th").filter(has_text=re.compile("^speed-up$"))
    lines = (
        "[...document.querySelectorAll('#table-table1 tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
    )
    column, was = head.evaluate("cell => cell.cellIndex"), opened.evaluate(lines)
    for order in ("ascending", "descending"):
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == order
        now = opened.evaluate(lines)
        ours = [float(line[column].split()[0]) for line in now if not line[0].endswith(", paper")]
        assert ours == sorted(ours, reverse=order == "descending") and sorted(now) == sorted(was)
        assert all(b[0] == f"{a[0]}, paper" for a, b in zip(now[::2], now[1::2], strict=True))


def check_accessibility(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra test is not installed: no axe")
    found = axe.Axe().run(opened).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"][:200]) for each in found] == []
