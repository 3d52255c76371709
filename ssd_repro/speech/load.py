"""Loading a voice: the bundled one, another voice folder, or a CosyVoice 2 or 3."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from ..models import checkpoints
from ..models.speech_lm import PRECISIONS, choose_device
from . import zero_shot
from .voice import Voice


def load(
    path: str | Path | None = None,
    device: str = "auto",
    precision: str = "fp32",
    compile: bool = False,
    max_length: int = 1024,
    draft: str = "",
    data: str = "",
    front_end: str = "upstream",
) -> Voice:
    """Load a voice folder (the bundled one by default), or a CosyVoice 2 or 3. Raises InputError.

    device: auto, cpu or cuda. precision of target and draft: fp32 or bf16; the codec stays fp32.
    compile: decode in static caches of ``max_length`` positions (prompt and speech tokens of a
    sentence) with compiled forwards, CUDA graphs on CUDA; the first sentences then wait for the
    compiler. See ``models.runtimes.graphs.StaticLM``. draft, data, front_end: of a CosyVoice alone, see
    ``zero_shot.load``.
    """
    if precision not in PRECISIONS:  # before any work
        raise InputError(f"precision {precision!r} is unknown: choose {' or '.join(PRECISIONS)}")
    device = choose_device(device)
    if device == "cuda":  # of several processes on a machine each takes its own GPU
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    folder = Path(path) if path else checkpoints.BUNDLED

    if zero_shot.is_cosyvoice(folder):
        return zero_shot.load(folder, device, precision, compile, draft, data, front_end)
    if draft or data:
        raise InputError(f"{folder} is a voice with its own draft and sentences: leave draft and data empty")
    return Voice(*checkpoints.load_voice(folder), folder, device, precision, compile, max_length)
