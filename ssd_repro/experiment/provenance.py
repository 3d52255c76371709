"""Where results come from: protocol, machine and its load, versions, commit, parameters."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

from ..files import git_state, source_tree, write_text
from ..processes import process

# Part of every row's key. Raise it by hand when what is decoded or measured changes; the golden tests
# (tests/speech/golden_tokens.json, tests/experiment/golden_metrics.json) fail if that changes without it.
PROTOCOL = 2
PACKAGES = (
    *("torch", "transformers", "torchmetrics", "faster-whisper", "ctranslate2", "onnxruntime"),
    *("speechmos", "Resemblyzer", "pyworld", "numpy", "ssd-repro"),
)


def row_context(device) -> dict:
    """The part of a row's settings that all rows of this machine share: protocol, device, chip, threads, torch."""
    import torch

    kind = str(device).partition(":")[0]  # which of several GPUs it was does not count
    chip = torch.cuda.get_device_name(device) if kind == "cuda" else _processor()
    threads = torch.get_num_threads()
    return {"protocol": PROTOCOL, "device": kind, "chip": chip, "threads": threads, "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(about: dict) -> str:
    """The chip of an entry of provenance.json; of a CPU the instructions, too: hosts give unlike ones one name."""
    known = about["device"] == "cpu" and about.get("instructions")
    return f"{about['chip']} with {known}" if known else about["chip"]


class LoadMeter:
    """How many cores processes outside of this run use: those but this one and, in a group, its parent's children."""

    def __init__(self) -> None:
        this = psutil.Process()
        self.own = this.parent().children() if process()[1] > 1 else [this]
        self.restart()

    def restart(self) -> None:
        self.began, self.before = time.perf_counter(), self._seconds_of_others()

    def other_load(self) -> float:
        """Their mean number since ``restart``."""
        used = self._seconds_of_others() - self.before
        return round(max(0.0, used) / (time.perf_counter() - self.began), 2)

    def _seconds_of_others(self) -> float:
        whole, own = psutil.cpu_times(), [process.cpu_times() for process in self.own if process.is_running()]
        busy = sum(getattr(whole, kind, 0.0) for kind in ("user", "nice", "system", "steal"))
        return busy - sum(times.user + times.system for times in own)


def code_sha256(package: Path = Path(__file__).parents[1]) -> str:
    """First 12 digits of the SHA-256 of all sources of the package. It is recorded; no row depends on it."""
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def results_folder(out: str, profile: str) -> Path:
    """``out`` if given, else results/<profile> of the checkout or of the working directory."""
    return Path(out) if out else (source_tree() or Path()) / "results" / profile


def relative(path: Path, *roots: Path | None) -> str:
    """Seen from the first of ``roots`` that it lies below, if any: results name no machine's folders."""
    path = Path(path)
    below = [root for root in roots if root and path.resolve().is_relative_to(root)]
    return (path.resolve().relative_to(below[0]) if below else path).as_posix()


def all_provenance(folder: Path) -> dict[str, dict]:
    """Notebook -> its entry of ``<folder>/provenance.json``."""
    path = Path(folder) / "provenance.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def write_provenance(folder, name: str, voice, profile: str, parameters: dict, keys=()) -> dict:
    """Add to ``<folder>/provenance.json``, under ``name``, where its results (rows ``keys``) come from -> that entry.

    An entry stays as it is if the same parameters lead to the same rows: it tells of the run that made them.
    """
    import torch

    whole = all_provenance(folder)
    old, keys = whole.get(name, {}), list(keys)
    if keys and (old.get("keys"), old.get("parameters")) == (keys, parameters):
        return old
    versions = {package.name: package.version for package in metadata.distributions()}
    whole[name] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{**git_state(), "code": code_sha256(), "weights": voice.weights_id},
        **{"profile": profile, "parameters": parameters, "keys": keys, "precision": voice.precision},
        **{**row_context(voice.device), "cores": os.cpu_count()},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()},
        "versions": {package: versions.get(package) for package in PACKAGES},
    }
    write_text(Path(folder) / "provenance.json", json.dumps(whole, indent=1, sort_keys=True) + "\n")
    return whole[name]
