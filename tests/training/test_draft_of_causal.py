"""A draft for a causal model of transformers: both recipes through the one trainer, and the folder that comes out."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from tiny_models import EOS, tiny, uncached
from transformers import AutoModelForCausalLM

from ssd_repro import cli, load_draft, speculative_generate
from ssd_repro.errors import InputError
from ssd_repro.models.draft import own_parameters
from ssd_repro.training import draft as draft_module
from ssd_repro.training.data import Example
from ssd_repro.training.deployed import load_target
from ssd_repro.training.hidden import HiddenTask
from ssd_repro.training.loop import Settings

pytest.importorskip("accelerate", reason="the extra scale is not installed")
FAST = {"steps": 6, "batch": 6, "warmup": 2, "save_every": 3, "precision": "fp32", "learning_rate": 3e-3}
VOCAB = 24  # text 3 to 11, speech 12 to 23


@pytest.fixture(scope="module", params=[("llama", False), ("gemma3", True)], ids=["llama", "gemma3-tied"])
def world(request, tmp_path_factory):
    """A target's folder in bf16, sampled with a repetition penalty, and a data folder of 12 rows."""
    family, tied = request.param
    folder = tmp_path_factory.mktemp(family)
    model = tiny(family, layers=6, vocab=VOCAB, tie_word_embeddings=tied, dtype=torch.bfloat16)
    settings = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    model.generation_config.update(**settings, max_new_tokens=20, eos_token_id=[EOS, 2])
    model.save_pretrained(folder / "target")
    rng, lines = random.Random(1), []
    for i in range(12):
        text, speech = ([rng.randrange(a, b) for _ in range(n)] for a, b, n in ((3, 12, 4), (12, VOCAB, 5 + i)))
        lines.append(json.dumps({"id": f"u{i}", "text_ids": text, "speech": speech}) + "\n")
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_text("".join(lines))
    return folder


def train(world, out, recipe, drafter="paper", **settings):
    folders, settings = (world / "target", world / "data", out), Settings(**(FAST | settings))
    how = {"drafter": drafter, "held_out": 3, "device": "cpu", "log": lambda _: None}
    return draft_module.train(*folders, settings, recipe, **how)


@pytest.mark.parametrize("recipe", ["paper", "on-policy"])
def test_both_recipes(world, recipe, tmp_path):
    draft, rows = train(world, tmp_path, recipe)
    assert len(rows) == 2 and 0 < rows[-1]["dev_acceptance"] < 1 and rows[-1]["dev_loss"] < 6
    again, same = train(world, tmp_path, recipe)  # it is done: read from the folder
    assert same == rows and not (tmp_path / "checkpoint.pt").exists()
    model = AutoModelForCausalLM.from_pretrained(world / "target")
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and plain.dtype == torch.bfloat16
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(set(file.keys())) == len(list(plain.named_parameters()))  # each tensor once
    assert str(world) not in (tmp_path / "config.json").read_text()
    card = (tmp_path / "README.md").read_text()
    assert "base_model: target" in card and f"recipe {recipe}" in card and str(world) not in card
    if model.config.model_type != "llama":
        return  # soft caps need eager attention, which from_pretrained does not remember
    shared = load_draft(tmp_path, model)
    assert shared.get_input_embeddings().weight is model.get_input_embeddings().weight
    ids = torch.randint(3, VOCAB, (2, 9))
    assert torch.equal(uncached(plain, ids), uncached(shared, ids))
    moved = uncached(draft.model.bfloat16(), ids) - uncached(plain, ids)
    assert moved.abs().max() < 0.1 < (uncached(plain, ids) - uncached(model, ids)).abs().max()
    said = model.generate(ids, custom_generate=speculative_generate, assistant_model=shared)
    assert said.shape[0] == 2 and said.shape[1] > 9


@pytest.mark.parametrize("recipe", ["paper", "on-policy"])
def test_a_hidden_drafter_learns_goes_on_after_a_kill_and_speaks(world, recipe, tmp_path, monkeypatch):
    settings = {"steps": 20, "save_every": 5, "learning_rate": 1e-2, "drafter": "hidden"}
    drawn = []

    def killed(task, items, rng):
        drawn.append(len(items))
        if len(drawn) > 12:
            raise RuntimeError("killed")
        return items

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(HiddenTask, "draw", killed)
        train(world, tmp_path / "killed", recipe, **settings)
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    draft, rows = train(world, tmp_path / "killed", recipe, **settings)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"] and 0 < rows[-1]["dev_acceptance_4"] < 1
    whole, same = train(world, tmp_path / "whole", recipe, **settings)
    own = own_parameters(draft)
    assert all(torch.equal(value, own[name]) for name, value in own_parameters(whole).items())
    assert [row["loss"] for row in same] == [row["loss"] for row in rows]

    folder = tmp_path / "whole"
    about, card = json.loads((folder / "draft.json").read_text()), (folder / "README.md").read_text()
    assert about["layers"] == {"rank": 128, "taps": [2, 4, 6]} and "after layers 2, 4, 6" in card
    assert f"recipe {recipe}" in card and str(world) not in card and not (folder / "model.safetensors").exists()
    with safe_open(folder / "draft.safetensors", "pt") as file:
        assert set(file.keys()) == own.keys() and file.get_tensor("joiner.weight").dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(world / "target")
    again = load_draft(folder, model)
    assert again.get_input_embeddings() is model.get_input_embeddings() and again.dtype == torch.bfloat16
    assert all(torch.equal(value, own[name].bfloat16()) for name, value in own_parameters(again).items())
    ids = torch.randint(3, VOCAB, (2, 9))
    said = model.generate(ids, custom_generate=speculative_generate, assistant_model=again, tolerance=0.0)
    assert said.shape[0] == 2 and said.shape[1] > 9


