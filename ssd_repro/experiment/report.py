"""What the result notebooks show, each once: made from rows alone, by a notebook or by ``ssd-repro report``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from ..errors import InputError
from ..files import write_text
from . import figures, statistics, tables


@dataclass(frozen=True)
class Exhibit:
    """A table with its figure: ``table(rows)``, or ``table(rows, tolerance, draft_length)`` where ``at`` is set.

    draw(table, axes) fills the axes of a figure of ``shape`` (rows, columns) and ``size`` inches.
    """

    notebook: str
    table: Callable[..., pd.DataFrame]
    note: str
    readable: Callable[[pd.DataFrame], pd.DataFrame] = tables.readable
    draw: Callable | None = None
    shape: tuple[int, int] = (1, 1)
    size: tuple[float, float] = (10, 3.4)
    at: bool = False


def _as_is(table: pd.DataFrame) -> pd.DataFrame:
    return table


def _timeline(table: pd.DataFrame, ax):
    return figures.timeline(table.reset_index(), ax, table.attrs["title"])


def timeline(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's Figure 2 of the one SSD row: every token, its place and what became of it."""
    row = tables.of_method(rows, "speculative").iloc[0]
    events = figures.timeline_events(row).set_index("seconds")
    events.attrs["title"] = (
        f"SSD, beta {row.tolerance:g}, L_d {row.draft_length:g}: acceptance rate {row.acceptance_rate:.2f}, "
        f"{row.tokens_per_target_call:.2f} tokens a target call"
    )
    return events


def _counted(events: pd.DataFrame) -> pd.DataFrame:
    counts = events.kind.value_counts()
    return pd.DataFrame({"tokens": counts.reindex([kind for kind in figures.KINDS if kind in counts])})


INTERVALS = "[low, high]: 95 % bootstrap intervals over utterances."
SPEED = (
    "Speed-up: corpus LM-RTF of the autoregressive target, decoded in turn with the system, over the system's; speed-up "
    "a token: median over utterances of the ratio of LM seconds a token; RTF speed-up: the same of the whole synthesis. "
    "The paper's LM-RTF is an A100's: compare ratios."
)
TABLE_NOTE = f"{INTERVALS} NMOS is DNSMOS P808_MOS. {SPEED}"
QUALITY_NOTE = (
    f"Paired differences (same text, voice, seed) with 95 % bootstrap intervals. 'Shown equivalent': two one-sided tests "
    f"at 5 % against the margins {statistics.MARGINS}; 'shown different': the interval leaves 0 out; 'no difference shown' is "
    "neither, and does not mean equal. Length ratio: seconds of audio over the autoregressive target's."
)
STAGES_NOTE = (
    "Seconds of each stage for one second of audio; verify: the target's steps; rest: the loop. LM share: prefill to "
    "rest. The bundled voice's codec is a WORLD vocoder; CosyVoice has a flow model and a neural vocoder."
)
ACCEPTANCE_NOTE = (
    f"{INTERVALS} Accepted / judged: of the drafted tokens up to a round's first rejection; accepted / drafted: of all. A "
    "rejected draft counts where it would have stood, and for what the token in its place carries: silence is 35 dB "
    "below the loud tokens of its utterance, boundary is a token on either side of a change."
)
THEORY_NOTE = (
    "Speed-up a token, over all utterances together. Formula: (1 - alpha^(L_d+1)) / ((1 - alpha)(c L_d + 1)), Leviathan et al. 2023, alpha = accepted / "
    "judged, c = draft step / target step; positions: with the acceptance rate of each position of the draft; costs: also "
    "with the measured cost of the verification. The residue: prefill % and loop % of SSD's LM time, which no prediction "
    "counts; left %: first tokens, rounds that the end cuts short, and the prefill of the baseline."
)
WHY = {
    "00_listen": "Why they differ: one sentence of another voice on another machine; the next "
    "notebooks have the numbers.",
    "01_table1": "Why they differ: another target and draft, trained on far less speech; a CPU, where a forward costs what "
    "it computes, while on the paper's A100 a small forward costs mostly its launch; Whisper base, not large-v3; GE2E, not "
    "ERes2Net.",
    "02_tolerance": "Why they differ: the gain of beta depends on how often this draft is rejected without it and on the "
    "price of a draft step and of a verification, and both are this voice's and this machine's, not CosyVoice's on an A100.",
    "03_draft_length": "Why they differ: the best L_d is where one more drafted token stops earning its price; acceptance "
    "and prices are this voice's and this machine's.",
    "04_stages": "Why they differ: the paper's synthesis has a flow model and a neural vocoder behind the language model, "
    "the bundled voice a WORLD vocoder, which is cheap: the language model's share is larger, and its speed-up shows more.",
    "05_acceptance": "The paper gives no acceptance rate; where ours is higher or lower than its speed-up suggests, the prices "
    "of a draft step and of a verification differ (notebook 06).",
    "06_theory": "Why they differ: the same formula with other acceptance rates and other prices; each is in the table above.",
}


WHY_OTHERS = "Why they differ: another machine and other precision; other utterances; a draft of other training; the rows name them."


def _versus(notebook: str, table: Callable, at: bool = False) -> Exhibit:
    return Exhibit(notebook, table, WHY[notebook], _as_is, at=at)


