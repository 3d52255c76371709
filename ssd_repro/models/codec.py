"""Waveform <-> speech tokens: WORLD features, one FSQ codebook, 25 tokens a second.

The encoder sees WORLD features and Whisper tiny.en encoder states (so that the
codes carry phones, as CosyVoice's supervised tokenizer does); the decoder sees
codes and a voice embedding only, and no vocoder is trained: WORLD makes the
waveform (Morise et al. 2016). FSQ: Mentzer et al. 2023, 8 digits of 3 levels =
6,561 codes, the size of CosyVoice 2's codebook.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

SAMPLE_RATE = 24_000
TOKEN_RATE = 25
FRAME_MS = 5.0
FRAMES_PER_TOKEN = 8  # 40 ms of 5 ms WORLD frames
ENVELOPE, APERIODICITY = 40, 3
FEATURES = ENVELOPE + APERIODICITY + 2  # + log F0, voiced flag
LOG_F0, VOICED = ENVELOPE + APERIODICITY, ENVELOPE + APERIODICITY + 1
FFT_SIZE = 1024


def _pyworld():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # its import's, of no use to us
        import pyworld
    return pyworld


def analyse(audio: np.ndarray) -> np.ndarray:
    """WORLD features of ``audio`` (samples,) float at 24 kHz -> (frames, 45), 5 ms a frame.

    Columns: 40 coded envelope, 3 coded aperiodicity, log F0 (interpolated
    through unvoiced frames), voiced flag.
    """
    pyworld = _pyworld()
    x = np.ascontiguousarray(audio, dtype=np.float64)
    f0, times = pyworld.dio(x, SAMPLE_RATE, frame_period=FRAME_MS)
    f0 = pyworld.stonemask(x, f0, times, SAMPLE_RATE)
    envelope = pyworld.cheaptrick(x, f0, times, SAMPLE_RATE, fft_size=FFT_SIZE)
    aperiodicity = pyworld.d4c(x, f0, times, SAMPLE_RATE, fft_size=FFT_SIZE)
    voiced = f0 > 0
    log_f0 = np.full(len(f0), math.log(150.0))
    if voiced.any():
        log_f0 = np.interp(np.arange(len(f0)), np.flatnonzero(voiced), np.log(f0[voiced]))
    return np.concatenate(
        [
            pyworld.code_spectral_envelope(envelope, SAMPLE_RATE, ENVELOPE),
            pyworld.code_aperiodicity(aperiodicity, SAMPLE_RATE),
            log_f0[:, None],
            voiced[:, None],
        ],
        axis=1,
    ).astype(np.float32)


def synthesise(features: np.ndarray) -> np.ndarray:
    """WORLD features (frames, 45) -> float32 waveform at 24 kHz, within [-1, 1]."""
    pyworld = _pyworld()
    x = np.ascontiguousarray(features, dtype=np.float64)
    f0 = np.where(x[:, VOICED] > 0.5, np.exp(np.clip(x[:, LOG_F0], 3.9, 6.4)), 0.0)
    envelope = pyworld.decode_spectral_envelope(np.ascontiguousarray(x[:, :ENVELOPE]), SAMPLE_RATE, FFT_SIZE)
    coded = np.minimum(x[:, ENVELOPE : ENVELOPE + APERIODICITY], 0.0)
    aperiodicity = pyworld.decode_aperiodicity(np.ascontiguousarray(coded), SAMPLE_RATE, FFT_SIZE)
    audio = pyworld.synthesize(f0, envelope, aperiodicity, SAMPLE_RATE, FRAME_MS)
    return np.clip(audio, -1.0, 1.0).astype(np.float32)


def long_term_spectrum(audios: list[np.ndarray]) -> np.ndarray:
    """Mean power spectrum of several waveforms at 24 kHz: (FFT_SIZE // 2 + 1,)."""
    power = np.zeros(FFT_SIZE // 2 + 1)
    for audio in audios:
        frames = np.lib.stride_tricks.sliding_window_view(audio, FFT_SIZE)[:: FFT_SIZE // 4]
        power += (np.abs(np.fft.rfft(frames * np.hanning(FFT_SIZE), axis=1)) ** 2).sum(0)
    return power / sum(len(audio) for audio in audios)


def code_gain(gain: np.ndarray) -> Tensor:
    """A power gain a frequency (FFT_SIZE // 2 + 1,) -> what it adds to a coded envelope (40,)."""
    both = np.ascontiguousarray(np.stack([gain, np.ones_like(gain)]))
    coded = _pyworld().code_spectral_envelope(both, SAMPLE_RATE, ENVELOPE)
    return torch.from_numpy((coded[0] - coded[1]).astype(np.float32))


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of the codec; ``hint`` is the width of the Whisper states (tiny.en: 384)."""

    digits: int = 8
    levels: int = 3
    hint: int = 384
    encoder_width: int = 256
    encoder_blocks: int = 4
    decoder_width: int = 320
    decoder_blocks: int = 6
    voices: int = 6

    @property
    def codebook_size(self) -> int:
        return self.levels**self.digits


class Block(nn.Module):
    """Residual dense convolution of width 3, as one matrix product: (B, T, C) -> (B, T, C)."""

    def __init__(self, width: int, dilation: int = 1, dropout: float = 0.1):
        super().__init__()
        self.dilation = dilation
        self.norm = nn.LayerNorm(width)
        self.rise = nn.Linear(3 * width, 2 * width)
        self.fall = nn.Linear(2 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        h, d = self.norm(x), self.dilation
        padded = nn.functional.pad(h, (0, 0, d, d))
        h = torch.cat([padded[:, : -2 * d], h, padded[:, 2 * d :]], dim=-1)
        h = nn.functional.gelu(self.rise(h))
        if self.training:  # whole channels: a mask per element costs a fifth of a CPU step
            h = h * nn.functional.dropout(h.new_ones(h.shape[0], 1, h.shape[2]), self.dropout)
        return x + self.fall(h)


def stack(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width, (1, 2, 3)[i % 3]) for i in range(count)))


class Codec(nn.Module):
    """Features <-> codes. Shapes: features (B, 8·N, 45), hint (B, 2·N, hint), codes (B, N)."""

    def __init__(self, config: CodecConfig = CodecConfig()):
        super().__init__()
        self.config = c = config
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))
        # Per voice, for the decoded envelope: what training.codec.calibrate finds.
        self.register_buffer("scale", torch.ones(c.voices, ENVELOPE))
        self.register_buffer("shift", torch.zeros(c.voices, ENVELOPE))
        per_half = FRAMES_PER_TOKEN // 2
        self.enter = nn.Linear(per_half * FEATURES + c.hint, c.encoder_width)
        self.encoder = stack(c.encoder_width, c.encoder_blocks)
        self.pool = nn.Linear(2 * c.encoder_width, c.encoder_width)
        self.encoder_out = nn.Sequential(
            stack(c.encoder_width, 1), nn.LayerNorm(c.encoder_width), nn.Linear(c.encoder_width, c.digits)
        )
        self.voice = nn.Embedding(c.voices, c.decoder_width)
        self.code_in = nn.Linear(c.digits, c.decoder_width)
        self.decoder_in = stack(c.decoder_width, 2)
        self.spread = nn.Linear(c.decoder_width, 2 * c.decoder_width)
        self.decoder = stack(c.decoder_width, c.decoder_blocks)
        self.leave = nn.Sequential(nn.LayerNorm(c.decoder_width), nn.Linear(c.decoder_width, per_half * FEATURES))

    def normalise(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def digits(self, features: Tensor, hint: Tensor) -> Tensor:
        """Continuous digits (B, N, 8) before rounding, each in (-1, 1)."""
        batch, frames, _ = features.shape
        halves = self.normalise(features).reshape(batch, frames // 4, 4 * FEATURES)
        x = self.encoder(self.enter(torch.cat([halves, hint], dim=-1)))
        x = self.pool(x.reshape(batch, frames // FRAMES_PER_TOKEN, -1))
        return torch.tanh(self.encoder_out(x).float())

    def quantise(self, digits: Tensor) -> Tensor:
        """Round to {-1, 0, 1} with a straight-through gradient."""
        return digits + (digits.round() - digits).detach()

    def to_code(self, rounded: Tensor) -> Tensor:
        """Digits in {-1, 0, 1} (B, N, 8) -> code ids (B, N), first digit least significant."""
        weights = self.config.levels ** torch.arange(self.config.digits, device=rounded.device)
        return ((rounded.round().long() + 1) * weights).sum(-1)

    def to_digits(self, codes: Tensor) -> Tensor:
        """Code ids (B, N) -> digits in {-1, 0, 1} (B, N, 8). Raises on ids outside the codebook."""
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.config.codebook_size):
            raise ValueError(f"speech tokens must be in 0..{self.config.codebook_size - 1}")
        weights = self.config.levels ** torch.arange(self.config.digits, device=codes.device)
        return (codes[..., None] // weights % self.config.levels - 1).float()

    def encode(self, features: Tensor, hint: Tensor) -> Tensor:
        """Features (B, 8·N, 45) and Whisper states (B, 2·N, hint) -> code ids (B, N)."""
        return self.to_code(self.digits(features, hint))

    def decode_digits(self, digits: Tensor, voice: Tensor) -> Tensor:
        """Digits (B, N, 8), voice ids (B,) -> normalised features (B, 8·N, 45)."""
        x = self.code_in(digits) + self.voice(voice)[:, None]
        x = self.spread(self.decoder_in(x))
        x = x.reshape(x.shape[0], -1, self.config.decoder_width)
        x = self.leave(self.decoder(x))
        return x.reshape(x.shape[0], -1, FEATURES).float()

    @torch.no_grad()
    def features(self, codes: Tensor, voice: int) -> Tensor:
        """Code ids (N,) -> WORLD features (8·N, 45), the envelope with the voice's global variance.

        A decoder trained by an absolute error speaks in averages, which sounds muffled; a fixed
        gain a coefficient gives the envelope back its spread (Toda and Tokuda 2007, in the
        affine form of Silén et al. 2012).
        """
        voices = torch.tensor([voice], device=codes.device)
        made = self.decode_digits(self.to_digits(codes[None]), voices)[0] * self.std + self.mean
        made[:, :ENVELOPE] = made[:, :ENVELOPE] * self.scale[voice] + self.shift[voice]
        return made

    def decode(self, codes: Tensor, voice: int) -> np.ndarray:
        """Code ids (N,) -> float32 waveform at 24 kHz, 960 samples a code."""
        if len(codes) == 0:
            raise ValueError("no speech tokens to decode: expected at least one")
        return synthesise(self.features(codes, voice).cpu().numpy())
