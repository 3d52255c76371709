"""The codec in training, and the speech tokens it gives."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import files
from ..models import codec as wide
from ..models.checkpoints import weights_sha256
from ..models.codec import ENVELOPE, FRAMES_PER_TOKEN, LOG_F0, SAMPLE_RATE, TOKEN_RATE, VOICED, Codec, CodecConfig
from ..speech.text import SYMBOLS, VOICES, language, phone_ids, plain_phones
from .loop import Settings, Task, train

FEATURES_VERSION = 1  # to be raised when ``features_of`` gives something else for the same audio
BLANK = len(SYMBOLS)


@dataclass(frozen=True)
class Features:
    """Of N tokens: ``world`` (8N, 45), ``hint`` (2N, 384) Whisper states, ``phones`` ids."""

    id: str
    voice: str
    world: Tensor
    hint: Tensor
    phones: list[int]

    def __len__(self) -> int:
        return len(self.world) // FRAMES_PER_TOKEN

    labels = property(__len__)


class Hint:
    """Whisper encoder states of 24 kHz audio, 50 a second; ``model``: a CTranslate2 folder or hub name."""

    def __init__(self, model: str):
        from faster_whisper import WhisperModel, download_model

        folder = Path(model) if Path(model).is_dir() else Path(download_model(model))
        # CTranslate2 sets torch's number of threads, too: to what it is.
        threads = torch.get_num_threads()
        self.model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=threads)
        self.digest = files.file_digest(folder / "model.bin")

    def __call__(self, audio: np.ndarray, tokens: int) -> np.ndarray:
        import librosa

        mel = self.model.feature_extractor(librosa.resample(audio, orig_sr=SAMPLE_RATE, target_sr=16_000))
        mel = np.pad(mel, ((0, 0), (0, 8)), mode="edge")[:, : 4 * tokens]
        return np.array(self.model.encode(mel))[0]


def features_of(audio: np.ndarray, hint: Hint) -> dict[str, np.ndarray]:
    """``world`` and ``hint`` of ``audio`` (samples,) at 24 kHz."""
    tokens = len(audio) // (SAMPLE_RATE // TOKEN_RATE)
    return {"world": wide.analyse(audio)[: FRAMES_PER_TOKEN * tokens], "hint": hint(audio, tokens)}


def featurise(audio: Path, row: dict[str, str], hint: Hint, folder: Path) -> Features:
    """Of a corpus row; kept in ``folder`` as fp16, named by the audio, the hint's weights, the analysis' version."""
    import soundfile

    made_by = f"{FEATURES_VERSION} {hint.digest} {files.sha256(audio)}"
    path = folder / f"{row['id']}-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        samples, rate = soundfile.read(audio, dtype="float32")
        assert rate == SAMPLE_RATE, rate
        with files.replacing(path) as part, part.open("wb") as out:
            np.savez(out, **{name: value.astype(np.float16) for name, value in features_of(samples, hint).items()})
    with np.load(path) as stored:
        world, states = (torch.from_numpy(stored[name]) for name in ("world", "hint"))
    return Features(row["id"], row["voice"], world.float(), states, phone_ids(row["text"], language(row["voice"])))


class PhoneHead(nn.Module):
    """Digits (B, N, 8) -> phone logits at 50 Hz (B, 2N, phones + blank): CTC makes the codes carry phones."""

    def __init__(self, digits: int, width: int = 256):
        super().__init__()
        self.at_25_hz = nn.Sequential(nn.Linear(digits, width), wide.stack(width, 2), nn.Linear(width, 2 * width))
        self.at_50_hz = nn.Sequential(wide.stack(width, 1), nn.Linear(width, len(SYMBOLS) + 1))

    def forward(self, digits: Tensor) -> Tensor:
        x = self.at_25_hz(digits)
        return self.at_50_hz(x.reshape(len(x), -1, x.shape[2] // 2)).float()


def flip(digits: Tensor, part: float) -> Tensor:
    """``part`` of the ``digits`` replaced by random ones."""
    return torch.where(torch.rand_like(digits) < part, torch.randint_like(digits, -1, 2), digits)


class CodecTask(Task):
    """The codec, and a head that reads phones from the codes; ``kept``: a codec that stays as it is."""

    WEIGHTS = {"envelope": 1.0, "spectrum": 2.0, "aperiodicity": 0.3, "f0": 0.5, "voiced": 0.3, "delta": 0.3}
    FLIP, HINT_DROPOUT = 0.04, 0.15

    def __init__(self, learned: list[Features], config: CodecConfig, phone_weight: float, kept: Codec | None = None):
        super().__init__()
        self.codec, self.phone_head, self.phone_weight = Codec(config), PhoneHead(config.digits), phone_weight
        world = torch.cat([f.world for f in learned[:400]])
        self.codec.mean.copy_(world.mean(0))
        self.codec.std.copy_(world.std(0))
        self.codec.mean[VOICED] = self.codec.std[VOICED] = 0.5
        n = torch.arange(ENVELOPE)
        cosines = torch.cos(math.pi * n[:, None] * (2 * n[None] + 1) / (2 * ENVELOPE)) * math.sqrt(2 / ENVELOPE)
        cosines[0] /= math.sqrt(2)
        self.register_buffer("to_spectrum", self.codec.std[:ENVELOPE, None] * cosines, persistent=False)
        normal = self.codec.normalise(world[:20_000])[:, :ENVELOPE]
        self.spectrum_scale = float((normal @ self.to_spectrum).std())
        if kept:
            self.codec.load_state_dict(kept.state_dict())
            self.codec.requires_grad_(False)

    def draw(self, items: list[Features], rng: random.Random) -> list[Features]:
        """Half the time shift the 40 ms grid by 20 ms."""
        if not self.training:
            return items
        return [replace(f, world=f.world[4:-4], hint=f.hint[1:-1]) if rng.randrange(2) else f for f in items]

    def forward(self, items: list[Features]) -> dict[str, Tensor]:
        """L1 on normalised features and on the log spectrum, CTC on the codes; evaluating adds the phone error rate."""
        device = self.codec.mean.device
        world = pad_sequence([f.world for f in items], True, math.nan).to(device)  # (B, 8N, 45)
        world = torch.where(world.isnan(), self.codec.mean, world)
        hint = pad_sequence([f.hint.float() for f in items], True).to(device)  # (B, 2N, 384)
        mask = pad_sequence([torch.ones(len(f)) for f in items], True).to(device)  # (B, N)
        voices = torch.tensor([VOICES.index(f.voice) for f in items], device=device)
        with self.autocast():
            if self.training:
                hint = hint * F.dropout(hint.new_ones(len(hint), 1, hint.shape[2]), self.HINT_DROPOUT)
            digits = shown = self.codec.quantise(self.codec.digits(world, hint))
            if self.training:  # the decoder must bear a language model's mistakes
                shown = flip(digits, self.FLIP)
            made, logits = self.codec.decode_digits(shown, voices), self.phone_head(digits)
        frames = mask.repeat_interleave(FRAMES_PER_TOKEN, 1)[..., None]
        terms = self._distances(made, self.codec.normalise(world), frames)
        total = sum(self.WEIGHTS[name] * value for name, value in terms.items())
        terms |= self._phones(logits, (mask.sum(1) * 2).long(), [plain_phones(f.phones) for f in items])
        return terms | {"loss": total + self.phone_weight * terms["ctc"]}

    def _phones(self, logits: Tensor, frames: Tensor, labels: list[list[int]]) -> dict[str, Tensor]:
        """CTC of (B, 2N, phones + blank) logits, and when evaluating the phone error rate."""
        from torchmetrics.functional.text import edit_distance

        log_probs, lengths = logits.log_softmax(-1), torch.tensor([len(x) for x in labels], device=logits.device)
        wanted = torch.tensor(sum(labels, []), device=logits.device)
        options = {"blank": BLANK, "zero_infinity": True, "reduction": "none"}
        ctc = (F.ctc_loss(log_probs.transpose(0, 1), wanted, frames, lengths, **options) / lengths).mean()
        if self.training:
            return {"ctc": ctc}
        best = zip(log_probs.argmax(-1).tolist(), frames.tolist(), strict=True)
        read = ["".join(chr(p) for p, _ in groupby(b[:n]) if p != BLANK) for b, n in best]
        wrong = edit_distance(read, ["".join(map(chr, x)) for x in labels], reduction="sum")
        return {"ctc": ctc, "phone_error_rate": wrong / lengths.sum()}

    def _distances(self, made: Tensor, wanted: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Mean absolute distances of normalised features (B, 8N, 45) where ``mask`` (B, 8N, 1) is 1."""
        error, count = (made - wanted) * mask, mask.sum()
        envelope = error[..., :ENVELOPE]
        voiced = (wanted[..., VOICED] > 0) * mask[..., 0]
        return {
            "envelope": envelope.abs().sum() / count / ENVELOPE,
            "spectrum": (envelope @ self.to_spectrum).abs().sum() / count / ENVELOPE / self.spectrum_scale,
            "aperiodicity": error[..., ENVELOPE:LOG_F0].abs().sum() / count / wide.APERIODICITY,
            "f0": (error[..., LOG_F0].abs() * voiced).sum() / voiced.sum(),
            "voiced": error[..., VOICED].abs().sum() / count,
            "delta": (envelope[:, 1:] - envelope[:, :-1]).abs().sum() / count / ENVELOPE,
        }


