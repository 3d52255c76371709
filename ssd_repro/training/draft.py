"""One draft trainer for every target: the paper's recipe (Eq. 7) and the on-policy one, on 1..N processes.

SYMBOLS: p is the DRAFT, q the TARGET. Every process keeps target and draft, and takes its share
of each batch; the gradient is the mean over ALL tokens of the batch, so that neither the number
of processes nor gradient accumulation changes the result beyond rounding. What a step sees
depends on (seed, step) alone: a run that was killed goes on where it was, to the same weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoding.sampling import probabilities
from ..decoding.speculative import autoregressive
from ..errors import InputError, check_number
from ..files import append_row, drop_half_line, git_state, locked, read_rows, write_text
from ..models import checkpoints
from ..models.draft import make_draft, own_parameters
from ..models.speech_lm import PRECISIONS, SpeechLM, choose_device
from .data import Batch, Batches, Example, Target, collate, data_sha256, load_target, read_data
from .loop import learning_rate, write_checkpoint

RECIPES = ("paper", "on-policy")
LOSSES = ("ce", "kl")
FREE = ("accumulate", "save_every")  # settings that may differ when a run goes on


@dataclass(frozen=True)
class Settings:
    """How to train; checked here (InputError).

    recipe      'paper': on the data's speech; 'on-policy': on speech that the target itself
                says to the data's texts, as it is deployed (sampler, lengths, precision)
    loss        'ce': cross-entropy of the tokens (Eq. 7); 'kl': KL(q || p) from the law that
                the target samples from, top-k, top-p and RAS included, to the draft's softmax.
                Default: ce for the paper's recipe, kl for on-policy
    batch       utterances of one optimiser step, all processes and accumulated parts together
    accumulate  parts of a process's share that go through the model one after another
    precision   'bf16' is mixed: weights and optimiser stay fp32
    """

    steps: int
    recipe: str = "paper"
    loss: str = ""
    batch: int = 64
    accumulate: int = 1
    learning_rate: float = 3e-4
    warmup: int = 200
    weight_decay: float = 0.05
    precision: str = "bf16"
    seed: int = 0
    save_every: int = 200

    def __post_init__(self):
        if not self.loss:
            object.__setattr__(self, "loss", "ce" if self.recipe == "paper" else "kl")
        for name, known in (("recipe", RECIPES), ("loss", LOSSES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}.")
        for name in ("steps", "batch", "accumulate", "warmup", "save_every"):
            check_number(name, getattr(self, name), 1, 1_000_000_000, whole=True)
        check_number("seed", self.seed, 0, 2**63 - 1, whole=True)
        check_number("learning_rate", self.learning_rate, 1e-9, 10.0)
        check_number("weight_decay", self.weight_decay, 0.0, 10.0)


# ------------------------------------------------------------ processes


def processes(device: str = "auto"):
    """The accelerate.Accelerator of this process; alone, or as torchrun or accelerate launched it.

    Raises InputError without accelerate, for a device that is not there, and under plugins
    that cut the model into pieces.
    """
    try:
        from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
    except ImportError:
        raise InputError("accelerate is not installed: install the extra `ssd-repro[scale]`") from None
    device = choose_device(device)
    # Some processes may sample hours longer than others: no wait for them shall time out.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[patience])
    kinds = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in kinds:
        raise InputError(f"accelerate runs {accelerator.distributed_type.value}: only plain data parallelism will do")
    return accelerator


def _agree(accelerator, function: Callable):
    """``function()`` in every process; an InputError of any of them is raised in all."""
    from accelerate.utils import gather_object

    value = error = None
    try:
        value = function()
    except InputError as raised:
        error = str(raised)
    errors = [text for text in gather_object([error]) if text]
    if errors:
        raise InputError(errors[0])
    return value


# ------------------------------------------------------------- sampling


def sample(
    target: Target, examples: list[Example], settings: Settings, folder: Path, accelerator, log=print
) -> list[Example]:
    """``examples`` with what the target says to their texts in place of their speech; kept in ``folder``.

    The processes take turns; each row is on the disk before the next begins, and is never made
    again. A row depends on (seed, its id) alone. The folder is a data folder. InputError if it
    holds samples of another target, other data or other settings.
    """
    about = {
        "seed": settings.seed,
        "precision": settings.precision,
        "target": checkpoints.weights_sha256(target.lm),
        "decoding": asdict(target.config(100)),  # its lengths for 100 text tokens
        "data": data_sha256([replace(one, speech=one.speech[:0], stopped=True) for one in examples]),
    }
    _agree(accelerator, lambda: accelerator.is_main_process and _prepare_samples(folder, about))
    done = _agree(accelerator, lambda: _sampled_ids(folder, about))  # nobody writes before all have read
    # In deployment's precision, in a copy; embeddings of the prompt come from it too.
    lm = copy.deepcopy(target.lm).to(accelerator.device).eval()
    if settings.precision == "bf16":
        lm = lm.cast("bf16")
    asked = replace(target, lm=lm)
    mine = [one for one in examples if one.id not in done][accelerator.process_index :: accelerator.num_processes]
    began = time.perf_counter()
    for i, one in enumerate(mine, 1):
        append_row(folder / f"{accelerator.process_index:05d}.jsonl", say(asked, one, settings.seed).row())
        if accelerator.is_main_process and (i % 100 == 0 or i == len(mine)):
            log(f"sampled {i} of {len(mine)} in this process, {(time.perf_counter() - began) / i:.2f} s each")
    accelerator.wait_for_everyone()
    made = _agree(accelerator, lambda: {row["id"]: Example.from_row(row) for row in _rows(folder)})
    return [made[one.id] for one in examples if len(made[one.id].speech)]


@torch.inference_mode()
def say(target: Target, one: Example, seed: int) -> Example:
    """``one`` with the target's own speech, sampled as deployed; its generator is seeded by (seed, id)."""
    prefix = target.embed(one)
    own = int.from_bytes(hashlib.sha256(f"{seed}/{one.id}".encode()).digest()[:7], "big")
    generator = torch.Generator(prefix.device).manual_seed(own)
    result = autoregressive(target.lm, prefix, target.config(len(one.text)), generator)
    return Example.from_row(one.row() | {"speech": list(result.tokens), "stopped": result.stopped})


