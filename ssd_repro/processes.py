"""Several processes: which one this is, waiting for the others, launching them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time


def process() -> tuple[int, int]:
    """(rank, number of processes) of the initialised torch.distributed group; (0, 1) where there is none.

    RANK and WORLD_SIZE alone count for nothing: a cluster's shell may hold them where nothing was launched.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Until every process of the group has come here; at once where there is no group."""
    import torch.distributed as dist

    if process()[1] > 1:
        dist.barrier()


LAUNCHED = "SSD_REPRO_LAUNCHED"  # set in the processes of --processes


def _first_process() -> bool:
    """Of those that torchrun or accelerate launched; what all of them would say, this one says.

    Of those of ``launch`` any may speak: the first that fails is the last.
    """
    return LAUNCHED in os.environ or os.environ.get("RANK", "0") == "0"


def launch(processes: int, arguments: list[str]) -> int:
    """The same command in several processes of this machine, each with its share of the cores -> exit code.

    Not by torchrun: its processes outlive a killed parent, and hold the lock. These end with it
    (``end_with_parent``), and the first that fails ends the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} | os.environ
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), LAUNCHED: "1"}
    command, workers = [sys.executable, "-m", "ssd_repro", *arguments], []
    try:
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(subprocess.Popen(command, env=share | meet | own, stdin=subprocess.PIPE))
        while True:
            codes = [worker.poll() for worker in workers]
            if any(codes) or None not in codes:
                return max(abs(code) for code in codes if code is not None)
            time.sleep(0.2)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def end_with_parent() -> None:
    """In a process of ``launch``: end when its parent has, that is, when the pipe on stdin does."""
    if LAUNCHED in os.environ:
        pipe = os.dup(0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        threading.Thread(target=lambda: os.read(pipe, 1) or os._exit(1), daemon=True).start()
