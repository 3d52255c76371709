"""The draft trainer: its loss, its data, one process against two, a kill in the middle."""

import copy
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny_cosyvoice
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file
from toys import tiny_lm

from ssd_repro import cli
from ssd_repro.decoding.rules import TopK
from ssd_repro.decoding.sampling import Sampler, probabilities
from ssd_repro.errors import InputError
from ssd_repro.models import checkpoints
from ssd_repro.models.codec import Codec, CodecConfig
from ssd_repro.models.cosyvoice import END_OF_PROMPT, load_cosyvoice
from ssd_repro.models.draft import make_draft
from ssd_repro.speech.text import TASK, VOICES
from ssd_repro.training import deployed
from ssd_repro.training import draft as draft_module
from ssd_repro.training.data import Example
from ssd_repro.training.deployed import load_target, voice_target
from ssd_repro.training.loop import Batches, Settings
from ssd_repro.training.parallel import processes
from ssd_repro.training.target import TargetOptions

pytest.importorskip("accelerate", reason="the extra scale is not installed")
SMALL = CodecConfig(encoder_width=16, decoder_width=16, encoder_blocks=1, decoder_blocks=1, hint=8)
FAST = {"batch": 6, "warmup": 2, "save_every": 4, "precision": "fp32", "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A voice folder with a tiny random target, and a data folder of two shards, 14 utterances of two renderings."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    codec = Codec(SMALL)
    target = TargetOptions(hidden=16, ffn=32, layers=4, heads=2, kv_heads=1).untrained(codec)
    facts = {
        "voices": list(VOICES),
        "references": {},
        "sampler": vars(Sampler()),
        "token_text_ratio": [1.2, 2.6],
        "prompts": {VOICES[0]: {"id": "p", "phones": [11, 12], "codes": [4, 5, 6]}},
    }
    checkpoints.save_voice(folder / "voice", codec, target, make_draft(target), facts)
    rng, lines = random.Random(1), []
    for i in range(14):
        n = rng.randrange(4, 24)  # of very different lengths: the processes get unequal shares of tokens
        codes = [[rng.randrange(6561) for _ in range(n - shift)] for shift in range(2)]
        phones = [rng.randrange(10, 40) for _ in range(3 + i % 4)]
        row = {"id": f"u{i}", "voice": VOICES[i % 6], "phones": phones, "codes": codes, "aligned": []}
        lines.append(json.dumps(row) + "\n")
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_text("".join(lines[:9]))
    with gzip.open(folder / "data" / "b.jsonl.gz", "wt") as shard:
        shard.writelines(lines[9:])
    return folder


def train(world, out, log=lambda line: None, recipe="paper", sample_batch=1, **settings):
    folders, settings = (world / "voice", world / "data", out), Settings(**(FAST | settings))
    how = {"held_out": 3, "sample_batch": sample_batch, "device": "cpu", "log": log}
    return draft_module.train(*folders, settings, recipe, **how)


def command(world, out, **settings):
    options = FAST | {"held-out": 3, "device": "cpu"} | settings
    pairs = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    folders = ["--target", world / "voice", "--data", world / "data", "--out", out]
    return ["-m", "ssd_repro", "train-draft", *map(str, folders), *pairs]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def weights(out):
    return load_file(out / "draft.safetensors")


def assert_close(some, others):
    assert some.keys() == others.keys()
    for name, value in some.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=2e-5, msg=name)


