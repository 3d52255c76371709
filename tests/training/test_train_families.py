"""Targets of every family in the one trainer."""

from dataclasses import replace

import pytest
import torch
from tiny_corpus import CODEC, PLAIN, utterances

from ssd_repro.errors import InputError
from ssd_repro.models.families import FAMILIES, UNGROUPED, small_decoder
from ssd_repro.models.speech_lm import SpeechLM
from ssd_repro.training import families, grow
from ssd_repro.training.draft import DraftTask
from ssd_repro.training.hidden import HiddenTask
from ssd_repro.training.loop import Settings
from ssd_repro.training.target import TargetTask, train_target


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_learns_and_its_draft_loss_is_its_drafts(family, tmp_path):
    """What the trainer calls "draft" is the loss of ``make_draft``'s own draft, before that is trained."""
    items = utterances(4)
    settings = Settings(60, batch=4, warmup=5, learning_rate=2e-2, precision="fp32")
    lm, rows = train_target(CODEC, items, items, settings, replace(PLAIN, family=family), tmp_path)
    assert type(lm.model) is FAMILIES[family][1] and rows[-1]["speech"] < 0.5 * rows[0]["speech"]
    described = families.voice_target(lm, 6561, families.recipe.SAMPLER, families.recipe.TOKEN_TEXT_RATIO, {})
    task = DraftTask(described, "ce").eval()
    task.precision = "fp32"
    with torch.no_grad():
        found = task(items)
    assert float(found["loss"]) == pytest.approx(rows[-1]["dev_draft"], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_and_eager_attention_train_alike(family):
    torch.manual_seed(0)
    task = TargetTask(CODEC, replace(PLAIN, family=family), utterances(4)).eval()
    task.precision = "fp32"
    with torch.no_grad():
        losses = []
        for attention in ("eager", "sdpa"):
            task.lm.model.set_attn_implementation(attention)
            losses.append(task(utterances(4)))
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], atol=1e-4, rtol=1e-4)


def test_voices_that_are_missing_are_trained_or_asked_for(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(families, "train_family", lambda f, folder, *_: made.append(f) or folder / "voice")
    plan, how = families.Plan(steps=1), ("bundled", print)
    (tmp_path / "llama" / "voice").mkdir(parents=True)
    (tmp_path / "llama" / "voice" / "voice.json").write_text("{}")
    where = families.voices(["llama", "qwen3"], str(tmp_path), "", "x", plan, *how)
    assert made == ["qwen3"] and where == [tmp_path / name / "voice" for name in ("llama", "qwen3")]
    with pytest.raises(InputError, match="has no qwen3/voice.*-p train true"):
        families.voices(["llama", "qwen3"], str(tmp_path), "", "x", None, *how)
    for wrong, said in (
        (["gpt"], "family 'gpt' is unknown"),
        ([], "at least one"),
        (["llama"] * 2, "each family once"),
    ):
        with pytest.raises(InputError, match=said):
            families.voices(wrong, str(tmp_path), "", "x", plan, *how)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen2"}))
def test_a_hidden_drafter_is_of_any_family_and_growing_of_qwen2_alone(family):
    lm = SpeechLM(small_decoder(family, 16, 32, 3, 4, 4 if family in UNGROUPED else 2, 106), 6564)
    with pytest.raises(InputError, match="Qwen2 decoder alone can grow"):
        grow.grow(lm, 32, 32, 3, 8, 4)
    target = families.voice_target(lm, 6561, families.recipe.SAMPLER, families.recipe.TOKEN_TEXT_RATIO)
    task = HiddenTask(target).eval()
    task.precision = "fp32"
    with torch.no_grad():
        assert 0 < float(task(utterances(2))["acceptance_4"]) < 1