def train_codec(
    learned: list[Features],
    dev: list[Features],
    settings: Settings,
    out: Path,
    phone_weight: float = 0.25,
    kept: Codec | None = None,
    config: CodecConfig | None = None,
    log=print,
) -> tuple[CodecTask, list[dict]]:
    """Train codec and phone head together, or for a ``kept`` codec the head -> (task on the CPU, log rows)."""
    torch.manual_seed(settings.seed)
    task = CodecTask(learned, config or CodecConfig(), phone_weight, kept)
    facts = {"phone_weight": phone_weight, "begin": weights_sha256(kept, torch.float32) if kept else ""}
    rows = train(task, learned, dev, settings, out, facts | {"config": asdict(task.codec.config)}, log=log)
    return task.cpu(), rows


def codes_of(codec: Codec, f: Features) -> Tensor:
    return codec.encode(f.world[None], f.hint[None].float())[0]


@torch.no_grad()
def resynthesise(codec: Codec, audio: np.ndarray, voice: str, hint: Hint) -> np.ndarray:
    """``audio`` (samples,) at 24 kHz through the codec."""
    world, states = (torch.from_numpy(part)[None] for part in features_of(audio, hint).values())
    return codec.decode(codec.encode(world, states)[0], VOICES.index(voice))


@torch.no_grad()
def calibrate(codec: Codec, items: list[Features], audio: Callable[[str], np.ndarray], most: int = 40) -> None:
    """Set the codec's ``scale`` and ``shift`` of every voice from its first ``most`` of ``items``.

    audio: id -> the teacher's, (samples,) at 24 kHz. scale: the spread of each envelope coefficient
    within an utterance, the teacher's over the decoder's. shift: the teacher's mean, and then what is
    left between the long-term spectra of both audios (WORLD has a bias of its own).
    """

    def moments(features: list[Tensor]) -> Tensor:
        return torch.stack([torch.stack((x.mean(0), x.std(0))) for x in features]).mean(0)[:, :ENVELOPE]

    codec.scale.fill_(1.0)
    codec.shift.fill_(0.0)
    for place, voice in enumerate(VOICES):
        of_voice = [f for f in items if f.voice == voice][:most]
        if not of_voice:
            continue
        codes = [codes_of(codec, f) for f in of_voice]
        mean, spread = moments([f.world for f in of_voice])
        made_mean, made_spread = moments([codec.features(c, place) for c in codes])
        codec.scale[place] = spread / made_spread
        codec.shift[place] = mean - codec.scale[place] * made_mean
        wanted = wide.long_term_spectrum([audio(f.id) for f in of_voice])
        found = wide.long_term_spectrum([codec.decode(c, place) for c in codes])
        codec.shift[place] += wide.code_gain(wanted / found)