def log_rows(out):
    """log.jsonl without the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds_per_step"} for row in rows]


def samples(out):
    return [json.loads(line) for shard in sorted(out.glob("samples/*.jsonl")) for line in shard.open()]


@pytest.fixture(scope="module")
def on_policy(world):
    """An undisturbed run of one process."""
    train(world, world / "one", recipe="on-policy", steps=8)
    return world / "one"


# One process, two, a kill


def test_two_processes_equal_one(world, on_policy, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = tmp_path / "two"
    done = subprocess.run([*launch, *command(world, out, recipe="on-policy", steps=8)], capture_output=True, text=True,
                          env=ENVIRONMENT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr and done.stdout == f"{out / 'draft.json'}\n"
    shards = sorted((out / "samples").glob("*.jsonl"))
    assert len(shards) == 2 and all(shard.stat().st_size for shard in shards)
    assert sorted(samples(out), key=lambda row: row["id"]) == sorted(samples(on_policy), key=lambda row: row["id"])
    assert_close(weights(on_policy), weights(out))
    for mine, other in zip(log_rows(on_policy), log_rows(out), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def test_killed_and_resumed_gives_the_same_weights(world, tmp_path):
    rows = train(world, tmp_path / "whole", steps=48)[1]
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, *command(world, out, steps=48)], env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "draft.json").exists()
    with pytest.raises(InputError, match="learning_rate 0.003, now it is 0.001"):
        train(world, out, steps=48, learning_rate=1e-3)
    again = train(world, out, steps=48)[1]
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert log_rows(out) == log_rows(tmp_path / "whole") and len(again) == len(rows) == len(log_rows(out))
    assert not (out / "checkpoint.pt").exists()


def test_a_draft_that_was_stopped_early_is_not_taken_for_a_whole_one(world, tmp_path):
    train(world, tmp_path, steps=4, until=2)
    with pytest.raises(InputError, match="draft.json is of a run with until 2, now it is 0"):
        train(world, tmp_path, steps=4)


def test_accumulation_changes_nothing(world, tmp_path):
    train(world, tmp_path / "whole", steps=4)
    train(world, tmp_path / "parts", steps=4, accumulate=4)
    assert_close(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    for mine, other in zip(log_rows(tmp_path / "whole"), log_rows(tmp_path / "parts"), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def test_samples_are_made_once(world, on_policy, tmp_path, monkeypatch):
    """What another number of processes left behind, a half-written row included, is used and completed."""
    made = samples(on_policy)
    folder = tmp_path / "out" / "samples"
    shutil.copytree(on_policy / "samples", folder)
    text = [json.dumps(row) + "\n" for row in made]
    (folder / "00000.jsonl").write_text("".join(text[:4]) + text[7][:20])
    (folder / "00005.jsonl").write_text("".join(text[4:6]))
    asked = []
    sample = deployed.sample_one
    monkeypatch.setattr(
        deployed, "sample_one", lambda target, one, seed: asked.append(one.id) or sample(target, one, seed)
    )
    train(world, tmp_path / "out", recipe="on-policy", steps=8)
    assert asked == [row["id"] for row in made[6:]]
    assert sorted(samples(tmp_path / "out"), key=str) == sorted(made, key=str)
    assert all(torch.equal(value, weights(on_policy)[name]) for name, value in weights(tmp_path / "out").items())
    with pytest.raises(InputError, match="samples is of a run with seed 0, now it is 1"):
        train(world, tmp_path / "out", recipe="on-policy", steps=8, seed=1)


def test_samples_made_in_batches(world, tmp_path, monkeypatch):
    """A row is the same in whatever batch it was made; a killed run goes on; by ones or in batches are two things."""
    made = []
    batch = deployed.sample_batch
    monkeypatch.setattr(deployed, "sample_batch", lambda t, few, seed: made.append(len(few)) or batch(t, few, seed))
    train(world, tmp_path / "a", recipe="on-policy", steps=2, sample_batch=5)
    assert made == [5, 5, 4]
    (tmp_path / "b" / "samples").mkdir(parents=True)
    first = samples(tmp_path / "a")[:3]
    (tmp_path / "b" / "samples" / "00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first))
    shutil.copy(tmp_path / "a" / "samples" / "about.json", tmp_path / "b" / "samples")
    train(world, tmp_path / "b", recipe="on-policy", steps=2, sample_batch=7)
    assert made == [5, 5, 4, 7, 4]
    assert sorted(samples(tmp_path / "b"), key=str) == sorted(samples(tmp_path / "a"), key=str)
    with pytest.raises(InputError, match="batch"):
        train(world, tmp_path / "b", recipe="on-policy", steps=2)


def test_a_batch_says_what_the_target_says(world):
    target = load_target(world / "voice")
    greedy = replace(target, config=lambda n: replace(target.config(n), sampler=Sampler(temperature=0)))
    few = [group[0] for group in target.read(world / "data")][:6]
    for one, other in zip(deployed.sample_batch(greedy, few, 0), few, strict=True):
        assert one.row() == deployed.sample_one(greedy, other, 0).row()


def test_samples_are_what_the_deployed_target_says(world, on_policy):
    """Lengths and stops of the voice's own decoding; the label of a speech that was cut off is no stop."""
    import ssd_repro

    voice = ssd_repro.load(world / "voice", "cpu")
    made = samples(on_policy)
    assert len(made) == 14 and len({row["id"] for row in made}) == 14
    for row in made:
        phones = row["text_ids"][:-1]
        config = voice.config(len(phones), 0.0, 1)
        assert config.min_tokens <= len(row["speech"]) <= config.max_tokens
        assert row["stopped"] == (len(row["speech"]) < config.max_tokens)
    target = load_target(world / "voice")
    for row in made:  # what stands in front is what the voice itself puts there: its prompt, or a voice token
        name = VOICES[int(row["id"][1:].split("/")[0]) % 6]
        assert row["prompt_speech"] == ([4, 5, 6] if name == VOICES[0] else [])
        prefix = voice.prefix(row["text_ids"][:-1], name)
        batch = target.collate([Example.from_row(row)])
        torch.testing.assert_close(batch.embedded[:, : prefix.shape[1]], prefix)
    one = Example.from_row(made[0])
    first, second, other = (deployed.sample_one(target, one, seed).row() for seed in (0, 0, 1))
    assert first == second == made[0] != other
    cut = target.collate([replace(one, stopped=False)])
    assert cut.labels.tolist() == made[0]["speech"] and len(cut.history) == int(cut.at.sum()) == len(cut.labels)


