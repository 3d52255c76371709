"""What a draft learns from: rows on the disk, batches that depend on (seed, step) alone, tensors.

A data folder holds ``*.jsonl`` or ``*.jsonl.gz`` files, as many as you like, one object a line:

    id             unique in the folder
    text_ids       ids of the text's tokens, from the target's own tokenizer
    speech         the speech tokens that say it, codes only: marks and stop are put around them
    prompt_text, prompt_speech   optional: a zero-shot prompt's text tokens and speech tokens.
                   They come before the text and before the speech, and are never a label.
    stopped        optional, true: false if the speech was cut off before its end

The bundled voice reads its own tokenised corpus (``training.Utterance``) as well.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..decoding.result import DecodeConfig
from ..errors import InputError
from ..models.cosyvoice import END_OF_PROMPT, SPEECH_TOKENS, CosyVoiceLM, load_cosyvoice
from ..models.cosyvoice import decode_config as cosyvoice_config
from ..models.speech_lm import SpeechLM
from ..speech.load import load
from ..speech.text import VOICES, prompt
from ..speech.voice import decode_config


def _none() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """One spoken text; int32 arrays (a list of Python numbers would take ten times the memory)."""

    id: str
    text: np.ndarray
    speech: np.ndarray
    prompt_text: np.ndarray = field(default_factory=_none)
    prompt_speech: np.ndarray = field(default_factory=_none)
    stopped: bool = True

    @property
    def labels(self) -> int:
        """How many tokens are predicted: the speech and its stop."""
        return len(self.speech) + self.stopped

    def __len__(self) -> int:
        return sum(len(part) for part in (self.text, self.speech, self.prompt_text, self.prompt_speech))

    def row(self) -> dict:
        """As a data folder has it."""
        lists = {"text_ids": self.text, "speech": self.speech,
                 "prompt_text": self.prompt_text, "prompt_speech": self.prompt_speech}  # fmt: skip
        return {"id": self.id, **{name: ids.tolist() for name, ids in lists.items()}, "stopped": self.stopped}

    @classmethod
    def from_row(cls, row: dict) -> Example:
        """ValueError if a list holds something else than token ids."""
        names = ("text_ids", "speech", "prompt_text", "prompt_speech")
        return cls(row["id"], *(_ids(name, row.get(name, [])) for name in names), row.get("stopped", True))


def _ids(name: str, values: list) -> np.ndarray:
    found = np.array(values)
    if found.ndim != 1 or (found.size and (found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= 2**31)):
        raise ValueError(f"{name} must be a list of token ids")
    return found.astype(np.int32)


@dataclass(frozen=True)
class Target:
    """A target, and what training and sampling need to know of it.

    codes   speech tokens are 0 .. codes-1; ``stop`` is the label after the last one
    prefix  (lm, text, prompt_text, prompt_speech), int64 (n,) each -> embeddings (1, T, hidden)
            of everything before the first token to be said
    config  number of the text's tokens -> how the target is decoded when it is deployed
    rows    a data row -> its examples: one, or several renderings of one utterance
    needed  text tokens that every text or its prompt must hold
    """

    lm: SpeechLM
    codes: int
    stop: int
    prefix: Callable[[SpeechLM, Tensor, Tensor, Tensor], Tensor]
    config: Callable[[int], DecodeConfig]
    rows: Callable[[dict], list[Example]] = lambda row: [Example.from_row(row)]
    needed: tuple[int, ...] = ()

    def embed(self, one: Example) -> Tensor:
        """The prefix of ``one``, (1, T, hidden), on the target's device."""
        device = self.lm.speech_embedding.weight.device
        parts = (one.text, one.prompt_text, one.prompt_speech)
        return self.prefix(self.lm, *(torch.from_numpy(part).long().to(device) for part in parts))


