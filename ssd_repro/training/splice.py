"""Utterances of the bundled voice's corpus joined anew: one behind another, or cut between two words."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ..models.codec import TOKEN_RATE
from ..speech.text import PUNCTUATION, TASK, plain_phones, prompt_and_text
from .data import Example

SPACE = PUNCTUATION.index(" ")


def by_voice(examples: Iterable[Example], longest: float = np.inf) -> dict[str, list[Example]]:
    """voice -> its examples of at most ``longest`` speech tokens."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        if len(example.speech) <= longest:
            found.setdefault(example.voice, []).append(example)
    return found


PROMPT_TOKENS = 4 * TOKEN_RATE  # the longest speech that serves as a zero-shot prompt


def behind(prompts: dict[str, list[Example]], example: Example, rng: random.Random, learned: bool) -> Example:
    """``example`` as zero-shot speech, behind one of ``prompts`` of its voice, which is a label if ``learned``."""
    if not prompts.get(example.voice):
        return example
    front = rng.choice(prompts[example.voice])
    before = np.array(prompt_and_text([], None, front.text[:-1].tolist())[0], np.int32)
    if not learned:
        return replace(example, prompt_text=before, prompt_speech=front.speech)
    return replace(
        example,
        prompt_text=before,
        speech=np.concatenate((front.speech, example.speech)),
        aligned=np.concatenate((front.aligned, example.aligned)),
        cuts=tuple(len(front.speech) + cut for cut in example.cuts),
    )


class Words(NamedTuple):
    text: list[int]  # each word's place in the phones
    plain: list[int]  # its first phone's place in the phones without stress and punctuation
    place: list[int]  # for each speech token the (plain) phone that is being spoken


def find_words(example: Example) -> Words:
    """Where the words of ``example`` begin, found again from its aligned phones."""
    phones = example.text[:-1].tolist()
    labels = plain_phones(phones)
    before = [0, *accumulate(len(plain_phones([p])) for p in phones)]
    starts = [p for p in range(len(phones)) if p == 0 or phones[p - 1] == SPACE]
    ends = [*starts[1:], len(phones)]
    starts = [p for p, end in zip(starts, ends, strict=True) if before[p] < before[end]]  # marks alone are no word
    pairs, at, places = list(zip(labels, [*labels[1:], -1], strict=True)), 0, []
    for now in example.aligned.tolist():  # the alignment is monotone: stay if possible, else the nearest
        at = pairs.index(tuple(now), at)
        places.append(at)
    return Words(starts, [before[p] for p in starts], places)


def splice(example: Example, other: Example, known: dict[str, Words], rng: random.Random) -> Example:
    """``example`` cut between two words; it goes on up to six words earlier or later, or after a few of ``other``'s.

    A sentence that says a phrase twice or leaves one out: who follows the text by the last few
    phones alone gets lost in it, as a small target does where a text repeats itself.
    """
    count = len(known[example.id].text)
    if count < 3:
        return example
    cut = rng.randrange(1, count)
    next_word = rng.choice([k for k in range(max(1, cut - 6), min(count, cut + 7)) if k != cut])
    parts = [(example, 0, cut), (example, next_word, count)]
    if rng.random() < 0.5:
        words = len(known[other.id].text)
        begin = rng.randrange(words)
        parts.insert(1, (other, begin, min(words, begin + rng.randint(1, 6))))
    phones, speech, places, cuts, said = [], [], [], [], 0
    for source, begin, end in parts:
        words, whole = known[source.id], source.text[:-1].tolist()
        last = end == len(words.text)
        low, high = words.plain[begin], len(plain_phones(whole)) if last else words.plain[end]
        first, until = (bisect_left(words.place, x) if x else 0 for x in (low, high))
        cuts += [len(speech)] if speech else []
        text = whole[words.text[begin] if begin else 0 : None if last else words.text[end]]
        phones += text if phones[-1:] in ([], [SPACE]) else [SPACE, *text]
        speech += source.speech[first:until].tolist()
        places += [place - low + said for place in words.place[first:until]]
        said += high - low
    labels = [*plain_phones(phones), -1]
    aligned = np.array([[labels[place], labels[place + 1]] for place in places], np.int32).reshape(-1, 2)
    text, speech = (np.array(ids, np.int32) for ids in ([*phones, TASK], speech))
    return replace(example, id=f"{example.id}+", text=text, speech=speech, aligned=aligned, cuts=tuple(cuts))
