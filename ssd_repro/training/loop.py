"""The one training loop: codec, target and draft, on 1..N processes, killed and resumed as if nothing had been.

What a step sees depends on (seed, step) alone. Every process takes its share of each batch; the
gradient is the mean over ALL labels of the batch, so that neither the number of processes nor
gradient accumulation changes the result beyond rounding, where terms are means over the labels
and nothing is drawn inside the model (the draft; codec and target have dropout).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, check_number
from ..files import append_row, replacing, write_text
from ..models.speech_lm import PRECISIONS
from .parallel import agree, processes


@dataclass(frozen=True)
class Settings:
    """How to train; checked here (InputError).

    steps       optimiser steps, over which the learning rate falls to 0
    batch       utterances of one step, all processes and accumulated parts together
    accumulate  parts of a process's share that go through the model one after another
    precision   'bf16' is mixed: weights and optimiser stay fp32
    save_every  steps between checkpoints and evaluations
    until       stop early, at this step; 0: at ``steps``
    """

    steps: int
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.05
    precision: str = "bf16"
    seed: int = 0
    save_every: int = 200
    until: int = 0

    # What may differ when a run goes on: accumulate and save_every change no gradient beyond rounding;
    # until only says where to stop. steps may not: the learning rate of every step depends on it.
    FREE = ("accumulate", "save_every", "until")

    def __post_init__(self):
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("steps", "batch", "accumulate", "warmup", "save_every"):
            check_number(name, getattr(self, name), 1, 1_000_000_000, whole=True)
        check_number("until (0: at steps)", self.until, 0, self.steps, whole=True)
        check_number("seed", self.seed, 0, 2**63 - 1, whole=True)
        check_number("learning_rate", self.learning_rate, 1e-9, 10.0)
        check_number("weight_decay", self.weight_decay, 0.0, 10.0)

    def rate(self, step: int) -> float:
        """The learning rate of ``step``: linear warm-up, times a cosine to 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        return self.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))


def check_choice(name: str, value: str, known) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}; choose one of {', '.join(known)}.")


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """p, q (N, V) -> mean of sum min(p, q): 1 - total variation."""
    return torch.minimum(p, q).sum(-1).mean()


def divergence(logits: Tensor, q: Tensor) -> Tensor:
    """0.1 KL(q || p) + 0.9 total variation of a draft's softmax p from q, means over rows; logits, q (N, V).

    Total variation is 1 - the acceptance rate of lossless decoding; the KL carries the gradient where
    the two have nothing in common (weights as DSpark's, Cheng et al. 2026).
    """
    log_p = logits.log_softmax(-1)
    return 0.1 * F.kl_div(log_p, q, reduction="batchmean") + 0.9 * (1 - overlap(log_p.exp(), q))


