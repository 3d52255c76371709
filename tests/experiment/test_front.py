"""README's first screen: three paragraphs that follow the tables."""

import json
from pathlib import Path

import pandas as pd
import pytest

from ssd_repro.errors import InputError
from ssd_repro.experiment import front

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "results" / "mini"
PAGE = "top\n\n**Measured:** old\n\n| | WER %, here | old\n\n**Why:** old\n\nend\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of the committed tables, to be changed."""
    made = tmp_path / "mini"
    (made / "tables").mkdir(parents=True)
    for name in ("table1.csv", "theory.csv"):
        (made / "tables" / name).write_bytes((COMMITTED / "tables" / name).read_bytes())
    return made


def change(path: Path, system: str, **values) -> None:
    table = pd.read_csv(path).set_index("system")
    for name, value in values.items():
        table.loc[system, name] = value
    table.to_csv(path)


def test_readme_says_what_the_committed_tables_say():
    text = (ROOT / "README.md").read_text("utf-8")
    assert front.renew(text, COMMITTED) == text


def test_numbers_follow_the_tables(folder):
    change(folder / "tables" / "table1.csv", "SSD", **{"speed-up": 1.777, "WER %": 33.3, "tokens per target call": 3.5})
    made = front.renew(PAGE, folder)
    assert "old" not in made and made.startswith("top\n\n**Measured:** with") and made.endswith("\n\nend\n")
    claim, table, why = (next(p for p in made.split("\n\n") if p.startswith(begin)) for begin in front.BEGINS)
    assert "1.78 [" in claim and "33.3 %" in claim and "gives 3.50 tokens" in why
    row = next(line for line in table.splitlines() if line.startswith("| SSD, beta 0.4, the paper's recipe |"))
    assert row.startswith("| SSD, beta 0.4, the paper's recipe | 33.3 | 1.78 [") and row.endswith("| 5.7 | 1.40 |")


def test_the_fastest_lossless_drafter_is_shown(folder):
    path = folder / "tables" / "table1.csv"
    table = pd.read_csv(path)
    lossless = table[table.system.str.contains("beta 0,")].iloc[0]
    extra = {**lossless, "system": "SSD, other drafter, beta 0, L_d 1", "speed-up": 3.0}
    pd.concat([table, pd.DataFrame([extra])]).to_csv(path, index=False)
    made = front.renew(PAGE, folder)
    assert "| SSD, other drafter, beta 0, L_d 1 |" in made and lossless.system not in made
    table[~table.system.str.contains("drafter")].to_csv(path, index=False)
    assert "beta 0" not in front.renew(PAGE, folder).replace("beta 0.4", "")


def test_the_tolerant_one_costs_no_more_words_than_the_papers(folder):
    path = folder / "tables" / "table1.csv"
    table = pd.read_csv(path)
    one, base = table[table.system.str.contains("drafter, beta 0.4")].iloc[0], table.set_index("system")["WER %"]
    extra = [
        {
            **one,
            "system": f"SSD, other drafter, beta 0.4, L_d {n}",
            "speed-up": 2.0 + n,
            "WER %": base["Autoregressive"] + n,
        }
        for n in (1, 2, 3)
    ]
    pd.concat([table, pd.DataFrame(extra)]).to_csv(path, index=False)
    made = front.renew(PAGE, folder)
    assert "beta 0.4, L_d 2 |" in made and "other drafter, beta 0.4, L_d 3" not in made


def test_a_gpus_paragraph_comes_from_the_folder_beside(folder):
    page = PAGE.replace("**Why:** old", "**On a GPU** old\n\n**Why:** old")
    assert "**On a GPU** old" in front.renew(page, folder)  # no such folder: it stays
    gpu = folder.parent / "gpu"
    (gpu / "tables").mkdir(parents=True)
    (gpu / "tables" / "table1.csv").write_bytes((ROOT / "results" / "gpu" / "tables" / "table1.csv").read_bytes())
    (gpu / "provenance.json").write_bytes((ROOT / "results" / "gpu" / "provenance.json").read_bytes())
    change(gpu / "tables" / "table1.csv", "SSD", **{"speed-up": 1.999})
    said = front.renew(page, folder).partition("**On a GPU**")[2].partition("\n\n")[0]
    assert (
        "H200" in said and "recipe is 2.00 [" in said and "own speech 1.5" in said and "best drafter makes it" in said
    )
    assert "another voice than above" in said  # this folder has no provenance
    (folder / "provenance.json").write_bytes((gpu / "provenance.json").read_bytes())
    assert "another voice" not in front.renew(page, folder)


def test_the_words_of_the_lossless_drafter_are_of_this_voice_alone(folder):
    known = pd.read_csv(folder / "tables" / "table1.csv")
    name = known[known.system.str.contains("beta 0, ")].sort_values("speed-up").system.iloc[-1]
    (folder / "provenance.json").write_bytes((ROOT / "results" / "mini" / "provenance.json").read_bytes())
    voice = json.loads((folder / "provenance.json").read_text())["01_table1"]["weights"]
    path = folder.parent / "voice" / "tables" / "lossless.csv"
    path.parent.mkdir(parents=True)
    line = {"system": name, "WER difference": 0.02, "WER difference_low": -0.7, "WER difference_high": 0.8, "n": 300}
    for whose, equivalent, words in (
        (
            voice,
            "yes",
            "Its words, on 300 utterances: 0.0 [-0.7, 0.8] points of WER from the target's (90 %), equivalent",
        ),
        (voice, "not shown", "equivalence within one point not shown."),
        ("another", "yes", None),
    ):
        pd.DataFrame([{**line, "equivalent": equivalent, "voice": whose}]).to_csv(path, index=False)
        made = front.renew(PAGE, folder)
        assert words in made if words else "Its words" not in made
    few = pd.DataFrame([{**line, "n": 150, "equivalent": "yes"}, {**line, "system": "SSD", "n": 0, "equivalent": ""}])
    few.to_csv(folder / "tables" / "equivalence.csv", index=False)  # the folder's own
    assert "Its words, on 150 utterances: 0.0 [-0.7, 0.8]" in front.renew(PAGE, folder)


def test_a_page_without_a_paragraph_is_refused_and_others_stay(folder, tmp_path):
    with pytest.raises(InputError, match="0 paragraphs that begin with"):
        front.renew(PAGE.replace("**Why:** old\n\n", ""), folder)
    assert front.renew("another page\n", folder) == "another page\n"
    (folder / "tables" / "theory.csv").unlink()
    assert front.renew(PAGE, folder) == PAGE
