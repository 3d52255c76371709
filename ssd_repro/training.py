"""The steps that make the bundled voice: codec, speech tokens, target (its draft: draft_training.py).

Each step resumes from its own checkpoint; what a step samples depends on
(seed, step) alone, so a resumed run equals an undisturbed one.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec import (
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
from .sampling import check_number
from .speech_lm import SpeechLM, draft_layers, small_qwen2
from .text import PUNCTUATION, SYMBOLS, TEXT_VOCABULARY, VOICES, language, phone_ids, plain_phones, prompt

STOP_TOKENS = 3  # 6,561 codes + 3, as CosyVoice 2


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; ``batch`` in utterances; ``until``: stop early there, 0: at ``steps``."""

    steps: int
    batch: int = 16
    learning_rate: float = 1.2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    seed: int = 0
    save_every: int = 200
    until: int = 0

    def __post_init__(self):
        check_number("until (0: not before steps)", self.until, 0, self.steps, whole=True)


def fit(
    model: nn.Module,
    groups: list[dict],
    loss: Callable[[list, random.Random], dict[str, Tensor]],
    items: list,
    size: Callable[[object], int],
    schedule: Schedule,
    checkpoint: Path,
    dev: list | None = None,
    log: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """Train ``model`` with AdamW and a cosine; returns the log rows (also in the checkpoint).

    ``loss`` gives named terms, of which "total" is minimised. Batches hold
    items of like ``size``. Every ``save_every`` steps the terms over ``dev``
    join the log and ``checkpoint`` is written, beside and renamed; it is read
    if it is there.
    """
    optimizer = torch.optim.AdamW(
        groups, schedule.learning_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay
    )
    scales = [group.get("scale", 1.0) for group in optimizer.param_groups]
    first, rows, end = 0, [], schedule.until or schedule.steps
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, rows = saved["step"], json.loads(saved["rows"])
    model.train()
    sums: dict[str, list[float]] = {}
    began = time.perf_counter()
    for step in range(first, end):
        rate = learning_rate(schedule, step)
        for group, scale in zip(optimizer.param_groups, scales):
            group["lr"] = rate * scale
        torch.manual_seed(schedule.seed * 1_000_003 + step)  # dropout has no generator argument
        terms = loss(pick(items, size, schedule, step), random.Random(f"{schedule.seed}/{step}"))
        optimizer.zero_grad()
        terms["total"].backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        for name, value in terms.items():  # a step may lack some
            sums.setdefault(name, []).append(float(value.detach()))
        last = step + 1 == end
        if (step + 1) % 50 == 0 or last:
            row = {"step": step + 1, **{k: sum(v) / len(v) for k, v in sums.items()}}
            sums = {}
            if dev and ((step + 1) % schedule.save_every == 0 or last):
                model.eval()
                with torch.no_grad():
                    row |= {f"dev_{k}": v for k, v in mean_terms(loss, dev, schedule.batch).items()}
                model.train()
            rows.append(row)
            pace = (time.perf_counter() - began) / (step + 1 - first)
            log(" ".join(f"{k}={v:.4g}" for k, v in row.items()) + f" {pace:.3f}s/step")
        if (step + 1) % schedule.save_every == 0 or last:
            save = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write_checkpoint(checkpoint, save | {"step": step + 1, "rows": json.dumps(rows)})
    model.eval()
    return rows


def learning_rate(schedule, step: int) -> float:
    """Linear warm-up, times a cosine to 0; ``schedule`` has learning_rate, warmup and steps."""
    warm = min(1.0, (step + 1) / schedule.warmup)
    return schedule.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / schedule.steps))