def _prepare_samples(folder: Path, about: dict) -> None:
    """Make the folder ready for more rows."""
    if not (folder / "about.json").exists():
        write_text(folder / "about.json", json.dumps(about, indent=1) + "\n")
    for shard in folder.glob("*.jsonl"):
        drop_half_line(shard)


def _sampled_ids(folder: Path, about: dict) -> set[str]:
    """The ids of the rows that are there."""
    path = folder / "about.json"
    if not path.is_file():
        raise InputError(f"{path} is not seen by every process: --out must be on a disk that all nodes share")
    kept = json.loads(path.read_text("utf-8"))
    for name, value in json.loads(json.dumps(about)).items():
        if kept.get(name) != value:
            raise InputError(f"{folder} holds samples of another {name}: choose another --out, or remove that folder")
    return {row["id"] for row in _rows(folder)}


def _rows(folder: Path) -> list[dict]:
    return [row for shard in sorted(folder.glob("*.jsonl")) for row in read_rows(shard)]


# ------------------------------------------------------------- training


def train_draft(
    target: Target,
    train: list[Example],
    dev: list[Example],
    settings: Settings,
    out: Path,
    accelerator=None,
    log=print,
) -> tuple[SpeechLM, list[dict]]:
    """The paper's draft: bottom layers and head are trained, all else is frozen (``make_draft``).

    -> the draft, and the rows of the log: loss over the steps since the last row, gradient_norm
    of the last step (before it is clipped to 1); every save_every steps, over ``dev``: dev_loss (cross-entropy), dev_overlap, the mean of sum min(p, q)
    over plain softmaxes, and dev_acceptance, the same over the laws sampled from: the acceptance
    rate of plain speculative sampling on these tokens. ``out`` gets log.jsonl, checkpoint.pt
    while it runs, draft.safetensors and draft.json when it is done; the same call goes on from
    there. InputError if it holds another run, or if the batch cannot be shared out.
    """
    accelerator = accelerator or processes()
    run = _agree(accelerator, lambda: _Run(target, train, dev, settings, Path(out), accelerator))
    if not run.finished:
        while run.step < settings.steps:
            run.advance(log)
        run.finish()
    return run.draft.eval(), run.rows


