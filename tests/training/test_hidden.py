"""The drafters on hidden states learn to agree with their target, are saved, resumed, and speak with a voice."""

import pytest
import torch
from tiny_corpus import CODEC, PLAIN, utterances

import ssd_repro
from ssd_repro.decoding.sampling import Sampler
from ssd_repro.errors import InputError
from ssd_repro.models import checkpoints
from ssd_repro.models.draft import make_draft, own_parameters
from ssd_repro.speech.text import VOICES
from ssd_repro.training import draft as draft_module
from ssd_repro.training import loop
from ssd_repro.training.block import BlockTask
from ssd_repro.training.deployed import voice_target
from ssd_repro.training.loop import Settings

pytest.importorskip("accelerate", reason="the extra scale is not installed")
SAMPLER = Sampler(ras_tau=0.3, temperature=0.8)


def tiny_target():
    torch.manual_seed(0)
    lm = PLAIN.untrained(CODEC).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)  # it has something to say
    return voice_target(lm, 6561, SAMPLER, (1.2, 2.6), {})


def train(drafter, out, steps=40, begin=None, rate=1e-2):
    settings = Settings(
        steps, batch=6, warmup=2, save_every=10, precision="fp32", learning_rate=rate, weight_decay=1e-9
    )
    everyone = utterances(24)
    return draft_module.train_draft(
        tiny_target(), everyone, everyone[:4], settings, out, drafter=drafter, begin=begin, log=lambda _: None
    )


@pytest.fixture(scope="module", params=["hidden", "block"])
def drafter(request):
    return request.param


@pytest.fixture(scope="module")
def trained(drafter, tmp_path_factory):
    out = tmp_path_factory.mktemp(drafter)
    return out, *train(drafter, out)


