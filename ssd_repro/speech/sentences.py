"""What is spoken: utterances, and the held-out sentences that come with the package."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources

from ..errors import InputError


@dataclass(frozen=True)
class Utterance:
    text_id: str
    text: str
    voice: str
    seed: int = 0


def evaluation_sentences(part: str = "eval") -> list[tuple[str, str]]:
    """(id, text) of the held-out sentences, in their fixed random order; part: eval, or dev for choices."""
    source = resources.files("ssd_repro") / "data" / f"{part}_sentences.tsv"
    lines = (line for line in source.read_text("utf-8").splitlines() if not line.startswith("#"))
    return [(row["id"], row["text"]) for row in csv.DictReader(lines, delimiter="\t")]


def utterances(count: int, voices: tuple[str, ...], seed: int = 0, part: str = "eval") -> list[Utterance]:
    """``count`` utterances: the held-out sentences in order, dealt to the voices in turn, a seed for each.

    After the last sentence (of 200) they begin anew, each now with the next voice and a new seed.
    """
    known = evaluation_sentences(part)
    most, of = len(known) * len(voices), f"{len(known)} sentences, {len(voices)} voices"
    if not 1 <= count <= most:
        raise InputError(f"sentences must be a whole number from 1 to {most} ({of}), got {count}")
    rounds = (divmod(i, len(known)) for i in range(count))
    return [
        Utterance(*known[i], voices[(i + again) % len(voices)], seed + again * len(known) + i) for again, i in rounds
    ]
