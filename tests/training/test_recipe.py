"""The training notebooks, with real models of smoke size, on the bundled reference utterances."""

import hashlib
import json
from collections import Counter

import fake_voice
import matplotlib
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from notebook_code import run_notebook

import ssd_repro
from ssd_repro.errors import InputError
from ssd_repro.experiment import metrics
from ssd_repro.models.codec import Codec
from ssd_repro.speech.text import language, phone_ids
from ssd_repro.training import corpus, deployed, recipe
from ssd_repro.training.target import TargetOptions

matplotlib.use("agg")


def test_notebooks_11_to_13_make_a_voice_that_loads(tmp_path, monkeypatch):
    work, out = tmp_path / "work", tmp_path / "results"
    monkeypatch.setattr(metrics, "measure", fake_voice.fake_measure)
    monkeypatch.setattr(metrics, "speaker_embedding", lambda audio, rate: np.array([np.abs(audio).mean(), 1.0]))
    smoke = yaml.safe_load((ROOT / "notebooks" / "profiles" / "smoke.yaml").read_text())
    for name in ("11_codec", "12_target", "13_draft"):
        run_notebook(name, smoke, work=str(work), out=str(out))
    made = ssd_repro.load(work / "voice", device="cpu")
    assert made.target.model.config.num_hidden_layers == smoke["layers"]
    assert len(made.draft.model.layers) == 2
    assert set(made.front.about["references"]) == set(made.names)
    assert made.reference("bf_emma").std() > 0.01
    assert len((work / "tokens.jsonl").read_text().splitlines()) == 6
    provenance = json.loads((out / "provenance.json").read_text())
    files = {"11_codec": work / "codec.safetensors", "12_target": work / "target.safetensors"}
    for name, file in files.items():
        assert provenance[name]["weights"] == hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    assert provenance["13_draft"]["weights"] == made.weights_id
    assert (out / "figures" / "codec_losses.png").stat().st_size > 1000
    ablation = pd.read_csv(out / "tables" / "codec_ablation.csv", index_col=0)
    assert list(ablation.index[[0, 1, 4]]) == ["teacher", "reconstruction", "the whole training"]
    for name in ("11_codec", "12_target"):
        with pytest.raises(InputError, match="is of a run with learning_rate 0.001, now it is 0.5"):
            run_notebook(name, smoke, learning_rate=0.5, work=str(work), out=str(out))


def test_the_smoke_profile_names_parameters_of_the_training_notebooks():
    declared = Counter()
    for path in (ROOT / "notebooks").glob("1[1-37]_*.ipynb"):
        declared.update(line.split(":")[0] for cell in json.loads(path.read_text())["cells"]
                        if "parameters" in cell["metadata"].get("tags", []) for line in cell["source"])  # fmt: skip
    assert set(yaml.safe_load((ROOT / "notebooks" / "profiles" / "smoke.yaml").read_text())) <= set(declared)


class Teacher:
    def create(self, text, voice, speed, lang):
        return fake_voice.tone(len(text) / 15), corpus.SAMPLE_RATE


def test_notebook_10_speaks_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "load_teacher", lambda *_: Teacher())
    monkeypatch.setattr(corpus, "find_voices", lambda *_: None)
    monkeypatch.setattr(corpus, "find_teacher", lambda *_: None)
    made = run_notebook("10_corpus", lines=3, work=str(tmp_path), out=str(tmp_path))["made"]
    assert len(made) == 3 and not made.same.any()


def test_a_step_out_of_order_says_which_notebook_comes_first(tmp_path):
    steps = (
        lambda: recipe.read_weights(tmp_path / "x", Codec(), 11),
        lambda: recipe.open_corpus("", tmp_path),
        lambda: recipe.tokens_path("", tmp_path),
    )
    for step in steps:
        with pytest.raises(InputError, match="run notebook 1[01] first"):
            step()


def test_an_average_needs_something_to_average_with():
    with pytest.raises(InputError, match=r"average is 0.5 and begin is empty"):
        recipe.target_to_begin_from("", 0.5, TargetOptions())
    with pytest.raises(InputError, match="average is 2"):
        recipe.target_to_begin_from("bundled", 2, TargetOptions())


def test_the_bundled_tokens_are_of_the_manifest_and_what_a_draft_can_learn_from(tmp_path):
    path, manifest = recipe.tokens_path("bundled", tmp_path), corpus.read_metadata(corpus.MANIFEST)
    manifest, voice = {row["id"]: row for row in manifest}, ssd_repro.load(device="cpu")
    prompts = voice.front.about["prompts"]
    groups = deployed.voice_target(voice.target, 6561, voice.sampler, (1.2, 2.6), prompts).read(path)
    assert len(groups) == 3626
    for group in groups:
        name, _, number = group[0].id.partition("/")
        row = manifest[name]
        assert group[0].voice == row["voice"] and len(group[0].speech) == int(row["samples"]) // 960
        assert number == "0" and len(group) == 4 and all(len(one.speech) == len(one.aligned) for one in group)
        assert group[0].prompt_speech.tolist() == prompts[row["voice"]]["codes"]
    for group in groups[::100]:
        row = manifest[group[0].id.partition("/")[0]]
        assert group[0].text[:-1].tolist() == phone_ids(row["text"], language(row["voice"]))
