"""Ratings files in, rows out; each file that does not count is named with its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..errors import InputError
from . import FORMAT

FAILED = 1  # attention checks that a listener may fail
ALIKE = 8  # equal ratings, and nothing else, from which on a listener does not count
COLUMNS = ["listener", "part", "check", "system", "text", "voice", "value", "passed", "synthetic"]


@dataclass
class Heard:
    """rows: one per answer of the listeners that count. left_out: file -> why it does not count."""

    rows: pd.DataFrame
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def listeners(self) -> int:
        return self.rows.listener.nunique()

    @property
    def synthetic(self) -> int:
        """How many rows are marked as made by no listener."""
        return int(self.rows.synthetic.sum())


def read_key(path: Path) -> dict:
    try:
        key = json.loads(path.read_text("utf-8"))
        if key["format"] == FORMAT:
            return key
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path} is not the key.json of a listening test: give the one of the test with --key")


def read(paths: Sequence[Path], key: dict) -> Heard:
    """All ratings files, those of a folder in the order of their names. InputError if there is none at all."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise InputError(f"{paths[0]} holds no ratings: give files that the test saved (*.json)")
    heard, seen, rows = Heard(pd.DataFrame()), {}, []
    for file in files:
        try:
            session = _checked(file, key)
            if (listener := session["listener"]) in seen:
                raise InputError(f"listener {listener} has already rated in {seen[listener]}")
            own = _rows(session, key)
            _screen(own)
        except InputError as error:
            heard.left_out[str(file)] = str(error)
            continue
        seen[listener] = file
        rows += own
    heard.rows = pd.DataFrame(rows, columns=COLUMNS)
    return heard


def _checked(file: Path, key: dict) -> dict:
    try:
        session = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise InputError("it is not JSON") from None
    if not isinstance(session, dict) or session.get("format") != FORMAT:
        raise InputError("it is no ratings file of this listening test")
    if session.get("build") != key["build"]:
        raise InputError(f"it is of build {session.get('build')!r}, not of {key['build']}")
    listener, answers = session.get("listener"), session.get("answers")
    if type(listener) is not int or listener < 1:
        raise InputError(f"its listener is {listener!r}, not a whole number from 1 on")
    if not isinstance(answers, list) or not all(isinstance(a, dict) and {"trial", "value"} <= set(a) for a in answers):
        raise InputError("its answers are not a list of objects with trial and value")
    return session


def _rows(session: dict, key: dict) -> list[dict]:
    group = (session["listener"] - 1) % len(key["systems"])
    own = {name: trial for name, trial in key["trials"].items() if group in trial["groups"]}
    answers = {str(answer["trial"]): answer for answer in session["answers"]}
    if foreign := answers.keys() - own.keys():
        raise InputError(f"it answers trial {min(foreign)!r}, which listener {session['listener']} was not asked")
    if len(answers) < len(session["answers"]):
        raise InputError("it answers a trial more than once")
    if missing := own.keys() - answers.keys():
        raise InputError(f"{len(missing)} of its {len(own)} trials have no answer")
    rows = []
    for name, trial in own.items():
        value, allowed = answers[name]["value"], trial["allowed"]
        if type(value) is not type(allowed[0]) or value not in allowed:
            raise InputError(f"its answer to trial {name} is {value!r}, not one of {', '.join(map(str, allowed))}")
        about = {k: trial[k] for k in ("part", "check", "system", "text", "voice")}
        passed = value in trial["right"] if trial["right"] else None
        made = {"passed": passed, "synthetic": bool(answers[name].get("synthetic", False))}
        rows.append({"listener": session["listener"], **about, "value": value, **made})
    return rows


def _screen(rows: list[dict]) -> None:
    """InputError if the listener failed more than FAILED attention checks, or gave every sample the same rating."""
    checks = [row["passed"] for row in rows if row["check"]]
    if (failed := checks.count(False)) > FAILED:
        raise InputError(f"its listener failed {failed} of {len(checks)} attention checks, {FAILED} is allowed")
    for part in ("NAT", "SIM"):
        given = [row["value"] for row in rows if row["part"] == part and not row["check"]]
        if len(given) >= ALIKE and len(set(given)) == 1:
            raise InputError(f"its listener rated every sample of the part {part} {given[0]}")
