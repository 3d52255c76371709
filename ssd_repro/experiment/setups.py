"""Setups: voice, machine and metric models by one name, a section of notebooks/setups.yaml."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path

from ..errors import InputError

FIRST = "bundled"  # the section that has every setting


@cache
def sections(path: Path) -> dict[str, dict]:
    """name -> its settings (str, or None: for the user to give), in full."""
    import yaml

    read = yaml.safe_load(path.read_text("utf-8"))
    return {name: read[FIRST] | given for name, given in read.items()}


def settings_of(setup: str, path: Path) -> dict:
    """ "bundled precision=int8", a section and what differs from it -> all settings. InputError for what is none."""
    try:
        name, *changes = shlex.split(setup)
    except ValueError:  # nothing, or a quote that is left open
        raise InputError(f"setup {setup!r} must be a name, then NAME=VALUE for each setting that differs") from None
    known = sections(path)
    if name not in known:
        raise InputError(f"unknown setup {name!r}: choose one of {', '.join(known)}")
    settings = dict(known[name])
    for change in changes:
        setting, equals, value = change.partition("=")
        if setting not in settings or not equals:
            names = ", ".join(settings)
            raise InputError(f"setup {setup!r}: {change!r} must be SETTING=VALUE with one of the settings {names}")
        settings[setting] = value
    return settings
