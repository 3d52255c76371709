"""Where results come from: protocol, machine, versions, commit, parameters."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from ..files import git_state, source_tree, write_text
from .machine import machine_kind

# Part of every row's key. Raise it by hand when what is decoded or measured changes; the golden tests
# (tests/decoding, tests/experiment/golden_metrics.json) fail if that changes without it.
PROTOCOL = 1
PACKAGES = (
    *("torch", "transformers", "torchmetrics", "faster-whisper", "ctranslate2", "onnxruntime"),
    *("speechmos", "Resemblyzer", "pyworld", "numpy", "ssd-repro"),
)


def row_context(device) -> dict:
    """The part of a row's settings that all rows of this machine share: protocol, device, chip, threads, torch."""
    return {"protocol": PROTOCOL, **machine_kind(device)}


def code_sha256(package: Path = Path(__file__).parents[1]) -> str:
    """First 12 digits of the SHA-256 of all sources of the package. It is recorded; no row depends on it."""
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def results_folder(out: str, profile: str) -> Path:
    """``out`` if given, else results/<profile> of the checkout or of the working directory."""
    return Path(out) if out else (source_tree() or Path()) / "results" / profile


def write_provenance(folder, name: str, voice, profile: str, parameters: dict, keys=()) -> dict:
    """Add to ``<folder>/provenance.json``, under ``name``, where its results (rows ``keys``) come from -> that entry.

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
        "code": code_sha256(),
        "weights": voice.weights_id,
        "profile": profile,
        "parameters": parameters,
        **row_context(voice.device),
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
