"""Utterances cut and joined anew."""

from __future__ import annotations

import gzip
import json
import random
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from ..models.codec import (
    TOKEN_RATE,
)
from ..speech.text import PUNCTUATION, plain_phones


@dataclass(frozen=True)
class Utterance:
    """One tokenised utterance. ``codes``: one list a grid shift; ``aligned``: [this phone, next phone] at each token.

    ``cuts``: of a spliced one, the tokens that follow a cut; they are no labels.
    """

    id: str
    voice: str
    phones: list[int]
    codes: list[list[int]]
    aligned: list[list[list[int]]]
    cuts: tuple[int, ...] = ()


def read_utterances(path: Path) -> list[Utterance]:
    """Tokenised corpus, one JSON object a line; a ``.gz`` is unpacked."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        return [Utterance(**json.loads(line)) for line in lines]


def write_utterances(path: Path, utterances: Iterable[Utterance]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(vars(u)) + "\n" for u in utterances), "utf-8")
    part.replace(path)


def by_voice(utterances: Iterable[Utterance]) -> dict[str, list[Utterance]]:
    found: dict[str, list[Utterance]] = {}
    for u in utterances:
        found.setdefault(u.voice, []).append(u)
    return found


def prompts(utterances: Iterable[Utterance], longest: int = 4 * TOKEN_RATE) -> dict[str, list[Utterance]]:
    """The utterances of each voice that are short enough to be a zero-shot prompt."""
    return by_voice(u for u in utterances if len(u.codes[0]) <= longest)


@dataclass(frozen=True)
class Words:
    """Where the words of an utterance begin, and where its speech stands in the text.

    ``text``: each word's place in the phones; ``plain``: its first phone without stress and
    punctuation; ``place``: for each grid shift and token the (plain) phone that is being spoken.
    """

    text: list[int]
    plain: list[int]
    place: list[list[int]]


def words(u: Utterance) -> Words:
    """Where the words of ``u`` begin, found again from its aligned phones."""
    labels, space = plain_phones(u.phones), PUNCTUATION.index(" ")
    before = [0, *accumulate(len(plain_phones([p])) for p in u.phones)]
    starts = [p for p in range(len(u.phones)) if p == 0 or u.phones[p - 1] == space]
    ends = [*starts[1:], len(u.phones)]
    starts = [p for p, end in zip(starts, ends) if before[p] < before[end]]  # marks alone are no word
    pairs = list(zip(labels, [*labels[1:], -1]))

    def follow(aligned: list[list[int]]) -> list[int]:
        at, found = 0, []
        for now in aligned:  # the path is monotone: stay if possible, else the nearest
            at = pairs.index(tuple(now), at)
            found.append(at)
        return found

    return Words(starts, [before[p] for p in starts], [follow(a) for a in u.aligned])


def splice(u: Utterance, other: Utterance, known: dict[str, Words], rng: random.Random) -> Utterance:
    """``u`` cut between two words: it goes on up to six words earlier or later, at times after a few of ``other``'s.

    A sentence that says a phrase twice or leaves one out: who follows the text by the last few
    phones alone gets lost in it, as a small target does where a text repeats itself.
    """
    count, shift = len(known[u.id].text), rng.randrange(len(u.codes))
    if count < 3:
        return u
    cut = rng.randrange(1, count)
    goes_on = rng.choice([k for k in range(max(1, cut - 6), min(count, cut + 7)) if k != cut])
    parts = [(u, shift, 0, cut), (u, shift, goes_on, count)]
    if rng.random() < 0.5:
        begin = rng.randrange(len(known[other.id].text))
        end = min(len(known[other.id].text), begin + rng.randint(1, 6))
        parts.insert(1, (other, rng.randrange(len(other.codes)), begin, end))
    phones, codes, places, cuts, said = [], [], [], [], 0
    for v, k, begin, end in parts:
        at, last = known[v.id], end == len(known[v.id].text)
        low, high = at.plain[begin], len(plain_phones(v.phones)) if last else at.plain[end]
        first, until = (bisect_left(at.place[k], x) if x else 0 for x in (low, high))
        cuts += [len(codes)] if codes else []
        text = v.phones[at.text[begin] if begin else 0 : None if last else at.text[end]]
        phones += text if phones[-1:] in ([], [PUNCTUATION.index(" ")]) else [PUNCTUATION.index(" "), *text]
        codes += v.codes[k][first:until]
        places += [place - low + said for place in at.place[k][first:until]]
        said += high - low
    labels = [*plain_phones(phones), -1]
    aligned = [[labels[place], labels[place + 1]] for place in places]
    return Utterance(f"{u.id}+", u.voice, phones, [codes], [aligned], tuple(cuts))
