"""A folder that is a listening test: index.html and audio/ for listeners, key.json for the analysis.

The sound is made from the tokens of a results folder's rows, by the codec or vocoder of the voice that made them:
nothing is decoded again, so listeners hear what the tables measured.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..experiment import report, tables
from ..experiment.provenance import all_provenance
from ..experiment.samples import SAME, sound, voice_of
from ..experiment.studies import STUDIES
from ..files import write_bytes, write_text
from . import FORMAT, need
from .design import PARTS, Clip, choose, trials
from .power import Plan

LEVEL, PEAK = -23.0, 0.98  # LUFS of every clip, less if one of them would pass the peak
SHORTEST = 0.5  # seconds; loudness is measured over 0.4
RUN = "run `ssd-repro run --profile {} --only 01 02` first"


def build(folder: Path, out: Path, profile: str, count: int = 24, seed: int = 0) -> dict:
    """Make or replace the test in ``out`` from the rows of ``folder`` -> its key.json. Raises InputError."""
    need("pyloudnorm", "statsmodels")
    rows, about = rows_of_table1(folder, profile)
    systems = systems_of(rows, about, profile)
    common, silent = _spoken_by_all(systems)
    voices, plan = [index[1] for index in common], Plan(count, len(systems))
    chosen = choose(voices, count, len(systems))
    names = list(systems)
    design = trials([voices[i] for i in chosen], names, (names[0], names[2]), seed)
    voice = voice_of(about)
    sounds = {}
    for clip in dict.fromkeys(clip for trial in design for clip in trial.clips):
        name, u = clip
        row = systems[name if name in systems else names[0]].loc[common[chosen[u]]]
        sounds[clip] = sound(voice, row) if name in systems else voice.reference(row["voice"])
        sounds[clip] = sounds[clip][::-1] if name == "backwards" else sounds[clip]
    files, level = _levelled(sounds, voice.sample_rate)
    listed = {f"t{number:03}": trial for number, trial in enumerate(design)}
    said = {name: common[chosen[trial.utterance]] for name, trial in listed.items()}
    page, build_id = _page(listed, files, len(systems))
    key = {
        **{"format": FORMAT, "build": build_id, "profile": profile, "weights": voice.weights_id, "seed": seed},
        "sound": f"the rows' own tokens through the codec of voice {voice.weights_id}, {level:.1f} LUFS",
        **{"plan": asdict(plan), "listeners": plan.listeners()},
        "left out, silent or empty under a system": silent,
        "systems": {name: {"rows": [*ours.loc[[common[i] for i in chosen]].key]} for name, ours in systems.items()},
        "trials": {
            name: asdict(trial) | {"allowed": trial.allowed, "text": said[name][0], "voice": said[name][1]}
            for name, trial in listed.items()
        },
    }
    _write(out, page, {name: content for name, content in files.values()}, key)
    return key


def rows_of_table1(folder: Path, profile: str) -> tuple[pd.DataFrame, dict]:
    """The rows of every result notebook that ran beside notebook 01, of its voice -> rows, 01's provenance entry."""
    ran = all_provenance(folder)
    if not {"01_table1", "02_tolerance"} <= ran.keys():
        raise InputError(f"{folder} has no rows of notebooks 01 and 02: " + RUN.format(profile))
    about = ran["01_table1"]
    parts = [report.rows_of_run(folder, name)[0] for name in STUDIES if name in ran and name != "00_listen"]
    rows = pd.concat(parts, ignore_index=True).drop_duplicates("key")
    return rows[(rows.weights == about["weights"]) & rows.temperature.isna()], about


