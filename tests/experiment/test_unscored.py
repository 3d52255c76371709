"""Rows without scores, as a GPU makes them: tables, figures and the page show speed, and '–' for the words."""

import json
import re

import pandas as pd
import pytest
from made_rows import geometric, three_systems

from ssd_repro import cli
from ssd_repro.experiment import metrics, page, provenance, report

GPU = {"device": "cuda", "chip": "NVIDIA H100", "precision": "bf16", "runtime": "graphs"}


def unscored(folder, asked):
    """Rows and provenance of notebooks 01, 02 and 04 as `run` leaves them without scores; ``asked``: for them."""
    rows = pd.concat([three_systems(10), geometric(0.8, 3, 10, tolerance=0.0, drafter="hidden")], ignore_index=True)
    rows = rows.drop(columns=["whisper", "speaker"]).assign(**GPU, **metrics.UNSCORED, scored=asked)
    lines = rows.astype(object).where(rows.notna() | rows.columns.isin(metrics.UNSCORED), None).to_dict("records")
    (folder / "rows").mkdir(parents=True)
    (folder / "rows" / "table1.jsonl").write_text("".join(f"{json.dumps(line, default=float)}\n" for line in lines))
    about = {
        **{"date": "2026-01-01T00:00:00", "commit": "abc", "dirty": False, "code": "c", "weights": "fake", "cores": 16},
        **{"profile": "mini", "chip": "NVIDIA H100", "device": "cuda", "threads": 1, "torch": "2", "python": "3"},
        **{"system": "Linux", "versions": {}, "keys": [row["key"] for row in lines]},
        "parameters": {"tolerance": 0.4, "draft_length": 3, "sentences": 10, "runtime": "graphs"},
    }
    whole = dict.fromkeys(("01_table1", "02_tolerance", "04_stages"), about)
    (folder / "provenance.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("asked", [False, True])
def test_rows_without_scores(tmp_path, asked):
    folder = tmp_path / "gpu"
    unscored(folder, asked)
    assert cli.main(["report", "--out", str(folder)]) == 0
    ran = provenance.all_provenance(folder)
    made = [name for name, exhibit in report.EXHIBITS.items() if exhibit.notebook in ran and not exhibit.of_folder]
    assert not (folder / "tables" / "tradeoff.md").exists() and len(made) > 8
    for name in made:
        assert (folder / "tables" / f"{name}.md").is_file(), name
        assert (folder / "figures" / f"{name}.png").is_file() == (report.EXHIBITS[name].draw is not None), name
    table = pd.read_csv(folder / "tables" / "table1.csv", index_col="system")
    assert table.loc["SSD", "speed-up"] > 1 and table["WER %"].isna().all()
    text = (folder / "tables" / "table1.md").read_text()
    assert "–" in text and "nan" not in text.lower() and "NMOS |" not in text.splitlines()[0]
    assert "-p sentences 10 -p runtime graphs" in text
    assert "not scored" in (folder / "tables" / "equivalence.md").read_text()
    shown = (folder / page.NAME).read_text("utf-8")
    assert "WER not scored" in shown and "NVIDIA H100" in shown
    assert not re.search(r"\bnan\b", shown)
    assert ('id="table-table1_quality"' in shown) == asked  # else it would be empty
