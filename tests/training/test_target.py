import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_corpus import CODEC, PLAIN, SIZES, sentence, utterances

from ssd_repro.models.draft import make_draft
from ssd_repro.training import splice, target
from ssd_repro.training.data import collate
from ssd_repro.training.loop import Settings
from ssd_repro.training.target import TargetOptions, TargetTask, train_target

STOP = 6561


def cross_entropy(lm, examples) -> float:
    batch = collate(lm, examples, STOP)
    return float(F.cross_entropy(lm(batch.embedded, batch.at), batch.labels).detach())


def test_target_learns_and_the_plain_model_keeps_its_logits(tmp_path):
    items, torch_seed = utterances(4), 0
    torch.manual_seed(torch_seed)
    settings = Settings(60, batch=4, warmup=5, learning_rate=2e-2)
    lm, rows = train_target(CODEC, items, items, settings, PLAIN, tmp_path)
    assert rows[-1]["speech"] < 0.5 * rows[0]["speech"]
    assert cross_entropy(lm, items) == pytest.approx(rows[-1]["dev_speech"], rel=0.02)  # bf16


def test_a_target_to_go_on_from_loses_nothing(tmp_path):
    torch.manual_seed(0)
    options = TargetOptions(**SIZES)
    first, again = (TargetTask(CODEC, options, utterances(4)) for _ in range(2))
    parts = [[getattr(task.lm, name).parametrizations.weight for name in ("speech_embedding", "head")]
             for task in (first, again)]  # fmt: skip
    with torch.no_grad():
        for part in parts[0]:
            part.original1.normal_(std=0.01)  # as training leaves it
        first.lm.head.bias.normal_()
    plain = first.plain()
    again.begin_from(plain)
    for name, value in again.plain().state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], atol=1e-5, rtol=1e-4)
    for new, old in zip(*parts[::-1], strict=True):
        assert new.original1.std() < 1.1 * old.original1.std()  # what codes share is shared, not their own
    settings = Settings(1, batch=2, warmup=1, learning_rate=1e-9)
    made, _ = train_target(CODEC, utterances(4), utterances(2, 1), settings, options, tmp_path, plain)
    torch.testing.assert_close(made.head.weight, plain.head.weight, atol=1e-4, rtol=1e-3)


def test_averaged_with_what_it_began_from():
    torch.manual_seed(0)
    new, old = PLAIN.untrained(CODEC), PLAIN.untrained(CODEC)
    moved, before = new.head.weight.clone(), old.head.weight.clone()
    mean = target.averaged(new, old, 0.25)
    torch.testing.assert_close(mean.head.weight, 0.75 * moved + 0.25 * before)
    assert torch.equal(old.head.weight, before)


def test_about_half_the_utterances_follow_a_short_one_of_their_voice():
    items = utterances(60)
    task = TargetTask(CODEC, replace(PLAIN, prompted=0.5), items)
    for training in (True, False):
        drawn = task.train(training).draw(items, random.Random(0))
        changed = [one for one, before in zip(drawn, items, strict=True) if one is not before]
        assert 15 < len(changed) < 45  # P < 1e-4 for a fair coin
        assert all(bool(len(one.prompt_speech)) != training for one in changed)  # in training it is learned too


def test_held_out_loss_is_of_what_follows_the_prompt_alone():
    front, one = sentence(["bat", "at", "tab"], "0"), sentence(["zip", "i", "piz"], "1")
    lm = PLAIN.untrained(CODEC)
    behind = splice.behind({one.voice: [front]}, one, random.Random(0), learned=False)
    assert target.held_out_loss(lm, [one], [front]) == pytest.approx(cross_entropy(lm, [behind]), rel=1e-4)


def test_spliced_utterances_train_the_target(tmp_path):
    items = [sentence(["bat", "at", "tab"], "0"), sentence(["zip", "i", "piz"], "1")]
    settings, options = (
        Settings(60, batch=2, learning_rate=5e-3, warmup=5),
        replace(PLAIN, splice=1.0, draft_weight=0.0),
    )
    _, rows = train_target(CODEC, items, items, settings, options, tmp_path)
    assert rows[-1]["dev_speech"] < 0.5 * 8.8, "8.8: nothing is known of 6,564 tokens"


def test_what_is_not_aligned_is_learned_as_it_stands(tmp_path):
    """The target's own speech: neither cut nor put behind another, no phones to foresee; also nothing but such."""
    items = utterances(4)
    own = [replace(one, id=f"own/{one.id}", aligned=None) for one in items]
    options = replace(PLAIN, prompted=1.0, splice=1.0)
    task = TargetTask(CODEC, options, items + own)
    drawn = task.train().draw(items + own, random.Random(0))
    assert [new is old for new, old in zip(drawn, items + own, strict=True)] == 4 * [False] + 4 * [True]
    assert float(task(own)["phone"].detach()) == 0
    _, rows = train_target(CODEC, own, own, Settings(60, batch=4, warmup=5, learning_rate=2e-2), options, tmp_path)
    assert rows[-1]["speech"] < 0.5 * rows[0]["speech"] and rows[-1]["phone"] == 0


def test_flipped_digits_are_seen_and_the_labels_stay():
    task, one = TargetTask(CODEC, replace(PLAIN, flip=0.5), utterances(1)), utterances(1)
    plain, noisy = (collate(task.lm, one, STOP, noise=noise) for noise in (None, task._flipped))
    assert torch.equal(plain.labels, noisy.labels) and not torch.equal(plain.embedded, noisy.embedded)


def test_the_drafts_layers_learn_beside_the_whole_target():
    torch.manual_seed(0)
    items = utterances(4)
    task = TargetTask(CODEC, PLAIN, items)
    terms = task(items)
    assert set(terms) == {"loss", "speech", "phone", "draft"}
    terms["draft"].backward()
    moved = [layer.mlp.up_proj.weight.grad is not None for layer in task.lm.model.layers]
    assert moved == [True, False, False, True]
    draft = make_draft(task.plain(), bottom=1, top=1)
    with torch.no_grad():
        found = task.eval()(items)
    assert float(found["draft"]) == pytest.approx(cross_entropy(draft, items), rel=0.02)  # bf16
    assert 0 < float(found["overlap"]) <= 1 and float(found["speech"]) != float(found["draft"])
