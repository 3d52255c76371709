"""The draft in training, for every target: the paper's recipe (Eq. 7) and the on-policy one.

SYMBOLS: p is the DRAFT, q the TARGET. Every process keeps both.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, check_number
from ..files import git_state, locked
from ..models import checkpoints
from ..models.draft import make_draft, split_of
from ..models.hidden_draft import HiddenDraft
from ..models.speech_lm import SpeechLM
from .block import BlockTask
from .data import Example, flat, hold_out
from .deployed import Target, load_target, sample
from .hidden import HiddenTask
from .loop import Settings, Task, check_choice, check_identity, divergence, identity, overlap
from .loop import train as run_training
from .parallel import agree, processes

# recipe -> its default loss. paper: on the data's speech; on-policy: on speech that the target itself
# says to the data's texts, as it is deployed (sampler, lengths, precision).
RECIPES = {"paper": "ce", "on-policy": "kl"}


# ce: of the data's tokens (Eq. 7). kl: KL(q || p), from what the target samples from, top-k, top-p and RAS
# included, to the draft's softmax. Both in nats. tv: ``loop.divergence`` of the same.
LOSSES = ("ce", "kl", "tv")
BY_HIDDEN_STATES = {"hidden": HiddenTask, "block": BlockTask}
DRAFTERS = ("paper", *BY_HIDDEN_STATES)


def loss_of(recipe: str, loss: str) -> str:
    """``loss``, or if it is empty the recipe's own. InputError if there is no such recipe or loss."""
    check_choice("recipe", recipe, RECIPES)
    check_choice("loss", loss or RECIPES[recipe], LOSSES)
    return loss or RECIPES[recipe]


class DraftTask(Task):
    """The paper's draft on its target: bottom layers and head are trained, all else is frozen (``make_draft``)."""

    def __init__(self, target: Target, loss: str, begin: SpeechLM | None = None):
        """begin: a draft of this target whose own weights are gone on from; None: the target's."""
        super().__init__()
        self.target, self.loss, self.draft = target, loss, make_draft(target.lm, **(split_of(begin) if begin else {}))
        if begin:
            self.draft.load_state_dict(begin.state_dict())

    def forward(self, items: list[Example]) -> dict[str, Tensor]:
        """The loss; evaluating, cross-entropy, overlap and acceptance.

        overlap: mean of sum min(p, q) over plain softmaxes; acceptance: the same over the distributions
        sampled from, the acceptance rate of plain speculative sampling on these tokens.
        """
        batch = self.target.collate(items)

        def logits(lm: SpeechLM) -> Tensor:
            with self.autocast():
                return lm(batch.embedded, batch.at).float()

        def deployed(raw: Tensor) -> Tensor:
            return self.target.deployed(raw, batch.history)

        p = logits(self.draft)  # (N, V), as q
        if self.training and self.loss == "ce":
            return {"loss": F.cross_entropy(p, batch.labels)}
        with torch.no_grad():
            q = logits(self.target.lm)
        if self.training and self.loss == "kl":
            return {"loss": F.kl_div(p.log_softmax(-1), deployed(q), reduction="batchmean")}
        if self.training:
            return {"loss": divergence(p / self.target.temperature, deployed(q))}
        return {
            "loss": F.cross_entropy(p, batch.labels),
            "overlap": overlap(p.softmax(-1), q.softmax(-1)),
            "acceptance": overlap(deployed(p), deployed(q)),
        }


