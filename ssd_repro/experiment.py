"""A grid of settings x utterances -> one row per decoded utterance, resumable, with provenance.

Rows are appended to ``<folder>/rows/<name>.jsonl``, each on the disk before the next begins.
A row's key is over its settings, the weights, the code and the machine: rows of another
model, code or machine stay in the file, but are never used for this one. Grids share rows:
what any file of the folder holds is not made again.

A row is timed against its own baseline: the autoregressive target, decoded in turn with it
(``base_*``), whatever run that was. So rows of different runs compare by their ratios.

Several processes (torchrun, ``accelerate launch``) share the utterances: each writes
``<name>.rank<r>.jsonl``, and the next run in one process puts those into ``<name>.jsonl``.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import pandas as pd

from . import metrics
from .codec import TOKEN_RATE
from .errors import InputError

# Modules that no row depends on; a change in any other makes a new code revision.
NOT_IN_ROWS = {"__main__", "cli", "compare", "curves", "figures", "report", "tables", "theory", "interactive",
               "training", "recipe", "corpus", "draft_data", "draft_training", "cosyvoice"}  # fmt: skip
PACKAGES = ("torch", "transformers", "torchmetrics", "faster-whisper", "ctranslate2", "onnxruntime",
            "speechmos", "Resemblyzer", "pyworld", "numpy", "ssd-repro")  # fmt: skip
WARM_UP = "This short sentence warms the machine up."
BLOCK = 4  # utterances that each of several processes decodes before they all measure
SILENCE_DB = -35.0  # a token's 40 ms, against the 95th percentile of its utterance's tokens


@dataclass(frozen=True)
class System:
    """One line of a table: how to decode, and whether the sound is measured.

    tolerance, draft_length: of the speculative method alone. temperature: the sampler's, for
    draft and target; None: the voice's own. heard: with WER, DNSMOS and speaker similarity.
    """

    method: str
    tolerance: float | None = None
    draft_length: int | None = None
    temperature: float | None = None
    heard: bool = True

    def arguments(self) -> dict:
        """What ``voice.speak`` gets: its own defaults where nothing is set."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "heard"}


AUTOREGRESSIVE = System("autoregressive")


def grid(
    tolerances=(), draft_lengths=(), temperatures=(), tolerance: float = 0.4, draft_length: int = 3,
    heard: bool = True,
) -> list[System]:  # fmt: skip
    """SSD over one setting at a time, the others at (tolerance, draft_length, the voice's temperature)."""
    beta, length = float(tolerance), draft_length
    return [
        *(System("speculative", float(b), length, heard=heard) for b in tolerances),
        *(System("speculative", beta, n, heard=heard) for n in draft_lengths),
        *(System("speculative", beta, length, float(t), heard=heard) for t in temperatures),
    ]


@dataclass(frozen=True)
class Utterance:
    """What is spoken, by whom, with which seed."""

    text_id: str
    text: str
    voice: str
    seed: int


def evaluation_sentences(part: str = "eval") -> list[tuple[str, str]]:
    """(id, text) of the held-out sentences, in their fixed random order; part: eval, or dev for choices."""
    source = resources.files("ssd_repro") / "data" / f"{part}_sentences.tsv"
    lines = (line for line in source.read_text("utf-8").splitlines() if not line.startswith("#"))
    return [(row["id"], row["text"]) for row in csv.DictReader(lines, delimiter="\t")]


def utterances(count: int, voices: tuple[str, ...], seed: int = 0, part: str = "eval") -> list[Utterance]:
    """``count`` utterances: the held-out sentences in order, dealt to the voices in turn, a seed for each.

    After the last sentence (of 200) they begin anew, each now with the next voice and a new seed.
    """
    known = evaluation_sentences(part)
    most = len(known) * len(voices)
    if not 1 <= count <= most:
        raise InputError(
            f"sentences must be a whole number from 1 to {most} ({len(known)} sentences, {len(voices)} voices), got {count}"
        )
    rounds = (divmod(i, len(known)) for i in range(count))
    return [
        Utterance(*known[i], voices[(i + again) % len(voices)], seed + again * len(known) + i) for again, i in rounds
    ]


