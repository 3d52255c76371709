"""Notebook 17: tiny voices of three families from training to table, and its table on rows with known answers."""

import gzip
from dataclasses import replace
from itertools import islice

import pandas as pd
import pytest
import yaml
from conftest import ROOT
from fake_voice import FakeVoice
from made_rows import geometric, row
from notebook_code import run_notebook

from ssd_repro.errors import InputError
from ssd_repro.experiment import architectures, metrics, report
from ssd_repro.files import read_rows, write_text
from ssd_repro.speech import load
from ssd_repro.training import recipe


def made(family="llama", weights="w", alpha=0.8, draft=0.002, verify=0.022, step=0.02):
    """AR of WER 10 %, SSD at beta 0 (unscored) and .4 of one word more in 10 utterances; prices as given."""
    frames = [pd.DataFrame([row("autoregressive", i, 2.0, words=10, word_errors=1) for i in range(40)])]
    for beta, chance in ((0.0, alpha - 0.2), (0.4, alpha)):
        prices = {"draft": draft, "verify": verify, "target": step}
        ours = geometric(chance, 3, **prices, tolerance=beta, words=10, word_errors=1)
        if beta:
            ours.loc[:9, "word_errors"] = 2
        else:
            ours["words"] = float("nan")
        frames.append(ours)
    about = {"study": "family", "family": family, "parameters": 15e6, "layers": 12, "processes": 1}
    rows = pd.concat([*frames, pd.DataFrame([about])], ignore_index=True).assign(weights=weights)
    rows["base_tokens"], rows["base_prefill_seconds"] = rows.tokens, 0.0
    return rows


def test_table_by_hand():
    rows = pd.concat([made(), made("gpt_neox", "v", alpha=0.5, draft=0.012)], ignore_index=True)
    table = architectures.table(rows)
    assert list(table.index) == ["Llama", "GPT-NeoX"] and list(table["parameters, M"]) == [15, 15]
    llama, neox = (table.loc[name] for name in table.index)
    assert llama["WER %"] == pytest.approx(10) and llama["more WER"] == pytest.approx(100 * 10 / 400)
    assert llama["c, beta 0.4"] == pytest.approx(0.1) and llama["V, beta 0.4"] == pytest.approx(1.1)
    assert llama["price, beta 0.4"] == pytest.approx(1.4)
    expected = 1 + 0.8 + 0.8**2 + 0.8**3
    assert llama["tokens a round, beta 0.4"] == pytest.approx(expected, rel=0.05)
    for at in ("beta 0", "beta 0.4"):
        assert llama[f"predicted, {at}"] == pytest.approx(llama[f"tokens a round, {at}"] / llama[f"price, {at}"])
    assert llama["speed-up, beta 0.4"] == pytest.approx(llama["predicted, beta 0.4"], rel=0.05)
    assert llama["speed-up, beta 0.4_low"] < llama["speed-up, beta 0.4"] < llama["speed-up, beta 0.4_high"]
    assert neox["price, beta 0"] == pytest.approx(3 * 0.6 + 1.1) and neox["speed-up, beta 0.4"] < 1


def test_the_conclusion_says_where_it_does_not_hold_and_why():
    fast, slow = made(), made("gpt_neox", "v", alpha=0.5, draft=0.012)
    said = architectures.conclusion(pd.concat([fast, slow], ignore_index=True))
    llama, neox, whole = said.split("\n\n")
    assert llama.count("it holds") == 2 and "does not hold" not in llama
    assert neox.count("it does not hold") == 2 and "most of it the drafts (1.80)" in neox and "c 0.60" in neox
    assert whole == "The gain holds at beta 0 on 1 of 2; at beta 0.4 on 1 of 2 families."
    assert "most of it the verification" in architectures.conclusion(made(alpha=0.3, verify=0.05))


def test_the_tables_to_read():
    table = architectures.table(made())
    assert list(architectures.reasons(table).index) == ["Llama, beta 0", "Llama, beta 0.4"]
    assert "[" in architectures.speeds(table)["speed-up, beta 0.4"].iloc[0]


