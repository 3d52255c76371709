"""A grid of settings x utterances -> one row per decoded utterance, resumable, with provenance.

Rows are appended to ``<folder>/rows/<name>.jsonl``, each on the disk before the next begins.
A row's key is over its settings, the weights, the code and the machine: rows of another
model, code or machine stay in the file, but are never used for this one. Grids share rows:
what any file of the folder holds is not made again.

A row is timed against its own baseline: the autoregressive target, decoded in turn with it
(``base_*``), whatever run that was. So rows of different runs compare by their ratios.

Several processes (torchrun, ``accelerate launch``) share the utterances: each writes
``<name>.rank<r>.jsonl``, and the next run in one process puts those into ``<name>.jsonl``.
"""

from __future__ import annotations

from dataclasses import asdict

from ..errors import InputError
from ..files import append_row, drop_half_line
from ..processes import process, wait_for_all
from ..speech.sentences import Utterance
from . import metrics
from .provenance import code_revision, where
from .rows import baseline, find, key, locked_rows, measured, merge_rows, row_settings, rows_of_folder, to_frame
from .systems import System, _is_base, _plain, lineup

WARM_UP = "This short sentence warms the machine up."
BLOCK = 4  # utterances that each of several processes decodes before they all measure


def run(voice, systems, utterances, folder, name, repeats=2, whisper="", speaker="",
        progress=lambda it: it):  # fmt: skip
    """Decode and measure what no rows file holds yet -> DataFrame, one row per utterance and system.

    Fair timing: one warm-up of every system; then, sentence by sentence, the systems take
    turns (who begins rotates), ``repeats`` times with the same seed, and the median counts.
    The autoregressive target takes its turn wherever something is decoded, as its baseline, also
    where its own row is there or was not asked for. Metrics are computed after the timed part,
    of several processes when all of them have ended it.
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise InputError(f"repeats must be a whole number of at least 1, got {repeats!r}")
    systems = _plain(systems, voice)
    for said in utterances:  # before any work
        for system in systems:
            voice.check(said.text, voice=said.voice, seed=said.seed, **system.arguments())
    context = {**where(voice.device), "precision": voice.precision, "compile": voice.compile,
               "front_end": voice.front_end, "weights": voice.weights_id, "sampler": asdict(voice.sampler),
               "code": code_revision(), "repeats": repeats, **metrics.models(whisper, speaker)}  # fmt: skip
    rank, world = process()
    mine = utterances[rank::world]
    cells = [[(system, row_settings(system, said, context)) for system in systems] for said in mine]
    block = BLOCK if world > 1 else 1

    with locked_rows(folder, name, rank) as path:
        if world == 1:
            merge_rows(path)
        drop_half_line(path)
        known = rows_of_folder(folder)
        missing = {system for line in cells for system, s in line if find(known, s) is None}
        _warm_up(voice, [s for s in systems if s in missing], mine, whisper, speaker)
        wait_for_all()  # nobody is timed while another warms up
        for begin in progress(range(0, -(-len(utterances) // world), block)):
            chosen = range(begin, min(begin + block, len(mine)))
            timed = []
            for i in chosen:
                new = [(system, s) for system, s in cells[i] if find(known, s) is None]
                order = lineup(systems, [system for system, _ in new], i)
                timed.append((new, mine[i], decode(voice, order, mine[i], repeats)))
            wait_for_all()
            for new, said, takes in timed:
                for row in rows_of(voice, new, said, takes, whisper, speaker):
                    append_row(path, row)
                    known[row["key"]] = row
            wait_for_all()
    return to_frame(find(known, settings) for line in cells for _, settings in line)


def _warm_up(voice, missing: list[System], said: list[Utterance], whisper: str, speaker: str) -> None:
    """Models that cannot be had are known before any work; then one decode of every system."""
    if any(system.heard for system in missing) and voice.audible:
        metrics.load(whisper, speaker)
    for system in lineup(missing, missing, 0):
        voice.speak(WARM_UP, voice=said[0].voice, seed=0, **system.arguments())


def decode(voice, order: list[System], said: Utterance, repeats: int) -> dict[System, list]:
    """Timed decodes of one utterance, the systems in turn -> the takes of each."""
    takes: dict[System, list] = {system: [] for system in order}
    for _ in range(repeats):
        for system, mine in takes.items():
            mine.append(voice.speak(said.text, voice=said.voice, seed=said.seed, **system.arguments()))
    return takes


def rows_of(voice, new, said: Utterance, takes: dict, whisper: str, speaker: str):
    """One by one the rows of one utterance: ``new`` (system, settings), as ``decode`` timed them, and heard."""
    beside, settings = next((mine for system, mine in takes.items() if _is_base(system)), []), dict(new)
    for system in (system for system in takes if system in settings):
        scores = metrics.UNHEARD
        if system.heard and voice.audible:
            take, reference = takes[system][0], voice.reference(said.voice)
            scores = metrics.measure(take.audio, take.sample_rate, said.text, reference, whisper, speaker)
        own = settings[system]
        yield {"key": key(own), **own, **measured(takes[system]), **baseline(beside),
               "processes": process()[1], **scores}  # fmt: skip