class Task(nn.Module):
    """What ``train`` trains: those of its parameters that require a gradient.

    ``forward(items)`` gives named terms, scalar tensors, each a mean over the items' ``labels`` (how
    many they have); "loss" is minimised. In eval mode it gives what is logged of held-out items, as dev_<name>.
    """

    precision = "bf16"  # ``train`` sets it from the settings

    def draw(self, items: list, rng: random.Random) -> list:
        """What chance makes of a step's whole batch, or of all held-out items: the same in every process."""
        return items

    def groups(self) -> list[dict]:
        """AdamW's parameter groups; "scale": a factor of the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def autocast(self):
        kind = next(self.parameters()).device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16")


class Batches:
    """step -> the items of that step, over all processes; it depends on (seed, step) alone.

    An epoch is sorted by jittered length, cut into batches of like length, and these shuffled.
    """

    def __init__(self, items: list, batch: int, seed: int) -> None:
        self.items, self.batch, self.seed, self.epoch = items, batch, seed, -1

    def __call__(self, step: int) -> list:
        batches, left = divmod(len(self.items), self.batch)
        epoch, place = divmod(step, batches)
        if epoch != self.epoch:
            rng = random.Random(f"{self.seed}/{epoch}")
            jittered = [len(item) * rng.uniform(0.85, 1.15) for item in self.items]
            self.epoch, self.order = epoch, np.argsort(jittered, kind="stable")
            first = rng.randrange(left + 1)  # else the longest would be left out of every epoch
            self.starts = [first + k * self.batch for k in range(batches)]
            rng.shuffle(self.starts)
        return [self.items[i] for i in self.order[self.starts[place] :][: self.batch]]


def identity(settings: Settings, facts: dict, items: list, dev: list) -> dict:
    """What makes a run this run and no other, as JSON has it: settings but for ``Settings.FREE``, facts and data."""
    fixed = {name: value for name, value in asdict(settings).items() if name not in Settings.FREE}
    return json.loads(json.dumps(fixed | facts | {"data": data_sha256(items), "dev": data_sha256(dev)}))


def data_sha256(items: list) -> str:
    """SHA-256 over all fields of dataclasses of tensors, arrays and what has a repr, in their order."""
    digest = hashlib.sha256()
    for value in (getattr(item, field.name) for item in items for field in fields(item)):
        arrays = isinstance(value, (Tensor, np.ndarray))
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode() if arrays else repr(value).encode())
        digest.update(np.ascontiguousarray(value) if arrays else b"")
    return digest.hexdigest()


def check_identity(path: Path, kept: dict, ours: dict) -> None:
    """InputError unless the run that ``path`` is of, ``kept``, is the one that was asked for."""
    for name, value in ours.items():
        if kept.get(name) != value:
            raise InputError(
                f"{path} is of a run with {name} {kept.get(name)!r}, now it is {value!r}: choose another folder, or "
                "remove it to begin anew"
            )


def train(
    task: Task, items: list, dev: list, settings: Settings, out: Path, facts: dict, accelerator=None, log=print
) -> list[dict]:
    """Train ``task`` in place with AdamW -> the rows of the log, at every 50th step and every checkpoint.

    A row holds the terms, means since the row before, gradient_norm of the last step (before it is
    clipped to 1), the learning rate, how many labels were seen, and with a checkpoint the terms of
    ``dev``. ``items``: dataclasses with a length. ``out`` gets log.jsonl and checkpoint.pt; the same
    call goes on from there. ``facts``: what else than settings and data decides the result. InputError
    if ``out`` holds another run, or if the batch cannot be shared out.
    """
    from accelerate.utils import gather_object

    accelerator = accelerator or processes()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for each new shape: 40 % of a step on an H100
    run = agree(accelerator, lambda: _Run(task, items, dev, settings, Path(out), facts, accelerator))
    if len(set(gather_object([f"{run.step} {run.identity}"]))) > 1:
        raise InputError("the processes see different data or checkpoints: all nodes must share the disk they are on")
    run.model = accelerator.prepare(task)
    while run.step < run.end:
        run.advance(log)
    task.eval()
    return run.rows


class _Run:
    """The state of one training: what a checkpoint holds, and the step that changes it."""

    def __init__(self, task, items, dev, settings: Settings, out: Path, facts: dict, accelerator) -> None:
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        name = "batch (at least processes x accumulate, at most the rows to learn from)"
        check_number(name, settings.batch, self.world * settings.accumulate, len(items), whole=True)
        self.batches, self.dev = Batches(items, settings.batch, settings.seed), dev
        self.settings, self.end, self.accelerator = settings, settings.until or settings.steps, accelerator
        self.path, self.log_path = out / "checkpoint.pt", out / "log.jsonl"
        self.identity = identity(settings, facts, items, dev)
        self.step, self.rows, self.seen, self.sums = 0, [], 0, Counter()
        self.task = task.to(accelerator.device).train()
        self.task.precision = settings.precision
        self.trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(task.groups(), betas=(0.9, 0.98), weight_decay=settings.weight_decay)
        if self.path.exists():
            self._resume()
        if accelerator.is_main_process:  # rows after the checkpoint will be made again
            write_text(self.log_path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.began = (time.perf_counter(), self.step)

    def _resume(self) -> None:
        try:
            saved = torch.load(self.path, weights_only=True, map_location=self.accelerator.device)
            facts = json.loads(saved["facts"])
        except (RuntimeError, UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{self.path} cannot be read ({type(error).__name__}): remove it to begin anew") from None
        check_identity(self.path, facts["identity"], self.identity)
        if facts["step"] > self.end:
            raise InputError(f"{self.path} is at step {facts['step']}, after until {self.end}: raise until")
        self.task.load_state_dict(saved["trained"], strict=False)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.rows, self.seen = facts["step"], facts["rows"], facts["seen"]

    def advance(self, log: Callable[[str], None]) -> None:
        """One optimiser step; then the log and the checkpoint, where they are due."""
        settings = self.settings
        # Dropout has no generator argument; alone (rank 0 of 1) the seed is seed * 1_000_003 + step.
        torch.manual_seed(((settings.seed * 1_000_003 + self.step) * self.world + self.rank) % 2**63)
        whole = self.task.draw(self.batches(self.step), random.Random(f"{settings.seed}/{self.step}"))
        share, labels = whole[self.rank :: self.world], sum(item.labels for item in whole)
        for i in range(settings.accumulate):
            last, part = i + 1 == settings.accumulate, share[i :: settings.accumulate]
            weight = sum(item.labels for item in part)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                terms = self.model(part)
                # DistributedDataParallel takes the mean over processes; it shall be the sum.
                (terms["loss"] * (weight * self.world / labels)).backward()
            _add(self.sums, terms, weight)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.step) * group.get("scale", 1.0)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.seen = self.step + 1, self.seen + labels
        saving = self.step % settings.save_every == 0 or self.step == self.end
        if saving or self.step % 50 == 0:
            self._report(float(norm), saving, log)
        if saving and self.accelerator.is_main_process:
            facts = {"identity": self.identity, "step": self.step, "rows": self.rows, "seen": self.seen}
            trained = {name: p.detach() for name, p in self.trained.items()}
            state = {"trained": trained, "optimizer": self.optimizer.state_dict(), "facts": json.dumps(facts)}
            with replacing(self.path) as part:
                torch.save(state, part)

    def _report(self, norm: float, evaluating: bool, log: Callable[[str], None]) -> None:
        row = {"step": self.step, **self._means(self.sums)}
        row |= {"gradient_norm": norm, "learning_rate": self.settings.rate(self.step - 1), "labels": self.seen}
        self.sums = Counter()
        if evaluating and self.dev:
            row |= {f"dev_{name}": value for name, value in self._evaluate().items()}
        clock, since = self.began
        row["seconds_per_step"] = (time.perf_counter() - clock) / (self.step - since)
        self.rows.append(row)
        if self.accelerator.is_main_process:
            append_row(self.log_path, row)
            log(" ".join(f"{name}={value:.4g}" for name, value in row.items()))

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Means over the labels of ``dev``, which the processes share out."""
        self.task.eval()
        drawn = self.task.draw(self.dev, random.Random(0))
        size = max(1, self.settings.batch // (self.world * self.settings.accumulate))
        sums, share = Counter(), drawn[self.rank :: self.world]
        for start in range(0, max(1, len(share)), size):
            part = share[start : start + size]  # too few for this process: it must still join in
            _add(sums, self.task(part or drawn[:1]), sum(item.labels for item in part))
        self.task.train()
        return self._means(sums)

    def _means(self, sums: Counter) -> dict[str, float]:
        """Over all processes."""
        names = sorted(sums)
        weight, *totals = self.accelerator.reduce(torch.stack([sums[name] for name in names]), "sum").tolist()
        return {name: total / weight for name, total in zip(names[1:], totals, strict=True)}


def _add(sums: Counter, terms: dict[str, Tensor], weight: int) -> None:
    """Of ``terms``, times ``weight``, and under "", which sorts first, of ``weight`` itself."""
    for name, value in {"": torch.ones_like(terms["loss"]), **terms}.items():
        sums[name] += value.detach().double() * weight