def test_how_drafts_are_judged_is_no_part_of_how_a_target_speaks(world):
    """Samples that were made before there were rules, block verification and confidence stay those of this target."""
    target = load_target(world / "voice")

    def described(**changes):
        return replace(target, config=lambda n: replace(target.config(n), **changes)).described()

    assert described() == target.described()
    assert described(rule=TopK(5)) == target.described()
    assert described(confidence=0.5) == target.described()
    assert described(verification="block", tolerance=0.0) == described(tolerance=0.0)
    assert described(sampler=replace(target.config(100).sampler, temperature=0.5)) != target.described()


# What is learned


def test_the_papers_recipe_moves_the_bottom_and_the_head_alone(world, tmp_path):
    target = load_target(world / "voice")
    before = {name: value.clone() for name, value in target.lm.state_dict().items()}
    groups = target.read(world / "data")
    learned = [one for group in groups for one in group]
    settings = Settings(60, **(FAST | {"save_every": 20, "learning_rate": 1e-2}))
    alone = processes("cpu")
    draft, rows = draft_module.train_draft(target, learned, learned[:4], settings, tmp_path, accelerator=alone)
    assert all(torch.equal(value, before[name]) for name, value in target.lm.state_dict().items())
    moved = {name for name, value in draft.named_parameters() if value.requires_grad}
    assert {name.split(".")[2] for name in moved if name.startswith("model")} == {"0"} and "head.weight" in moved
    assert not torch.equal(draft.head.weight, before["head.weight"])
    assert draft.model.layers[1].mlp.up_proj.weight is target.lm.model.layers[3].mlp.up_proj.weight
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert [row["step"] for row in rows] == [20, 40, 50, 60] and 0 < rows[-1]["dev_overlap"] <= 1
    assert [row["learning_rate"] for row in rows] == [settings.rate(row["step"] - 1) for row in rows]
    assert rows[-1]["labels"] == sum(one.labels for step in range(60) for one in Batches(learned, 6, 0)(step))