def test_each_voice_is_measured_once(fake, tmp_path):
    voices = [FakeVoice("a"), FakeVoice("b")]
    asked, said = architectures.systems(0.4, 3), fake.utterances(2)
    rows = architectures.measure(voices, asked, said, tmp_path, repeats=1)
    assert rows.groupby("weights").size().to_dict() == {"a": 7, "b": 7}
    again = architectures.measure(voices, asked, said, tmp_path, repeats=1)
    assert list(again.key) == list(rows.key) and len(read_rows(tmp_path / "rows" / "architectures.jsonl")) == 14
    lossless = rows[(rows.method == "speculative") & (rows.tolerance == 0)]
    assert not lossless.scored.any() and rows[rows.tolerance == 0.4].scored.all()
    about = architectures.recorded(rows, voices, tmp_path, "x", {"trained": "/somewhere", "work": "", "seed": 1})
    assert about["weights"] == "a, b" and about["parameters"] == {"trained": "", "work": "", "seed": 1}


def test_notebook_from_training_to_table(fake, monkeypatch, tmp_path):
    """Real tiny voices of all three families, on the eager runtime; the metrics are fakes."""
    monkeypatch.undo()
    import fake_voice

    monkeypatch.setattr(metrics, "measure", fake_voice.fake_measure)
    monkeypatch.setattr(metrics, "load", lambda *_: None)
    monkeypatch.setattr(metrics, "models", lambda whisper="", speaker="": {"whisper": whisper, "speaker": speaker})
    loaded, cut = [], load.load

    def shortened(path, **how):
        voice = cut(path, **how)
        config = voice.front.config
        voice.front.config = lambda n, **fields: replace(config(n, **fields), max_tokens=12, min_tokens=4)
        loaded.append(voice)
        return voice

    monkeypatch.setattr(load, "load", shortened)
    smoke = yaml.safe_load((ROOT / "notebooks" / "profiles" / "smoke.yaml").read_text())
    with gzip.open(recipe.MANIFEST.with_name("tokens.jsonl.gz"), "rt") as every:
        few = "".join(islice(every, 60))  # the whole corpus is read and aligned for minutes
    (tmp_path / "tokens.jsonl").write_text(few)
    folders = {name: str(tmp_path / name) for name in ("work", "out")} | {"tokens": str(tmp_path / "tokens.jsonl")}
    with pytest.raises(InputError, match="-p train true"):
        run_notebook("17_architectures", smoke, **folders, train=False)
    space = run_notebook("17_architectures", smoke, **folders)
    kinds = [voice.target.model.config.model_type for voice in loaded]
    assert kinds == ["llama", "qwen3", "gpt_neox"] and {voice.runtime for voice in loaded} == {"eager"}
    paths = [tmp_path / "work" / "architectures" / family / "voice" for family in ("llama", "gpt_neox")]
    assert [cut(path).runtime for path in paths] == ["openvino", "eager"]
    with pytest.raises(InputError, match="choose (runtime )?eager"):
        cut(paths[1], runtime="openvino")
    rows = space["rows"]
    assert len(rows) == 3 * (3 * smoke["sentences"] + 1) and rows.weights.nunique() == 3
    table = pd.read_csv(tmp_path / "out" / "tables" / "architectures.csv", index_col="family")
    assert list(table.index) == ["Llama", "Qwen3", "GPT-NeoX"] and (table["price, beta 0.4"] > 0).all()
    text = (tmp_path / "out" / "tables" / "architectures_why.md").read_text()
    assert "GPT-NeoX, beta 0.4" in text
    write_text(tmp_path / "out" / "tables" / "architectures.csv", "")
    assert report.report(tmp_path / "out") == ["architectures", "architectures_why"]
    assert len(pd.read_csv(tmp_path / "out" / "tables" / "architectures.csv")) == 3
