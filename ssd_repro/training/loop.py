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
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
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


class Task(nn.Module):
    """What ``train`` trains: those of its parameters that require a gradient.

    ``forward(items)`` gives named terms, scalar tensors, each a mean over the items' labels;
    "loss" is minimised. In eval mode it gives what is logged of held-out items, as dev_<name>.
    """

    precision = "bf16"  # ``train`` sets it from the settings

    def draw(self, items: list, rng: random.Random) -> list:
        """What chance makes of a step's whole batch, or of all held-out items: the same in every process."""
        return items

    def labels(self, item) -> int:
        """How many labels an item has: its weight in the mean over a batch."""
        raise NotImplementedError

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
        if not 1 <= batch <= len(items):
            raise InputError(f"batch is {batch}; it must be from 1 to {len(items)}, the number of rows to learn from.")
        self.items, self.batch, self.seed = items, batch, seed
        self.epoch, self.order, self.starts = -1, [], []

    def __call__(self, step: int) -> list:
        epoch, place = divmod(step, len(self.items) // self.batch)
        if epoch != self.epoch:
            self._shuffle(epoch)
        start = self.starts[place]
        return [self.items[i] for i in self.order[start : start + self.batch]]

    def _shuffle(self, epoch: int) -> None:
        rng = random.Random(f"{self.seed}/{epoch}")
        jittered = [len(item) * rng.uniform(0.85, 1.15) for item in self.items]
        self.epoch, self.order = epoch, np.argsort(jittered, kind="stable")
        batches, left = divmod(len(self.items), self.batch)
        first = rng.randrange(left + 1)  # else the longest would be left out of every epoch
        self.starts = [first + k * self.batch for k in range(batches)]
        rng.shuffle(self.starts)


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
        if arrays:
            digest.update(np.ascontiguousarray(value))
    return digest.hexdigest()


def check_identity(path: Path, kept: dict, ours: dict) -> None:
    """InputError unless the run that ``path`` is of, ``kept``, is the one that was asked for."""
    for name, value in ours.items():
        if kept.get(name) != value:
            raise InputError(
                f"{path} is of a run with {name} {kept.get(name)!r}, now it is {value!r}: choose another folder, or "
                "remove that file to begin anew"
            )


def train(
    task: Task, items: list, dev: list, settings: Settings, out: Path, facts: dict, accelerator=None, log=print
) -> list[dict]:
    """Train ``task`` in place with AdamW -> the rows of the log, at every 50th step and every checkpoint.

    A row holds the terms, means since the row before, gradient_norm of the last step (before it is
    clipped to 1), the learning rate, how many labels were seen, and with a checkpoint the terms of
    ``dev``. ``items``: dataclasses with a length; those of like length share a batch. ``out`` gets
    log.jsonl and checkpoint.pt; the same call goes on from there. ``facts``: what else than settings
    and data decides the result. InputError if ``out`` holds another run, or if the batch cannot be
    shared out.
    """
    accelerator = accelerator or processes()
    run = agree(accelerator, lambda: _Run(task, items, dev, settings, Path(out), facts, accelerator))
    run.start()
    while run.step < run.end:
        run.advance(log)
    task.eval()
    return run.rows


class _Run:
    """The state of one training: what a checkpoint holds, and the step that changes it."""

    def __init__(self, task, items, dev, settings: Settings, out: Path, facts: dict, accelerator) -> None:
        parts = accelerator.num_processes * settings.accumulate
        if settings.batch < parts:
            raise InputError(
                f"batch is {settings.batch}; {accelerator.num_processes} processes x {settings.accumulate} accumulated "
                f"parts need at least {parts} utterances."
            )
        self.batches, self.dev = Batches(items, settings.batch, settings.seed), dev
        self.settings, self.end, self.accelerator = settings, settings.until or settings.steps, accelerator
        self.path, self.log_path = out / "checkpoint.pt", out / "log.jsonl"
        self.identity = identity(settings, facts, items, dev)
        self.step, self.rows, self.seen = 0, [], 0
        self.task = task.to(accelerator.device).train()
        self.task.precision = settings.precision
        self.trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(task.groups(), betas=(0.9, 0.98), weight_decay=settings.weight_decay)
        self._resume()
        self.sums, self.weight = {}, 0
        self.began = (time.perf_counter(), self.step)

    def start(self) -> None:
        """Wrap the task for several processes, after a look at whether they are at one."""
        from accelerate.utils import gather_object

        if len(set(gather_object([f"{self.step} {self.identity}"]))) > 1:
            raise InputError(
                "the processes see different data or checkpoints: all nodes must share the disk that they are on"
            )
        self.model = self.accelerator.prepare(self.task)

    def _resume(self) -> None:
        if self.path.exists():
            try:
                saved = torch.load(self.path, weights_only=True, map_location=self.accelerator.device)
                facts = json.loads(saved["facts"])
            except (RuntimeError, UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
                raise InputError(
                    f"{self.path} cannot be read ({type(error).__name__}): remove it to begin anew"
                ) from None
            check_identity(self.path, facts["identity"], self.identity)
            if facts["step"] > self.end:
                raise InputError(f"{self.path} is at step {facts['step']}, after until {self.end}: raise until")
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(saved["trained"][name])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.rows, self.seen = facts["step"], facts["rows"], facts["seen"]
        if self.accelerator.is_main_process:  # rows after the checkpoint will be made again
            write_text(self.log_path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            facts = {"identity": self.identity, "step": self.step, "rows": self.rows, "seen": self.seen}
            trained = {name: p.detach() for name, p in self.trained.items()}
            state = {"trained": trained, "optimizer": self.optimizer.state_dict(), "facts": json.dumps(facts)}
            with replacing(self.path) as part:
                torch.save(state, part)

    def advance(self, log: Callable[[str], None]) -> None:
        """One optimiser step; then the log and the checkpoint, where they are due."""
        settings, rank, world = self.settings, self.accelerator.process_index, self.accelerator.num_processes
        # Dropout has no generator argument; alone (rank 0 of 1) the seed is seed * 1_000_003 + step.
        torch.manual_seed(((settings.seed * 1_000_003 + self.step) * world + rank) % 2**63)
        whole = self.task.draw(self.batches(self.step), random.Random(f"{settings.seed}/{self.step}"))
        share, labels = whole[rank::world], sum(map(self.task.labels, whole))
        self._gradient([share[i :: settings.accumulate] for i in range(settings.accumulate)], labels)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.step) * group.get("scale", 1.0)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.seen = self.step + 1, self.seen + labels
        saving = self.step % settings.save_every == 0 or self.step == self.end
        if saving or self.step % 50 == 0:
            self._report(float(norm), saving, log)
        if saving:
            self._save()

    def _gradient(self, parts: list[list], labels: int) -> None:
        """Add up the gradient of the mean loss over the ``labels`` of all processes."""
        for i, part in enumerate(parts):
            last, weight = i + 1 == len(parts), sum(map(self.task.labels, part))
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                terms = self.model(part)
                # DistributedDataParallel takes the mean over processes; it shall be the sum.
                (terms["loss"] * (weight * self.accelerator.num_processes / labels)).backward()
            self._add(self.sums, terms, weight)
            self.weight += weight

    @staticmethod
    def _add(sums: dict[str, Tensor], terms: dict[str, Tensor], weight: int) -> None:
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() * weight

    def _mean(self, sums: dict[str, Tensor], weight: int) -> dict[str, float]:
        """Over all processes."""
        names = sorted(sums)
        both = torch.stack([sums[name] for name in names] + [torch.tensor(weight).to(sums[names[0]])])
        *totals, weight = self.accelerator.reduce(both, "sum").tolist()
        return {name: total / weight for name, total in zip(names, totals, strict=True)}

    def _report(self, norm: float, evaluating: bool, log: Callable[[str], None]) -> None:
        row = {"step": self.step, **self._mean(self.sums, self.weight)}
        row |= {"gradient_norm": norm, "learning_rate": self.settings.rate(self.step - 1), "labels": self.seen}
        self.sums, self.weight = {}, 0
        if evaluating and self.dev:
            row |= self._evaluate()
        clock, since = self.began
        row["seconds_per_step"] = (time.perf_counter() - clock) / (self.step - since)
        self.rows.append(row)
        if self.accelerator.is_main_process:
            append_row(self.log_path, row)
            log(" ".join(f"{name}={value:.4g}" for name, value in row.items()))

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Means over the labels of ``dev``, which the processes share out."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.task.eval()
        drawn = self.task.draw(self.dev, random.Random(0))
        size = max(1, self.settings.batch // (world * self.settings.accumulate))
        sums, weight, share = {}, 0, drawn[rank::world]
        for start in range(0, max(1, len(share)), size):
            part = share[start : start + size]
            own = sum(map(self.task.labels, part))
            self._add(sums, self.task(part or drawn[:1]), own)  # too few for this process: it must still join in
            weight += own
        self.task.train()
        return {f"dev_{name}": value for name, value in self._mean(sums, weight).items()}