def reference_logits(target, lm, one):
    """Logits of each label of ``one``, by hand."""
    words = torch.from_numpy(np.concatenate((one.prompt_text, one.text))).long()
    speech = torch.from_numpy(np.concatenate((one.prompt_speech, one.speech))).long()
    embedded = torch.cat((target.lm.model.embed_tokens(words), target.lm.speech_embedding(speech)))
    return lm(embedded[None])[0][len(words) + len(one.prompt_speech) - 1 :]


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_loss_is_the_mean_over_all_tokens_after_the_prompt(loss, tmp_path):
    lm = tiny_lm(vocab=14)
    sampler = Sampler(top_k=6, ras_window=3, ras_tau=0.3)
    target = voice_target(lm, 13, sampler, (1.0, 3.0))
    rng = np.random.default_rng(0)

    def ids(size, end):
        return rng.integers(0, end, size).astype(np.int32)

    examples = [
        Example("a", ids(4, 5), ids(9, 13), ids(2, 5), ids(3, 13)),
        Example("b", ids(3, 5), ids(2, 13)),
        Example("c", ids(3, 5), ids(5, 13), stopped=False),
    ]
    draft, total, count, overlap, sampled = make_draft(lm), 0.0, 0, 0.0, 0.0
    for one in examples:
        said = one.speech.tolist()
        labels = torch.tensor(said + [13] * one.stopped)
        p, q = (reference_logits(target, model, one)[: len(labels)] for model in (draft, lm))
        past = torch.tensor([([-1] * 3 + said[:i])[-3:] for i in range(len(labels))])
        p_law, q_law = (probabilities(logits.detach(), past, sampler) for logits in (p, q))
        ce = F.cross_entropy(p, labels, reduction="sum")
        kl = (torch.xlogy(q_law, q_law) - q_law * p.log_softmax(-1)).sum()
        total = total + (ce if loss == "ce" else kl)
        overlap += float(torch.minimum(p.detach().softmax(-1), q.detach().softmax(-1)).sum())
        sampled += float(torch.minimum(p_law, q_law).sum())
        count += len(labels)
    assert count == 10 + 3 + 5
    (total / count).backward()
    norm = torch.stack([value.grad.norm() for value in draft.parameters() if value.requires_grad]).norm()
    settings = Settings(1, batch=3, accumulate=2, precision="fp32", learning_rate=1e-9)
    row = draft_module.train_draft(target, examples, examples, settings, tmp_path, loss=loss)[1][0]
    assert row["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["dev_overlap"] == pytest.approx(overlap / count, rel=1e-5)
    assert row["dev_acceptance"] == pytest.approx(sampled / count, rel=1e-4)


def test_on_policy_brings_the_draft_to_the_law_of_the_target(tmp_path):
    """With few tokens the draft can come near; what is accepted grows, also on texts that it has not seen."""
    lm = tiny_lm(vocab=14)
    target = voice_target(lm, 13, Sampler(ras=False), (2.0, 6.0))
    rng = np.random.default_rng(0)
    texts = [Example(str(i), rng.integers(0, 5, 6).astype(np.int32), np.zeros(1, np.int32)) for i in range(40)]
    settings = Settings(24, batch=16, warmup=3, learning_rate=1e-2)
    alone = processes("cpu")
    spoken = deployed.sample(target, texts, settings, tmp_path / "samples", alone)
    train, dev = spoken[8:], spoken[:8]
    untrained = replace(settings, steps=1, learning_rate=1e-9)
    before, after = (
        draft_module.train_draft(target, train, dev, s, tmp_path / str(s.steps), "on-policy", accelerator=alone)[1][-1]
        for s in (untrained, settings)
    )
    assert after["dev_acceptance"] > before["dev_acceptance"] + 0.05
    assert after["loss"] < 0.8 * before["loss"]


@pytest.mark.parametrize("version", [2, 3])
def test_cosyvoice(version, tmp_path):
    """Its files as target: embeddings and labels as upstream lays them out, lengths as it decodes, the draft loads."""
    upstream = tiny_cosyvoice.Upstream(version, text_vocab=END_OF_PROMPT + 1 if version == 3 else 300)
    tiny_cosyvoice.save_released(tmp_path / "cosyvoice", upstream)
    target = load_target(tmp_path / "cosyvoice")
    row = {
        "text_ids": [7, 8, 9],
        "speech": [5, 6, 4, 6560],
        "prompt_text": [3, 2],
        "prompt_speech": [1, 0, 1],
    }
    if version == 3:
        with pytest.raises(ValueError, match="151646"):
            rows = tmp_path / "bad.jsonl"
            rows.write_text(json.dumps({"id": "x"} | row))
            target.read(rows)
        row["prompt_text"] = [END_OF_PROMPT, 2]
    batch = target.collate([Example.from_row({"id": "x"} | row)])
    text, prompt_text, prompt_speech, speech = (
        torch.tensor(row[name]) for name in ("text_ids", "prompt_text", "prompt_speech", "speech")
    )
    prefix = upstream.prefix(text, prompt_text, prompt_speech)
    whole = torch.cat((prefix, upstream.speech_embedding(speech)[None]), 1)
    torch.testing.assert_close(batch.embedded, whole)
    assert batch.labels.tolist() == [5, 6, 4, 6560, {2: 6561, 3: 6562}[version]]
    with torch.no_grad():
        logits = target.lm(batch.embedded, batch.at)
    torch.testing.assert_close(logits, upstream.logits(whole)[0, prefix.shape[1] - 1 :], rtol=1e-3, atol=1e-4)

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"id": str(i)} | row) + "\n" for i in range(4)))
    folders = tmp_path / "cosyvoice", data, tmp_path / "out"
    draft_module.train(*folders, Settings(2, batch=2), "on-policy", held_out=1, device="cpu")
    made = samples(tmp_path / "out")
    assert [made[0][name] for name in ("prompt_text", "prompt_speech")] == [row["prompt_text"], [1, 0, 1]]
    assert all(len(row["speech"]) <= 60 and len({str(r["speech"]) for r in made}) == 4 for row in made)
    draft = checkpoints.load_draft(tmp_path / "out", load_cosyvoice(tmp_path / "cosyvoice"))
    assert len(draft.model.layers) == 2 and (draft.head.bias is None) == (version == 3)


