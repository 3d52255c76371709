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
from . import acceptance, cost, figures, front, price, speed, statistics, tables
from .provenance import all_provenance, relative
from .rows import SILENCE_DB, busy, count_empty, rows_of_folder, to_frame

INTERVALS = "[low, high]: 95 % bootstrap intervals over utterances."
SPEED = (
    "Speed-up: LM-RTF of the autoregressive target, decoded in turn with the system, over the system's; per token: "
    "median over utterances; RTF speed-up: of the whole synthesis. The paper's LM-RTF is an A100's: compare ratios."
)
TABLE = f"{INTERVALS} NMOS is DNSMOS P808_MOS. {SPEED}"
QUALITY = (
    "Paired differences (same text, voice, seed) with 95 % bootstrap intervals. 'Shown equivalent': two one-sided "
    f"tests at 5 % against the margins {statistics.MARGINS}; 'shown different': the interval leaves 0 out; 'no "
    "difference shown' is neither, and does not mean equal. Length ratio: seconds of audio over the target's."
)
LISTENED = "listening.csv"  # of a results folder: what ``listening-test analyse`` found
MACHINES = (
    "SIM-MOS, NAT-MOS: people's ratings, 1 to 5, by `ssd-repro listening-test`; the paper's with ± half of its 95 % "
    "interval. Machine: no rating but a model's prediction; NMOS is DNSMOS P808_MOS."
)
STAGES = "Seconds per second of audio; verify: the target's steps; rest: the loop. LM share: prefill to rest."
ACCEPTANCE = (
    f"{INTERVALS} Accepted / judged: of the drafted tokens up to a round's first rejection; accepted / drafted: of "
    "all. A rejected draft counts where it would have stood, and for what the token in its place carries: silence is "
    f"{-SILENCE_DB:g} dB below the loud tokens of its utterance, boundary is a token on either side of a change."
)
THEORY = (
    "Speed-up per token, over all utterances together. Formula: (1 - alpha^(L_d+1)) / ((1 - alpha)(c L_d + 1)), "
    "Leviathan et al. 2023, alpha = accepted / judged, c = draft step / target step; positions: with the acceptance "
    "rate of each position of the draft; costs: also with the measured cost of the verification. The residue: prefill "
    "% and loop % of SSD's LM time, which no prediction counts; left %: first tokens, rounds that the end cuts short, "
    "and the prefill of the baseline."
)
BENCH = (
    f"{INTERVALS} Same weights, prompts, sampler, seeds, threads, least and most tokens, in turns utterance by "
    "utterance; prefill and stop token count. Sampler: the voice's without RAS, one code for all. Assisted generation: "
    "our draft, L_d tokens a round, schedule constant, threshold 0; its distribution is that of "
    "beta 0. Over: speeds, above 1 is faster."
)
RATIOS = (
    f"{INTERVALS} x_over_y: times as many tokens a second. verify and draft over step: prices in the loop of SSD at "
    "the tolerance, in steps of our autoregressive target, sampling and judging included. outside_forwards: share of "
    "a round outside the models' forwards, from a pass of its own."
)
MEMORY = (
    "Parameters. Own: the draft's bottom layers and head, the rest being the target's; alone: what a draft takes that "
    "shares nothing but embeddings, as where a runtime packs each model's weights for itself (openvino)."
)
PRICES = (
    "A prediction but for the prices: these are measured in the loop at random weights, sampling included, and the "
    "speed-up is what they make of the acceptance of the voice's own rows, (1 - alpha^(L_d+1)) / ((1 - alpha)(c L_d + "
    "V)); a draft of one layer would have to earn that acceptance. c, V: draft step and verification in target steps. "
    "Floor: bytes of weights and cache over the machine's GB/s, or operations over its GFLOP/s, whichever is longer."
)
LENGTHS = (
    "One utterance that is not let stop, prefill included, and what the process (on a GPU: torch) had grown by; cache: "
    "computed. Floor: bytes of weights and cache of a target step over the machine's GB/s."
)
PRICE = (
    "Means over all places where the loop drafts, along what the target says by itself. Acceptance: of a draft, "
    "expected; TV: total variation between what the rule then says and the target, 0 to 1; bound: max(0, "
    "acceptance - sum min(p, q)), below which no rule comes; excess: TV less the bound; target cannot say: the "
    "probability of tokens that the target's own sampling excludes there. matched: normalize(max(0, q - p a)) after a "
    f"rejection. {INTERVALS}"
)
EQUAL = f"Parameter, TV and excess are interpolated between two points of a rule's grid. {PRICE}"
HEARD = f"more WER: points above the target without a draft, paired. Acceptance: accepted / drafted. {TABLE}"
TIMELINE = "Every token of the SSD sentence; figure: the paper's Figure 2."


