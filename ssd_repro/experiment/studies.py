"""What each result notebook compares and decodes: for the notebook, and for the processes that share its utterances."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from ..decoding import rules
from ..processes import process
from ..speech import load
from ..speech.sentences import Utterance
from ..speech.voice import Voice
from . import bench, growth, paper, price, provenance, run
from .cost import Geometry
from .notebooks import progress
from .systems import AUTOREGRESSIVE, System, grid


def _of_table1(p: dict, scored: bool = True) -> list[System]:
    ssd = System("speculative", p["tolerance"], p["draft_length"])
    return [replace(system, scored=scored) for system in (AUTOREGRESSIVE, System("draft"), ssd)]


def _other_drafters(voice: Voice, p: dict) -> list[System]:
    """The voice's other drafters but SLOWER, without loss and at the tolerance, as CHOSEN for this device."""
    found = []
    for name in [each for each in voice.others if each not in SLOWER]:
        for beta, ways in zip((0.0, p["tolerance"]), CHOSEN.get((name, voice.device.type), ([{}], [{}])), strict=True):
            found += [System("speculative", beta, drafter=name, **{"draft_length": paper.LENGTH} | way) for way in ways]
    return found


def _each_drafter(voice: Voice, p: dict) -> list[System]:
    """Every drafter at every length, without loss and, of those that learned, at the tolerance; unscored."""
    found = []
    for name in (None, *voice.others, *voice.untrained):
        betas = (0.0,) if name in voice.untrained else (0.0, p["tolerance"])
        found += [System("speculative", b, n, drafter=name, scored=False) for b in betas for n in p["lengths"]]
    return found


def _one_setting_at_a_time(p: dict) -> list[System]:
    lengths, temperatures = [p["draft_length"], *p["draft_lengths"]], p.get("temperatures", ())
    return grid(p["tolerances"], lengths, temperatures, p["tolerance"], p["draft_length"], scored=False)


def _heard(p: dict) -> list[System]:
    """The target, and SSD by each rule that is to be heard: the paper's by its tolerance, as in other notebooks."""
    betas = {name: rules.named(name, None).beta for name in p["heard"] if name.startswith("paper")}
    ssd = [System("speculative", betas.get(name), p["draft_length"]) for name in p["heard"]]
    ssd = [s if name in betas else replace(s, rule=name) for name, s in zip(p["heard"], ssd, strict=True)]
    return [replace(AUTOREGRESSIVE, scored=bool(ssd)), *ssd]


