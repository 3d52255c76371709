"""How prices grow: with the model, at random weights; with L_d and threads; with the utterance, in time and memory.

Prices are those of the loop, sampling included: a step of the target decoding alone, and of SSD's draft and
verification. At random weights a third of the target's layers, or one layer, drafts; how much of that is accepted means
nothing, and the tables take the acceptance of the voice's own rows instead.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import groupby

import numpy as np
import pandas as pd
import psutil
import torch

from ..decoding.result import DecodeConfig
from ..decoding.speculative import autoregressive, speculative
from ..errors import InputError, check_number
from ..models.codec import TOKEN_RATE
from ..models.draft import make_draft
from ..models.families import small_qwen2
from ..models.runtimes import with_runtime
from ..models.speech_lm import SpeechLM
from .cost import Geometry, facts
from .provenance import LoadMeter, row_context
from .rows import locked_rows, rows_of_folder, rows_together, to_frame

# How ``make_draft`` makes them.
DRAFTERS = {"a third of the layers": {}, "one layer, if accepted as often": {"bottom": 1, "top": 0}}
PROMPT = 200  # positions before the first token of a random model
SYSTEMS = ("autoregressive", "speculative")


@dataclass(frozen=True)
class Point:
    """Where prices are measured. size: LAYERSxHIDDEN."""

    size: str
    threads: int
    draft_length: int


def points(size: str, sizes: list[str], threads: list[int], lengths: list[int], draft_length: int) -> list[Point]:
    """One setting at a time from (``size``, threads[0], draft_length), each point once, by size and threads.

    InputError if there is no number of threads or a setting is out of range.
    """
    if not threads:
        raise InputError("thread_counts is empty: give at least one number of threads")
    for name, values, most in (("thread_counts", threads, 1024), ("draft_lengths", (*lengths, draft_length), 64)):
        for value in values:
            check_number(f"a number of {name}", value, 1, most, whole=True)
    found = [Point(each, threads[0], draft_length) for each in (size, *sizes)]
    found += [Point(size, each, draft_length) for each in threads]
    found += [Point(size, threads[0], each) for each in lengths]
    place = [size, *sizes]
    return sorted(dict.fromkeys(found), key=lambda p: (place.index(p.size), p.threads, p.draft_length))


def prices(
    voice, where: list[Point], folder, tokens: int = 80, repeats: int = 3, tolerance: float = 0.4, progress=iter
) -> pd.DataFrame:
    """Measure what ``folder`` holds no rows of -> a row per point and drafter. InputError for a bad size.

    where: of ``points``; the first one has the size of the voice's target.
    """
    check_number("price_tokens", tokens, 4, 1000, whole=True)
    check_number("price_repeats", repeats, 1, 1000, whole=True)
    own, mine = Geometry.of(voice.target), where[0].size
    sizes = {p.size: own if p.size == mine else Geometry.named(p.size, 1, own.speech_vocab) for p in where}
    shared = {**_shared(voice, tolerance), "study": "prices", "tokens": tokens, "repeats": repeats}
    found, threads = [], torch.get_num_threads()
    with locked_rows(folder, "growth") as path, ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        known = rows_of_folder(folder)
        for (size, count), group in groupby(progress(where), lambda p: (p.size, p.threads)):
            torch.set_num_threads(count)
            models = cache(partial(_models, voice, sizes[size], count))  # of one size at a time, and if need be
            for point in group:
                same = {**shared, **asdict(point), "method": "speculative", "geometry": asdict(sizes[size])}
                settings = {drafter: {**same, "drafter": drafter} for drafter in DRAFTERS}
                measure = partial(_prices, voice, models, point, tolerance, tokens, repeats)
                found += rows_together(path, known, settings, measure)
    return to_frame(found)


def _shared(voice, tolerance: float) -> dict:
    settings = {name: getattr(voice, name) for name in ("runtime", "precision")}
    return {**row_context(voice.device), **settings, "sampler": asdict(voice.sampler), "tolerance": tolerance}


def _models(voice, size: Geometry, threads: int) -> dict:
    """Name -> (what decodes, its facts) of the target and of its DRAFTERS, at random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = small_qwen2(size.hidden, size.ffn, size.layers, size.heads, size.kv_heads, vocab=1)
        target = SpeechLM(decoder, size.speech_vocab).eval().to(voice.device).requires_grad_(False)
    lms = {"target": target} | {name: make_draft(target, **layers) for name, layers in DRAFTERS.items()}
    wrap = partial(
        with_runtime, runtime=voice.runtime, precision=voice.precision, threads=threads, max_length=PROMPT + 1024
    )
    return {name: (wrap(lm.requires_grad_(False)), facts(target, lm)) for name, lm in lms.items()}