def test_it_learns_every_step_ahead(trained, drafter):
    """Of utterances that it learned from: made at random, they teach nothing of others."""
    _, _, rows = trained
    evaluated = [row for row in rows if "dev_loss" in row]
    names = [name for name in rows[-1] if name.startswith("dev_acceptance")]
    assert names == [f"dev_acceptance_{k + 1}" for k in range({"hidden": 4, "block": 6}[drafter])]
    for name in names:
        assert evaluated[-1][name] > 1.1 * evaluated[0][name]
    assert rows[-1]["dev_loss"] == pytest.approx(1 - sum(rows[-1][name] for name in names) / len(names))
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(drafter, tmp_path):
    def run(out, until):
        settings = Settings(8, 6, save_every=2, precision="fp32", learning_rate=1e-2, until=until)
        torch.manual_seed(1)
        task = draft_module.BY_HIDDEN_STATES[drafter](tiny_target())
        rows = loop.train(task, utterances(24), [], settings, out, {}, log=lambda _: None)
        return own_parameters(task.draft), rows

    run(tmp_path / "two", 4)
    (stopped, rows), (whole, _) = run(tmp_path / "two", 0), run(tmp_path / "one", 0)
    assert len(rows) == 4
    for name, value in whole.items():
        torch.testing.assert_close(stopped[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_a_later_slot_of_a_block_counts_for_less():
    torch.manual_seed(0)
    task, items = BlockTask(tiny_target(), layers=1, slots=3), utterances(2)
    assert task.draft.sizes == {"rank": 128, "taps": [1, 2, 4], "layers": 1, "slots": 3}
    assert task.draft.masks.shape == (2, 16)
    task.precision = "fp32"
    batch, lm = task.target.collate(items), task.target.lm
    logits, features = lm.with_features(batch.embedded, batch.at)
    q = task.target.deployed(logits, batch.history)
    made = task.made(features, batch.embedded, batch.at[:, 1:])
    terms, weights = torch.stack([loop.divergence(x / 0.8, q) for x in made]), torch.tensor([1, 0.8, 0.64])
    torch.testing.assert_close(task(items)["loss"], (terms * weights).sum() / weights.sum())


def test_it_goes_on_from_a_drafter(trained, drafter, tmp_path):
    _, before, rows = trained
    after, more = train(drafter, tmp_path, steps=1, begin=before, rate=1e-9)
    for (name, old), new in zip(own_parameters(before).items(), own_parameters(after).values(), strict=True):
        torch.testing.assert_close(new, old, atol=1e-6, rtol=0, msg=name)
    assert more[-1]["dev_loss"] == pytest.approx(rows[-1]["dev_loss"], abs=1e-5)
    with pytest.raises(InputError, match="is of a run with begin"):
        train(drafter, tmp_path, steps=1, begin=train(drafter, tmp_path / "other", steps=3)[0], rate=1e-9)


def test_it_is_kept_without_what_is_the_targets_and_read_again(trained):
    out, draft, _ = trained
    target = tiny_target().lm
    again = checkpoints.load_draft(out, target)
    own = own_parameters(draft)
    assert own and not any("embed" in name for name in own)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in own.items())
    assert again.lm.speech_embedding is target.speech_embedding
    with pytest.raises(InputError, match="another target"):
        checkpoints.load_draft(out, PLAIN.untrained(CODEC))


def test_a_voice_folder_keeps_it_and_speaks_with_it(trained, drafter, tmp_path):
    _, draft, _ = trained
    target = tiny_target().lm
    facts = {"voices": list(VOICES), "references": {}, "sampler": vars(Sampler(temperature=0)), "prompts": {}}
    facts["token_text_ratio"] = [1.2, 2.6]
    checkpoints.save_voice(tmp_path, CODEC, target, make_draft(target), facts, int8=True, others={drafter: draft})
    for runtime in ("eager", "graphs", "openvino"):
        voice = ssd_repro.load(tmp_path, device="cpu", runtime=runtime)
        alone = voice.speak("So am I.", "autoregressive")
        drafted = voice.speak("So am I.", tolerance=0.0, drafter=drafter)
        assert drafted.token_ids == alone.token_ids and drafted.drafter == drafter
        assert drafted.draft_calls > 1 and drafted.summary()["drafter"] == drafter
    with pytest.raises(InputError, match=f"'fast' is not one of this voice's: choose paper or {drafter} or early-exit"):
        voice.speak("So am I.", drafter="fast")
    plain = tmp_path / "plain"
    checkpoints.save_voice(plain, CODEC, target, make_draft(target), facts)
    with pytest.raises(InputError, match="choose paper or early-exit or n-gram$"):
        ssd_repro.load(plain, device="cpu").speak("So am I.", drafter=drafter)


def test_a_drafter_is_put_into_a_voice_folder(trained, drafter, tmp_path):
    _, draft, _ = trained
    target = tiny_target().lm
    facts = {"voices": list(VOICES), "references": {}, "sampler": vars(Sampler(temperature=0)), "prompts": {}}
    facts["token_text_ratio"] = [1.2, 2.6]
    checkpoints.save_voice(tmp_path, CODEC, target, make_draft(target), facts)
    before = ssd_repro.load(tmp_path, device="cpu", runtime="eager").weights_id
    checkpoints.add_other(tmp_path, drafter, draft)
    checkpoints.add_other(tmp_path, "on-policy", make_draft(target, bottom=1, top=1))
    for runtime in ("eager", "graphs", "openvino"):
        voice = ssd_repro.load(tmp_path, device="cpu", runtime=runtime)
        assert list(voice.drafters) == ["paper", drafter, "on-policy"] and voice.weights_id != before
        alone = voice.speak("So am I.", "autoregressive")
        for name in voice.drafters:
            assert voice.speak("So am I.", tolerance=0.0, drafter=name).token_ids == alone.token_ids
    with pytest.raises(InputError, match="drafter 'paper' is not one that a voice folder holds: choose hidden or"):
        checkpoints.add_other(tmp_path, "paper", draft)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(InputError, match="drafter is 'x'; choose one of paper, hidden"):
        draft_module.train(tmp_path, tmp_path, tmp_path, Settings(1), drafter="x")
    with pytest.raises(InputError, match="loss is 'kl'; a hidden drafter has one of its own"):
        draft_module.train_draft(tiny_target(), [], [], Settings(1), tmp_path, loss="kl", drafter="hidden")
