"""What the result notebooks show, each once: made from rows alone, by a notebook or by ``ssd-repro report``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown
from seaborn import despine

from ..errors import InputError
from ..files import source_tree, write_text
from . import (
    acceptance,
    architectures,
    cost,
    curves,
    drafters,
    equivalence,
    figures,
    front,
    notebooks,
    price,
    speed,
    tables,
    tradeoff,
)
from .captions import (
    ACCEPTANCE,
    ARCHITECTURES,
    BATCHES,
    BENCH,
    DRAFTERS,
    EQUAL,
    HEARD,
    INTERVALS,
    LENGTHS,
    MEMORY,
    PRICE,
    PRICES,
    QUALITY,
    RATIOS,
    SPEED,
    STAGES,
    TABLE,
    THEORY,
    TIMELINE,
    TRADEOFF,
    WHY,
    caveats,
    findings,
    machine_listeners,
    predicted,
)
from .provenance import all_provenance, machine, relative
from .rows import rows_of_folder, to_frame
from .style import WIDTH

LISTENED = "listening.csv"  # of a results folder: what ``listening-test analyse`` found


@dataclass(frozen=True)
class Exhibit:
    """A table with its figure: ``table(rows)``, or ``table(rows, tolerance, draft_length)`` where ``at_setting``,
    ``table(rows, rated)`` where ``with_ratings``.

    note: what stands below the table, or what computes it from the rows. draw(table, axes) fills the axes of a figure
    of ``shape`` (rows, columns) and ``size`` inches. page: the columns that a page has room for, if not all; the CSV
    has all. of_folder: made of the scored rows of all of the folder's notebooks in ``SCORED``. study: made of rows of
    that study, of which a run may have none.
    """

    notebook: str
    table: Callable[..., pd.DataFrame]
    note: str | Callable[[pd.DataFrame], str]
    draw: Callable | None = None
    shape: tuple[int, int] = (1, 1)
    size: tuple[float, float] = (WIDTH, 3.4)
    readable: Callable[[pd.DataFrame], pd.DataFrame] = tables.readable
    at_setting: bool = False
    with_ratings: bool = False
    page: tuple[str, ...] = ()
    of_folder: bool = False
    study: str = ""


def _and_paper(notebook: str, table: Callable, at_setting: bool = False, **settings) -> Exhibit:
    return Exhibit(notebook, partial(table, **settings), findings, readable=lambda text: text, at_setting=at_setting)


SCORED = "01_table1", "02_tolerance", "03_draft_length"
_RATINGS = ("SIM-MOS", "NAT-MOS", "listeners", "NMOS (machine)", "DistillMOS (machine)", "SS (machine)")
_SPEED = ("speed-up", "speed-up per token", "acceptance", "tokens per target call", "n")
_SHARES = ("RTF", *(f"{part} share %" for part in ("draft", "target", "codec", "LM")), "RTF speed-up")
_PREDICTED = ("L_d", "draft / target step", "verification / target step", "measured", "formula", "costs")
_ACCEPTED = ["accepted / drafted tokens", "tokens per target call", tables.SPEEDUP]
PRICED = "09_price_of_tolerance"
_RULES = ("drafter", "parameter", "acceptance", "TV", "excess", "target cannot say")
_PRICES = {"shape": (1, 2), "size": (WIDTH, 4.4), "readable": speed.readable_prices}
_LENGTHS = tuple(f"{system}, {unit}" for unit in ("ms / token", "MB") for system in ("autoregressive", "SSD"))
_WER = {"WER %": "WER, points"}
_QUALITY = {**_WER, "NMOS": "P808 (NMOS)", "SS": "SS"}
EXHIBITS = {
    "timeline": Exhibit(
        "00_listen", figures.events_of, TIMELINE, figures.timeline_and_sound, (2, 1), (WIDTH, 3.8), figures.counted
    ),
    "phases": Exhibit("00_listen", tables.stages, STAGES, figures.stages, page=_SHARES),
    "listen_paper": _and_paper("00_listen", tables.ssd_and_paper, names=[tables.SPEEDUP, _ACCEPTED[0]]),
    "tradeoff": Exhibit(
        "01_table1",
        tradeoff.of_rows,
        TRADEOFF,
        tradeoff.draw,
        readable=tradeoff.readable,
        size=(WIDTH, 5.4),
        page=("WER %", "WER rise", "speed-up", "n"),
        of_folder=True,
    ),
    "table1": Exhibit(
        "01_table1",
        tables.table1,
        TABLE,
        figures.table1,
        (1, 2),
        page=("WER %", "NMOS", "SS", "LM-RTF", "speed-up", "n"),
    ),
    "table1_quality": Exhibit("01_table1", tables.quality, QUALITY, readable=tables.readable_quality),
    "equivalence": Exhibit(
        "01_table1",
        equivalence.of_rows,
        equivalence.note,
        readable=equivalence.readable,
        page=("lossless", "speed-up", "WER difference", "equivalent", "n", "n needed"),
    ),
    "table1_paper": _and_paper("01_table1", tables.quality_and_paper, columns=_QUALITY),
    "table2": Exhibit(
        "01_table1",
        tables.table2,
        machine_listeners,
        readable=tables.readable_table2,
        with_ratings=True,
        page=_RATINGS,
    ),
    "table3": Exhibit(
        "02_tolerance",
        tables.table3,
        TABLE,
        curves.table3,
        (1, 2),
        (WIDTH, 3.8),
        page=("WER %", "NMOS", "LM-RTF", "speed-up", "acceptance", "n"),
    ),
    "table3_quality": Exhibit("02_tolerance", tables.quality, QUALITY, readable=tables.readable_quality),
    "table3_paper": _and_paper("02_tolerance", tables.quality_and_paper, columns=_WER),
    "figure3": Exhibit(
        "03_draft_length",
        tables.figure3,
        f"{INTERVALS} {SPEED}",
        curves.figure3,
        (1, 2),
        (WIDTH, 3.8),
        page=("LM-RTF", *_SPEED),
    ),
    "figure3_paper": _and_paper("03_draft_length", tables.figure3_and_paper),
    "figure1b": Exhibit("04_stages", tables.stages, STAGES, figures.stages, page=_SHARES),
    "figure1b_paper": _and_paper("04_stages", tables.stages_and_paper),
    "acceptance": Exhibit(
        "05_acceptance",
        acceptance.acceptance,
        ACCEPTANCE,
        curves.acceptance,
        size=(WIDTH, 6),
        readable=tables.readable_acceptance,
        at_setting=True,
    ),
    "acceptance_paper": _and_paper("05_acceptance", tables.ssd_and_paper, True, names=_ACCEPTED),
    "theory": Exhibit(
        "06_theory", tables.measured_and_predicted, THEORY, curves.theory, size=(WIDTH, 6.4), page=_PREDICTED
    ),
    "theory_paper": _and_paper("06_theory", tables.ssd_and_paper, names=["speed-up per token"]),
    "bench": Exhibit("07_bench", speed.side_by_side, BENCH, speed.draw_side_by_side, size=(WIDTH, 3.8)),
    "bench_ratios": Exhibit("07_bench", speed.ratios, RATIOS),
    "cost": Exhibit("07_bench", cost.of_rows, cost.note),
    "cost_memory": Exhibit("07_bench", cost.memory, MEMORY),
    "growth_size": Exhibit(
        "08_growth",
        speed.over_sizes,
        predicted,
        speed.draw_sizes,
        **_PRICES,
        page=("L_d", "weights, MB", "step, ms", "c", "V", "predicted speed-up"),
    ),
    "growth_setting": Exhibit(
        "08_growth",
        speed.over_settings,
        PRICES,
        speed.draw_settings,
        **_PRICES,
        page=("threads", "L_d", "step, ms", "c", "V", "predicted speed-up"),
    ),
    "growth_length": Exhibit(
        "08_growth",
        speed.over_lengths,
        LENGTHS,
        speed.draw_lengths,
        (1, 2),
        (WIDTH, 4),
        page=(*_LENGTHS, "speed-up"),
        study="lengths",
    ),
    "growth_batch": Exhibit("08_growth", speed.over_batches, BATCHES, study="batches"),
    "price": Exhibit(PRICED, price.frontier, PRICE, price.draw, (1, 4), (WIDTH, 4.4), price.readable, page=_RULES),
    "price_equal": Exhibit(
        PRICED, price.at_equal_acceptance, EQUAL, readable=price.readable, at_setting=True, page=_RULES
    ),
    "architectures": Exhibit(
        architectures.NOTEBOOK,
        architectures.table,
        ARCHITECTURES,
        architectures.draw,
        (1, 2),
        (WIDTH, 4.2),
        readable=architectures.speeds,
    ),
    "architectures_why": Exhibit(architectures.NOTEBOOK, architectures.table, WHY, readable=architectures.reasons),
    "drafters": Exhibit(
        drafters.NOTEBOOK,
        drafters.table,
        DRAFTERS,
        drafters.draw,
        (1, 2),
        (WIDTH, 4.2),
        readable=drafters.best,
        page=("beta", "L_d", "tokens a round", "c", "V", "speed-up"),
    ),
    "price_heard": Exhibit(
        PRICED, price.heard, HEARD, page=("WER %", "more WER", "acceptance", "tokens per target call", "n")
    ),
}


def show(name: str, rows: pd.DataFrame, folder: Path, about: dict) -> Markdown:
    """Make one exhibit: tables/<name>.csv and .md, figures/<name>.png, .svg, .pdf -> the table as Jupyter shows it.

    about: the entry of provenance.json. The figure, if any, is pyplot's newest.
    """
    exhibit = EXHIBITS[name]
    at = {k: about["parameters"][k] for k in ("tolerance", "draft_length")} if exhibit.at_setting else {}
    if exhibit.with_ratings:
        rated = Path(folder) / LISTENED
        found = pd.read_csv(rated, index_col="system") if rated.is_file() else pd.DataFrame(columns=["weights"])
        at["rated"] = found[found.weights == about["weights"]]
    if exhibit.of_folder:
        rows = scored_rows(folder, rows, about)
    table = exhibit.table(rows, **at)
    note = exhibit.note if isinstance(exhibit.note, str) else exhibit.note(rows)
    below = " ".join(filter(None, (note, caveats(rows), source_line(folder, exhibit.notebook, about, rows))))
    shown = exhibit.readable(table)
    if exhibit.page:
        shown = shown[[column for column in exhibit.page if column in shown]]
    text = f"{tables.markdown(shown)}\n{below}\n"
    tables.save(table, folder, name, text)
    if exhibit.draw:
        figure, axes = plt.subplots(*exhibit.shape, figsize=exhibit.size, layout="constrained")
        exhibit.draw(table, axes)
        despine(figure, left=exhibit.draw is figures.timeline_and_sound)
        figures.save(figure, folder, name)
    return Markdown(text)


def scored_rows(folder: Path, rows: pd.DataFrame, about: dict) -> pd.DataFrame:
    """``rows`` and those of the folder's other notebooks in SCORED by the same voice, each once."""
    known, ran = rows_of_folder(folder), all_provenance(folder)
    same = [ran[name] for name in SCORED if name in ran and ran[name]["weights"] == about["weights"]]
    keys = dict.fromkeys(key for other in same for key in other["keys"] if key in known)
    return to_frame({row["key"]: row for row in [*rows.to_dict("records"), *(known[key] for key in keys)]}.values())


