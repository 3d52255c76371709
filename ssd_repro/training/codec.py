"""The codec in training, and the speech tokens it gives."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.codec import (
    APERIODICITY,
    ENVELOPE,
    FRAMES_PER_TOKEN,
    LOG_F0,
    SAMPLE_RATE,
    TOKEN_RATE,
    VOICED,
    Codec,
    CodecConfig,
    analyse,
    code_gain,
    long_term_spectrum,
    stack,
)
from ..speech.text import SYMBOLS, VOICES, language, phone_ids, plain_phones
from .loop import Schedule, fit
from .splice import Utterance


@dataclass(frozen=True)
class Features:
    """One utterance of N tokens: ``world`` (8N, 45), ``hint`` (2N, 384) Whisper states, ``phones`` ids."""

    id: str
    voice: str
    world: Tensor
    hint: Tensor
    phones: list[int]


class Hint:
    """Whisper encoder states of 24 kHz audio, 50 a second; ``model``: a CTranslate2 folder or hub name."""

    def __init__(self, model: str):
        from faster_whisper import WhisperModel

        # CTranslate2 sets torch's number of threads, too: to what it is.
        threads = torch.get_num_threads()
        self.model = WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=threads)

    def __call__(self, audio: np.ndarray, tokens: int) -> np.ndarray:
        import librosa

        mel = self.model.feature_extractor(librosa.resample(audio, orig_sr=SAMPLE_RATE, target_sr=16_000))
        mel = np.pad(mel, ((0, 0), (0, 8)), mode="edge")[:, : 4 * tokens]
        return np.array(self.model.encode(mel))[0]


def featurise(audio: Path, row: dict[str, str], hint: Hint, folder: Path) -> Features:
    """Features of one corpus row (see corpus.py), kept in ``folder`` as fp16 so that a second run reads them."""
    import soundfile

    kept = folder / f"{row['id']}.npz"
    if not kept.exists():
        samples, rate = soundfile.read(audio, dtype="float32")
        assert rate == SAMPLE_RATE, rate
        tokens = len(samples) // (SAMPLE_RATE // TOKEN_RATE)
        world = analyse(samples)[: FRAMES_PER_TOKEN * tokens]
        part = kept.with_name(f".{kept.name}")
        np.savez(part, world=world.astype(np.float16), hint=hint(samples, tokens).astype(np.float16))
        part.replace(kept)
    with np.load(kept) as stored:
        world, states = (torch.from_numpy(stored[k].astype(np.float32)) for k in ("world", "hint"))
    return Features(row["id"], row["voice"], world, states.half(), phone_ids(row["text"], language(row["voice"])))


class PhoneHead(nn.Module):
    """Digits (B, N, 8) -> phone logits at 50 Hz (B, 2N, phones + blank): CTC makes the codes carry phones."""

    def __init__(self, digits: int, width: int = 256):
        super().__init__()
        self.i = nn.Linear(digits, width)
        self.b = stack(width, 2)
        self.up = nn.Linear(width, 2 * width)
        self.b2 = stack(width, 1)
        self.o = nn.Linear(width, len(SYMBOLS) + 1)

    def forward(self, digits: Tensor) -> Tensor:
        x = self.up(self.b(self.i(digits)))
        return self.o(self.b2(x.reshape(x.shape[0], -1, x.shape[2] // 2))).float()


class CodecTrainer(nn.Module):
    """The codec in training. Weights of the loss terms: ``WEIGHTS``; ``phone_weight`` 0 is reconstruction alone."""

    WEIGHTS = {"envelope": 1.0, "spectrum": 2.0, "aperiodicity": 0.3, "f0": 0.5, "voiced": 0.3, "delta": 0.3}

    def __init__(
        self,
        train: list[Features],
        config: CodecConfig = CodecConfig(),
        phone_weight: float = 0.25,
        flip: float = 0.04,
    ):
        super().__init__()
        self.codec, self.phone_head = Codec(config), PhoneHead(config.digits)
        self.phone_weight, self.flip = phone_weight, flip
        world = torch.cat([f.world for f in train[:400]])
        self.codec.mean.copy_(world.mean(0))
        self.codec.std.copy_(world.std(0))
        self.codec.mean[VOICED] = self.codec.std[VOICED] = 0.5
        n = torch.arange(ENVELOPE)
        cosines = torch.cos(math.pi * n[:, None] * (2 * n[None] + 1) / (2 * ENVELOPE)) * math.sqrt(2 / ENVELOPE)
        cosines[0] /= math.sqrt(2)
        self.register_buffer("to_spectrum", self.codec.std[:ENVELOPE, None] * cosines, persistent=False)
        normal = self.codec.normalise(world[:20_000])[:, :ENVELOPE]
        self.spectrum_scale = float((normal @ self.to_spectrum).std())

    def collate(self, batch: list[Features], rng: random.Random):
        """Pad; half the time shift the 40 ms grid by 20 ms -> world, hint, mask (B, N), voices, CTC labels."""
        cut = [rng.randrange(2) if self.training else 0 for _ in batch]
        counts = [len(f.world[4 * c : len(f.world) - 4 * c]) // FRAMES_PER_TOKEN for f, c in zip(batch, cut)]
        tokens = max(counts)
        world = self.codec.mean.expand(len(batch), FRAMES_PER_TOKEN * tokens, -1).clone()
        hint = torch.zeros(len(batch), 2 * tokens, self.codec.config.hint)
        mask = torch.zeros(len(batch), tokens)
        for i, (f, c, n) in enumerate(zip(batch, cut, counts)):
            world[i, : FRAMES_PER_TOKEN * n] = f.world[4 * c :][: FRAMES_PER_TOKEN * n]
            hint[i, : 2 * n] = f.hint[c:][: 2 * n].float()
            mask[i, :n] = 1
        voices = torch.tensor([VOICES.index(f.voice) for f in batch])
        return world, hint, mask, voices, [plain_phones(f.phones) for f in batch]

    def loss(self, batch: list[Features], rng: random.Random) -> dict[str, Tensor]:
        """L1 on normalised features and on the log spectrum, CTC on the codes; evaluating adds the phone error rate."""
        world, hint, mask, voices, labels = self.collate(batch, rng)
        with torch.autocast("cpu", torch.bfloat16):
            if self.training:
                hint = hint * F.dropout(torch.ones(len(hint), 1, hint.shape[2]), 0.15)
            digits = self.codec.quantise(self.codec.digits(world, hint))
            spoken = digits
            if self.training:  # wrong digits: the decoder must bear a language model's mistakes
                spoken = torch.where(
                    torch.rand_like(digits) < self.flip, torch.randint(-1, 2, digits.shape).float(), digits
                )
            made = self.codec.decode_digits(spoken, voices)
            logits = self.phone_head(digits)
        terms = self.distances(
            made, self.codec.normalise(world), mask.repeat_interleave(FRAMES_PER_TOKEN, 1)[..., None]
        )
        total = sum(self.WEIGHTS[name] * value for name, value in terms.items())
        log_probs, frames = logits.log_softmax(-1), (mask.sum(1) * 2).long()
        lengths = torch.tensor([len(x) for x in labels])
        ctc = F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor(sum(labels, [])),
            frames,
            lengths,
            blank=len(SYMBOLS),
            zero_infinity=True,
            reduction="none",
        )
        terms["ctc"] = (ctc / lengths).mean()
        terms["total"] = total + self.phone_weight * terms["ctc"]
        if not self.training:
            best = log_probs.argmax(-1)
            heard = [[p for p, _ in groupby(b[:n].tolist()) if p != len(SYMBOLS)] for b, n in zip(best, frames)]
            wrong = sum(edit_distance(h, x) for h, x in zip(heard, labels))
            terms["phone_error_rate"] = torch.tensor(wrong / int(lengths.sum()))
        return terms

    def distances(self, made: Tensor, wanted: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Mean absolute distances of normalised features (B, 8N, 45) where ``mask`` (B, 8N, 1) is 1."""
        error, count = (made - wanted) * mask, mask.sum()
        envelope = error[..., :ENVELOPE]
        voiced = (wanted[..., VOICED] > 0) * mask[..., 0]
        return {
            "envelope": envelope.abs().sum() / count / ENVELOPE,
            "spectrum": (envelope @ self.to_spectrum).abs().sum() / count / ENVELOPE / self.spectrum_scale,
            "aperiodicity": error[..., ENVELOPE:LOG_F0].abs().sum() / count / APERIODICITY,
            "f0": (error[..., LOG_F0].abs() * voiced).sum() / voiced.sum(),
            "voiced": error[..., VOICED].abs().sum() / count,
            "delta": (envelope[:, 1:] - envelope[:, :-1]).abs().sum() / count / ENVELOPE,
        }


