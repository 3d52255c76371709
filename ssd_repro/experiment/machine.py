"""The machine that a row was timed on: its kind, and how busy it was with other work."""

from __future__ import annotations

import os
import platform
import socket
from contextlib import suppress
from pathlib import Path

from ..processes import process


def machine_kind(device) -> dict:
    """Device, chip, threads and torch version: what timings depend on. Which of several GPUs it was does not count."""
    import torch

    kind = str(device).partition(":")[0]
    chip = torch.cuda.get_device_name(device) if kind == "cuda" else _processor()
    return {"device": kind, "chip": chip, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def processes_of_run() -> list[int]:
    """Process ids of this run on this machine. All processes of a group must call it together."""
    world = process()[1]
    if world == 1:
        return [os.getpid()]
    import torch.distributed as dist

    here, everyone = socket.gethostname(), [None] * world
    dist.all_gather_object(everyone, (here, os.getpid()))
    return [pid for host, pid in everyone if host == here]


class LoadMeter:
    """How many cores other work takes: CPU time of the machine less that of the processes ``pids``.

    Only the cores that ``pids`` may run on are counted.
    """

    def __init__(self, pids: list[int]) -> None:
        import psutil

        self.own = [psutil.Process(pid) for pid in pids]
        self.cores = set(range(psutil.cpu_count() or 1))
        if hasattr(psutil.Process, "cpu_affinity"):
            self.cores = {core for own in self.own for core in own.cpu_affinity()}
        self.restart()

    def restart(self) -> None:
        self.before = self._seconds()

    def other_load(self) -> float | None:
        """Mean number of cores that other processes used since ``restart``; None where the system does not say."""
        whole, busy, own = (now - then for now, then in zip(self._seconds(), self.before, strict=True))
        if whole <= 0:
            return None
        return round(max(0.0, busy - own) / whole * len(self.cores), 2)

    def _seconds(self) -> tuple[float, float, float]:
        """CPU seconds so far: of all cores, of all cores at work, of the own processes."""
        import psutil

        times = [core for i, core in enumerate(psutil.cpu_times(percpu=True)) if i in self.cores]
        guests = sum(getattr(t, "guest", 0) + getattr(t, "guest_nice", 0) for t in times)  # part of user and nice
        whole = sum(map(sum, times)) - guests
        own = 0.0
        for fellow in self.own:
            with suppress(psutil.Error):  # it has ended
                own += sum(fellow.cpu_times()[:2])  # user and system
        return whole, whole - sum(t.idle + getattr(t, "iowait", 0) for t in times), own
