"""The training loop."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import check_number


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; ``batch`` in utterances; ``until``: stop early there, 0: at ``steps``."""

    steps: int
    batch: int = 16
    learning_rate: float = 1.2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    seed: int = 0
    save_every: int = 200
    until: int = 0

    def __post_init__(self):
        check_number("until (0: not before steps)", self.until, 0, self.steps, whole=True)


def fit(
    model: nn.Module,
    groups: list[dict],
    loss: Callable[[list, random.Random], dict[str, Tensor]],
    items: list,
    size: Callable[[object], int],
    schedule: Schedule,
    checkpoint: Path,
    dev: list | None = None,
    log: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """Train ``model`` with AdamW and a cosine; returns the log rows (also in the checkpoint).

    ``loss`` gives named terms, of which "total" is minimised. Batches hold
    items of like ``size``. Every ``save_every`` steps the terms over ``dev``
    join the log and ``checkpoint`` is written, beside and renamed; it is read
    if it is there.
    """
    optimizer = torch.optim.AdamW(groups, schedule.learning_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    scales = [group.get("scale", 1.0) for group in optimizer.param_groups]
    first, rows, end = 0, [], schedule.until or schedule.steps
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, rows = saved["step"], json.loads(saved["rows"])
    model.train()
    sums: dict[str, list[float]] = {}
    began = time.perf_counter()
    for step in range(first, end):
        rate = learning_rate(schedule, step)
        for group, scale in zip(optimizer.param_groups, scales):
            group["lr"] = rate * scale
        torch.manual_seed(schedule.seed * 1_000_003 + step)  # dropout has no generator argument
        terms = loss(pick(items, size, schedule, step), random.Random(f"{schedule.seed}/{step}"))
        optimizer.zero_grad()
        terms["total"].backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        for name, value in terms.items():  # a step may lack some
            sums.setdefault(name, []).append(float(value.detach()))
        last = step + 1 == end
        if (step + 1) % 50 == 0 or last:
            row = {"step": step + 1, **{k: sum(v) / len(v) for k, v in sums.items()}}
            sums = {}
            if dev and ((step + 1) % schedule.save_every == 0 or last):
                model.eval()
                with torch.no_grad():
                    row |= {f"dev_{k}": v for k, v in mean_terms(loss, dev, schedule.batch).items()}
                model.train()
            rows.append(row)
            pace = (time.perf_counter() - began) / (step + 1 - first)
            log(" ".join(f"{k}={v:.4g}" for k, v in row.items()) + f" {pace:.3f}s/step")
        if (step + 1) % schedule.save_every == 0 or last:
            save = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write_checkpoint(checkpoint, save | {"step": step + 1, "rows": json.dumps(rows)})
    model.eval()
    return rows


def learning_rate(schedule, step: int) -> float:
    """Linear warm-up, times a cosine to 0; ``schedule`` has learning_rate, warmup and steps."""
    warm = min(1.0, (step + 1) / schedule.warmup)
    return schedule.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / schedule.steps))


def pick(items: list, size: Callable[[object], int], schedule: Schedule, step: int) -> list:
    """The batch of ``step``: an epoch is shuffled, sorted by jittered size and cut into batches."""
    per_epoch = max(1, len(items) // schedule.batch)
    epoch, place = divmod(step, per_epoch)
    rng = random.Random(f"{schedule.seed}/{epoch}")
    order = sorted(items, key=lambda item: size(item) * rng.uniform(0.85, 1.15))
    starts = [k * schedule.batch for k in range(per_epoch)]
    rng.shuffle(starts)
    return order[starts[place] : starts[place] + schedule.batch]


def write_checkpoint(path: Path, content: dict) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(content, part)
    part.replace(path)


def mean_terms(loss: Callable, items: list, batch: int) -> dict[str, float]:
    """Mean of every loss term over ``items``, in batches."""
    starts = range(0, len(items), batch)
    found = [loss(items[s : s + batch], random.Random(s)) for s in starts]
    return {k: sum(float(f[k]) for f in found) / len(found) for k in found[0]}
