"""Loading a voice: the bundled one, another voice folder, or a CosyVoice 2 or 3."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from ..errors import InputError, check_number
from ..files import sha256
from ..models import checkpoints
from ..models.cosyvoice import TEXT_MODEL, load_cosyvoice
from ..models.draft import EarlyExit
from ..models.hidden_draft import HiddenDraft
from ..models.runtimes import FAMILIES, choose_precision, choose_runtime, with_runtime
from ..models.speech_lm import SpeechLM, choose_device
from . import libritts
from .bundled import Bundled
from .voice import Front, Voice
from .zero_shot import Tokens, Upstream

FRONT_ENDS = {"upstream": Upstream, "tokens": Tokens}
# Below so many parameters of the target one thread is as fast as several on an idle CPU, and on a busy
# one a forward on two threads took 30 to 50 times as long: each of its many small parts waits for both.
SMALL_MODEL = 100_000_000
TORCH_THREADS = torch.get_num_threads()  # torch's own choice, before any voice was loaded


def load(
    path: str | Path | None = None,
    device: str = "auto",
    precision: str = "fp32",
    runtime: str = "auto",
    max_length: int | None = None,
    draft: str = "",
    data: str = "",
    front_end: str = "upstream",
    threads: int | None = None,
) -> Voice:
    """Load a voice folder (the bundled one by default), or a CosyVoice 2 or 3. Raises InputError.

    device      auto, cpu or cuda
    precision   of target and draft: fp32 or bf16, with the openvino runtime int8 (weights) and w8a8
                (inputs of products, too; CPUs with VNNI); auto: bf16 on a GPU, w8a8 on such a CPU,
                else fp32. The codec stays fp32. fp32 and int8 say the same tokens on every CPU
    runtime     what runs target and draft: auto, eager, graphs or openvino (``models.runtimes``); decoders of
                other families than Qwen2 (``models.families``) run on eager alone
    max_length  positions of a static cache (graphs), prompt and speech tokens of a piece; None: 1024, of a
                CosyVoice 2048 (20 times the 80 text tokens of upstream's pieces, prompt, texts)
    threads     of torch, in the whole process. None: on a CPU one for a target below SMALL_MODEL,
                else torch's own choice, as where the environment sets OMP_NUM_THREADS

    Of a CosyVoice alone: draft, the folder that ``ssd-repro train-draft`` wrote; data, a LibriTTS folder
    or the hub name of one; front_end, upstream (its package) or tokens (no sound).
    """
    if front_end not in FRONT_ENDS:
        raise InputError(f"front_end {front_end!r} is unknown: choose {' or '.join(FRONT_ENDS)}")
    for name, value, most in (("max_length", max_length, 1_000_000), ("threads", threads, 1024)):
        if value is not None:
            check_number(name, value, 1, most, whole=True)
    device, asked = choose_device(device), runtime
    runtime = choose_runtime(asked, device, precision)
    if device == "cuda":  # of several processes on a machine each takes its own GPU
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    folder, others = Path(path) if path else checkpoints.BUNDLED, {}

    if (folder / "llm.pt").is_file() or (folder / TEXT_MODEL).is_dir():
        front, target, small, weights_id = _cosyvoice(folder, device, draft, data, front_end)
        if isinstance(small, HiddenDraft):
            raise InputError(f"{draft} holds a hidden-state drafter: with a CosyVoice only the paper's runs yet")
        max_length = max_length or 2048
    else:
        if draft or data:
            raise InputError(f"{folder} is a voice with its own draft and sentences: leave draft and data empty")
        codec, target, small, about = checkpoints.load_voice(folder)
        family = target.model.config.model_type
        if asked == "auto" and family not in FAMILIES.get(runtime, (family,)):
            runtime = choose_runtime("eager", device, precision)
        others = checkpoints.load_others(folder, target, about)
        front = Bundled(codec.to(device).requires_grad_(False), about, folder, device)
        weights_id = _identity(sorted(about["sha256"].values()))
    precision = choose_precision(precision, runtime, device)
    lms = tuple(lm.to(device).requires_grad_(False) for lm in (target, small))
    threads = _set_threads(threads, target, device)
    running = partial(
        with_runtime, runtime=runtime, precision=precision, threads=threads, max_length=max_length or 1024
    )
    drafters = {}
    for name, other in others.items():
        other.to(device).requires_grad_(False).eval()
        if not isinstance(other, HiddenDraft):
            drafters[name] = running(other)
            continue
        if runtime != "openvino":  # there the matrices around the layers stay in fp32, as hidden states come in it
            other.cast(precision)
        target.taps = other.taps  # before the target is compiled: then it hands out hidden states
        drafters[name] = other.on(running(other.lm))
    untrained = {"early-exit": EarlyExit(target, running)}
    how = (precision, runtime, threads, untrained)
    return Voice(front, *lms, weights_id, device, tuple(map(running, lms)), drafters, *how)


def _cosyvoice(
    folder: Path, device: str, draft: str, data: str, front_end: str
) -> tuple[Front, SpeechLM, SpeechLM, str]:
    """(front, target, draft, weights_id). InputError that names what is missing."""
    for name, value, what in (
        ("draft", draft, "the folder that `ssd-repro train-draft` wrote for it"),
        ("data", data, "the folder of LibriTTS test-clean, or a hub name such as mythicinfinity/libritts"),
    ):
        if not value:
            raise InputError(f"{folder} is a CosyVoice, which also needs {name}: {what}")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # upstream's package takes the current one
    target, known = load_cosyvoice(folder), libritts.index(data)
    small = checkpoints.load_draft(Path(draft), target)
    front = FRONT_ENDS[front_end](folder, target.layout.version, known)
    digests = [checkpoints.weights_sha256(lm) for lm in (target, small)]
    digests += [sha256(folder / name) for name in ("flow.pt", "hift.pt") if (folder / name).is_file()]
    return front, target, small, _identity(digests)


def _identity(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def _set_threads(threads: int | None, target: SpeechLM, device: str) -> int:
    """Set torch's threads as ``load`` says -> how many they are."""
    if threads is None and device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        size = sum(parameter.numel() for parameter in target.parameters())
        threads = 1 if size < SMALL_MODEL else TORCH_THREADS
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