def source_line(folder: Path, notebook: str, about: dict, rows: pd.DataFrame) -> str:
    """One sentence under a table: hardware, command with what differs from the profile, commit, and the folder."""
    commit = (about["commit"] or "unknown")[:10] + (" with local changes" if about["dirty"] else "")
    processes, threads = rows.processes.max(), f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    if processes > 1:
        threads = f"{threads} in each of {processes} processes"
    command = notebooks.command(notebook, about, processes)
    precision = "".join(f"{name}, " for name in rows.precision.dropna().unique())
    made_by = f"{about['date'][:10]}, {machine(about)}, {precision}{threads}, torch {about['torch']}, commit {commit}"
    return f"{made_by}, voice {about['weights']}: `{command}` -> `{relative(folder, source_tree(), Path.cwd())}`."


def rows_of_run(folder: Path, notebook: str, known: dict[str, dict] | None = None) -> tuple[pd.DataFrame, dict]:
    """The rows of the run that provenance.json tells of, and that entry of it. known: ``rows_of_folder(folder)``."""
    about, known = all_provenance(folder)[notebook], known or rows_of_folder(folder)
    if lost := [key for key in about["keys"] if key not in known]:
        raise InputError(f"{folder}/rows lacks {len(lost)} rows of that run: run {notebook} again")
    return to_frame(known[key] for key in about["keys"]), about