def run(voice, systems, utterances, folder, name, repeats=2, whisper="", speaker="",
        progress=lambda it: it):  # fmt: skip
    """Decode and measure what no rows file holds yet -> DataFrame, one row per utterance and system.

    Fair timing: one warm-up of every system; then, sentence by sentence, the systems take
    turns (who begins rotates), ``repeats`` times with the same seed, and the median counts.
    The autoregressive target takes its turn wherever something is decoded, as its baseline, also
    where its own row is there or was not asked for. Metrics are computed after the timed part,
    of several processes when all of them have ended it.
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise InputError(f"repeats must be a whole number of at least 1, got {repeats!r}")
    systems = _plain(systems, voice)
    for said in utterances:  # before any work
        for system in systems:
            voice.check(said.text, voice=said.voice, seed=said.seed, **system.arguments())
    context = {**where(voice.device), "precision": voice.precision, "compile": voice.compile,
               "front_end": voice.front_end, "weights": voice.weights_id, "sampler": asdict(voice.sampler),
               "code": code_revision(), "repeats": repeats, **metrics.models(whisper, speaker)}  # fmt: skip
    rank, world = process()
    mine = utterances[rank::world]
    cells = [[(system, row_settings(system, said, context)) for system in systems] for said in mine]
    block = BLOCK if world > 1 else 1

    with locked_rows(folder, name, rank) as path:
        if world == 1:
            merge_rows(path)
        drop_half_line(path)
        known = rows_of_folder(folder)
        missing = {system for line in cells for system, s in line if find(known, s) is None}
        _warm_up(voice, [s for s in systems if s in missing], mine, whisper, speaker)
        wait_for_all()  # nobody is timed while another warms up
        for begin in progress(range(0, -(-len(utterances) // world), block)):
            chosen = range(begin, min(begin + block, len(mine)))
            timed = []
            for i in chosen:
                new = [(system, s) for system, s in cells[i] if find(known, s) is None]
                order = lineup(systems, [system for system, _ in new], i)
                timed.append((new, mine[i], decode(voice, order, mine[i], repeats)))
            wait_for_all()
            for new, said, takes in timed:
                for row in rows_of(voice, new, said, takes, whisper, speaker):
                    append_row(path, row)
                    known[row["key"]] = row
            wait_for_all()
    return to_frame(find(known, settings) for line in cells for _, settings in line)


def _plain(systems, voice) -> list[System]:
    """Each once: the voice's own temperature is no other one, beta 1 is 1.0, and heard is more than unheard."""
    own = voice.sampler.temperature
    plain = [replace(s, temperature=None) if s.temperature == own else s for s in systems]
    plain = [s if s.tolerance is None else replace(s, tolerance=float(s.tolerance)) for s in plain]
    return list(dict.fromkeys(replace(s, heard=True) if replace(s, heard=True) in plain else s for s in plain))


def _is_base(system: System) -> bool:
    """Whether it decodes as the baseline does, heard or not."""
    return system.arguments() == AUTOREGRESSIVE.arguments()


def lineup(systems: list[System], missing: list[System], turn: int) -> list[System]:
    """Who decodes, in which order: what is missing and the baseline, begun one further with each ``turn``."""
    if not missing:
        return []
    order = systems if any(_is_base(s) for s in systems) else [AUTOREGRESSIVE, *systems]
    first = turn % len(order)
    return [s for s in order[first:] + order[:first] if s in missing or _is_base(s)]