def pick(items: list, size: Callable[[object], int], schedule: Schedule, step: int) -> list:
    """The batch of ``step``: an epoch is shuffled, sorted by jittered size and cut into batches."""
    per_epoch = max(1, len(items) // schedule.batch)
    epoch, place = divmod(step, per_epoch)
    rng = random.Random(f"{schedule.seed}/{epoch}")
    order = sorted(items, key=lambda item: size(item) * rng.uniform(0.85, 1.15))
    starts = [k * schedule.batch for k in range(per_epoch)]
    rng.shuffle(starts)
    return order[starts[place] : starts[place] + schedule.batch]


def write_checkpoint(path: Path, content: dict) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(content, part)
    part.replace(path)


# ----------------------------------------------------------------------- codec


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
    return Features(
        row["id"], row["voice"], world, states.half(), phone_ids(row["text"], language(row["voice"]))
    )


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
        cosines = torch.cos(math.pi * n[:, None] * (2 * n[None] + 1) / (2 * ENVELOPE)) * math.sqrt(
            2 / ENVELOPE
        )
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
            heard = [
                [p for p, _ in groupby(b[:n].tolist()) if p != len(SYMBOLS)] for b, n in zip(best, frames)
            ]
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


# ---------------------------------------------------------------- speech tokens


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


# -------------------------------------------------------------------- splices


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


# ------------------------------------------------------------------- target LM


class Factored(nn.Module):
    """A (6564, width) matrix as digit vectors plus a part of its own for each code.

    FSQ codes that share digits share what they learn: with two hours of speech
    most codes are too rare to be learned alone. Folded into one plain matrix
    when training is over.
    """

    def __init__(self, codec: Codec, width: int, scale: float):
        super().__init__()
        size, digits = codec.config.codebook_size, codec.config.digits
        values = codec.to_digits(torch.arange(size)).long() + 1
        basis = F.one_hot(values, codec.config.levels).reshape(size, -1).float()
        self.register_buffer("basis", torch.block_diag(basis, torch.eye(STOP_TOKENS)), persistent=False)
        self.common = nn.Parameter(torch.randn(self.basis.shape[1], width) * scale / math.sqrt(digits))
        self.own = nn.Parameter(torch.zeros(len(self.basis), width))

    def weight(self) -> Tensor:
        return self.basis @ self.common + self.own


class TargetTrainer(nn.Module):
    """A SpeechLM in training: factored embedding and head, auxiliary phone heads, and the draft's layers beside it.

    The phone heads predict, above the draft's bottom layers and from a third and two thirds of
    the depth, the phone that the next speech token belongs to and the one after it: attention
    finds the alignment in hundreds of steps instead of many thousands. The layers of the paper's
    draft have a loss of their own, of ``draft_weight``, so that the top layers learn to do without
    the middle, as LayerSkip's do (Elhoushi et al. 2024). With probability ``prompt_rate`` an
    utterance follows one of ``short`` of its voice, the prompts of zero-shot speech; with
    ``splice_rate`` it is spliced with another of ``pieces`` of its voice.
    """

    def __init__(
        self,
        codec: Codec,
        hidden: int = 256,
        ffn: int = 1024,
        layers: int = 12,
        heads: int = 4,
        kv_heads: int = 2,
        dropout: float = 0.1,
        flip: float = 0.02,
        draft_weight: float = 0.3,
        short: dict[str, list[Utterance]] | None = None,
        prompt_rate: float = 0.5,
        splice_rate: float = 0.0,
        pieces: list[Utterance] | None = None,
    ):
        super().__init__()
        self.codec, self.flip = [codec], flip  # in a list: not a part of this module
        self.splice_rate, self.pieces = splice_rate, by_voice(pieces or [])
        self.words = {u.id: words(u) for u in pieces or []} if splice_rate else {}
        self.model = small_qwen2(
            hidden, ffn, layers, heads, kv_heads, TEXT_VOCABULARY, max_position_embeddings=4096
        )
        self.model.set_attn_implementation("eager")  # on a CPU SDPA's backward takes twice its time
        self.embedding = Factored(codec, hidden, 0.3)
        self.head = Factored(codec, hidden, 0.05)
        self.bias = nn.Parameter(torch.zeros(len(self.head.basis)))
        self.bottom, self.top = draft_layers(layers)
        self.draft_weight, self.prompt_rate, self.short = draft_weight, prompt_rate, short or {}
        self.watched = sorted({self.bottom, layers // 3, 2 * layers // 3})
        self.phone_heads = nn.ModuleDict(
            {str(place): nn.Linear(hidden, 2 * len(SYMBOLS)) for place in self.watched}
        )
        self._seen: dict[int, Tensor] = {}
        for place in self.watched:
            self.model.layers[place - 1].register_forward_hook(self._watch(place))
        nn.init.normal_(self.model.embed_tokens.weight, std=0.3)
        for layer in self.model.layers:
            layer.mlp.register_forward_hook(_channel_dropout(dropout))

    def _watch(self, place: int):
        def hook(module, args, output):
            self._seen[place] = output[0] if isinstance(output, tuple) else output

        return hook

    def folded(self) -> SpeechLM:
        """The plain SpeechLM that is shipped: factors multiplied out."""
        lm = SpeechLM(type(self.model)(copy.deepcopy(self.model.config)), len(self.head.basis))
        lm.model.set_attn_implementation("sdpa")
        lm.model.load_state_dict(self.model.state_dict())  # a copy: without the training hooks
        with torch.no_grad():
            lm.speech_embedding.weight.copy_(self.embedding.weight())
            lm.head.weight.copy_(self.head.weight())
            lm.head.bias.copy_(self.bias)
        return lm.eval()

    @torch.no_grad()
    def unfold(self, lm: SpeechLM) -> None:
        """Begin with the weights of ``lm``, which ``folded`` once made: the phone heads alone stay random.

        What codes share in the digits is found by least squares, the rest is their own.
        """
        self.model.load_state_dict(lm.model.state_dict())
        self.bias.copy_(lm.head.bias)
        for factored, matrix in ((self.embedding, lm.speech_embedding.weight), (self.head, lm.head.weight)):
            factored.common.copy_(torch.linalg.lstsq(factored.basis, matrix, driver="gelsd").solution)
            factored.own.copy_(matrix - factored.basis @ factored.common)

    def loss(self, batch: list[Utterance], rng: random.Random) -> dict[str, Tensor]:
        """Cross-entropy of the speech tokens and the stop token, with the phone heads' beside it.

        "speech" is the whole target's, "draft" that of the draft's layers. ``overlap``, on held-out
        speech: mean of sum min(p, q) of the two softmaxes.
        """
        if self.training and self.splice_rate:
            batch = [self._spliced(u, rng) for u in batch]
        flip = self.flip if self.training else 0.0
        before = followed(batch, rng, self.short, self.prompt_rate)
        rows = layout(batch, rng, self.codec[0], flip, before, prompted_only=not self.training)
        q, p, phones = self._pass(rows)
        speech, draft = (F.cross_entropy(logits, rows.labels) for logits in (q, p))
        wanted = rows.phones.reshape(-1)
        heard = [F.cross_entropy(x.reshape(-1, len(SYMBOLS)), wanted, ignore_index=-1) for x in phones]
        phone = sum(heard) / len(heard)
        terms = {"total": speech + 0.5 * phone + self.draft_weight * draft, "speech": speech, "phone": phone, "draft": draft}
        if not self.training:
            terms["overlap"] = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).mean()
        return terms

    def _spliced(self, u: Utterance, rng: random.Random) -> Utterance:
        if rng.random() >= self.splice_rate:
            return u
        return splice(u, rng.choice(self.pieces[u.voice]), self.words, rng)

    def _pass(self, rows: Rows) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits of the whole target and of the draft's layers, (n, 6564) both, and the phone heads'."""
        layers, long = self.model.layers, rows.text.shape[1]
        place, causal = torch.arange(long)[None], torch.full((1, 1, long, long), -math.inf).triu(1)
        with torch.autocast("cpu", torch.bfloat16):
            embedded = embed(rows, self.model.embed_tokens.weight, self.embedding.weight())
            whole = self.model(
                inputs_embeds=embedded, attention_mask={"full_attention": causal}, use_cache=False
            ).last_hidden_state
            brief, angles = self._seen[self.bottom], self.model.rotary_emb(embedded, place)
            for layer in layers[len(layers) - self.top :]:
                brief = layer(brief, causal, position_ids=place, position_embeddings=angles)
            matrix = self.head.weight()
            q, p = (
                F.linear(hidden[rows.spoken], matrix, self.bias).float() for hidden in (whole, self.model.norm(brief))
            )
            heads = [self.phone_heads[str(k)](self._seen[k][rows.spoken]).float() for k in self.watched]
        return q, p, heads


def followed(
    batch: list[Utterance], rng: random.Random, short: dict[str, list[Utterance]], rate: float
) -> list[Utterance | None]:
    """With probability ``rate`` a short utterance of its voice to stand in front of each; None: nothing."""
    return [
        rng.choice(short[u.voice]) if short.get(u.voice) and rng.random() < rate else None for u in batch
    ]


def _channel_dropout(rate: float):
    def hook(module, args, output):
        if module.training:  # one mask a channel: a mask per element costs a fifth of a CPU step
            return output * F.dropout(output.new_ones(output.shape[0], 1, output.shape[2]), rate)

    return hook


@dataclass
class Rows:
    """A padded batch: ``text`` and ``speech`` ids (B, T) with -1 where the other one stands."""

    text: Tensor
    speech: Tensor
    spoken: Tensor  # bool (B, T): positions that predict a speech token
    labels: Tensor  # (number of such positions,)
    phones: Tensor  # (number of such positions, 2): phone of the next token and the one after


def layout(
    batch: list[Utterance],
    rng: random.Random,
    codec: Codec,
    flip: float,
    before: list[Utterance | None] | None = None,
    prompted_only: bool = False,
) -> Rows:
    """A padded batch with its labels, in one of the two layouts of text.prompt.

    Alone: [start][voice][phones...][task][speech tokens...]. With an utterance of the same voice
    ``before`` it: [start][its phones][phones][task][its speech][speech], and no voice token. Both
    are labels, with ``prompted_only`` not the one before: it may have been learned by heart.
    """
    stop = codec.config.codebook_size
    heads, spoken, told, fronts = [], [], [], []  # text ids, codes, their phones; tokens before the utterance
    for w, u in zip(before or [None] * len(batch), batch):
        heads.append(prompt(u.phones, None if w else u.voice, w.phones if w else ()))
        shifts = [(v, rng.randrange(len(v.codes))) for v in (w, u) if v]
        spoken.append([code for v, k in shifts for code in v.codes[k]])
        told.append([phone for v, k in shifts for phone in v.aligned[k]])
        fronts.append(len(spoken[-1]) - len(u.codes[shifts[-1][1]]))
    length = max(len(h) + len(c) for h, c in zip(heads, spoken))
    text = torch.full((len(batch), length), -1)
    speech, labels = text.clone(), text.clone()
    phones = torch.full((len(batch), length, 2), -1)
    for i, (head, said, aligned) in enumerate(zip(heads, spoken, told)):
        codes, t = torch.tensor(said), len(head)
        text[i, :t] = torch.tensor(head)
        speech[i, t : t + len(codes)] = codes
        labels[i, t - 1 : t + len(codes)] = torch.cat([codes, torch.tensor([stop])])
        phones[i, t - 1 : t - 1 + len(codes)] = torch.tensor(aligned)
        begin = t - 1 + fronts[i]
        labels[i, [begin + cut for cut in batch[i].cuts]] = -1
        if prompted_only:
            labels[i, :begin] = -1
    if flip:
        digits = codec.to_digits(speech.clamp(min=0))
        wrong = torch.rand(digits.shape) < flip
        noisy = codec.to_code(torch.where(wrong, torch.randint(-1, 2, digits.shape).float(), digits))
        speech = torch.where(speech >= 0, noisy, speech)
    spoken = labels >= 0
    return Rows(text, speech, spoken, labels[spoken], phones[spoken])


def embed(rows: Rows, text: Tensor, speech: Tensor) -> Tensor:
    """Embeddings (B, T, hidden) of a padded batch from the two tables."""
    mixed = F.embedding(rows.text.clamp(min=0), text) * (rows.text >= 0)[..., None]
    return mixed + F.embedding(rows.speech.clamp(min=0), speech) * (rows.speech >= 0)[..., None]


def train_target(
    codec: Codec,
    train: list[Utterance],
    dev: list[Utterance],
    schedule: Schedule,
    checkpoint: Path,
    log=print,
    begin: Path | SpeechLM | None = None,
    **settings,
) -> tuple[SpeechLM, list[dict]]:
    """Train the target -> (SpeechLM, log rows).

    begin: another run's checkpoint, for its weights alone, or a target of the same sizes.
    """
    torch.manual_seed(schedule.seed)
    trainer = TargetTrainer(codec, **settings)
    if begin and not checkpoint.exists():
        if isinstance(begin, SpeechLM):
            trainer.unfold(begin)
        else:
            trainer.load_state_dict(torch.load(begin, weights_only=True)["model"])
    own = [trainer.embedding.own, trainer.head.own]
    rest = [p for p in trainer.parameters() if all(p is not q for q in own)]
    groups = [{"params": rest}, {"params": own, "scale": 0.3}]
    rows = fit(
        trainer,
        groups,
        trainer.loss,
        train,
        lambda u: len(u.codes[0]),
        schedule,
        checkpoint,
        dev,
        log,
    )
    return trainer.folded(), rows


@torch.no_grad()
def held_out_loss(lm: SpeechLM, codec: Codec, dev: list[Utterance], short: dict[str, list[Utterance]]) -> float:
    """Cross-entropy of ``dev``'s tokens, each utterance behind one of ``short`` of its voice, in fp32."""
    total = count = 0
    for start in range(0, len(dev), 8):
        batch, rng = dev[start : start + 8], random.Random(start)
        rows = layout(batch, rng, codec, 0.0, followed(batch, rng, short, 1.0), prompted_only=True)
        logits = lm(embed(rows, lm.model.embed_tokens.weight, lm.speech_embedding.weight), rows.spoken)
        total += float(F.cross_entropy(logits, rows.labels, reduction="sum"))
        count += len(rows.labels)
    return total / count


def averaged(new: SpeechLM, old: SpeechLM, part: float) -> SpeechLM:
    """``new``, in place, with ``part`` of the weights of ``old``, which it went on from (Wortsman et al. 2022, WiSE-FT)."""
    known = old.state_dict()
    with torch.no_grad():
        for name, weight in new.state_dict().items():
            weight.lerp_(known[name].to(weight), part)
    return new


def by_voice(utterances: Iterable[Utterance]) -> dict[str, list[Utterance]]:
    found: dict[str, list[Utterance]] = {}
    for u in utterances:
        found.setdefault(u.voice, []).append(u)
    return found


def prompts(utterances: Iterable[Utterance], longest: int = 4 * TOKEN_RATE) -> dict[str, list[Utterance]]:
    """The utterances of each voice that are short enough to be a zero-shot prompt."""
    return by_voice(u for u in utterances if len(u.codes[0]) <= longest)


def mean_terms(loss: Callable, items: list, batch: int) -> dict[str, float]:
    """Mean of every loss term over ``items``, in batches."""
    starts = range(0, len(items), batch)
    found = [loss(items[s : s + batch], random.Random(s)) for s in starts]
    return {k: sum(float(f[k]) for f in found) / len(found) for k in found[0]}


def read_utterances(path: Path) -> list[Utterance]:
    """Tokenised corpus, one JSON object a line; a ``.gz`` is unpacked."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        return [Utterance(**json.loads(line)) for line in lines]


def write_utterances(path: Path, utterances: Iterable[Utterance]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(vars(u)) + "\n" for u in utterances), "utf-8")
    part.replace(path)
