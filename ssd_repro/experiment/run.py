"""A grid of systems x utterances -> one row each, resumable.

Rows are appended to ``<folder>/rows/<name>.jsonl``, each on the disk before the next begins. A row is used again
when its key (settings, weights, machine kind, ``provenance.PROTOCOL``) agrees, whatever file of the folder holds it.
A row is timed against its own baseline: the autoregressive target, decoded in turn with it (``base_*``), in whichever
run that was. So rows of different runs compare by their ratios.

Several processes of one torch.distributed group share the utterances: each writes
``<name>.rank<r>.jsonl``, and the next run in one process puts those into ``<name>.jsonl``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

import pandas as pd

from ..errors import check_number
from ..files import append_row
from ..processes import process, wait_for_all
from ..speech.sentences import Utterance
from . import metrics
from .provenance import LoadMeter, row_context
from .rows import baseline_fields, decoding_fields, locked_rows, row_settings, rows_of_folder, to_frame
from .systems import System, distinct, turn_order

WARM_UP = "This short sentence warms the machine up."
BLOCK = 4  # utterances that each of several processes decodes before they all measure


@dataclass(frozen=True)
class Job:
    """One utterance; its row's settings under every system; the systems that lack that row; those that decode."""

    utterance: Utterance
    settings: dict[System, dict]
    missing: list[System]
    order: list[System]  # in which they take turns


def run(
    voice, systems, utterances, folder, name, repeats=2, whisper="", speaker="", progress=lambda it: it
) -> pd.DataFrame:
    """Decode and measure what no rows file holds yet -> DataFrame, one row per utterance and system.

    Fair timing: one warm-up of every system; then, utterance by utterance, the systems take
    turns (another one begins each time), ``repeats`` times with the same seed, and the median
    counts. Metrics are computed after the timed part; with several processes, when all of
    them have ended it. Raises InputError, before any work where it can.
    """
    systems = distinct(systems, voice)
    check_number("repeats", repeats, 1, math.inf, whole=True)
    for said, system in product(utterances, systems):
        voice.check(said.text, voice=said.voice, seed=said.seed, **system.arguments())
    scored = voice.audible and any(system.scored for system in systems)
    models = metrics.models(whisper, speaker) if scored else {}
    rank, world = process()
    block = BLOCK if world > 1 else 1
    blocks = range(0, -(-len(utterances) // world), block)  # as many for every process
    load = LoadMeter()

    with locked_rows(folder, name, rank, world) as path:
        known = rows_of_folder(folder)
        jobs = _plan(voice, systems, utterances[rank::world], known, repeats, models)
        if voice.audible and any(system.scored for job in jobs for system in job.missing):
            metrics.load(whisper, speaker)  # one that is missing is known before any work
        for system in dict.fromkeys(system for job in jobs for system in job.order):
            voice.speak(WARM_UP, voice=jobs[0].utterance.voice, seed=0, **system.arguments())
        wait_for_all()  # nobody is timed while another warms up
        for first in progress(blocks):
            timed = [(job, *_decode(voice, job, repeats, load)) for job in jobs[first : first + block]]
            wait_for_all()
            for job, takes, other_load in timed:
                for row in _measure(voice, job, takes, whisper, speaker):
                    row |= {"processes": world, "other_load": other_load}
                    append_row(path, row)
                    known[row["key"]] = row
            wait_for_all()
    return to_frame(known[settings["key"]] for job in jobs for settings in job.settings.values())


def _plan(voice, systems: list[System], utterances, known: dict, repeats: int, models: dict[str, str]) -> list[Job]:
    """A job per utterance, also where no row is missing; ``known``: rows by key."""
    context = {
        **row_context(voice.device),
        **{name: getattr(voice, name) for name in ("precision", "runtime", "front_end")},
        **{"weights": voice.weights_id, "sampler": asdict(voice.sampler), "repeats": repeats},
    }
    jobs = []
    for turn, utterance in enumerate(utterances):
        settings = {system: row_settings(system, utterance, context, models) for system in systems}
        missing = [system for system in systems if settings[system]["key"] not in known]
        jobs.append(Job(utterance, settings, missing, turn_order(systems, missing, turn)))
    return jobs


def _decode(voice, job: Job, repeats: int, load: LoadMeter) -> tuple[dict[System, list], float]:
    """Timed decodes of one utterance, the systems in turn -> the takes of each, and the load by other work."""
    said, takes = job.utterance, {system: [] for system in job.order}
    load.restart()
    for _ in range(repeats):
        for system, of_system in takes.items():
            of_system.append(voice.speak(said.text, voice=said.voice, seed=said.seed, **system.arguments()))
    return takes, load.other_load()


def _measure(voice, job: Job, takes: dict[System, list], whisper: str, speaker: str) -> Iterator[dict]:
    for system in (system for system in takes if system in job.missing):
        take, scores = takes[system][0], metrics.UNSCORED
        if system.scored and voice.audible:
            audio = take.audio if take.token_ids else take.audio[:0]  # Whisper finds words in an empty take's pauses
            reference = voice.reference(job.utterance.voice)
            scores = metrics.measure(audio, take.sample_rate, job.utterance.text, reference, whisper, speaker)
        yield {
            **job.settings[system],
            **decoding_fields(takes[system]),
            **baseline_fields(next(each for other, each in takes.items() if other.is_baseline)),
            **scores,
        }
