"""Tokenised speech: rows on the disk, one type of example, one padded batch of them.

A data folder holds ``*.jsonl`` or ``*.jsonl.gz`` files, as many as you like, one object a line:

    id             unique in the folder
    text_ids       ids of the text's tokens, from the target's own tokenizer
    speech         the speech tokens that say it, codes only: marks and stop are put around them
    prompt_text, prompt_speech   optional: a zero-shot prompt's text tokens and speech tokens.
                   They come before the text and before the speech, and are never a label.
    stopped        optional, true: false if the speech was cut off before its end

For a causal model of transformers all of these are ids of its one vocabulary: text_ids the whole prompt as
its processor makes it, the marks before the speech among them; speech without the token that ends it;

or, for the bundled voice, rows of notebook 11: id, voice, phones, codes (several renderings of the
utterance), aligned (of each rendering the [phone, next phone] that each token belongs to).
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError
from ..models.speech_lm import SpeechLM
from ..speech.text import VOICES, prompt_and_text

LISTS = ("text_ids", "speech", "prompt_text", "prompt_speech")  # of a row; ``Example.parts``
NO_TOKENS = partial(np.zeros, 0, np.int32)


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """One rendering of a text; int32 arrays (a list of Python numbers would take ten times the memory).

    voice, aligned (len(speech), 2)   of the bundled voice's corpus alone
    cuts   places in ``speech`` that are no label: what follows a splice
    """

    id: str
    text: np.ndarray
    speech: np.ndarray
    prompt_text: np.ndarray = field(default_factory=NO_TOKENS)
    prompt_speech: np.ndarray = field(default_factory=NO_TOKENS)
    stopped: bool = True
    voice: str = ""
    aligned: np.ndarray | None = None
    cuts: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        return self.text, self.speech, self.prompt_text, self.prompt_speech

    @property
    def labels(self) -> int:
        """How many tokens are predicted: the speech and its stop."""
        return len(self.speech) + self.stopped - len(self.cuts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def row(self) -> dict:
        lists = {name: ids.tolist() for name, ids in zip(LISTS, self.parts, strict=True)}
        return {"id": self.id, **lists, "stopped": self.stopped}

    @classmethod
    def from_row(cls, row: dict) -> Example:
        """ValueError if a list holds something else than token ids."""
        return cls(row["id"], *(_ids(name, row.get(name, [])) for name in LISTS), row.get("stopped", True))


def _ids(name: str, values: list) -> np.ndarray:
    found = np.array(values)
    if found.ndim != 1 or (found.size and (found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= 2**31)):
        raise ValueError(f"{name} must be a list of token ids")
    return found.astype(np.int32)


def renderings(row: dict, prompts: dict[str, dict] | None) -> list[Example]:
    """A row as examples; ``prompts``: of a bundled kind of voice, voice.json's prompts, which then come first."""
    if prompts is None or "phones" not in row:
        return [Example.from_row(row)]
    if row["voice"] not in VOICES:
        raise ValueError(f"voice {row['voice']!r} is none of {', '.join(VOICES)}")
    shown = prompts.get(row["voice"], {"phones": [], "codes": []})
    before, text = prompt_and_text(row["phones"], row["voice"], shown["phones"])
    common = {"text": _ids("phones", text), "voice": row["voice"]}
    common |= {"prompt_text": _ids("phones", before), "prompt_speech": _ids("codes", shown["codes"])}
    found = []
    for i, (codes, aligned) in enumerate(zip_longest(row["codes"], row["aligned"])):
        pairs = None if aligned is None else np.array(aligned, np.int32).reshape(len(codes), 2)
        found.append(Example(f"{row['id']}/{i}", speech=_ids("codes", codes), aligned=pairs, **common))
    if not found:
        raise ValueError("codes has no rendering")
    return found


def read_data(path: Path, text_vocab: int, codes: int, prompts: dict[str, dict] | None = None, needed=()) -> list[list]:
    """Every row of a data folder (or of one file) as its ``renderings``, in the order of file names and lines.

    text_vocab, codes: how many ids text and speech have; needed: ids that every text must hold. InputError names
    the file, the line and what is wrong. 600 hours take about half a gigabyte, in each process.
    """
    path, seen, found = Path(path), {}, []
    files = sorted((*path.glob("*.jsonl"), *path.glob("*.jsonl.gz"))) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"--data {path} has no *.jsonl or *.jsonl.gz file: see notebooks/README.md")
    for file in files:
        for number, line in _lines(file):
            try:
                found.append(renderings(json.loads(line), prompts))
                for example in found[-1]:
                    _check(example, text_vocab, codes, needed)
                    if example.id in seen:
                        raise ValueError(f"id {example.id!r} was already in {seen[example.id]}")
                    seen[example.id] = file.name
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
                raise InputError(f"{file}, line {number} is not a row of speech: {what}") from None
    if not found:
        raise InputError(f"--data {path} has no rows")
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read to its end: {error}") from None