class _Run:
    """The state of one training: what a checkpoint holds, and the step that changes it."""

    def __init__(self, target, train, dev, settings: Settings, out: Path, accelerator) -> None:
        parts = accelerator.num_processes * settings.accumulate
        if settings.batch < parts:
            raise InputError(
                f"batch is {settings.batch}; {accelerator.num_processes} processes x {settings.accumulate} accumulated "
                f"parts need at least {parts} utterances."
            )
        self.batches = Batches(train, settings.batch, settings.seed)
        self.target, self.dev, self.settings, self.out, self.accelerator = (
            target,
            dev,
            settings,
            out,
            accelerator,
        )
        fixed = {name: value for name, value in asdict(settings).items() if name not in FREE}
        shas = {
            "target": checkpoints.weights_sha256(target.lm),
            "data": data_sha256(train),
            "dev": data_sha256(dev),
        }
        self.identity = json.loads(json.dumps(fixed | shas))
        self.step, self.rows, self.tokens = 0, [], 0
        self.finished = (out / "draft.json").exists()
        if self.finished:
            self._check_identity(out / "draft.json", about := checkpoints.read_draft_facts(out))
            self.draft, self.rows = checkpoints.load_draft(out, target.lm), about["log"]
            return
        target.lm.to(accelerator.device).eval()
        self.draft = make_draft(target.lm)
        self.trained = own_parameters(self.draft)
        self.optimizer = torch.optim.AdamW(self.trained.values(), betas=(0.9, 0.98), weight_decay=settings.weight_decay)
        self._resume()
        self.model = None  # made at the first step: wrapping it needs all processes to be well
        self.sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # loss, tokens
        self.began = (time.perf_counter(), self.step)

    # checkpoints

    @property
    def path(self) -> Path:
        return self.out / "checkpoint.pt"

    def _check_identity(self, path: Path, kept: dict) -> None:
        for name, value in self.identity.items():
            if kept["identity"].get(name) != value:
                raise InputError(
                    f"{path} is of a run with {name} {kept['identity'].get(name)!r}, now it is {value!r}: choose "
                    "another --out, or remove that file to begin anew"
                )

    def _resume(self) -> None:
        if self.path.exists():
            try:
                saved = torch.load(self.path, weights_only=True, map_location=self.accelerator.device)
                facts = json.loads(saved["facts"])
            except (RuntimeError, UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
                raise InputError(
                    f"{self.path} cannot be read ({type(error).__name__}): remove it to begin anew"
                ) from None
            self._check_identity(self.path, facts)
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(saved["trained"][name])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.rows, self.tokens = facts["step"], facts["rows"], facts["tokens"]
        if self.accelerator.is_main_process:  # rows after the checkpoint will be made again
            write_text(self.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            facts = {"identity": self.identity, "step": self.step, "rows": self.rows, "tokens": self.tokens}
            state = {"trained": {name: p.detach() for name, p in self.trained.items()},
                     "optimizer": self.optimizer.state_dict(), "facts": json.dumps(facts)}  # fmt: skip
            write_checkpoint(self.path, state)

    def finish(self) -> None:
        """Write the draft and what made it; the checkpoint is then of no more use."""
        if self.accelerator.is_main_process:
            facts = {
                "identity": self.identity,
                "settings": asdict(self.settings),
                "processes": self.accelerator.num_processes,
                "rows": len(self.batches.examples),
                "tokens": self.tokens,
                "device": str(self.accelerator.device),
                "torch": torch.__version__,
                **git_state(),
                "log": self.rows,
            }
            checkpoints.save_draft(self.out, self.draft, self.target.lm, facts)
            self.path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    # a step

    def advance(self, log: Callable[[str], None]) -> None:
        """One optimiser step; then the log and the checkpoint, where they are due."""
        if self.model is None:
            self._start()
        settings = self.settings
        whole = self.batches(self.step)
        share = whole[self.accelerator.process_index :: self.accelerator.num_processes]
        self._gradient(
            [share[i :: settings.accumulate] for i in range(settings.accumulate)],
            sum(one.labels for one in whole),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        self.norm = nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += sum(one.labels for one in whole)
        saving = self.step % settings.save_every == 0 or self.step == settings.steps
        if saving or self.step % 50 == 0:
            self._report(saving, log)
        if saving:
            self._save()

    def _start(self) -> None:
        """Wrap the draft for several processes, after a look at whether they are at one."""
        from accelerate.utils import gather_object

        if len(set(gather_object([f"{self.step} {self.identity}"]))) > 1:
            raise InputError(
                "the processes see different data or checkpoints: --data and --out must be on a disk that all nodes share"
            )
        self.model = self.accelerator.prepare(self.draft)

    def _gradient(self, parts: list[list[Example]], tokens: int) -> None:
        """Add up the gradient of the mean loss over the ``tokens`` of all processes."""
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                batch = collate(self.target, part)
                loss = self._loss(self._logits(self.model, batch), batch)
                # DistributedDataParallel takes the mean over processes; it shall be the sum.
                (loss * (self.accelerator.num_processes / tokens)).backward()
            self.sums += torch.stack((loss.detach().double(), loss.new_tensor(len(batch.labels)).double()))

    def _logits(self, lm: nn.Module, batch: Batch) -> Tensor:
        """(N, V) float32 of the places that predict, in the precision of the settings."""
        kind = batch.embedded.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return lm(batch.embedded, batch.at).float()

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Summed over the batch's labels, in nats."""
        if self.settings.loss == "ce":
            return F.cross_entropy(logits, batch.labels, reduction="sum")
        with torch.no_grad():
            q = self._law(self._logits(self.target.lm, batch), batch)
        return F.kl_div(logits.log_softmax(-1), q, reduction="sum")

    def _law(self, logits: Tensor, batch: Batch) -> Tensor:
        """What is sampled from in deployment, (N, V); without the ban on early stops, which depends on the text."""
        return probabilities(logits, batch.history, self.target.config(1).sampler)

    # the log

    def _report(self, evaluating: bool, log: Callable[[str], None]) -> None:
        loss, tokens = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums = torch.zeros_like(self.sums)
        clock, since = self.began
        row = {
            "step": self.step,
            "loss": loss / tokens,
            "gradient_norm": float(self.norm),
            "learning_rate": learning_rate(self.settings, self.step - 1),
            "tokens": self.tokens,
        }
        if evaluating and self.dev:
            row |= self._evaluate()
        row["seconds_per_step"] = (time.perf_counter() - clock) / (self.step - since)
        self.rows.append(row)
        if self.accelerator.is_main_process:
            append_row(self.out / "log.jsonl", row)
            log(" ".join(f"{name}={value:.4g}" for name, value in row.items()))

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Means over the tokens of ``dev``, which the processes share out."""
        accelerator = self.accelerator
        mine = self.dev[accelerator.process_index :: accelerator.num_processes]
        size = max(1, self.settings.batch // (accelerator.num_processes * self.settings.accumulate))
        sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
        for start in range(0, len(mine), size):
            batch = collate(self.target, mine[start : start + size])
            p, q = self._logits(self.draft, batch), self._logits(self.target.lm, batch)
            overlap = torch.minimum(p.softmax(-1), q.softmax(-1)).sum()
            sampled = torch.minimum(self._law(p, batch), self._law(q, batch)).sum()
            loss = F.cross_entropy(p, batch.labels, reduction="sum")
            sums += torch.stack((loss, overlap, sampled, loss.new_tensor(len(batch.labels)))).double()
        loss, overlap, sampled, tokens = accelerator.reduce(sums, "sum").tolist()
        return {
            "dev_loss": loss / tokens,
            "dev_overlap": overlap / tokens,
            "dev_acceptance": sampled / tokens,
        }


# -------------------------------------------------------------- command


def train(
    target_folder: Path,
    data: Path,
    out: Path,
    settings: Settings,
    held_out: int = 64,
    longest: int = 1500,
    samples: int | None = None,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> tuple[SpeechLM, list[dict]]:
    """What ``ssd-repro train-draft`` does, in every process. Raises InputError, the same one in all.

    held_out: rows, chosen by the seed, that are only evaluated on; longest: rows with more
    speech tokens are left out; samples: the on-policy recipe takes at most so many rows.
    """
    check_number("held_out", held_out, 0, 1_000_000, whole=True)
    check_number("longest", longest, 1, 1_000_000, whole=True)
    if samples is not None:
        check_number("samples", samples, 1, 1_000_000_000, whole=True)
    accelerator = processes(device)
    say_so = log if accelerator.is_main_process else lambda _: None
    with ExitStack() as stack:
        lock = locked(Path(out) / ".run.lock") if accelerator.is_main_process else nullcontext()
        _agree(accelerator, lambda: stack.enter_context(lock))
        target = _agree(accelerator, lambda: load_target(target_folder))
        groups = _agree(accelerator, lambda: read_data(data, target))
        groups = [group for group in groups if len(group[0].speech) <= longest]
        random.Random(settings.seed).shuffle(groups)
        if len(groups) <= held_out:
            raise InputError(
                f"held_out is {held_out}; the data has {len(groups)} rows of at most {longest} speech tokens."
            )
        dev, rest = groups[:held_out], groups[held_out:]
        say_so(
            f"{len(rest)} rows to learn from, {len(dev)} held out, {accelerator.num_processes} processes on {accelerator.device.type}"
        )
        if settings.recipe == "on-policy":
            asked = [group[0] for group in dev + rest[:samples]]  # renderings of a text have the same text
            spoken = sample(target, asked, settings, Path(out) / "samples", accelerator, say_so)
            ids = {group[0].id for group in dev}
            dev, learned = (
                [one for one in spoken if one.id in ids],
                [one for one in spoken if one.id not in ids],
            )
        else:
            dev, learned = ([one for group in part for one in group] for part in (dev, rest))
        return train_draft(target, learned, dev, settings, out, accelerator, say_so)