def _prices(voice, models, point: Point, tolerance: float, tokens: int, repeats: int) -> dict[str, dict]:
    """Drafter -> milliseconds of a step, of a drafted token and of a verification: medians of the repeats, in turns."""
    models, device = models(), voice.device
    target, about = models["target"]
    vocab, hidden = (about["target"][name] for name in ("speech_vocab", "hidden"))
    lengths = {"max_tokens": tokens, "min_tokens": tokens, "stop_ids": (vocab - 1,)}
    config = DecodeConfig(sampler=voice.sampler, draft_length=point.draft_length, tolerance=tolerance, **lengths)
    noise = torch.randn(1, PROMPT, hidden, generator=torch.Generator().manual_seed(0))
    prefix = 0.02 * noise.to(voice.target.head.weight)  # its device and dtype
    decode = {"target": partial(autoregressive, target)}
    decode |= {name: partial(speculative, target, models[name][0]) for name in DRAFTERS}
    took, load = {name: [] for name in decode}, LoadMeter()
    for turn in range(repeats + 1):  # the first one warms up
        for name, run in decode.items():
            result = run(prefix, config, torch.Generator(device).manual_seed(turn))
            if turn:
                verify = result.seconds["verify"] / (result.target_calls - 1)
                took[name].append([1000 * verify, 1000 * result.seconds["draft"] / max(result.drafted, 1)])
    step = np.median(took["target"], axis=0)[0]
    machine = {"other_load": load.other_load(), "processes": 1, "prompt": PROMPT}
    machine |= speed_of_machine(device, point.threads)
    made = {}
    for name in DRAFTERS:
        verify, draft = np.median(took[name], axis=0)
        made[name] = {"step_ms": step, "verify_ms": verify, "draft_ms": draft, "models": models[name][1], **machine}
    return made


@cache
def speed_of_machine(device: torch.device, threads: int) -> dict[str, float]:
    """GB/s of a matrix of 256 MB times a vector, GFLOP/s of a product of matrices: fp32, by torch, the best of 5."""
    wide, square = torch.ones(8192, 8192, device=device), torch.ones(1536, 1536, device=device)

    def best(work) -> float:
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    read, multiply = best(lambda: wide @ wide[0]), best(lambda: square @ square)
    return {"gb_per_second": 4e-9 * wide.numel() / read, "gflop_per_second": 2e-9 * 1536**3 / multiply}


def lengths(
    voice, seconds: list[int], folder, draft_length: int, seed: int = 0, tolerance: float = 0.4, progress=iter
) -> pd.DataFrame:
    """One row per system: an utterance as long as the last of ``seconds``, and where it was at each of them.

    marks: [tokens, seconds, bytes that the process has grown by]. The voice says its first evaluation text and is not
    let stop.
    """
    if not seconds:
        raise InputError("seconds is empty: give at least one length of an utterance")
    for each in seconds:
        check_number("a number of seconds", each, 1, 3600, whole=True)
    said, marks = voice.utterances(1, seed)[0], [each * TOKEN_RATE for each in sorted(seconds)]
    shared = {**_shared(voice, tolerance), "study": "lengths", "weights": voice.weights_id, "marks_at": marks}
    shared |= {"draft_length": draft_length, **asdict(said)}
    found = []
    with locked_rows(folder, "growth") as path:
        known = rows_of_folder(folder)
        for method in progress(SYSTEMS):
            measure = partial(_long, voice, said, method, marks, draft_length, tolerance)
            found += rows_together(path, known, {method: {**shared, "method": method}}, measure)
    return to_frame(found)