SLOWER = {"block"}  # than another at either beta on every machine here; notebooks 07 and 18 have it
# (drafter, device) -> how it drafts without loss, and at the tolerance, where that is not the paper's way. On a CPU
# what was fastest on development sentences, of L_d 1 to 4, both verifications, without or with adaptive drafts; and at
# the tolerance the next best, too. On a GPU the fastest by its prices.
CHOSEN = {
    ("hidden", "cpu"): ([{"draft_length": 2, "verification": "block"}], [{"draft_length": 2}, {}]),
    ("hidden", "cuda"): ([{"draft_length": 4, "verification": "block"}], [{"draft_length": 4}]),
}
# notebook -> (name of its rows file, its parameters -> the systems that it compares)
STUDIES = {
    "00_listen": ("listen", lambda p: _of_table1(p, scored=False)),
    "01_table1": ("table1", _of_table1),
    "02_tolerance": ("tolerance", lambda p: [AUTOREGRESSIVE, *grid(p["tolerances"], draft_length=p["draft_length"])]),
    "03_draft_length": ("draft_length", lambda p: grid((), p["draft_lengths"], (), p["tolerance"], scored=False)),
    "04_stages": ("table1", lambda p: [AUTOREGRESSIVE, System("speculative", p["tolerance"], p["draft_length"])]),
    "05_acceptance": ("acceptance", _one_setting_at_a_time),
    "06_theory": ("theory", _one_setting_at_a_time),
    "07_bench": ("bench", lambda p: []),  # its own: Study.compare
    "08_growth": ("acceptance", lambda p: grid((), [p["draft_length"]], (), p["tolerance"], scored=False)),
    "09_price_of_tolerance": ("price", _heard),
    "18_drafters": ("drafters", lambda p: [replace(AUTOREGRESSIVE, scored=False)]),
}
BY_VOICE = {"01_table1": _other_drafters, "18_drafters": _each_drafter}  # systems that depend on the voice, behind them


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

        Of several processes each returns its share, and nothing else.
        """
        p, (rank, world) = self.parameters, process()
        how = {"repeats": 3} | {name: p[name] for name in ("repeats", "whisper", "speaker") if name in p}
        how["progress"] = partial(progress, disable=rank > 0)
        rows = run.run(self.voice, systems, self.utterances, self.folder, STUDIES[self.notebook][0], **how)
        return (rows, {}) if world > 1 else self._recorded(rows)

    def _recorded(self, rows: pd.DataFrame) -> tuple[pd.DataFrame, dict]:
        p = self.parameters
        return rows, provenance.write_provenance(self.folder, self.notebook, self.voice, p["profile"], p, rows.key)

    def compare(self) -> tuple[pd.DataFrame, dict]:
        """``bench.measure``: our decoding beside transformers'; as ``decode``, in this process alone."""
        names = ("tolerance", "draft_length", "repeats", "longest", "compile")
        how = {name: self.parameters[name] for name in names} | {"drafter": self.parameters.get("drafter", "all")}
        return self._recorded(bench.measure(self.voice, self.utterances, self.folder, **how, progress=progress))

    def price(self, systems: list[System]) -> tuple[pd.DataFrame, dict]:
        """The rows of ``decode``, and ``price.prices`` along what the target said, made in this process alone."""
        rows, _ = self.decode(systems)
        spoken, names = rows[rows.method == "autoregressive"], price.rules_of(self.parameters)
        priced = price.prices(self.voice, spoken, names, self.folder, progress=progress)
        return self._recorded(pd.concat([rows, priced], ignore_index=True))

    def grow(self) -> tuple[pd.DataFrame, dict]:
        """The rows of ``decode``, and those of ``growth``, made in this process alone."""
        p, own = self.parameters, Geometry.of(self.voice.target)
        where = growth.points(
            f"{own.layers}x{own.hidden}", p["sizes"], p["thread_counts"], p["draft_lengths"], p["draft_length"]
        )
        spoken = run.run(
            self.voice, self.systems, self.utterances, self.folder, "acceptance", p["repeats"], progress=progress
        )
        how = {"tolerance": p["tolerance"], "progress": progress}
        prices = growth.prices(self.voice, where, self.folder, p["price_tokens"], p["price_repeats"], **how)
        lengths = growth.lengths(self.voice, p["seconds"], self.folder, p["draft_length"], p["seed"], **how)
        together = growth.batches(self.voice, p["batches"], self.folder, p["draft_length"], p["seed"], **how)
        return self._recorded(pd.concat([spoken, prices, lengths, together], ignore_index=True))


def begin(notebook: str, parameters: dict) -> Study:
    """Load the voice that a result notebook's parameters name, and say what it decodes."""
    p = parameters
    names = ("device", "precision", "runtime", "draft", "data", "front_end", "threads")
    voice = load.load(p["weights"] or None, **{name: p[name] for name in names if name in p})
    if "text" in p:
        utterances = [Utterance("listen", p["text"], p["voice"] or voice.names[0], p["seed"])]
    else:
        utterances = voice.utterances(p["utterances" if "utterances" in p else "sentences"], p["seed"])
    folder = provenance.results_folder(p["out"], p["profile"])
    systems = STUDIES[notebook][1](p) + (BY_VOICE[notebook](voice, p) if notebook in BY_VOICE else [])
    return Study(notebook, p, folder, voice, systems, utterances)


def make_rows(parameters: dict[str, dict]) -> None:
    """In each of several processes: its share of the rows of these notebooks (name -> all of its parameters)."""
    for notebook, values in parameters.items():
        if notebook in STUDIES:
            study = begin(notebook, values)
            study.decode(study.systems)
