"""A listening test of the fake voice, and ratings that nobody gave: each answer is marked synthetic."""

import json
from dataclasses import replace

import pytest

from ssd_repro.experiment import provenance, run, systems
from ssd_repro.listening import FORMAT, build
from ssd_repro.speech import load, sentences

POINT = {"tolerance": 0.4, "draft_length": 3}


def fill(voice, folder, count=24):
    """Rows of notebooks 01 and 02, unscored, and their provenance."""
    said = sentences.utterances(count, voice.names)
    table1 = [systems.System("autoregressive"), systems.System("draft"), systems.System("speculative", 0.4, 3)]
    for notebook, grid in (("01_table1", table1), ("02_tolerance", systems.grid([0.0, 0.4]))):
        grid = [replace(system, scored=False) for system in grid]
        rows = run.run(voice, grid, said, folder, notebook[3:], repeats=1)
        provenance.write_provenance(folder, notebook, voice, "quick", POINT, rows.key)


def make_test(voice, folder, count=24, rows=24):
    """Rows in folder/results, the test in folder/test -> its key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load", lambda *_, **__: voice)
        patch.setattr(provenance.LoadMeter, "other_load", lambda _: 0.0)
        if not (folder / "results").exists():
            fill(voice, folder / "results", rows)
        return build.build(folder / "results", folder / "test", "quick", count)


def asked(key, listener) -> dict:
    group = (listener - 1) % len(key["systems"])
    return {name: trial for name, trial in key["trials"].items() if group in trial["groups"]}


def session(key, listener, dice, effects=None, told=0.5, spread=(0.0, 0.0, 0.8), failed=0) -> dict:
    """Ratings of a made-up listener who fails so many checks and tells X with probability ``told``.

    effects: system -> points above 3.5. spread: of the effects by listener and by text, and of a rating.
    """
    answers, own = [], {}
    for name, trial in asked(key, listener).items():
        if trial["check"]:
            value = trial["right"][0]
            if failed:
                failed, value = failed - 1, next(v for v in trial["allowed"] if v not in trial["right"])
        elif trial["part"] == "ABX":
            right = trial["right"][0]
            value = right if dice.random() < told else {"A": "B", "B": "A"}[right]
        else:
            system = trial["system"]
            own.setdefault(system, dice.normal(0, spread[0]))
            mean = 3.5 + (effects or {}).get(system, 0.0) + own[system] + dice.normal(0, spread[2])
            value = int(min(5, max(1, round(mean))))
        answers.append({"trial": name, "value": value, "seconds": 5.0, "plays": [1], "synthetic": True})
    about = {"format": FORMAT, "build": key["build"], "listener": listener, "session": f"{listener:032x}"}
    return {**about, "started": "2026-01-01T00:00:00Z", "finished": True, "answers": answers}


def write(folder, sessions) -> list:
    folder.mkdir(parents=True, exist_ok=True)
    for made in sessions:
        (folder / f"{made['listener']}.json").write_text(json.dumps(made))
    return sorted(folder.iterdir())
