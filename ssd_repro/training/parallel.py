"""One process, or several that accelerate or torchrun launched: they fail together, and share out rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from ..errors import InputError
from ..files import append_row, drop_half_line, read_rows
from ..models.speech_lm import choose_device


def processes(device: str = "auto"):
    """The accelerate.Accelerator; InputError without accelerate, the device or plain data parallelism."""
    try:
        from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
    except ImportError:
        raise InputError("accelerate is not installed: install the extra `ssd-repro[scale]`") from None
    device = choose_device(device)
    # Some processes may sample hours longer than others: no wait for them shall time out.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[patience])
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise InputError(f"accelerate runs {accelerator.distributed_type.value}: only plain data parallelism will do")
    return accelerator


def agree(accelerator, function: Callable):
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


def rows_of(folder: Path) -> list[dict]:
    return [row for shard in sorted(folder.glob("*.jsonl")) for row in read_rows(shard)]


def share_rows(
    folder: Path, items: list, make: Callable[[list], list[dict | None]], accelerator, log: Callable, batch: int = 1
) -> None:
    """A row of each of ``items`` that has none yet, in ``folder``/<process>.jsonl, ``batch`` of them at a time.

    make: items -> a row or None for each.

    The processes take turns; each row is on the disk before the next begins, and none is made twice,
    whoever made it before. ``items`` and rows have an id. Returns when all processes are done.
    """

    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for shard in folder.glob("*.jsonl"):
            drop_half_line(shard)
    accelerator.wait_for_everyone()
    done = agree(accelerator, lambda: {row["id"] for row in rows_of(folder)})  # nobody writes before all have read
    rank, world, began = accelerator.process_index, accelerator.num_processes, time.perf_counter()
    share = [item for item in items if item.id not in done][rank::world]
    for first in range(0, len(share), batch):
        i = min(first + batch, len(share))
        if rows := [row for row in make(share[first:i]) if row]:
            append_row(folder / f"{rank:05d}.jsonl", *rows)
        if accelerator.is_main_process and (first // 100 != i // 100 or i == len(share)):
            log(f"{i} of {len(share)} utterances of this process, {(time.perf_counter() - began) / i:.2f} s each")
    accelerator.wait_for_everyone()
