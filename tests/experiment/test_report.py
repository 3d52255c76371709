"""``ssd-repro report`` and the sliders: everything from rows alone, and decoding in place."""

import json
import re
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from made_rows import geometric, three_systems

from ssd_repro import cli, files
from ssd_repro.errors import InputError
from ssd_repro.experiment import architectures, figures, interactive, provenance, report, run, studies, systems, theory
from ssd_repro.experiment.systems import AUTOREGRESSIVE, System
from ssd_repro.speech import load, sentences

POINT = {"tolerance": 0.4, "draft_length": 3}
GRIDS = {
    "00_listen": ("listen", [AUTOREGRESSIVE, System("draft"), System("speculative", 0.4, 3)]),
    "01_table1": ("table1", [AUTOREGRESSIVE, System("draft"), System("speculative", 0.4, 3)]),
    "02_tolerance": ("tolerance", [AUTOREGRESSIVE, *systems.grid([0.0, 0.4, 1.0])]),
    "03_draft_length": ("draft_length", systems.grid((), [1, 3, 5], scored=False)),
    "04_stages": ("table1", [AUTOREGRESSIVE, System("speculative", 0.4, 3)]),
    "05_acceptance": ("acceptance", systems.grid([0.0, 0.4, 1.0], [1, 3, 5], [0.7, 1.0], scored=False)),
    "06_theory": ("theory", systems.grid([0.0, 0.4, 1.0], [1, 3, 5], scored=False)),
}


def fill(voice, folder):
    """The rows and the provenance of all result notebooks, small."""
    for notebook, (name, grid) in GRIDS.items():
        said = sentences.utterances(1 if notebook == "00_listen" else 6, voice.names)
        rows = run.run(voice, grid, said, folder, name, repeats=1)
        provenance.write_provenance(folder, notebook, voice, "quick", POINT, rows.key)
    said = sentences.utterances(2, voice.names)
    at = {"profile": "quick", "repeats": 1, "longest": 6, "compile": False, "seed": 0, **POINT}
    at |= {
        "sizes": [],
        "thread_counts": [1],
        "draft_lengths": [3],
        "price_tokens": 6,
        "price_repeats": 1,
        "seconds": [1],
        "batches": [1, 2],
    }
    studies.Study("07_bench", at, folder, voice, [], said).compare()
    studies.Study("08_growth", at, folder, voice, [System("speculative", 0.4, 3, scored=False)], said).grow()
    at |= {"betas": [1.0], "mixtures": [0.5], "ranks": [2], "epsilons": [0.1], "cosines": [0.5], "entropies": [1.0]}
    heard = [AUTOREGRESSIVE, System("speculative", None, 3, rule="ensemble:0.5")]
    studies.Study("09_price_of_tolerance", at, folder, voice, heard, said).price(heard)
    others = [System("speculative", beta, 3, drafter=n, scored=False) for n in (None, "n-gram") for beta in (0.0, 0.4)]
    studies.Study("18_drafters", at, folder, voice, [], said).decode([replace(AUTOREGRESSIVE, scored=False), *others])
    rows = architectures.measure([voice], architectures.systems(0.4, 3), said, folder, repeats=1)
    architectures.recorded(rows, [voice], folder, "quick", POINT)


