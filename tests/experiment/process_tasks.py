"""What the tests' processes do. It imports little: each process imports it anew."""

import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ssd_repro.errors import InputError
from ssd_repro.processes import process


def tell(folder):
    """Write down who this process is."""
    rank, world = process()
    told = f"{rank} of {world}, GPU {os.environ['LOCAL_RANK']}, {torch.get_num_threads()} threads"
    Path(folder, str(rank)).write_text(told)


def refuse(parameters):
    raise InputError(f"draft_lengths are {parameters['03_draft_length']['draft_lengths']}")


def hang(parameters):
    rank, _ = process()
    for _ in tqdm([0, 1]):
        Path(parameters["03_draft_length"]["out"], str(rank)).touch()
        time.sleep(60)