def test_samples_are_the_targets_own(world, tmp_path):
    """On-policy rows are what ``generate`` samples from, and a row depends on its id alone."""
    train(world, tmp_path, "on-policy")
    made = [json.loads(line) for shard in tmp_path.glob("samples/*.jsonl") for line in shard.open()]
    assert len(made) == 12 and any(row["stopped"] for row in made)
    assert all(len(row["speech"]) <= 20 and not {EOS, 2} & set(row["speech"]) for row in made)
    target = load_target(world / "target")
    row = Example.from_row(made[0])
    config = target.decoding(row)
    assert config.max_tokens == 20 and config.stop_ids == (EOS, 2)
    names = [type(one).__name__ for one in config.sampler.processors]
    assert names[0] == "RepetitionPenaltyLogitsProcessor" and len(names) == 4
    raw = torch.randn(5, VOCAB)
    law = target.deployed(raw, torch.zeros(5, 1, dtype=torch.int64))
    assert ((law > 0).sum(-1) <= 20).all() and torch.allclose(law.sum(-1), torch.ones(5))


def test_training_logits_are_the_models(world):
    """The padded batch of embeddings gives, at each label, what a plain forward of its row gives."""
    target = load_target(world / "target")
    examples = [group[0] for group in target.read(world / "data")][:4]
    batch = target.collate(examples)
    with torch.no_grad():
        got = target.lm(batch.embedded, batch.at)
    want = []
    for one in examples:
        ids = torch.tensor([*one.text.tolist(), *one.speech.tolist()])[None]
        want.append(uncached(target.lm.model, ids)[0, len(one.text) - 1 :])
    torch.testing.assert_close(got, torch.cat(want), atol=1e-4, rtol=1e-4)
    assert batch.labels.tolist() == [i for one in examples for i in [*one.speech.tolist(), EOS]]


@pytest.mark.parametrize("drafter, left", [("paper", "model.safetensors"), ("hidden", "draft.safetensors")])
def test_the_command(world, drafter, left, tmp_path, capsys):
    folders = ["--target", str(world / "target"), "--data", str(world / "data"), "--out", str(tmp_path)]
    options = [
        "--drafter",
        drafter,
        "--steps",
        "2",
        "--batch",
        "4",
        "--held-out",
        "2",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]
    assert cli.main(["train-draft", *folders, *options]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'draft.json'}\n" and (tmp_path / left).is_file()


def test_bad_targets_say_so(world, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not a causal language model"):
        load_target(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(world / "target")
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no eos_token_id"):
        load_target(tmp_path)
    for name, value, words in (("num_beams", 3, "num_beams 3"), ("stop_strings", ["a"], "stop strings")):
        fresh = AutoModelForCausalLM.from_pretrained(world / "target")
        setattr(fresh.generation_config, name, value)
        fresh.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=f"cannot be followed: .*{words}"):
            load_target(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7, "layer_types": None}))
    with pytest.raises(InputError, match="lacks"):
        load_target(tmp_path)


def test_a_draft_of_another_target_is_refused(world, tmp_path):
    train(world, tmp_path, "paper", steps=2)
    train(world, tmp_path / "hidden", "paper", "hidden", steps=2)
    other = tiny("llama", layers=6, vocab=VOCAB, seed=5)
    for folder in (tmp_path, tmp_path / "hidden"):
        with pytest.raises(InputError, match="trained for another target"):
            load_draft(folder, other)
    train(world, tmp_path / "hidden", "paper", "hidden", steps=2)  # it is done: read from the folder
    with pytest.raises(InputError, match="is of a run with loss"):
        train(world, tmp_path / "hidden", "paper", steps=2)


def test_a_hidden_drafter_needs_one_width(world):
    target = load_target(world / "target")
    target.lm.model.set_input_embeddings(torch.nn.Embedding(VOCAB, 8))
    with pytest.raises(InputError, match="has embeddings of width 8 and hidden states of 16"):
        HiddenTask(target)