def edit_distance(a: list, b: list) -> int:
    """Levenshtein distance of two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def train_codec(
    train: list[Features],
    dev: list[Features],
    schedule: Schedule,
    checkpoint: Path,
    log=print,
    keep: Codec | None = None,
    **settings,
) -> tuple[CodecTrainer, list[dict]]:
    """Train codec and phone head together -> (trainer, log rows); ``keep``: a codec that stays as it is."""
    torch.manual_seed(schedule.seed)
    trainer = CodecTrainer(train, **settings)
    if keep:
        trainer.codec.load_state_dict(keep.state_dict())
        trainer.codec.requires_grad_(False)
    rows = fit(
        trainer,
        [{"params": [p for p in trainer.parameters() if p.requires_grad]}],
        trainer.loss,
        train,
        lambda f: len(f.world),
        schedule,
        checkpoint,
        dev,
        log,
    )
    return trainer, rows


def codes_of(codec: Codec, f: Features) -> Tensor:
    """Code ids (N,) of one utterance's features."""
    return codec.encode(f.world[None], f.hint[None].float())[0]


@torch.no_grad()
def calibrate(codec: Codec, items: list[tuple[Features, np.ndarray]]) -> None:
    """Set the codec's ``scale`` and ``shift`` of every voice from teacher speech (features, audio at 24 kHz).

    scale: the spread of each envelope coefficient within an utterance, the teacher's over the
    decoder's. shift: the teacher's mean, and then what is left between the long-term spectra of
    the teacher's and the synthesised audio (WORLD has a bias of its own).
    """
    codec.scale.fill_(1.0)
    codec.shift.fill_(0.0)
    for place, voice in enumerate(VOICES):
        mine = [(f, audio) for f, audio in items if f.voice == voice]
        if not mine:
            continue
        codes = [codes_of(codec, f) for f, _ in mine]

        def moments(features: list[Tensor]) -> tuple[Tensor, Tensor]:
            envelopes = [x[:, :ENVELOPE] for x in features]
            return (
                torch.stack([e.mean(0) for e in envelopes]).mean(0),
                torch.stack([e.std(0) for e in envelopes]).mean(0),
            )

        mean, spread = moments([f.world for f, _ in mine])
        made_mean, made_spread = moments([codec.features(c, place) for c in codes])
        codec.scale[place] = spread / made_spread
        codec.shift[place] = mean - codec.scale[place] * made_mean
        wanted = long_term_spectrum([audio for _, audio in mine])
        found = long_term_spectrum([codec.decode(c, place) for c in codes])
        codec.shift[place] += code_gain(wanted / found)