def voice_target(
    lm: SpeechLM, codes: int, sampler, ratio: tuple[float, float], prompts: dict[str, dict] | None = None
) -> Target:
    """The bundled voice's kind of target: text.prompt's layout, what stands before the text in prompt_text.

    prompts: voice.json's zero-shot prompts; a ``training.Utterance`` is put behind its voice's.
    """

    def prefix(lm: SpeechLM, text: Tensor, prompt_text: Tensor, prompt_speech: Tensor) -> Tensor:
        words = lm.model.embed_tokens(torch.cat((prompt_text, text)))
        return torch.cat((words, lm.speech_embedding(prompt_speech)))[None]

    def config(text_tokens: int) -> DecodeConfig:
        stops = tuple(range(codes, lm.speech_embedding.num_embeddings))
        return decode_config(max(1, text_tokens - 1), ratio, stops, sampler=sampler)  # 1: the task mark

    return Target(lm, codes, codes, prefix, config, partial(_voice_rows, prompts or {}))


def _voice_rows(prompts: dict[str, dict], row: dict) -> list[Example]:
    """A ``training.Utterance``: its grid shifts are as many renderings of one text."""
    if "phones" not in row:
        return [Example.from_row(row)]
    if row["voice"] not in VOICES:
        raise ValueError(f"voice {row['voice']!r} is none of {', '.join(VOICES)}")
    shown = prompts.get(row["voice"], {"phones": [], "codes": []})
    whole = _ids("phones", prompt(row["phones"], row["voice"], shown["phones"]))
    edge = len(whole) - len(row["phones"]) - 1
    around = {"prompt_text": whole[:edge], "prompt_speech": _ids("codes", shown["codes"])}
    return [
        Example(f"{row['id']}/{i}", whole[edge:], _ids("codes", codes), **around)
        for i, codes in enumerate(row["codes"])
    ]


def cosyvoice_target(lm: CosyVoiceLM) -> Target:
    """CosyVoice 2 or 3: [sos, prompt text, text, task, prompt speech], speech, end of speech."""

    def prefix(lm: CosyVoiceLM, text: Tensor, prompt_text: Tensor, prompt_speech: Tensor) -> Tensor:
        return lm.prefix(text, prompt_text, prompt_speech)

    needed = (END_OF_PROMPT,) if lm.layout.version == 3 else ()
    return Target(lm, SPEECH_TOKENS, lm.layout.eos, prefix, partial(cosyvoice_config, lm.layout), needed=needed)


def load_target(path: Path) -> Target:
    """A voice folder, or what ``cosyvoice_lm.load_cosyvoice`` reads. InputError if it is neither, or damaged."""
    if (Path(path) / "voice.json").is_file():
        voice = load(path, "cpu")
        ratio = voice.about["token_text_ratio"]
        prompts = voice.about.get("prompts")
        return voice_target(voice.target, voice.codec.config.codebook_size, voice.sampler, ratio, prompts)
    return cosyvoice_target(load_cosyvoice(path))


# ---------------------------------------------------------------- rows


def read_data(path: Path, target: Target) -> list[list[Example]]:
    """Every row of a data folder (or of one file) as its examples, in the order of file names and lines.

    InputError names the file, the line and what is wrong with it. 600 hours take about half a
    gigabyte of memory, in each process.
    """
    path, seen, found = Path(path), {}, []
    files = sorted((*path.glob("*.jsonl"), *path.glob("*.jsonl.gz"))) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"--data {path} has no *.jsonl or *.jsonl.gz file: see README, 'On your GPU'")
    for file in files:
        for number, line in _lines(file):
            try:
                group = target.rows(json.loads(line))
                for one in group:
                    _check(one, target)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
                raise InputError(f"{file}, line {number} is not a row of speech: {what}") from None
            for one in group:
                if one.id in seen:
                    raise InputError(f"{file}, line {number}: id {one.id!r} was already in {seen[one.id]}")
                seen[one.id] = file.name
            found.append(group)
    if not found:
        raise InputError(f"--data {path} has no rows")
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read to its end: {error}") from None