def batches(
    voice, sizes: list[int], folder, draft_length: int, seed: int = 0, tolerance: float = 0.4, progress=iter
) -> pd.DataFrame:
    """One row per number of sequences at once and method: tokens and seconds of the same utterances.

    These are as many as the largest of ``sizes``; a smaller batch decodes them in several turns.
    """
    for each in sizes:
        check_number("a number of batches", each, 1, 1024, whole=True)
    if not sizes:
        return pd.DataFrame()
    said = voice.utterances(max(sizes), seed)
    shared = {**_shared(voice, tolerance), "study": "batches", "weights": voice.weights_id, "utterances": len(said)}
    shared |= {"draft_length": draft_length, "seed": seed}
    found = []
    with locked_rows(folder, "growth") as path:
        known = rows_of_folder(folder)
        for size in progress(sizes):
            settings = {method: {**shared, "batch": size, "method": method} for method in SYSTEMS}
            measure = partial(_together, voice, said, size, tolerance, draft_length)
            found += rows_together(path, known, settings, measure)
    return to_frame(found)


def _together(voice, said: list, size: int, tolerance: float, draft_length: int) -> dict[str, dict]:
    """Method -> tokens (stop tokens among them) and seconds of all utterances, ``size`` at once; methods in turns."""
    numbers, load = {method: {"tokens": 0, "lm_seconds": 0.0} for method in SYSTEMS}, LoadMeter()
    firsts = range(0, len(said), size)
    for turn, first in enumerate([0, *firsts]):  # the first one warms up
        few = said[first : first + size]
        for method in SYSTEMS if turn % 2 else SYSTEMS[::-1]:
            given = [each.text for each in few], method, [each.voice for each in few], tolerance, draft_length
            takes = voice.speak_together(*given, [each.seed for each in few])
            if turn:
                emitted = [r.emitted for take in takes for sentence in take.sentences for r in sentence.rounds]
                numbers[method]["tokens"] += sum(emitted)
                numbers[method]["lm_seconds"] += takes[0].lm_seconds
    return {method: {**found, "processes": 1, "other_load": load.other_load()} for method, found in numbers.items()}


def _long(voice, said, method: str, marks: list[int], draft_length: int, tolerance: float) -> dict[str, dict]:
    piece, load = voice.front.pieces(said.text, said.voice)[0], LoadMeter()
    prefix, (target, draft) = voice.prefix(piece, said.voice), voice.models
    run = partial(speculative, target, draft) if method == "speculative" else partial(autoregressive, target)
    for most in (TOKEN_RATE, marks[-1]):  # a second of speech warms up
        lengths = {"max_tokens": most, "min_tokens": most, "banned_ids": None}
        config = voice.config(len(piece), tolerance, draft_length, **lengths)
        reached = _marks(partial(run, prefix, config), voice.device, [m for m in marks if m <= most], said.seed)
    numbers = {"marks": reached, "processes": 1, "other_load": load.other_load(), "prompt": prefix.shape[1]}
    models = facts(voice.target, voice.draft)
    return {method: {**numbers, "models": models, **speed_of_machine(voice.device, voice.threads)}}


def _marks(run, device: torch.device, marks: list[int], seed: int) -> list[list[float]]:
    count, left, found, began, before = 0, list(marks), [], time.perf_counter(), _memory(device)

    def on_tokens(new: list[int]) -> None:
        nonlocal count
        count += len(new)
        while left and count >= left[0]:
            left.pop(0)
            found.append([count, time.perf_counter() - began, _memory(device) - before])

    run(torch.Generator(device).manual_seed(seed), on_tokens)
    return found


def _memory(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