def align(log_probs: Tensor, labels: list[int], blank: int) -> list[int]:
    """CTC Viterbi: (T, C) log probabilities, labels (L,) -> index into labels for each of T frames.

    A blank belongs to the label before it (the first label at the start).
    """
    states = torch.full((2 * len(labels) + 1,), blank)
    states[1::2] = torch.tensor(labels)
    emit = log_probs[:, states]
    skip = torch.zeros(len(states), dtype=torch.bool)
    skip[3::2] = states[3::2] != states[1:-2:2]
    score = torch.full((len(states),), -math.inf)
    score[:2] = emit[0, :2]
    back = []
    low = torch.tensor([-math.inf])
    for row in emit[1:]:
        moves = torch.stack(
            [
                score,
                torch.cat([low, score[:-1]]),
                torch.cat([low, low, score[:-2]]).masked_fill(~skip, -math.inf),
            ]
        )
        best, step = moves.max(0)
        back.append(step)
        score = best + row
    state = len(states) - 1 if score[-1] > score[-2] else len(states) - 2
    path = [state]
    for step in reversed(back):
        state -= int(step[state])
        path.append(state)
    return [max(0, (s - 1) // 2) for s in reversed(path)]


@torch.no_grad()
def tokenise(trainer: CodecTrainer, f: Features, shifts: int = 4) -> Utterance | None:
    """Speech tokens of one utterance on ``shifts`` grids 10 ms apart, each aligned with its phones.

    None if it is too short for its phones to be aligned.
    """
    hint, labels = f.hint.float(), plain_phones(f.phones)
    between = (hint + torch.cat([hint[1:], hint[-1:]])) / 2  # Whisper states come every 20 ms
    codes, aligned = [], []
    for shift in range(shifts):
        states = (between if shift % 2 else hint)[shift // 2 :]
        tokens = len(f.world[2 * shift :]) // FRAMES_PER_TOKEN
        if 2 * tokens < len(labels) + 5:
            return None
        world = f.world[2 * shift :][: FRAMES_PER_TOKEN * tokens]
        rounded = trainer.codec.digits(world[None], states[None, : 2 * tokens]).round()
        path = align(trainer.phone_head(rounded)[0].log_softmax(-1), labels, len(SYMBOLS))[::2]
        codes.append(trainer.codec.to_code(rounded)[0].tolist())
        aligned.append([[labels[i], labels[i + 1] if i + 1 < len(labels) else -1] for i in path])
    return Utterance(f.id, f.voice, f.phones, codes, aligned)