def systems_of(rows: pd.DataFrame, about: dict, profile: str) -> dict[str, pd.DataFrame]:
    """Name -> rows by SAME of autoregressive, draft, SSD at 01's setting, and the fastest lossless drafter."""
    own = about["parameters"]
    found = {name: rows[rows.method == method] for method, name in list(tables.NAMES.items())[:2]}
    papers = tables.of_papers_draft(rows)
    found["SSD"] = papers[(papers.tolerance == own["tolerance"]) & (papers.draft_length == own["draft_length"])]
    lossless = {**tables.ssd_settings(rows), **tables.other_drafters(rows)}
    lossless = {name: ours for name, ours in lossless.items() if (ours.tolerance == 0).all()}
    if not lossless:
        raise InputError("there is no row with tolerance 0: " + RUN.format(profile))
    speed = {name: tables.speed_columns(ours)["speed-up"] for name, ours in lossless.items()}
    best = max(speed, key=speed.get)
    return {
        name: ours.drop_duplicates(SAME).set_index(SAME, drop=False)
        for name, ours in (found | {best: lossless[best]}).items()
    }


def _spoken_by_all(systems: dict[str, pd.DataFrame]) -> tuple[list[tuple], int]:
    """(SAME of the utterances that every system speaks, in the rows' order; how many fall out as too short)."""
    first, *rest = systems.values()
    common = [index for index in first.index if all(index in ours.index for ours in rest)]
    heard = [i for i in common if all(ours.loc[i].audio_seconds >= SHORTEST for ours in systems.values())]
    return heard, len(common) - len(heard)


def _levelled(sounds: dict[Clip, np.ndarray], rate: int) -> tuple[dict[Clip, tuple[str, bytes]], float]:
    """Clip -> (file name, FLAC), all equally loud by ITU-R BS.1770; and how loud, in LUFS."""
    import pyloudnorm
    import soundfile

    meter, gains, files = pyloudnorm.Meter(rate), {}, {}
    for clip, audio in sounds.items():
        loudness = meter.integrated_loudness(audio.astype(float))
        if not np.isfinite(loudness):
            raise InputError(f"the sound of {clip[0]}, utterance {clip[1] + 1}, is silent: it cannot be listened to")
        gains[clip] = 10 ** ((LEVEL - loudness) / 20)
    loudest = max(gains[clip] * np.abs(audio).max() for clip, audio in sounds.items())
    lower = min(1.0, PEAK / loudest)
    for clip, audio in sounds.items():
        with io.BytesIO() as buffer:
            soundfile.write(buffer, audio * gains[clip] * lower, rate, format="FLAC", subtype="PCM_16")
            content = buffer.getvalue()
        files[clip] = f"{hashlib.sha256(content).hexdigest()[:12]}.flac", content  # the name tells no system
    return files, LEVEL + 20 * np.log10(lower)


def _page(listed: dict, files: dict[Clip, tuple[str, bytes]], groups: int) -> tuple[str, str]:
    """(index.html, the build's id: digest of all that a listener is shown)."""
    template, style, script = (
        (resources.files(__package__) / "page" / name).read_text("utf-8")
        for name in ("index.html", "style.css", "test.js")
    )
    shown = [
        [
            {"id": name, "part": trial.part, "clips": [files[clip][0] for clip in trial.clips]}
            for part in PARTS
            for name, trial in listed.items()
            if trial.part == part and group in trial.groups
        ]
        for group in range(groups)
    ]
    build_id = hashlib.sha256(json.dumps([shown, template, script]).encode()).hexdigest()[:12]
    data = json.dumps({"format": FORMAT, "build": build_id, "groups": shown}).replace("<", "\\u003c")
    for mark, text in (("/* style */", style), ("/* script */", script), ("/* data */", data)):
        template = template.replace(mark, text)
    return template, build_id


def _write(out: Path, page: str, clips: dict[str, bytes], key: dict) -> None:
    place = out / "key.json"
    if out.exists() and not place.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is there and is no listening test: give the name of a new folder")
    old = json.loads(place.read_text("utf-8"))["build"] if place.is_file() else key["build"]
    if old != key["build"] and any((out / "ratings").glob("*.json")):
        raise InputError(f"{out} has ratings of another build ({old}): give the name of a new folder")
    for stale in set((out / "audio").glob("*.flac")) - {out / "audio" / name for name in clips}:
        stale.unlink()
    for name, content in clips.items():
        write_bytes(out / "audio" / name, content)
    write_text(out / "index.html", page)
    write_text(place, json.dumps(key, indent=1) + "\n")