def report(folder: Path, pages: Sequence[Path] = ()) -> list[str]:
    """Every exhibit of a results folder anew from its rows, and the pages' blocks and numbers -> what was made.

    No model is loaded. Exhibits of notebooks that have not run, and the blocks for them, stay as they are.
    """
    plt.switch_backend("agg")
    ran = [name for name, exhibit in EXHIBITS.items() if exhibit.notebook in all_provenance(folder)]
    if not ran:
        raise InputError(f"{folder}/provenance.json tells of no result notebook: run `ssd-repro run` first")
    texts, known = {page: page.read_text("utf-8") for page in pages}, rows_of_folder(folder)
    for name in list(ran):
        rows, about = rows_of_run(folder, EXHIBITS[name].notebook, known)
        unscored = EXHIBITS[name].of_folder and not tables.has(scored_rows(folder, rows, about), "words")
        if unscored or (EXHIBITS[name].study and EXHIBITS[name].study not in set(rows.study)):
            ran.remove(name)  # what it is made of was not measured
            continue
        shown = show(name, rows, folder, about)
        plt.close("all")
        for page, text in texts.items():
            if f"<!-- {name} -->" in text:
                texts[page] = put_between(text, name, shown.data)
    for page, text in texts.items():
        write_text(page, front.renew(CELL.sub(partial(_cell, root=page.parent), text), folder))
    return ran


def put_between(text: str, name: str, inside: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    made, count = re.subn(
        f"{begin}.*?{end}", lambda _: f"{begin}\n{inside.strip()}\n{end}", text, count=1, flags=re.DOTALL
    )
    if not count:
        raise InputError(f"the markers {begin} and {end} are missing")
    return made


# A number within a page's sentences: <!-- = FILE.csv; column=value; ...; column; format -->number<!-- /= -->
CELL = re.compile(r"<!-- = (.+?) -->.*?<!-- /= -->", re.DOTALL)


def _cell(found: re.Match, root: Path) -> str:
    """The number anew from its file below ``root``, if there is one. InputError if no one row fits."""
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
        raise InputError(f"the marker {found[1]!r} does not name one number of {root / name}") from None
