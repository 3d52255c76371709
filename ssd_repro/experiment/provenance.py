"""Where results come from: machine, versions, commit, parameters."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from ..files import git_state, source_tree, write_text

# Modules that no row depends on; a change in any other makes a new code revision.
NOT_IN_ROWS = {"__main__", "cli", "compare", "curves", "figures", "report", "tables", "theory", "interactive",
               "training", "recipe", "corpus", "draft_data", "draft_training", "cosyvoice"}  # fmt: skip
PACKAGES = ("torch", "transformers", "torchmetrics", "faster-whisper", "ctranslate2", "onnxruntime",
            "speechmos", "Resemblyzer", "pyworld", "numpy", "ssd-repro")  # fmt: skip


@lru_cache(maxsize=1)
def code_revision() -> str:
    """Short SHA-256 of the package's sources that a row depends on."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
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


def results_folder(out: str, profile: str) -> Path:
    """``out`` if given, else results/<profile> of the checkout or of the working directory."""
    return Path(out) if out else (source_tree() or Path()) / "results" / profile


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
