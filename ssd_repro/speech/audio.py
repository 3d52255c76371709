"""Waveforms on disk and at other rates."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_audio(path: Path, rate: int) -> np.ndarray:
    """An audio file as float32 (samples,) at ``rate``: channels averaged, resampled if it has another one."""
    import soundfile

    audio, own = soundfile.read(path, dtype="float32")
    return resample(audio.mean(1) if audio.ndim > 1 else audio, own, rate)


def resample(audio: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """float32 (samples,) at ``rate`` -> at ``wanted``."""
    if rate == wanted:
        return audio
    import soxr

    return soxr.resample(np.asarray(audio, np.float32), rate, wanted)
