"""A grid of settings x utterances -> one row per decoded utterance, resumable, with provenance.

Rows are appended to ``<folder>/rows/<name>.jsonl``, each on the disk before the next begins.
A row's key is over its settings, the weights, the code and the machine: rows of another
model, code or machine stay in the file, but are never used for this one.

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
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import pandas as pd

from . import metrics
from .errors import InputError

# Modules that no row depends on; a change in any other makes a new code revision.
NOT_IN_ROWS = {"__main__", "cli", "figures", "tables", "training", "recipe", "corpus", "draft_data",
               "draft_training", "cosyvoice"}  # fmt: skip
PACKAGES = ("torch", "transformers", "torchmetrics", "faster-whisper", "ctranslate2", "onnxruntime",
            "speechmos", "Resemblyzer", "pyworld", "numpy", "ssd-repro")  # fmt: skip
WARM_UP = "This short sentence warms the machine up."


@dataclass(frozen=True)
class System:
    """One line of a table: how to decode. The two numbers are for the speculative method alone."""

    method: str
    tolerance: float | None = None
    draft_length: int | None = None

    def arguments(self) -> dict:
        """What ``voice.speak`` gets: its own defaults where nothing is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


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
    """The first ``count`` held-out sentences, dealt to the voices in turn; one seed for each."""
    known = evaluation_sentences(part)
    if not 1 <= count <= len(known):
        raise InputError(f"sentences must be a whole number from 1 to {len(known)}, got {count}")
    return [
        Utterance(text_id, text, voices[i % len(voices)], seed + i)
        for i, (text_id, text) in enumerate(known[:count])
    ]


def run(voice, systems, utterances, folder, name, repeats=2, whisper="", speaker="",
        progress=lambda it: it):  # fmt: skip
    """Decode and measure what is not yet in the rows file -> DataFrame, one row per utterance.

    Fair timing: one warm-up of every system; then, sentence by sentence, the systems take
    turns (who begins rotates), ``repeats`` times with the same seed, and the median counts.
    Metrics are computed after the timed part of a sentence.
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise InputError(f"repeats must be a whole number of at least 1, got {repeats!r}")
    for said in utterances:  # before any work
        for system in systems:
            voice.check(said.text, voice=said.voice, seed=said.seed, **system.arguments())
    context = {**where(voice.device), "precision": voice.precision, "compile": voice.compile,
               "front_end": voice.front_end, "weights": voice.weights_id, "code": code_revision(),
               "repeats": repeats, **metrics.models(whisper, speaker)}  # fmt: skip
    rank, world = process()
    utterances = utterances[rank::world]
    grid = [[(system, row_settings(system, said, context)) for system in systems] for said in utterances]
    keys = [key(settings) for cells in grid for _, settings in cells]

    with locked_rows(folder, name, rank) as path:
        if world == 1:
            merge_rows(path)
        drop_half_line(path)
        done = {row["key"] for row in known_rows(path)}
        if set(keys) - done:
            if voice.audible:
                metrics.load(whisper, speaker)  # a model that cannot be had is known before any work
            for system in systems:
                voice.speak(WARM_UP, voice=utterances[0].voice, seed=0, **system.arguments())
        for i, cells in enumerate(progress(grid)):
            turn = [cells[(i + j) % len(cells)] for j in range(len(cells))]
            missing = [(system, s) for system, s in turn if key(s) not in done]
            for row in decode_and_measure(voice, missing, utterances[i], repeats, whisper, speaker):
                append_row(path, row)
        rows = {row["key"]: row for row in known_rows(path)}
    return to_frame(rows[k] for k in keys)


def decode_and_measure(voice, cells, said: Utterance, repeats: int, whisper: str, speaker: str):
    """Timed decodes of one utterance, the systems in turn; then its rows, one by one."""
    takes: list[list] = [[] for _ in cells]
    for _ in range(repeats):
        for (system, _), mine in zip(cells, takes, strict=True):
            mine.append(voice.speak(said.text, voice=said.voice, seed=said.seed, **system.arguments()))
    for (_, settings), mine in zip(cells, takes, strict=True):
        take = mine[0]
        if voice.audible:
            reference = voice.reference(said.voice)
            scores = metrics.measure(take.audio, take.sample_rate, said.text, reference, whisper, speaker)
        else:
            scores = metrics.UNHEARD
        yield {"key": key(settings), **settings, **measured(mine), **scores}


def measured(takes: list) -> dict:
    """One row's numbers from repeated takes: medians of seconds, all else from the first."""
    take = takes[0]
    rounds = [r for sentence in take.sentences for r in sentence.rounds]
    return {
        "tokens": len(take.token_ids),
        "tokens_sha256": hashlib.sha256(np.asarray(take.token_ids, "<i4").tobytes()).hexdigest(),
        "repeatable": all(other.token_ids == take.token_ids for other in takes),
        "stopped": take.stopped,
        "audio_seconds": take.audio_seconds,
        "lm_seconds": statistics.median(t.lm_seconds for t in takes),
        "lm_seconds_each": [t.lm_seconds for t in takes],
        "synthesis_seconds": statistics.median(t.rtf * t.audio_seconds for t in takes),
        "seconds": {k: statistics.median(t.seconds[k] for t in takes) for k in take.seconds},
        "target_calls": take.target_calls,
        "draft_calls": take.draft_calls,
        "drafted": sum(r.drafted for r in rounds),
        "accepted": sum(r.accepted for r in rounds),
        "rounds": [[r.drafted, r.accepted] for r in rounds],
        "acceptance_rate": take.acceptance_rate,
        "tokens_per_target_call": take.tokens_per_target_call,
    }


# Keys: settings, weights, code, machine


def row_settings(system: System, said: Utterance, context: dict) -> dict:
    return {**asdict(system), **asdict(said), **context}


def key(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


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
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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


def known_rows(path: Path) -> list[dict]:
    """The rows of a rows file and of every process's part of it."""
    whole = path.with_name(path.name.partition(".")[0] + ".jsonl")
    return [row for part in (whole, *rank_files(path)) for row in read_rows(part)]


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
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with path.open("ab") as handle:
            size = handle.tell()
            try:
                handle.write(lines.encode())
                handle.flush()
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
    """Write beside and rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as handle:
        handle.write(text)
    os.chmod(handle.name, 0o644)
    os.replace(handle.name, path)


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
    """Add to ``<folder>/provenance.json``, under ``name``, where its results (rows ``keys``) come from."""
    path = Path(folder) / "provenance.json"
    whole = json.loads(path.read_text("utf-8")) if path.exists() else {}
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
        "keys": list(keys),
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
        name: kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
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