EXHIBITS = {
    "timeline": Exhibit("00_listen", timeline, "Every token of the SSD sentence; figure: the paper's Figure 2.", _counted,
                        _timeline, size=(10, 3)),
    "phases": Exhibit("00_listen", tables.stages, STAGES_NOTE, draw=figures.stages, size=(10, 2.6)),
    "listen_paper": _versus("00_listen", tables.versus_listen),
    "table1": Exhibit("01_table1", tables.table1, TABLE_NOTE, draw=figures.table1, shape=(1, 2)),
    "table1_quality": Exhibit("01_table1", tables.quality, QUALITY_NOTE, tables.readable_quality),
    "table1_paper": _versus("01_table1", tables.versus_table1),
    "table3": Exhibit("02_tolerance", tables.table3, TABLE_NOTE, draw=figures.table3, shape=(1, 2)),
    "table3_quality": Exhibit("02_tolerance", tables.quality, QUALITY_NOTE, tables.readable_quality),
    "table3_paper": _versus("02_tolerance", tables.versus_table3),
    "figure3": Exhibit("03_draft_length", tables.figure3, f"{INTERVALS} {SPEED}", draw=figures.figure3, shape=(1, 2)),
    "figure3_paper": _versus("03_draft_length", tables.versus_figure3),
    "figure1b": Exhibit("04_stages", tables.stages, STAGES_NOTE, draw=figures.stages, size=(10, 2.6)),
    "figure1b_paper": _versus("04_stages", tables.versus_stages),
    "acceptance": Exhibit("05_acceptance", tables.acceptance, ACCEPTANCE_NOTE, tables.readable_acceptance,
                          figures.acceptance, (2, 4), (12, 5.6), at=True),
    "acceptance_paper": _versus("05_acceptance", tables.versus_acceptance, at=True),
    "theory": Exhibit("06_theory", tables.measured_and_predicted, THEORY_NOTE, draw=figures.theory, size=(8, 5)),
    "theory_paper": _versus("06_theory", tables.versus_theory),
}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """An exhibit as text; in Jupyter a table. Its figure, if any, is pyplot's newest."""

    text: str

    def _repr_markdown_(self) -> str:
        return self.text


def show(name: str, rows: pd.DataFrame, folder: Path, about: dict) -> Shown:
    """Make one exhibit: tables/<name>.csv and .md, figures/<name>.png and .svg. about: the entry of provenance.json."""
    exhibit = EXHIBITS[name]
    at = {k: about["parameters"][k] for k in ("tolerance", "draft_length")} if exhibit.at else {}
    table = exhibit.table(rows, **at)
    bundled = (rows.front_end == "bundled").all()
    said = exhibit.note if bundled or exhibit.note not in WHY.values() else WHY_OTHERS
    note = f"{said} {tables.source_line(folder, about, rows)}"
    text = tables.markdown(exhibit.readable(table)) + f"\n{note}\n"
    tables.save(table, folder, name, text)
    if exhibit.draw:
        figure, axes = plt.subplots(*exhibit.shape, figsize=exhibit.size, layout="constrained")
        exhibit.draw(table, axes)
        figures.save(figure, folder, name)
    return Shown(text)


def report(folder: Path, readme: Path | None = None) -> list[str]:
    """Every exhibit of a results folder anew from its rows, and README's blocks of the same names, and its numbers (``CELL``) -> what was made.

    No model is loaded. Exhibits of notebooks that have not run, and README's blocks for them, stay as they are.
    """
    plt.switch_backend("agg")
    folder, known = Path(folder), tables.provenance(folder)
    text, made, old = readme.read_text("utf-8") if readme else "", [], None
    for name, exhibit in EXHIBITS.items():
        if exhibit.notebook not in known:
            continue
        if exhibit.notebook != old:
            (rows, about), old = tables.rows_of_run(folder, exhibit.notebook), exhibit.notebook
        shown = show(name, rows, folder, about)
        plt.close("all")
        made.append(name)
        if f"<!-- {name} -->" in text:
            text = tables.put_between(text, name, shown.text)
    if not made:
        raise InputError(f"{folder}/provenance.json tells of no result notebook: run `ssd-repro run` first")
    if readme:
        write_text(readme, CELL.sub(lambda found: _cell(found, readme.parent), text))
    return made


# A number within README's sentences: <!-- = FILE.csv; column=value; ...; column; format -->number<!-- /= -->
CELL = re.compile(r"<!-- = (.+?) -->.*?<!-- /= -->", re.DOTALL)


def _cell(found: re.Match, root: Path) -> str:
    """The number anew from its file below ``root``; as it is if there is no such file. InputError if no one row fits."""
    name, *conditions, column, form = found[1].split("; ")
    if not (root / name).is_file():
        return found[0]
    table = pd.read_csv(root / name, dtype=str, keep_default_na=False)
    try:
        for where, _, value in (condition.partition("=") for condition in conditions):
            table = table[table[where] == value]
        (number,) = table[column]
        return f"<!-- = {found[1]} -->{float(number):{form}}<!-- /= -->"
    except (KeyError, ValueError):
        raise InputError(f"README's marker {found[1]!r} does not name one number of {root / name}") from None