def findings(rows: pd.DataFrame) -> str:
    """What these rows say of the speed-up: numbers computed from them, the machine and the metrics that they name."""
    found, said = tables.measured_and_predicted(rows).reset_index(), []
    if len(found := found.dropna(subset=["alpha", "costs", "measured"])):
        beta, length = (_range(found[column], "g") for column in ("beta", "L_d"))
        draft, verify = (_range(found[f"{step} / target step"]) for step in ("draft", "verification"))
        said = [
            f"SSD, beta {beta}, L_d {length}: {_range(found.alpha)} of the judged drafts are accepted; a draft step "
            f"costs {draft}, a verification {verify} target steps. These predict a speed-up per token of "
            f"{_range(found.costs)}; measured: {_range(found.measured)}."
        ]
    runtime = ", " + rows.runtime if "runtime" in rows else ""  # rows from before there was a choice are eager
    machines = (rows.chip + " (" + rows.device + runtime + ", " + rows.precision + ")").unique()
    said.append(f"Timed on {' and '.join(machines)}.")
    if len(scored := rows[rows.words.notna()]):
        said.append(f"WER by Whisper {_names(scored.whisper)}, SS by {_names(scored.speaker)}.")
    return " ".join(said)


def _range(values: pd.Series, form: str = ".2f") -> str:
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (values.min(), values.max())))


def _names(values: pd.Series) -> str:
    """Each once; of a model's folder its name alone."""
    return " and ".join(dict.fromkeys(Path(value).name for value in values))


def machine_listeners(rows: pd.DataFrame) -> str:
    """What the columns of Table 2 are, and how far its two predictors of naturalness agree on these rows."""
    if not tables.has(rows, "distillmos"):
        return MACHINES
    both = rows[["distillmos", "p808"]].dropna()
    r, low, high = tables.estimate("", statistics.pearson, both.distillmos, both.p808).values()
    return (
        f"{MACHINES} Correlation of DistillMOS with P808_MOS over {len(both)} rows: {tables.number(r, 2, low, high)}."
    )


def caveats(rows: pd.DataFrame) -> str:
    """What to know of these rows: empty utterances, and a machine that did other work; '' if there is nothing."""
    counts = {tables.NAMES[method]: count_empty(ours) for method, ours in rows.groupby("method", sort=False)}
    said = [f"{name}: {count} of {len(rows)} rows are empty utterances." for name, count in counts.items() if count]
    if share := busy(rows):
        said.append(f"Warning: the machine was not idle: other work ran beside {100 * share:.0f} % of these rows.")
    return " ".join(said)


def _predicted(rows: pd.DataFrame) -> str:
    return f"{speed.begins(rows)} {PRICES}"


def timeline(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's Figure 2 of the one SSD row: every token, its place and what became of it."""
    row = tables.of_method(rows, "speculative").iloc[0]
    events = figures.timeline_events(row).set_index("seconds")
    rate, per_call = (tables.number(row[name], 2) for name in ("acceptance_rate", "tokens_per_target_call"))
    setting = f"SSD, beta {row.tolerance:g}, L_d {row.draft_length:g}"
    events.attrs["title"] = f"{setting}: acceptance rate {rate}, {per_call} tokens per target call"
    return events


def _counted(events: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"tokens": events.kind.value_counts().reindex(figures.KINDS).dropna().astype(int)})


@dataclass(frozen=True)
class Exhibit:
    """A table with its figure: ``table(rows)``, or ``table(rows, tolerance, draft_length)`` where ``at_setting``,
    ``table(rows, rated)`` where ``with_ratings``.

    note: what stands below the table, or what computes it from the rows. draw(table, axes) fills the axes of a figure
    of ``shape`` (rows, columns) and ``size`` inches.
    """

    notebook: str
    table: Callable[..., pd.DataFrame]
    note: str | Callable[[pd.DataFrame], str]
    draw: Callable | None = None
    shape: tuple[int, int] = (1, 1)
    size: tuple[float, float] = (10, 3.4)
    readable: Callable[[pd.DataFrame], pd.DataFrame] = tables.readable
    at_setting: bool = False
    with_ratings: bool = False


def _and_paper(notebook: str, table: Callable, at_setting: bool = False, **settings) -> Exhibit:
    return Exhibit(notebook, partial(table, **settings), findings, readable=lambda text: text, at_setting=at_setting)