def _check(example: Example, text_vocab: int, codes: int, needed: Iterable[int]) -> None:
    for name, ids, end in zip(LISTS, example.parts, 2 * (text_vocab, codes), strict=True):
        if len(ids) and ids.max() >= end:
            raise ValueError(f"{name} has {ids.max()}; this target's ids end at {end - 1}")
    for token in set(needed).difference(example.text, example.prompt_text):
        raise ValueError(f"neither text_ids nor prompt_text holds {token}, which this target needs")
    typed = isinstance(example.id, str) and isinstance(example.stopped, bool)
    if not (typed and len(example.text) and len(example.speech)):
        raise ValueError("it needs an id (a string), text_ids and speech; stopped is true or false")


def hold_out(groups: list[list], count: int, longest: int, seed: int | None = None) -> tuple[list[list], list[list]]:
    """Rows of at most ``longest`` speech tokens -> (to learn from, ``count`` to evaluate on).

    Held out are the last ones, or those that ``seed`` chooses. InputError if none is left.
    """
    groups = [group for group in groups if len(group[0].speech) <= longest]
    if len(groups) <= count:
        raise InputError(f"held_out is {count}; the data has {len(groups)} rows of at most {longest} speech tokens.")
    if seed is not None:
        random.Random(seed).shuffle(groups)
        groups = groups[count:] + groups[:count]
    return groups[: len(groups) - count], groups[len(groups) - count :]


def flat(groups: list[list]) -> list[Example]:
    return [example for group in groups for example in group]


@dataclass(frozen=True)
class Batch:
    """Tensors of B examples with N labels among them.

    embedded (B, T, hidden), padded on the right; at: bool (B, T), the N places that predict;
    labels (N,); history (N, W): the tokens said before each label, newest last, -1 before the
    first (the prompt's speech is not said: RAS does not look at it); phones (N, 2): the phone of
    the label and the next one, -1 for the stop and where an example is not aligned.
    """

    embedded: Tensor
    at: Tensor
    labels: Tensor
    history: Tensor
    phones: Tensor


def collate(
    lm: SpeechLM, examples: list[Example], stop: int, window: int = 1, noise: Callable[[Tensor], Tensor] | None = None
) -> Batch:
    """A batch, embedded by ``lm``. stop: the label after the speech; window: W.

    noise: speech tokens -> what ``lm`` sees in their place; the labels stay.
    """
    device = lm.head.weight.device
    parts = [[torch.from_numpy(part).long() for part in example.parts] for example in examples]
    texts, said, prompts, before = (list(column) for column in zip(*parts, strict=True))
    texts, prompts = _at_once(texts, device), _at_once(prompts, device)
    shown = _at_once([torch.cat(pair) for pair in zip(before, said, strict=True)], device, noise)
    # Speech goes on like a prompt's.
    embedded = [lm.prefix(*of_one)[0] for of_one in zip(texts, prompts, shown, strict=True)]
    rows = []
    for example, speech, whole in zip(examples, said, embedded, strict=True):
        due = torch.cat((speech, torch.tensor([stop] * example.stopped, dtype=torch.long)))
        kept = torch.ones_like(due, dtype=torch.bool)
        kept[list(example.cuts)] = False
        begin = len(whole) - len(speech) - 1  # the last place before the speech predicts its first token
        at = F.pad(kept, (begin, len(whole) - begin - len(due)))
        history = F.pad(speech, (window, 0), value=-1).unfold(0, window, 1)[: len(due)][kept]
        pairs = torch.full((len(speech), 2), -1) if example.aligned is None else torch.from_numpy(example.aligned)
        phones = F.pad(pairs.long(), (0, 0, 0, 1), value=-1)[: len(due)]
        rows.append((at, due[kept], history, phones[kept]))
    at, *others = zip(*rows, strict=True)
    places = pad_sequence(at, batch_first=True).to(device)
    return Batch(pad_sequence(embedded, batch_first=True), places, *(torch.cat(each).to(device) for each in others))


def _at_once(tensors: list[Tensor], device, noise: Callable[[Tensor], Tensor] | None = None) -> Sequence[Tensor]:
    """``tensors`` (n,) on the device, through ``noise`` if any: one copy and one call, not one for each of a batch."""
    whole = torch.cat(tensors).to(device)
    return (noise(whole) if noise else whole).split([len(one) for one in tensors])