def _warm_up(voice, missing: list[System], said: list[Utterance], whisper: str, speaker: str) -> None:
    """Models that cannot be had are known before any work; then one decode of every system."""
    if any(system.heard for system in missing) and voice.audible:
        metrics.load(whisper, speaker)
    for system in lineup(missing, missing, 0):
        voice.speak(WARM_UP, voice=said[0].voice, seed=0, **system.arguments())


def decode(voice, order: list[System], said: Utterance, repeats: int) -> dict[System, list]:
    """Timed decodes of one utterance, the systems in turn -> the takes of each."""
    takes: dict[System, list] = {system: [] for system in order}
    for _ in range(repeats):
        for system, mine in takes.items():
            mine.append(voice.speak(said.text, voice=said.voice, seed=said.seed, **system.arguments()))
    return takes


def rows_of(voice, new, said: Utterance, takes: dict, whisper: str, speaker: str):
    """One by one the rows of one utterance: ``new`` (system, settings), as ``decode`` timed them, and heard."""
    beside, settings = next((mine for system, mine in takes.items() if _is_base(system)), []), dict(new)
    for system in (system for system in takes if system in settings):
        scores = metrics.UNHEARD
        if system.heard and voice.audible:
            take, reference = takes[system][0], voice.reference(said.voice)
            scores = metrics.measure(take.audio, take.sample_rate, said.text, reference, whisper, speaker)
        own = settings[system]
        yield {"key": key(own), **own, **measured(takes[system]), **baseline(beside),
               "processes": process()[1], **scores}  # fmt: skip


def measured(takes: list) -> dict:
    """One row's numbers from repeated takes: medians of seconds, all else from the first.

    pieces: tokens of each sentence of the text. rounds: of each sentence the [drafted,
    accepted] of its rounds, none where nothing was drafted (every round then gives one token).
    """
    take = takes[0]
    speculated = any(r.drafted for sentence in take.sentences for r in sentence.rounds)
    rounds = [[[r.drafted, r.accepted] for r in s.rounds if speculated] for s in take.sentences]
    return {
        "tokens": len(take.token_ids),
        "token_ids": list(take.token_ids),
        "pieces": [len(sentence.tokens) for sentence in take.sentences],
        "rounds": rounds,
        "carries": carries(take),
        "gap_seconds": take.gap_seconds,
        "repeatable": all(other.token_ids == take.token_ids for other in takes),
        "stopped": take.stopped,
        "audio_seconds": take.audio_seconds,
        "lm_seconds": _median(t.lm_seconds for t in takes),
        "lm_seconds_each": [round(t.lm_seconds, 6) for t in takes],
        "synthesis_seconds": _median(t.rtf * t.audio_seconds for t in takes),
        "seconds": {k: _median(t.seconds[k] for t in takes) for k in take.seconds},
        "target_calls": take.target_calls,
        "draft_calls": take.draft_calls,
        "drafted": sum(r.drafted for s in take.sentences for r in s.rounds),
        "accepted": sum(r.accepted for s in take.sentences for r in s.rounds),
        "acceptance_rate": take.acceptance_rate,
        "tokens_per_target_call": take.tokens_per_target_call,
    }


def baseline(takes: list) -> dict:
    """Of a row's baseline, the autoregressive target decoded in turn with it."""
    return {
        "base_tokens": len(takes[0].token_ids),
        "base_audio_seconds": takes[0].audio_seconds,
        "base_lm_seconds": _median(t.lm_seconds for t in takes),
        "base_prefill_seconds": _median(t.seconds["prefill"] for t in takes),
        "base_synthesis_seconds": _median(t.rtf * t.audio_seconds for t in takes),
    }


def _median(seconds) -> float:
    """To the microsecond."""
    return round(statistics.median(seconds), 6)


