"""The hidden-state drafter learns to agree with its target, is saved, resumed, and speaks with a voice."""

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


def train(out, steps=40, until=0, begin=None, rate=1e-2):
    settings = Settings(
        steps, batch=6, warmup=2, save_every=10, precision="fp32", learning_rate=rate, until=until, weight_decay=1e-9
    )
    everyone = utterances(24)
    return draft_module.train_draft(
        tiny_target(), everyone, everyone[:4], settings, out, drafter="hidden", begin=begin, log=lambda _: None
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("hidden")
    return out, *train(out)


def test_it_learns_every_step_ahead(trained):
    """Of utterances that it learned from: made at random, they teach nothing of others."""
    _, _, rows = trained
    evaluated = [row for row in rows if "dev_loss" in row]
    for k in range(1, 5):
        assert evaluated[-1][f"dev_acceptance_{k}"] > 1.1 * evaluated[0][f"dev_acceptance_{k}"]
    assert rows[-1]["dev_loss"] == pytest.approx(1 - sum(rows[-1][f"dev_acceptance_{k}"] for k in range(1, 5)) / 4)


def test_it_goes_on_from_a_drafter(trained, tmp_path):
    _, before, rows = trained
    after, more = train(tmp_path, steps=1, begin=before, rate=1e-9)
    for (name, old), new in zip(own_parameters(before).items(), own_parameters(after).values(), strict=True):
        torch.testing.assert_close(new, old, atol=1e-6, rtol=0, msg=name)
    assert more[-1]["dev_loss"] == pytest.approx(rows[-1]["dev_loss"], abs=1e-5)
    with pytest.raises(InputError, match="is of a run with begin"):
        train(tmp_path, steps=1, begin=train(tmp_path / "other", steps=3)[0], rate=1e-9)


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


def test_a_voice_folder_keeps_it_and_speaks_with_it(trained, tmp_path):
    _, draft, _ = trained
    target = tiny_target().lm
    facts = {"voices": list(VOICES), "references": {}, "sampler": vars(Sampler(temperature=0)), "prompts": {}}
    facts["token_text_ratio"] = [1.2, 2.6]
    checkpoints.save_voice(tmp_path, CODEC, target, make_draft(target), facts, int8=True, others={"hidden": draft})
    for runtime in ("eager", "graphs", "openvino"):
        voice = ssd_repro.load(tmp_path, device="cpu", runtime=runtime)
        alone = voice.speak("So am I.", "autoregressive")
        drafted = voice.speak("So am I.", tolerance=0.0, drafter="hidden")
        assert drafted.token_ids == alone.token_ids and drafted.drafter == "hidden"
        assert drafted.draft_calls > 1 and drafted.summary()["drafter"] == "hidden"
    with pytest.raises(InputError, match="drafter 'fast' is not one of this voice's: choose paper or hidden or n-gram"):
        voice.speak("So am I.", drafter="fast")
    plain = tmp_path / "plain"
    checkpoints.save_voice(plain, CODEC, target, make_draft(target), facts)
    with pytest.raises(InputError, match="choose paper or n-gram$"):
        ssd_repro.load(plain, device="cpu").speak("So am I.", drafter="hidden")


def test_a_drafter_is_put_into_a_voice_folder(trained, tmp_path):
    _, hidden, _ = trained
    target = tiny_target().lm
    facts = {"voices": list(VOICES), "references": {}, "sampler": vars(Sampler(temperature=0)), "prompts": {}}
    facts["token_text_ratio"] = [1.2, 2.6]
    checkpoints.save_voice(tmp_path, CODEC, target, make_draft(target), facts)
    before = ssd_repro.load(tmp_path, device="cpu", runtime="eager").weights_id
    checkpoints.add_other(tmp_path, "hidden", hidden)
    checkpoints.add_other(tmp_path, "on-policy", make_draft(target, bottom=1, top=1))
    for runtime in ("eager", "graphs", "openvino"):
        voice = ssd_repro.load(tmp_path, device="cpu", runtime=runtime)
        assert list(voice.drafters) == ["paper", "hidden", "on-policy"] and voice.weights_id != before
        alone = voice.speak("So am I.", "autoregressive")
        for drafter in voice.drafters:
            assert voice.speak("So am I.", tolerance=0.0, drafter=drafter).token_ids == alone.token_ids
    with pytest.raises(InputError, match="drafter 'paper' is not one that a voice folder holds: choose hidden or"):
        checkpoints.add_other(tmp_path, "paper", hidden)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(InputError, match="drafter is 'x'; choose one of paper, hidden"):
        draft_module.train(tmp_path, tmp_path, tmp_path, Settings(1), drafter="x")
    with pytest.raises(InputError, match="loss is 'kl'; a hidden drafter has one of its own"):
        draft_module.train_draft(tiny_target(), [], [], Settings(1), tmp_path, loss="kl", drafter="hidden")