def train_draft(
    target: Target,
    learned: list[Example],
    dev: list[Example],
    settings: Settings,
    out: Path,
    recipe: str = "paper",
    loss: str = "",
    drafter: str = "paper",
    begin: SpeechLM | HiddenDraft | None = None,
    accelerator=None,
    log=print,
) -> tuple[SpeechLM | HiddenDraft, list[dict]]:
    """Train a draft -> the draft, and the rows of the log (``loop.train``, ``DraftTask.forward``, ``HiddenTask``).

    begin: a draft of the same kind whose weights it goes on from.

    ``out`` gets log.jsonl, checkpoint.pt while it runs, draft.safetensors and draft.json when it is
    done; the same call goes on from there. InputError if it holds another run.
    """
    check_choice("drafter", drafter, DRAFTERS)
    if loss and drafter != "paper":
        raise InputError(f"loss is {loss!r}; a {drafter} drafter has one of its own: leave loss empty")
    loss = loss_of(recipe, loss) if drafter == "paper" else ""
    out, accelerator = Path(out), accelerator or processes()
    facts = {"recipe": recipe, "loss": loss, "drafter": drafter, "target": checkpoints.weights_sha256(target.lm)}
    facts["until"] = settings.until  # a draft that is done does not go on
    facts["begin"] = begin and checkpoints.weights_sha256(begin)
    ours = identity(settings, facts, learned, dev)

    def finished() -> tuple[SpeechLM, list[dict]]:
        about = checkpoints.read_draft_facts(out)
        check_identity(out / "draft.json", about["identity"], ours)
        return checkpoints.load_draft(out, target.lm), about["log"]

    if done := agree(accelerator, lambda: (out / "draft.json").exists() and finished()):
        return done
    target.lm.to(accelerator.device).eval()
    torch.manual_seed(settings.seed)  # of the matrices that a hidden-state drafter begins with
    task = DraftTask(target, loss, begin) if drafter == "paper" else BY_HIDDEN_STATES[drafter](target, begin)
    rows = run_training(task, learned, dev, settings, out, facts, accelerator, log)
    if accelerator.is_main_process:
        about = {"identity": ours, "settings": asdict(settings), "processes": accelerator.num_processes}
        about |= {"rows": len(learned), "device": str(accelerator.device), "torch": torch.__version__}
        checkpoints.save_draft(out, task.draft, target.lm, {**about, **git_state(), "log": rows})
        (out / "checkpoint.pt").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return task.draft, rows


def train(
    target_folder: Path,
    data: Path,
    out: Path,
    settings: Settings,
    recipe: str = "paper",
    loss: str = "",
    drafter: str = "paper",
    held_out: int = 64,
    longest: int = 1500,
    samples: int | None = None,
    sample_batch: int = 1,
    device: str = "auto",
    log=print,
) -> tuple[SpeechLM, list[dict]]:
    """What ``ssd-repro train-draft`` does, in every process. Raises InputError, the same one in all.

    held_out: rows, chosen by the seed, that are only evaluated on; longest: rows with more
    speech tokens are left out; samples: the on-policy recipe takes at most so many rows, and speaks
    ``sample_batch`` of them at once.
    """
    loss_of(recipe, loss)
    check_choice("drafter", drafter, DRAFTERS)
    for name, value, least in (
        ("held_out", held_out, 0),
        ("longest", longest, 1),
        ("samples", samples, 1),
        ("sample_batch", sample_batch, 1),
    ):
        if value is not None:
            check_number(name, value, least, 1_000_000_000, whole=True)
    accelerator = processes(device)
    main = accelerator.is_main_process
    log = log if main else lambda _: None
    with ExitStack() as stack:
        lock = locked(Path(out) / ".run.lock") if main else nullcontext()
        agree(accelerator, lambda: stack.enter_context(lock))
        target = agree(accelerator, lambda: load_target(target_folder))
        groups = agree(accelerator, lambda: target.read(data))
        rest, held = hold_out(groups, held_out, longest, settings.seed)
        where = f"{accelerator.num_processes} processes on {accelerator.device.type}"
        log(f"{len(rest)} rows to learn from, {len(held)} held out, {where}")
        learned, dev = flat(rest), flat(held)
        if recipe == "on-policy":
            asked = [group[0] for group in held + rest[:samples]]  # renderings of a text have the same text
            spoken = sample(target, asked, settings, Path(out) / "samples", accelerator, log, sample_batch)
            ids = {o.id for o in dev}
            learned, dev = ([example for example in spoken if (example.id in ids) == kept] for kept in (False, True))
        how = {"accelerator": accelerator, "log": log}
        return train_draft(target, learned, dev, settings, out, recipe, loss, drafter, **how)
