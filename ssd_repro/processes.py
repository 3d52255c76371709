"""Several processes: which one this is, waiting for the others, starting them on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

from .errors import InputError


def process() -> tuple[int, int]:
    """(rank, number of processes) of the initialised torch.distributed group; (0, 1) where there is none.

    RANK and WORLD_SIZE alone count for nothing: a cluster's shell may hold them where nothing was launched.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    import torch.distributed as dist

    if process()[1] > 1:
        dist.barrier()


def is_launched() -> bool:
    """Whether torchrun or ``accelerate launch`` did it: torch.distributed.is_torchelastic_launched, without torch."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Of launched processes the first: it prints what all of them would."""
    return not is_launched() or os.environ.get("RANK") == "0"


@contextmanager
def _group(**where):
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=30), **where)  # a share may take hours longer than another
    try:
        dist.barrier()  # one that failed at once would leave the others in the middle of connecting
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def launched_group():
    return _group() if is_launched() else nullcontext()


def run_in_processes(count: int, function, *arguments) -> None:
    """``function(*arguments)`` in ``count`` new processes of this machine, which are a group.

    Each has its share of the cores. When one fails, or this process ends, however, all of them end.
    Raises InputError as one of them did.
    """
    import torch.multiprocessing as mp

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    refusals = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        member = (count, Path(folder, "store").as_uri(), refusals, function, arguments)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # until they have made their own arrangement
        try:
            context = mp.start_processes(_run_member, member, count, join=False, daemon=True, start_method="spawn")
        finally:
            signal.signal(signal.SIGINT, handler)
        try:
            while not context.join():
                pass
        except mp.ProcessRaisedException:
            if refusals.empty():
                raise
            raise InputError(refusals.get()) from None


def _run_member(rank: int, count: int, store: str, refusals, function, arguments) -> None:
    # SIGINT comes from the terminal, and from Linux when the parent has died (torch.multiprocessing asks for it).
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not multiprocessing.parent_process().is_alive():
        return
    os.environ["LOCAL_RANK"] = str(rank)  # its GPU
    try:
        with _group(init_method=store, rank=rank, world_size=count):
            function(*arguments)
    except InputError as error:
        refusals.put(str(error))
        raise
