"""The one loop: what a step sees, going on after a kill, and which run may go on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_corpus import CODEC, SIZES, SMALL, features, utterances

from ssd_repro.errors import InputError
from ssd_repro.models.speech_lm import SpeechLM
from ssd_repro.training.codec import train_codec
from ssd_repro.training.data import Example
from ssd_repro.training.loop import Batches, Settings
from ssd_repro.training.target import TargetOptions, TargetTask, train_target

SETTINGS = Settings(6, batch=3, warmup=2, save_every=3)
OPTIONS = TargetOptions(**SIZES, splice=0.5)


def target(out, settings=SETTINGS, options=OPTIONS, learned=8, **other) -> tuple[SpeechLM, list[dict]]:
    return train_target(CODEC, utterances(learned), utterances(2, 1), settings, options, out, **other)


def codec(out, settings=SETTINGS, learned=4, phone_weight=0.25):
    return train_codec(features(learned), features(2), settings, out, phone_weight, config=SMALL)


def weights(lm):
    return lm.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undisturbed runs of target and codec, left where they are."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, weights(target(folder / "target")[0]), codec(folder / "codec")[1]


def test_a_killed_run_goes_on_to_the_same_weights(whole, tmp_path, monkeypatch):
    steps, draw = [], TargetTask.draw

    def killed(task, items, rng):
        steps.append(task.training)
        if sum(steps) == 5:
            raise RuntimeError("killed")
        return draw(task, items, rng)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(TargetTask, "draw", killed)
        target(tmp_path)
    assert (tmp_path / "checkpoint.pt").exists()  # of step 3
    torch.manual_seed(99)  # what is drawn must depend on (seed, step) alone
    resumed, rows = target(tmp_path)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in whole[1].items())
    assert [row["step"] for row in rows] == [3, 6]


def test_stopped_early_and_then_on_to_the_end(whole, tmp_path):
    _, rows = target(tmp_path, replace(SETTINGS, until=3))
    assert [row["step"] for row in rows] == [3] and "dev_speech" in rows[-1]
    ended, rows = target(tmp_path, replace(SETTINGS, accumulate=1, save_every=6))
    assert all(torch.equal(value, weights(ended)[name]) for name, value in whole[1].items())
    with pytest.raises(InputError, match="is at step 6, after until 3"):
        target(tmp_path, replace(SETTINGS, until=3))


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"settings": replace(SETTINGS, steps=7)}, "steps 6, now it is 7"),
        ({"settings": replace(SETTINGS, batch=2)}, "batch 3, now it is 2"),
        ({"settings": replace(SETTINGS, learning_rate=1e-4)}, "learning_rate 0.001, now it is 0.0001"),
        ({"settings": replace(SETTINGS, seed=1)}, "seed 0, now it is 1"),
        ({"options": replace(OPTIONS, splice=0.2)}, "splice 0.5, now it is 0.2"),
        ({"options": replace(OPTIONS, hidden=32)}, "hidden 16, now it is 32"),
        ({"learned": 7}, "data '.*', now it is '.*'"),
        ({"begin": OPTIONS.untrained(CODEC)}, "begin '', now it is '.*'"),
    ],
)
def test_a_target_of_other_parameters_does_not_go_on_with_this_run(whole, other, sentence):
    with pytest.raises(InputError, match=f"checkpoint.pt is of a run with {sentence}"):
        target(whole[0] / "target", **other)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"settings": replace(SETTINGS, learning_rate=1e-4)}, "learning_rate 0.001, now it is 0.0001"),
        ({"phone_weight": 0.0}, "phone_weight 0.25, now it is 0.0"),
        ({"learned": 3}, "data '.*', now it is '.*'"),
    ],
)
def test_a_codec_of_other_parameters_does_not_go_on_with_this_run(whole, other, sentence):
    with pytest.raises(InputError, match=f"checkpoint.pt is of a run with {sentence}"):
        codec(whole[0] / "codec", **other)


def test_a_finished_run_is_given_back(whole):
    assert codec(whole[0] / "codec")[1] == whole[2]


def test_accumulation_changes_nothing(tmp_path):
    """What chance makes of a batch is drawn before the batch is cut into parts."""
    options = replace(OPTIONS, dropout=0.0, flip=0.0)
    logs = [target(tmp_path / str(parts), replace(SETTINGS, accumulate=parts, precision="fp32"), options)[1]
            for parts in (1, 3)]  # fmt: skip
    for one, other in zip(*logs, strict=True):
        assert one["labels"] == other["labels"]
        for name in ("speech", "draft", "dev_speech"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"until": 11}, "until .* is 11; it must be a whole number from 0 to 10"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"warmup": 0}, "warmup is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_are_checked(bad, sentence):
    with pytest.raises(InputError, match=sentence):
        Settings(10, **bad)


def test_every_epoch_shows_every_batch_once_and_depends_on_the_seed_alone():
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(1, 99, 22), 999]  # one is always the longest
    examples = [Example(str(i), np.zeros(1, np.int32), np.zeros(n, np.int32)) for i, n in enumerate(sizes)]

    def ids(batches, steps):
        return [[one.id for one in batches(step)] for step in steps]

    order = Batches(examples, 5, 3)
    epochs = [ids(order, range(4 * e, 4 * e + 4)) for e in range(30)]
    assert all(len({i for batch in epoch for i in batch}) == 20 for epoch in epochs)
    assert {i for epoch in epochs for batch in epoch for i in batch} == {one.id for one in examples}
    assert ids(Batches(examples, 5, 3), [77, 2]) == ids(order, [77, 2]) != ids(Batches(examples, 5, 4), [77, 2])
