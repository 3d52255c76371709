"""What each result notebook compares and decodes: for the notebook, and for the processes that share its utterances."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from ..processes import process
from ..speech import load
from ..speech.sentences import Utterance
from ..speech.voice import Voice
from . import provenance, run
from .systems import AUTOREGRESSIVE, System, grid


def table1(tolerance: float, draft_length: int, **_) -> list[System]:
    return [AUTOREGRESSIVE, System("draft"), System("speculative", tolerance, draft_length)]


def listen(**parameters) -> list[System]:
    return [replace(system, scored=False) for system in table1(**parameters)]


def stages(tolerance: float, draft_length: int, **_) -> list[System]:
    return [AUTOREGRESSIVE, System("speculative", tolerance, draft_length)]


def tolerance_grid(tolerances: list[float], draft_length: int, **_) -> list[System]:
    return [AUTOREGRESSIVE, *grid(tolerances, draft_length=draft_length)]


def draft_length_grid(draft_lengths: list[int], tolerance: float, **_) -> list[System]:
    return grid(draft_lengths=draft_lengths, tolerance=tolerance, scored=False)


def one_setting_at_a_time(tolerances, draft_lengths, tolerance, draft_length, temperatures=(), **_) -> list[System]:
    lengths = [draft_length, *draft_lengths]
    return grid(tolerances, lengths, temperatures, tolerance, draft_length, scored=False)


# notebook -> (name of its rows file, its parameters -> the systems that it compares)
STUDIES = {
    "00_listen": ("listen", listen),
    "01_table1": ("table1", table1),
    "02_tolerance": ("tolerance", tolerance_grid),
    "03_draft_length": ("draft_length", draft_length_grid),
    "04_stages": ("table1", stages),
    "05_acceptance": ("acceptance", one_setting_at_a_time),
    "06_theory": ("theory", one_setting_at_a_time),
}


@dataclass(frozen=True)
class Study:
    """A result notebook with its parameters checked and its voice loaded, ready to decode."""

    notebook: str
    parameters: dict
    folder: Path
    voice: Voice
    systems: list[System]
    utterances: list[Utterance]

    def decode(self, systems: list[System]) -> tuple[pd.DataFrame, dict]:
        """Decode what no rows file holds yet -> rows, and where they come from: for ``report.show``.

        systems: those of the study, or any others. Of several processes each returns its share, and nothing else.
        """
        p, (rank, world) = self.parameters, process()
        rows = run.run(
            self.voice,
            systems,
            self.utterances,
            self.folder,
            STUDIES[self.notebook][0],
            repeats=p.get("repeats", 3),
            whisper=p.get("whisper", ""),
            speaker=p.get("speaker", ""),
            progress=lambda turns: tqdm(turns, disable=rank > 0),
        )
        if world > 1:
            return rows, {}
        about = provenance.write_provenance(self.folder, self.notebook, self.voice, p["profile"], p, rows.key)
        return rows, about


def begin(notebook: str, parameters: dict) -> Study:
    """Load the voice that a result notebook's parameters name, and say what it decodes. Raises InputError."""
    p = parameters
    names = ("device", "precision", "runtime", "draft", "data", "front_end")
    voice = load.load(p["weights"] or None, **{name: p[name] for name in names})
    if "text" in p:
        utterances = [Utterance("listen", p["text"], p["voice"] or voice.names[0], p["seed"])]
    else:
        utterances = voice.utterances(p["sentences"], p["seed"])
    folder = provenance.results_folder(p["out"], p["profile"])
    return Study(notebook, p, folder, voice, STUDIES[notebook][1](**p), utterances)


def make_rows(parameters: dict[str, dict]) -> None:
    """In each of several processes: its share of the rows of these notebooks (name -> all of its parameters)."""
    for notebook, values in parameters.items():
        if notebook in STUDIES:
            study = begin(notebook, values)
            study.decode(study.systems)
