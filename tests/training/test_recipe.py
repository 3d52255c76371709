"""The training notebooks, for real, at smoke size, on the bundled reference utterances."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import ssd_repro
from ssd_repro import cli
from ssd_repro.decoding.sampling import Sampler
from ssd_repro.errors import InputError
from ssd_repro.speech import sentences
from ssd_repro.speech.text import language, phone_ids
from ssd_repro.training import corpus, data, recipe
from ssd_repro.training.codec import Hint
from ssd_repro.training.splice import Utterance, read_utterances


def test_notebooks_11_to_13_make_a_voice_that_loads(tmp_path):
    work, out = tmp_path / "work", tmp_path / "results"
    code = cli.main(
        ["run", "--profile", "smoke", "--only", "11", "12", "13", "--out", str(out), "-p", "work", str(work)]
    )
    assert code == 0
    made = ssd_repro.load(work / "voice", device="cpu")
    assert made.target.model.config.num_hidden_layers == 4
    assert len(made.draft.model.layers) == 2
    assert set(made.about["references"]) == set(made.names)
    assert made.reference("bf_emma").std() > 0.01
    tokens = work / "tokens.jsonl"
    assert len(tokens.read_text().splitlines()) == 6
    provenance = json.loads((out / "provenance.json").read_text())
    files = {"11_codec": work / "codec.safetensors", "12_target": work / "target.safetensors"}
    for name, file in files.items():
        assert provenance[name]["weights"] == hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    assert provenance["13_draft"]["weights"] == made.weights_id
    for name in ("11_codec", "12_target", "13_draft"):
        cells = json.loads((out / f"{name}.ipynb").read_text())["cells"]
        assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert (out / "figures" / "codec_losses.png").stat().st_size > 1000


def test_notebook_15_measures_the_deployed_sampler_again_on_other_utterances(tmp_path):
    code = cli.main(["run", "--profile", "smoke", "--only", "15", "--out", str(tmp_path), "-p", "sentences", "1"])
    assert code == 0
    first, again = (pd.read_csv(tmp_path / "tables" / f"{name}.csv") for name in ("samplers", "samplers_again"))
    assert list(first.system) == list(recipe.SAMPLERS)
    deployed = [name for name, sampler in recipe.SAMPLERS.items() if sampler == recipe.SAMPLER]
    assert len(deployed) == 1 and again.system[0] == deployed[0] and 2 <= len(again) <= 3
    rows = [json.loads(line) for line in (tmp_path / "rows" / "samplers.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == len(first) + len(again)
    assert len({row["voice"] for row in rows}) == 2


def test_a_new_target_leaves_the_rows_of_teacher_and_codec(tmp_path, monkeypatch):
    made = []
    said = [sentences.Utterance("t", "a text", "af_heart", 0)]
    monkeypatch.setattr(recipe, "_render", lambda voice, system, *rest: made.append(system) or (np.ones(9), True))
    monkeypatch.setattr(recipe, "_similarity", lambda audio, reference: 0.5)
    monkeypatch.setattr(recipe, "Hint", lambda model: None)
    monkeypatch.setattr(recipe.metrics, "measure", lambda *rest: {"word_errors": 0})
    soundfile.write(tmp_path / "t_af_heart.flac", np.ones(9) / 2, 24_000)
    voice = SimpleNamespace(
        names=("af_heart",), weights_id="a", sampler=Sampler(), reference=lambda name: np.ones(9),
        about={"sha256": {"codec.safetensors": "c" * 64}, "references": {"af_heart": "x.flac"}},
    )  # fmt: skip

    def again(**changed):
        made.clear()
        vars(voice).update(changed)
        assert [row["system"] for row in recipe.voice_rows(voice, tmp_path, "", said, tmp_path)] == list(SYSTEMS)
        return made

    SYSTEMS = ("teacher", "codec", "autoregressive")
    assert again() == list(SYSTEMS)
    assert again() == []
    assert again(weights_id="b") == ["autoregressive"]
    assert again(sampler=Sampler(temperature=0.5)) == ["autoregressive"]
    assert again(about=voice.about | {"sha256": {"codec.safetensors": "d" * 64}}) == ["codec"]
    assert again(about=voice.about | {"references": {"af_heart": "y.flac"}}) == list(SYSTEMS)


def test_the_hint_leaves_torch_its_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Hint(recipe.find_hint())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("step", [lambda p: recipe.load_codec(p / "x"), lambda p: recipe.load_target(p / "x", 32, 4),
                                  lambda p: recipe.corpus_features(p, "", p)])  # fmt: skip
def test_a_step_out_of_order_says_which_notebook_comes_first(step, tmp_path):
    with pytest.raises(InputError, match="notebook 1"):
        step(tmp_path)


def test_an_average_needs_something_to_average_with(tmp_path):
    with pytest.raises(InputError, match="average is 0.5 and begin ''"):
        recipe.begun("", 0.5)
    with pytest.raises(InputError, match="average is 2"):
        recipe.begun("bundled", 2)


def test_code_statistics_count_what_is_there():
    made = [Utterance("a", "af_heart", [1, 2], [[0, 1, 1, 2]], [])]
    facts = recipe.code_statistics(made)["value"]
    assert facts["tokens"] == 4 and facts["codes used"] == 3
    assert facts["entropy, bits a token"] == 1.5
    assert facts["tokens per text token, least"] == 2


def test_voice_table_counts_errors_over_words_not_over_utterances():
    rows = pd.DataFrame({
        "system": ["teacher", "teacher"], "word_errors": [1, 0], "words": [2, 8], "p808": [3.0, 4.0], "ovrl": [3.0, 3.0],
        "similarity": [0.9, 0.9], "own_voice": [True, True], "length_ratio": [1.0, 1.4], "stopped": [True, False],
    })  # fmt: skip
    line = recipe.voice_table(rows).iloc[0]
    assert (
        line["WER %"] == 10.0 and line["P808"] == 3.5 and line["within 25 %"] == 0.5 and line["ended by itself"] == 0.5
    )


def test_the_bundled_tokens_are_of_the_manifest_and_what_a_draft_can_learn_from(tmp_path):
    path = recipe.tokens_file("bundled", tmp_path)
    utterances, manifest = read_utterances(path), {row["id"]: row for row in corpus.manifest()}
    assert len(utterances) == 2074 == len({u.id for u in utterances})
    for u in utterances:
        row = manifest[u.id]
        assert u.voice == row["voice"] and len(u.codes[0]) == int(row["samples"]) // 960 and len(u.codes) == 4
        assert max(max(codes) for codes in u.codes) < 6561
        assert [len(codes) for codes in u.codes] == [len(pairs) for pairs in u.aligned]
    for u in utterances[::100]:
        assert u.phones == phone_ids(manifest[u.id]["text"], language(u.voice))
    voice = ssd_repro.load(device="cpu")
    described = data.voice_target(voice.target, 6561, voice.sampler, (1.2, 2.6), voice.about["prompts"])
    groups = data.read_data(path, described)
    assert len(groups) == 2074 and groups[0][0].speech.tolist() == utterances[0].codes[0]
    with pytest.raises(InputError, match="run notebook 11 first"):
        recipe.tokens_file("", tmp_path)
