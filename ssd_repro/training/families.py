"""A small voice on another family of decoders: the bundled voice's recipe, from the package's own speech tokens.

Notebooks 12 and 13 in one call, for notebook 17: the same data, losses, sampler, prompts and codec; of the decoder the
family alone differs. Needs neither teacher nor Whisper nor a phonemizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, check_number
from ..models import checkpoints
from ..models.families import check_family
from . import recipe
from .data import flat, hold_out
from .deployed import voice_target
from .draft import train_draft
from .loop import Settings
from .target import TargetOptions, train_target


@dataclass(frozen=True)
class Plan:
    """How long to train; steps of the target and of its draft. layers, hidden: of the target."""

    steps: int = 4000
    draft_steps: int = 500
    batch: int = 8
    learning_rate: float = 1e-3
    layers: int = 12
    hidden: int = 256
    held_out: int = 32
    longest: int = 260
    precision: str = "bf16"
    seed: int = 0

    def settings(self, steps: int) -> Settings:
        warmup = max(1, min(200, steps // 5))
        how = {"learning_rate": self.learning_rate, "precision": self.precision, "seed": self.seed}
        return Settings(steps, self.batch, warmup=warmup, **how)


def train_family(family: str, folder: Path, plan: Plan, tokens: str = "bundled", log: Callable = print) -> Path:
    """Train target and draft of ``family`` -> the voice folder, ``folder``/voice, int8; one that is there is kept.

    tokens: as in notebook 12. A run that was stopped goes on from its last checkpoint. On a GPU where torch finds
    one. InputError for an unknown family, a bad plan, or a ``folder`` that holds another run.
    """
    check_family(family)
    check_number("layers", plan.layers, 2, 1000, whole=True)
    whole, drafts = plan.settings(plan.steps), plan.settings(plan.draft_steps)
    voice = folder / "voice"
    if (voice / "voice.json").is_file():
        return voice
    source, codec, _, about = recipe.voice_to_begin_from("bundled")
    size, options = codec.config.codebook_size, TargetOptions(plan.hidden, layers=plan.layers, family=family)
    described = voice_target(options.untrained(codec), size, recipe.SAMPLER, recipe.TOKEN_TEXT_RATIO, {})
    path = recipe.tokens_path(tokens, folder)
    train, dev = (flat(part) for part in hold_out(described.read(path), plan.held_out, plan.longest))
    log(f"{family}: {len(train)} renderings to learn from")
    target, _ = train_target(codec, train, dev, whole, options, folder / "target", log=log)
    described = voice_target(target, size, recipe.SAMPLER, recipe.TOKEN_TEXT_RATIO, about["prompts"])
    train, dev = (flat(part) for part in hold_out(described.read(path), plan.held_out, plan.longest))
    draft, _ = train_draft(described, train, dev, drafts, folder / "draft", log=log)
    shutil.copytree(source / "references", voice / "references", dirs_exist_ok=True)
    known = {name: about[name] for name in ("voices", "references", "prompts", "token_text_ratio")}
    facts = known | {"sampler": vars(recipe.SAMPLER)}
    checkpoints.save_voice(voice, codec, target.cpu(), draft.cpu(), facts, int8=True)
    (folder / "target" / "checkpoint.pt").unlink(missing_ok=True)
    return voice


def voices(
    families: list[str], trained: str, work: str, profile: str, plan: Plan | None, tokens: str, log: Callable
) -> list[Path]:
    """Notebook 17's voice folders, one for each of ``families``; plan: train those that are missing.

    trained: the folder that holds <family>/voice, empty: <work>/architectures. InputError, before any work, for an
    unknown or doubled family, and for a missing voice without a plan.
    """
    if not families or len(set(families)) < len(families):
        raise InputError(f"families is {families}: name each family once, at least one")
    for family in families:
        check_family(family)
    root = Path(trained) if trained else recipe.work_folder(work, profile) / "architectures"
    lacking = [family for family in families if not (root / family / "voice" / "voice.json").is_file()]
    if lacking and plan is None:
        raise InputError(
            f"{root} has no {lacking[0]}/voice: name the folder that has, by -p trained FOLDER, or train it, by "
            "-p train true"
        )
    return [train_family(f, root / f, plan, tokens, log) if f in lacking else root / f / "voice" for f in families]