def test_report_makes_everything_from_rows_alone(fake, tmp_path, monkeypatch):
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    fill(fake, folder)
    decodes, before = len(fake.calls), (folder / "provenance.json").read_bytes()
    blocks = ["table1", "table3", "figure3", "theory_paper"]
    cell = "n is <!-- = results/tables/table3.csv; beta=0.4; n; .1f -->{}<!-- /= -->\n"
    readme.write_text(
        "top\n" + "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in blocks) + cell.format("old")
    )
    monkeypatch.setattr(load, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    command = ["report", "--out", str(folder), "--readme", str(readme)]
    assert cli.main(command) == 0
    assert len(fake.calls) == decodes and (folder / "provenance.json").read_bytes() == before
    for name, exhibit in report.EXHIBITS.items():
        assert len(pd.read_csv(folder / "tables" / f"{name}.csv")), name
        text = (folder / "tables" / f"{name}.md").read_text()
        assert text.startswith("| ") and "`ssd-repro run --profile quick" in text
        assert text.splitlines()[0].count("|") - 1 <= 7, name  # what a page has room for
        assert not re.search(r"-0\.?0*(?![.\d])|(\d+\.\d+) \[\1, \1\]", text.partition("\n\n")[0]), name
        for kind in ("svg", "png", "pdf"):
            assert (folder / "figures" / f"{name}.{kind}").exists() == (exhibit.draw is not None)
    text = readme.read_text()
    assert text.startswith("top\n<!-- table1 -->\n| system") and text.endswith(cell.format("6.0")) and "old" not in text
    assert "*SSD, paper*" in text and "of the judged drafts are accepted" in text
    assert all(path.stat().st_size < 5e6 for path in folder.rglob("*.*"))
    made = {path: path.read_bytes() for path in (folder / "tables").iterdir()}
    monkeypatch.setattr(figures, "save", lambda *_: None)  # of figures test_run.py says this
    assert cli.main(command) == 0 and readme.read_text() == text
    assert made == {path: path.read_bytes() for path in made}  # once more: the same


def test_the_committed_tables_are_those_of_the_committed_rows(tmp_path, monkeypatch):
    committed, folder = ROOT / "results" / "mini", tmp_path / "results" / "mini"
    shutil.copytree(committed / "rows", folder / "rows")
    shutil.copy(committed / "provenance.json", folder)
    monkeypatch.chdir(tmp_path)  # captions name the folder from here on
    monkeypatch.setattr(figures, "save", lambda *_: None)
    made = report.report(folder)
    ran = provenance.all_provenance(committed)
    assert made == [name for name, exhibit in report.EXHIBITS.items() if exhibit.notebook in ran] and len(made) > 12
    for path in (committed / "tables").iterdir():
        assert (folder / "tables" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((folder / "tables").iterdir())) == 2 * len(made)


def test_report_leaves_what_has_not_run(fake, tmp_path, capsys):
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    rows = run.run(fake, GRIDS["01_table1"][1], sentences.utterances(2, fake.names), folder, "table1")
    provenance.write_provenance(folder, "01_table1", fake, "quick", POINT, rows.key)
    readme.write_text("<!-- table3 -->\nold\n<!-- /table3 -->\n")
    assert cli.main(["report", "--out", str(folder), "--readme", str(readme)]) == 0
    assert readme.read_text() == "<!-- table3 -->\nold\n<!-- /table3 -->\n"
    assert not (folder / "tables" / "table3.md").exists() and (folder / "tables" / "table1.md").exists()
    path = folder / "rows" / "table1.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    assert cli.main(["report", "--out", str(folder)]) == 2
    assert "lacks 1 rows of that run: run 01_table1 again" in capsys.readouterr().err


def test_numbers_in_sentences(tmp_path):
    """Markers name one cell of a table below README's folder; the number is made anew, and only the number."""
    (tmp_path / "table3.csv").write_text("beta,n\n0,5\n0.4,6\n")
    cell = "<!-- = table3.csv; beta=0.4; n; .1f -->"
    text = f"n is {cell}7<!-- /= -->, <!-- = none.csv; n; .0f -->8<!-- /= -->."
    assert report.CELL.sub(lambda found: report._cell(found, tmp_path), text) == text.replace(">7<", ">6.0<")
    for wrong in ("beta=0.3; n", "beta=0.4; m", "n"):
        found = report.CELL.match(f"<!-- = table3.csv; {wrong}; .1f -->7<!-- /= -->")
        with pytest.raises(InputError, match="does not name one number"):
            report._cell(found, tmp_path)


def test_the_results_page_has_the_numbers_of_the_committed_tables():
    page = ROOT / "results" / "README.md"
    text = page.read_text("utf-8")
    assert len(report.CELL.findall(text)) > 10
    assert report.CELL.sub(lambda found: report._cell(found, page.parent), text) == text


ELSEWHERE = {"device": "cuda", "chip": "H100 w/ SXM", "precision": "bf16", "whisper": "models/large-v3"}


def test_findings_say_what_the_rows_show_and_nothing_else():
    here = geometric(0.7, 3, draft=0.01, verify=0.03, target=0.02)
    elsewhere = geometric(0.9, 5, draft=0.002, verify=0.022, target=0.02, tolerance=0.2, **ELSEWHERE)
    alpha, predicted = (theory.predict(here, 3)[name] for name in ("alpha", "costs"))
    assert alpha == pytest.approx(0.7, abs=0.01)
    assert report.findings(here) == (
        f"SSD, beta 0.4, L_d 3: {alpha:.2f} of the judged drafts are accepted; a draft step costs 0.50, a verification "
        f"1.50 target steps. These predict a speed-up per token of {predicted:.2f}; measured: {predicted:.2f}. "
        "Timed on AMD EPYC (cpu, fp32). WER by Whisper base, SS by GE2E."
    )
    text = report.findings(elsewhere)
    assert text.startswith("SSD, beta 0.2, L_d 5: 0.90 of") and "costs 0.10, a verification 1.10 target" in text
    assert text.endswith("Timed on H100 w/ SXM (cuda, bf16). WER by Whisper large-v3, SS by GE2E.")
    assert "(cuda, graphs, bf16)" in report.findings(elsewhere.assign(runtime="graphs"))
    both = report.findings(pd.concat([here, elsewhere], ignore_index=True))
    assert both.startswith(f"SSD, beta 0.2 to 0.4, L_d 3 to 5: {alpha:.2f} to 0.90 of") and "base and large-v3" in both
    assert "Whisper" not in report.findings(here.assign(words=np.nan))  # nothing was scored


def test_no_caption_explains_what_it_cannot_know():
    """The captions that stand under any rows name no machine or model of ours."""
    for name, exhibit in report.EXHIBITS.items():
        if isinstance(exhibit.note, str):
            assert not re.search("CPU|Whisper|GE2E|vocoder|bundled|differ:", exhibit.note), name
        assert (exhibit.note is report.findings) == name.endswith("_paper")


def test_captions_warn_where_the_machine_was_not_idle(tmp_path):
    about = dict.fromkeys(("date", "device", "chip", "torch", "weights", "profile", "commit"), "x") | {
        "dirty": False,
        "threads": 1,
    }
    rows = three_systems(10)
    busy = rows.assign(other_load=[0.9] * 3 + [0.1] * 27)
    text = report.show("table1_paper", busy, tmp_path, about).data
    assert "Warning: the machine was not idle: other work ran beside 10 % of these rows." in text
    for idle in (rows, rows.assign(other_load=0.1), rows.assign(other_load=np.nan)):
        assert "not idle" not in report.show("table1_paper", idle, tmp_path, about).data


def test_report_of_nothing_is_one_sentence(tmp_path, capsys):
    assert cli.main(["report", "--out", str(tmp_path)]) == 2
    assert "holds no provenance.json" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    (tmp_path / "provenance.json").write_text(json.dumps({"10_corpus": {}}))
    with pytest.raises(InputError, match="tells of no result notebook"):
        report.report(tmp_path)


def test_two_runs_into_one_folder(fake, tmp_path, capsys):
    with files.locked(tmp_path / ".run.lock"):
        for command in ("run", "report"):
            (tmp_path / "provenance.json").write_text("{}")
            assert cli.main([command, "--out", str(tmp_path)]) == 2
            assert "another run is writing into" in capsys.readouterr().err
    assert fake.calls == []


def test_the_notes_say_that_it_decodes(fake, monkeypatch):
    shown, notes = interactive.Listener(fake, sentences.Utterance("a", "A sentence.", "af_heart", 5), 0.4, 3), []
    shown.note.observe(lambda change: notes.append((change.new, len(fake.calls))), "value")
    shown.draft_length.value = 2
    assert notes[0] == ("decoding ...", 2) and notes[-1][0] != "decoding ..." and len(notes) == 2


def test_a_slider_that_needs_no_kernel_is_one_element_without_requests():
    emitted = {"beta 0: exact": [0.5, 0.3, 0.2], "beta 1: the draft": [0.2, 0.3, 0.5]}
    page = interactive.tolerance_slider([0.2, 0.3, 0.5], [0.5, 0.3, 0.2], emitted, 0).data
    figure = ElementTree.fromstring(page.replace("<br>", "<br/>").replace("></label>", "/></label>"))
    assert figure.tag == "figure" and "http" not in page and "<script" not in page
    bars = {kind: figure.findall(f".//rect[@class='{kind}']") for kind in ("draft", "target", "emitted")}
    heights = {kind: [float(bar.get("height")) for bar in found] for kind, found in bars.items()}
    assert heights["emitted"] == heights["target"] == heights["draft"][::-1]
    frames = json.loads(figure.find(".//input").get("data-frames"))
    assert [frame["text"] for frame in frames] == list(emitted) and figure.find("output").text == "beta 0: exact"
    assert frames[1]["height"] == heights["draft"] and figure.find(".//input").get("max") == "1"


def test_sliders_decode_again_and_redraw_in_place(fake):
    shown = interactive.Listener(fake, sentences.Utterance("a", "A sentence to hear.", "af_heart", 5), 0.4, 3)
    player, timeline, calls = shown.player.value, shown.timeline.value, len(fake.calls)
    assert timeline[:4] == b"\x89PNG" and "<audio" in player and "<audio" in shown.target.value and calls == 2
    widgets = shown.widget.children
    shown.draft_length.value = 6
    assert fake.calls[2:] == [("speculative", 5)] and shown.widget.children is widgets
    assert shown.timeline.value != timeline and shown.player.value != player
    longer = shown.player.value
    shown.tolerance.value = 0.9
    assert len(fake.calls) == 4 and shown.player.value != longer
    assert "times as fast as" in shown.note.value
    shown.speaker.value, alone = "am_michael", shown.target.value
    assert len(fake.calls) == 6 and shown.target.value != alone  # another voice: the target alone, too
    heard = shown.player.value
    shown.text.value = " "
    assert "text" in shown.note.value and shown.player.value == heard and len(fake.calls) == 6
    assert not shown.tolerance.continuous_update  # one decode a slide, not one a pixel