def carries(take) -> str:
    """What each token carries by its 40 ms of sound, a letter each: s speech, '.' silence.

    Silence lies SILENCE_DB below the 95th percentile of the tokens. Empty where the sound
    cannot be laid beside the tokens: it is longer or shorter than they say, or there is none.
    """
    counts = [len(sentence.tokens) for sentence in take.sentences]
    width, gap = take.sample_rate // TOKEN_RATE, int(take.gap_seconds * take.sample_rate)
    if not np.any(take.audio) or len(take.audio) != sum(counts) * width + gap * (len(counts) - 1):
        return ""
    begins = np.cumsum([0, *(n * width + gap for n in counts)])
    spoken = np.concatenate([take.audio[b : b + n * width] for b, n in zip(begins, counts, strict=False)])
    level = 10 * np.log10(np.square(spoken.reshape(-1, width)).mean(1) + 1e-12)
    return "".join("." if low else "s" for low in level < np.percentile(level, 95) + SILENCE_DB)


# Keys: settings, weights, code, machine


def row_settings(system: System, said: Utterance, context: dict) -> dict:
    return {**asdict(system), **asdict(said), **context}


def key(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def find(known: dict[str, dict], settings: dict) -> dict | None:
    """The row of these settings; where none needs to be heard, a heard one will do."""
    return known.get(key(settings)) or known.get(key({**settings, "heard": True}))


@lru_cache(maxsize=1)
def code_revision() -> str:
    """Short SHA-256 of the package's sources that a row depends on."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.stem not in NOT_IN_ROWS:
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]


def where(device) -> dict:
    """The machine, as far as timings depend on it; which of several GPUs it was does not count."""
    import torch

    kind = str(device).partition(":")[0]
    chip = torch.cuda.get_device_name(device) if kind == "cuda" else _processor()
    return {"device": kind, "chip": chip, "threads": torch.get_num_threads(),
            "torch": torch.__version__}  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# Several processes


def process() -> tuple[int, int]:
    """(rank, how many processes), as torchrun and ``accelerate launch`` set them; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Until every process of ``ssd-repro run`` has come here: nobody measures while another is timed."""
    import torch.distributed as dist

    if process()[1] > 1 and dist.is_available() and dist.is_initialized():
        dist.barrier()


@contextmanager
def locked_rows(folder, name: str, rank: int = 0):
    """The rows file that this process alone may write; that of rank 0 of many is locked as ``name`` itself."""
    own = Path(folder) / "rows" / f"{name}.jsonl"
    if process()[1] > 1:
        own = own.with_suffix(f".rank{rank}.jsonl")
    lock = own.with_name(f"{name}.lock" if rank == 0 else f"{name}.rank{rank}.lock")
    with locked(lock):
        yield own


def rank_files(path: Path) -> list[Path]:
    """What several processes wrote for the rows file ``path`` (or for that of which it is a part)."""
    return sorted(path.parent.glob(f"{path.name.partition('.')[0]}.rank*.jsonl"))


def rows_of_folder(folder) -> dict[str, dict]:
    """key -> row, of all rows files of a results folder and of every process's part of them."""
    paths = sorted((Path(folder) / "rows").glob("*.jsonl"))
    return {row["key"]: row for path in paths for row in read_rows(path)}


def merge_rows(path: Path) -> None:
    """Put the processes' parts into ``path``, each key once, and remove them.

    A part is removed when its rows are on the disk; killed before, the next merge finds
    their keys there and adds none twice. InputError while a process still writes.
    """
    drop_half_line(path)
    for part in rank_files(path):
        with locked(part.with_suffix(".lock")):
            known = {row["key"] for row in read_rows(path)}
            append_rows(path, {r["key"]: r for r in read_rows(part) if r["key"] not in known}.values())
            part.unlink()


# Rows on the disk


def append_row(path: Path, row: dict) -> None:
    """Add one line and wait until it is on the disk; on a full disk leave the file as it was."""
    append_rows(path, [row])


def append_rows(path: Path, rows) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    left = lines.encode()
    try:
        with path.open("ab", buffering=0) as handle:  # a buffer would write what is left of it when it closes
            size = handle.tell()
            try:
                while left:
                    left = left[handle.write(left) :]
                os.fsync(handle.fileno())
            except OSError:
                os.truncate(path, size)
                raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; the rows before are kept") from error


def drop_half_line(path: Path) -> None:
    """Cut off what a killed run left after the last whole line."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def read_rows(path: Path) -> list[dict]:
    """All whole lines of a rows file; none if there is no file yet."""
    if not Path(path).exists():
        return []
    whole, _, _ = Path(path).read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise InputError(f"{path}, line {number} is not JSON: remove that line and run again") from None
    return rows


def to_frame(rows) -> pd.DataFrame:
    return pd.DataFrame.from_records(list(rows))


@contextmanager
def locked(path: Path):
    """Only one process at a time; the system frees the lock of a killed one."""
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(
            f"another run is writing into {path.parent}: wait until it ends, or choose another folder"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write into {path.parent}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside and rename: a reader sees the old file or the new one. InputError on a full disk."""
    handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as handle:
            handle.write(content)
        os.chmod(handle.name, 0o644)
        os.replace(handle.name, path)
    except OSError as error:
        if handle:
            Path(handle.name).unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; what was there is kept") from error


# Where results and notebooks are, and what made them


def source_tree() -> Path | None:
    """The checkout that this package is imported from; None where it was copied on installing."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").exists() and (root / "notebooks").is_dir() else None


def results_folder(out: str, profile: str) -> Path:
    """``out`` if given, else results/<profile> of the checkout or of the working directory."""
    return Path(out) if out else (source_tree() or Path()) / "results" / profile


def git_state() -> dict:
    """Commit and whether anything but results differs from it; both None outside a checkout."""
    root = source_tree()
    if root is None:
        return {"commit": None, "dirty": None}

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(root), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":(exclude)results")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def write_provenance(folder, name: str, voice, profile: str, parameters: dict, keys=()) -> dict:
    """Add to ``<folder>/provenance.json``, under ``name``, where its results (rows ``keys``) come from.

    An entry stays as it is if the same parameters lead to the same rows: it tells of the run that made them.
    """
    path = Path(folder) / "provenance.json"
    whole = json.loads(path.read_text("utf-8")) if path.exists() else {}
    old, keys = whole.get(name, {}), list(keys)
    if keys and (old.get("keys"), old.get("parameters")) == (keys, parameters):
        return old
    whole[name] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **git_state(),
        "code": code_revision(),
        "weights": voice.weights_id,
        "profile": profile,
        "parameters": parameters,
        **where(voice.device),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "keys": keys,
    }
    write_text(path, json.dumps(whole, indent=1, sort_keys=True) + "\n")
    return whole[name]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Notebook parameters


def fits(value, kind: str) -> bool:
    """Whether ``value`` is of the type named ``kind``: str, int, float, bool or list[...]."""
    if kind.startswith("list"):
        inner = kind[5:-1]
        return isinstance(value, list) and (not inner or all(fits(item, inner) for item in value))
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    return isinstance(value, {"str": str, "int": int, "float": (int, float)}[kind])


def check_parameters(namespace: dict) -> dict:
    """For a notebook's second cell: ``globals()`` in, its parameters out.

    InputError for a value of another type than the parameters cell declares, and for a name
    that papermill injected though that cell has none such (papermill itself only warns).
    """
    kinds = {
        name: kind if isinstance(kind, str) else str(kind) if "[" in str(kind) else kind.__name__
        for name, kind in namespace.get("__annotations__", {}).items()
    }
    for cell in namespace.get("In", []):
        if cell.startswith("# Parameters\n"):
            for statement in ast.parse(cell).body:
                name = statement.targets[0].id
                if name not in kinds:
                    raise InputError(f"unknown parameter {name!r}: choose one of {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not fits(namespace[name], kind):
            raise InputError(f"parameter {name} must be {kind}, got {namespace[name]!r}")
    return {name: namespace[name] for name in kinds}