def align(log_probs: Tensor, labels: list[int], blank: int = BLANK) -> list[int]:
    """CTC Viterbi: (T, C) log probabilities, labels (L,) -> index into labels for each of T frames.

    A blank belongs to the label before it (the first label at the start).
    """
    states = torch.full((2 * len(labels) + 1,), blank)
    states[1::2] = torch.tensor(labels)
    emit = log_probs[:, states]
    barred = torch.ones(3, len(states), dtype=torch.bool)  # to stay, to go on by one, by two: over a blank
    barred[:2] = False
    barred[2, 3::2] = states[3::2] == states[1:-2:2]
    score = torch.full((len(states),), -math.inf)
    score[:2] = emit[0, :2]
    back = []
    for row in emit[1:]:
        before = F.pad(score, (2, 0), value=-math.inf).unfold(0, len(states), 1).flip(0)
        best, step = before.masked_fill(barred, -math.inf).max(0)
        back.append(step)
        score = best + row
    state = len(states) - 1 if score[-1] > score[-2] else len(states) - 2
    path = [state]
    for step in reversed(back):
        state -= int(step[state])
        path.append(state)
    return [max(0, (s - 1) // 2) for s in reversed(path)]


@torch.no_grad()
def token_row(task: CodecTask, f: Features) -> dict | None:
    """A row of tokens.jsonl (data.py): speech tokens on four grids 10 ms apart, aligned with the phones.

    None if the utterance is too short for its phones to be aligned.
    """
    hint, labels = f.hint.float(), plain_phones(f.phones)
    between = (hint + torch.cat([hint[1:], hint[-1:]])) / 2  # Whisper states come every 20 ms
    codes, aligned = [], []
    for shift in range(4):
        states, world = (between if shift % 2 else hint)[shift // 2 :], f.world[2 * shift :]
        tokens = len(world) // FRAMES_PER_TOKEN
        if 2 * tokens < len(labels) + 5:
            return None
        rounded = task.codec.digits(world[None, : FRAMES_PER_TOKEN * tokens], states[None, : 2 * tokens]).round()
        path = align(task.phone_head(rounded)[0].log_softmax(-1), labels)[::2]
        codes.append(task.codec.to_code(rounded)[0].tolist())
        aligned.append([[labels[i], [*labels, -1][i + 1]] for i in path])
    return {"id": f.id, "voice": f.voice, "phones": f.phones, "codes": codes, "aligned": aligned}