_ACCEPTANCE = {"shape": (2, 4), "size": (12, 5.6), "readable": tables.readable_acceptance, "at_setting": True}
_ACCEPTED = ["accepted / drafted tokens", "tokens per target call", tables.SPEEDUP]
_PRICES = {"shape": (1, 2), "size": (11, 4), "readable": speed.readable_prices}
PRICED = "09_price_of_tolerance"
_WER = {"WER %": "WER, points"}
_QUALITY = {**_WER, "NMOS": "P808 (NMOS)", "SS": "SS"}
EXHIBITS = {
    "timeline": Exhibit("00_listen", timeline, TIMELINE, figures.timeline, size=(10, 3), readable=_counted),
    "phases": Exhibit("00_listen", tables.stages, STAGES, figures.stages, size=(10, 2.6)),
    "listen_paper": _and_paper("00_listen", tables.ssd_and_paper, names=[tables.SPEEDUP, _ACCEPTED[0]]),
    "table1": Exhibit("01_table1", tables.table1, TABLE, figures.table1, (1, 2)),
    "table1_quality": Exhibit("01_table1", tables.quality, QUALITY, readable=tables.readable_quality),
    "table1_paper": _and_paper("01_table1", tables.quality_and_paper, columns=_QUALITY),
    "table2": Exhibit(
        "01_table1", tables.table2, machine_listeners, readable=tables.readable_table2, with_ratings=True
    ),
    "table3": Exhibit("02_tolerance", tables.table3, TABLE, figures.table3, (1, 2)),
    "table3_quality": Exhibit("02_tolerance", tables.quality, QUALITY, readable=tables.readable_quality),
    "table3_paper": _and_paper("02_tolerance", tables.quality_and_paper, columns=_WER),
    "figure3": Exhibit("03_draft_length", tables.figure3, f"{INTERVALS} {SPEED}", figures.figure3, (1, 2)),
    "figure3_paper": _and_paper("03_draft_length", tables.figure3_and_paper),
    "figure1b": Exhibit("04_stages", tables.stages, STAGES, figures.stages, size=(10, 2.6)),
    "figure1b_paper": _and_paper("04_stages", tables.stages_and_paper),
    "acceptance": Exhibit("05_acceptance", acceptance.acceptance, ACCEPTANCE, figures.acceptance, **_ACCEPTANCE),
    "acceptance_paper": _and_paper("05_acceptance", tables.ssd_and_paper, True, names=_ACCEPTED),
    "theory": Exhibit("06_theory", tables.measured_and_predicted, THEORY, figures.theory, size=(8, 5)),
    "theory_paper": _and_paper("06_theory", tables.ssd_and_paper, names=["speed-up per token"]),
    "bench": Exhibit("07_bench", speed.side_by_side, BENCH, speed.draw_side_by_side, size=(10, 3.6)),
    "bench_ratios": Exhibit("07_bench", speed.ratios, RATIOS),
    "cost": Exhibit("07_bench", cost.of_rows, cost.note),
    "cost_memory": Exhibit("07_bench", cost.memory, MEMORY),
    "growth_size": Exhibit("08_growth", speed.over_sizes, _predicted, speed.draw_sizes, **_PRICES),
    "growth_setting": Exhibit("08_growth", speed.over_settings, PRICES, speed.draw_settings, **_PRICES),
    "growth_length": Exhibit("08_growth", speed.over_lengths, LENGTHS, speed.draw_lengths, (1, 2), (11, 4)),
    "price": Exhibit(PRICED, price.frontier, PRICE, price.draw, (1, 2), (12, 5), price.readable),
    "price_equal": Exhibit(PRICED, price.at_equal_acceptance, EQUAL, readable=price.readable, at_setting=True),
    "price_heard": Exhibit(PRICED, price.heard, HEARD),
}


def show(name: str, rows: pd.DataFrame, folder: Path, about: dict) -> Markdown:
    """Make one exhibit: tables/<name>.csv and .md, figures/<name>.png and .svg -> the table as Jupyter shows it.

    about: the entry of provenance.json. The figure, if any, is pyplot's newest.
    """
    exhibit = EXHIBITS[name]
    at = {k: about["parameters"][k] for k in ("tolerance", "draft_length")} if exhibit.at_setting else {}
    if exhibit.with_ratings:
        rated = Path(folder) / LISTENED
        found = pd.read_csv(rated, index_col="system") if rated.is_file() else pd.DataFrame(columns=["weights"])
        at["rated"] = found[found.weights == about["weights"]]
    table = exhibit.table(rows, **at)
    note = exhibit.note if isinstance(exhibit.note, str) else exhibit.note(rows)
    below = " ".join(filter(None, (note, caveats(rows), source_line(folder, about, rows))))
    text = f"{tables.markdown(exhibit.readable(table))}\n{below}\n"
    tables.save(table, folder, name, text)
    if exhibit.draw:
        figure, axes = plt.subplots(*exhibit.shape, figsize=exhibit.size, layout="constrained")
        exhibit.draw(table, axes)
        despine(figure, left=exhibit.draw is figures.timeline)
        figures.save(figure, folder, name)
    return Markdown(text)


def source_line(folder: Path, about: dict, rows: pd.DataFrame) -> str:
    """One sentence under a table: hardware, command, commit, and the folder."""
    commit = (about["commit"] or "unknown")[:10] + (" with local changes" if about["dirty"] else "")
    processes, threads = rows.processes.max(), f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    command = "ssd-repro bench" if about["profile"] == "bench" else f"ssd-repro run --profile {about['profile']}"
    if processes > 1:
        threads, command = f"{threads} in each of {processes} processes", f"{command} --processes {processes}"
    made_by = f"{about['date'][:10]}, {about['chip']}, {threads}, torch {about['torch']}, commit {commit}"
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
    for name in ran:
        rows, about = rows_of_run(folder, EXHIBITS[name].notebook, known)
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