def _check(one: Example, target: Target) -> None:
    words, size = target.lm.model.embed_tokens.num_embeddings, target.codes
    limits = {"text_ids": (one.text, words), "prompt_text": (one.prompt_text, words),
              "speech": (one.speech, size), "prompt_speech": (one.prompt_speech, size)}  # fmt: skip
    for name, (ids, end) in limits.items():
        if len(ids) and ids.max() >= end:
            raise ValueError(f"{name} has {ids.max()}; this target's ids end at {end - 1}")
    for token in set(target.needed).difference(one.text, one.prompt_text):
        raise ValueError(f"neither text_ids nor prompt_text holds {token}, which this target needs")
    if not isinstance(one.id, str) or not isinstance(one.stopped, bool) or not len(one.text) or not len(one.speech):
        raise ValueError("it needs an id (a string), text_ids and speech; stopped is true or false")


def data_sha256(examples: list[Example]) -> str:
    """SHA-256 over ids and tokens, in their order."""
    digest = hashlib.sha256()
    for one in examples:
        parts = (one.text, one.speech, one.prompt_text, one.prompt_speech)
        digest.update(f"{one.id} {[len(part) for part in parts]} {one.stopped}\n".encode())
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


# ------------------------------------------------------------- batches


class Batches:
    """step -> the examples of that step, over all processes; it depends on (seed, step) alone.

    An epoch is sorted by jittered length, cut into batches of like length, and these shuffled.
    """

    def __init__(self, examples: list[Example], batch: int, seed: int) -> None:
        if not 1 <= batch <= len(examples):
            raise InputError(
                f"batch is {batch}; it must be from 1 to {len(examples)}, the number of rows to learn from."
            )
        self.examples, self.batch, self.seed = examples, batch, seed
        self.epoch, self.order, self.starts = -1, [], []

    def __call__(self, step: int) -> list[Example]:
        epoch, place = divmod(step, len(self.examples) // self.batch)
        if epoch != self.epoch:
            self._shuffle(epoch)
        start = self.starts[place]
        return [self.examples[i] for i in self.order[start : start + self.batch]]

    def _shuffle(self, epoch: int) -> None:
        rng = random.Random(f"{self.seed}/{epoch}")
        jittered = [len(one) * rng.uniform(0.85, 1.15) for one in self.examples]
        self.epoch, self.order = epoch, np.argsort(jittered, kind="stable")
        batches, left = divmod(len(self.examples), self.batch)
        first = rng.randrange(left + 1)  # else the longest would be left out of every epoch
        self.starts = [first + k * self.batch for k in range(batches)]
        rng.shuffle(self.starts)


@dataclass(frozen=True)
class Batch:
    """Tensors of B examples with N labels among them.

    embedded (B, T, hidden), padded on the right; at: bool (B, T), the N places that predict;
    labels (N,); history (N, W): the tokens said before each label, newest last, -1 before the
    first (the prompt's speech is not said: RAS does not look at it).
    """

    embedded: Tensor
    at: Tensor
    labels: Tensor
    history: Tensor


@torch.no_grad()
def collate(target: Target, examples: list[Example]) -> Batch:
    """Embeddings are frozen: they are looked up here, outside of what is trained."""
    window = target.config(1).sampler.ras_window
    embedded, at, labels, history = [], [], [], []
    for one in examples:
        prefix = target.embed(one)
        said = torch.from_numpy(one.speech).long().to(prefix.device)
        embedded.append(torch.cat((prefix[0], target.lm.speech_embedding(said))))
        due = torch.cat((said, said.new_tensor([target.stop] * one.stopped)))
        begin = prefix.shape[1] - 1  # the last place of the prefix predicts the first token
        at.append(F.pad(due.new_ones(len(due)), (begin, 0)))
        labels.append(due)
        history.append(F.pad(said, (window, 0), value=-1).unfold(0, window, 1)[: len(due)])
    long = max(len(rows) for rows in embedded)
    places = torch.stack([F.pad(row, (0, long - len(row))) for row in at]).bool()
    return Batch(pad_sequence(embedded, batch_first=True), places, torch.cat(labels), torch.cat(history))