# What is loaded


def test_a_draft_is_loaded_onto_its_target(world, on_policy):
    target = load_target(world / "voice").lm
    draft = checkpoints.load_draft(on_policy, target)
    stored = weights(on_policy)
    assert {name for name, value in draft.named_parameters() if value.requires_grad} == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in draft.named_parameters() if name in stored)
    assert draft.speech_embedding is target.speech_embedding
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(target).to(dtype)
        assert checkpoints.load_draft(on_policy, cast).head.weight.dtype == dtype


def cut(folder):
    path = folder / "draft.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def spoil(target):
    with torch.no_grad():
        target.model.layers[2].mlp.up_proj.weight[0, 0] += 1


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder, target: cut(folder), "damaged"),
        (lambda folder, target: (folder / "draft.safetensors").unlink(), "draft.safetensors is missing"),
        (lambda folder, target: (folder / "draft.json").unlink(), "draft.json is missing"),
        (lambda folder, target: (folder / "draft.json").write_text("{}"), "cannot be read"),
        (lambda folder, target: spoil(target), "another target"),
    ],
)
def test_a_draft_that_does_not_fit(world, on_policy, tmp_path, damage, sentence):
    shutil.copytree(on_policy, tmp_path / "draft")
    target = load_target(world / "voice").lm
    damage(tmp_path / "draft", target)
    with pytest.raises(InputError, match=sentence):
        checkpoints.load_draft(tmp_path / "draft", target)


ROW = {"id": "a", "text_ids": [1, TASK], "speech": [5, 6]}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "no rows"),
        ([ROW, ROW], "line 2 is not a row of speech: id 'a' was already in rows.jsonl"),
        ([ROW | {"speech": [6561]}], "speech has 6561; this target's ids end at 6560"),
        ([ROW | {"text_ids": [1.5]}], "text_ids must be a list of token ids"),
        ([ROW | {"prompt_speech": [-1]}], "prompt_speech must be"),
        ([ROW | {"speech": []}], "needs an id"),
        ([{"id": "a", "voice": VOICES[0], "phones": [11], "codes": [], "aligned": []}], "codes has no rendering"),
        ([{"text_ids": [1], "speech": [5]}], "id is missing"),
        (["{"], "line 1 is not a row"),
        ([["id"]], "line 1 is not a row"),
    ],
)
def test_bad_rows_are_named(world, tmp_path, rows, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    with pytest.raises(InputError, match=sentence):
        load_target(world / "voice").read(tmp_path)


def test_a_shard_that_was_cut(world, tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode() * 99)[:-20])
    with pytest.raises(InputError, match="cannot be read to its end"):
        load_target(world / "voice").read(tmp_path)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"recipe": "magic"}, "recipe is 'magic'"),
        ({"loss": "magic"}, "loss is 'magic'"),
        ({"batch": 99}, "at most the rows to learn from) is 99; it must be a whole number from 1 to 22"),
        ({"accumulate": 7}, "at most the rows to learn from) is 6; it must be a whole number from 7 to 22"),
        ({"held-out": 14}, "held_out is 14"),
        ({"data": "/nowhere"}, "no *.jsonl"),
        ({"target": "/nowhere"}, "/nowhere does not exist"),
        ({"steps": "x"}, "must be a whole number"),
    ],
)
def test_bad_input_is_one_sentence_of_the_first_process(world, tmp_path, capsys, monkeypatch, more, sentence):
    arguments = command(world, tmp_path / "out", **({"steps": 2} | more))[2:]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")  # as torchrun does
    for rank in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launched")
        monkeypatch.setenv("RANK", rank)
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
        said = [line for line in capsys.readouterr().err.splitlines() if " held out, " not in line]
        assert code == 2 and len(said) == (rank == "0")
        assert rank == "1" or sentence in said[0]
    assert not list((tmp_path / "out").glob("draft*"))
