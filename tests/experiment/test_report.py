"""``ssd-repro report`` and the sliders: everything from rows alone, and decoding in place."""

import json

import pandas as pd
import pytest
from conftest import ROOT

from ssd_repro import cli, files
from ssd_repro.errors import InputError
from ssd_repro.experiment import interactive, provenance, report, run, systems
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
    for notebook, (name, systems) in GRIDS.items():
        said = sentences.utterances(1 if notebook == "00_listen" else 6, voice.names)
        rows = run.run(voice, systems, said, folder, name, repeats=1)
        provenance.write_provenance(folder, notebook, voice, "quick", POINT, rows.key)


def test_report_makes_everything_from_rows_alone(fake, tmp_path, monkeypatch):
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    fill(fake, folder)
    decodes, before = len(fake.calls), (folder / "provenance.json").read_bytes()
    blocks = ["table1", "table3", "figure3", "theory_paper"]
    readme.write_text("top\n" + "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in blocks) + "end\n")
    monkeypatch.setattr(load, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    command = ["report", "--out", str(folder), "--readme", str(readme)]
    assert cli.main(command) == 0
    assert len(fake.calls) == decodes and (folder / "provenance.json").read_bytes() == before
    for name, exhibit in report.EXHIBITS.items():
        assert len(pd.read_csv(folder / "tables" / f"{name}.csv")), name
        text = (folder / "tables" / f"{name}.md").read_text()
        assert text.startswith("| ") and "`ssd-repro run --profile quick`" in text
        assert (folder / "figures" / f"{name}.svg").exists() == (exhibit.draw is not None)
    text = readme.read_text()
    assert text.startswith("top\n<!-- table1 -->\n| system |") and text.endswith("end\n") and "old" not in text
    assert "*SSD, paper*" in text and report.WHY["06_theory"] in text
    made = {path: path.read_bytes() for kind in ("tables", "figures") for path in (folder / kind).iterdir()}
    assert max(map(len, made.values())) < 5e6
    assert cli.main(command) == 0 and readme.read_text() == text
    assert made == {path: path.read_bytes() for path in made}  # once more: the same


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


def test_numbers_in_sentences(fake, tmp_path, capsys):
    """Markers name one cell of a table below README's folder; report writes the number, and only the number."""
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    fill(fake, folder)
    cell = "<!-- = results/tables/table3.csv; beta=0.4; n; .1f -->"
    readme.write_text(f"n is {cell}7<!-- /= -->, <!-- = none.csv; n; .0f -->8<!-- /= -->.\n")
    command = ["report", "--out", str(folder), "--readme", str(readme)]
    assert cli.main(command) == 0
    text = readme.read_text()
    assert text == f"n is {cell}6.0<!-- /= -->, <!-- = none.csv; n; .0f -->8<!-- /= -->.\n"
    readme.write_text(text.replace("beta=0.4", "beta=0.3"))
    assert cli.main(command) == 2 and "does not name one number" in capsys.readouterr().err


def test_readme_has_the_numbers_of_the_committed_tables():
    text = (ROOT / "README.md").read_text()
    assert report.CELL.sub(lambda found: report._cell(found, ROOT), text) == text


def test_other_models_get_no_explanation_of_the_bundled_voice(fake, tmp_path):
    rows = run.run(fake, GRIDS["01_table1"][1], sentences.utterances(8, fake.names), tmp_path, "table1")
    about = provenance.write_provenance(tmp_path, "01_table1", fake, "quick", POINT, rows.key)
    assert report.WHY["01_table1"] in report.show("table1_paper", rows, tmp_path, about).text
    text = report.show("table1_paper", rows.assign(front_end="upstream"), tmp_path, about).text
    assert report.WHY["01_table1"] not in text and report.WHY_OTHERS in text


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


def test_sliders_decode_again_and_redraw_in_place(fake):
    shown = interactive.Listener(fake, sentences.Utterance("a", "A sentence to hear.", "af_heart", 5), 0.4, 3)
    player, timeline, calls = shown.player.value, shown.timeline.value, len(fake.calls)
    assert timeline[:4] == b"\x89PNG" and "<audio" in player and calls == 1
    widgets = shown.widget.children
    shown.draft_length.value = 6
    assert fake.calls[1:] == [("speculative", 5)] and shown.widget.children is widgets
    assert shown.timeline.value != timeline and shown.player.value != player
    longer = shown.player.value
    shown.tolerance.value = 0.9
    assert len(fake.calls) == 3 and shown.player.value != longer
    assert not shown.tolerance.continuous_update  # one decode a slide, not one a pixel
