"""Rows in, tables out; nothing is measured here.

Every table is a frame of plain numbers: <name>_low and <name>_high bound the interval of <name>, 'paper <name>' is
the paper's. ``readable`` makes text of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..decoding.result import PHASES as LM_PHASES
from ..errors import InputError
from ..files import write_text
from . import paper, statistics, theory
from .statistics import bootstrap, corpus_speedup, paired, ratio_of_sums

NAMES = {"autoregressive": "Autoregressive", "draft": "Draft", "speculative": "SSD"}
PHASES = ("text", *LM_PHASES, "codec")  # of a row's seconds, in the order of work
DIGITS = {"n": 0, "L_d": 0, "LM-RTF": 3, "RTF": 3, **dict.fromkeys(PHASES, 4)}


def digits(column: str) -> int:
    """Decimals of a column: those of DIGITS, one of a per cent, else two."""
    return DIGITS.get(column, 1 if column.endswith("%") else 2)


# Systems


def of_method(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    chosen = rows[rows.method == method]
    if chosen.empty:
        raise InputError(f"there are no rows of the method {method}: run the notebook again")
    return chosen


def by_system(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Label -> rows, of all systems but the autoregressive: the draft, then SSD by beta and L_d."""
    rows = rows[rows.temperature.isna()]
    found = {NAMES["draft"]: rows[rows.method == "draft"]} if (rows.method == "draft").any() else {}
    for (beta, length), group in rows[rows.method == "speculative"].groupby(["tolerance", "draft_length"]):
        found[f"SSD, beta {beta:g}, L_d {length:g}"] = group
    return found


def only_ssd(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {label: ours for label, ours in by_system(rows).items() if label != NAMES["draft"]}


# Numbers of one system


def estimate(name: str, statistic, *columns, scale: float = 1) -> dict[str, float]:
    """A number over utterances and its interval; NaN where there is nothing to divide by."""
    value, bounds = np.nan, (np.nan, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        if len(columns[0]) and np.isfinite(found := statistic(*(np.asarray(column, float) for column in columns))):
            value, bounds = found, bootstrap(statistic, *columns)
    low, high = (bound if np.isfinite(bound) else np.nan for bound in bounds)
    short = name.removesuffix(" %")
    return {name: scale * value, f"{short}_low": scale * low, f"{short}_high": scale * high}


def ratio(a: pd.Series, b: pd.Series) -> float:
    """Sum over sum; NaN if the lower one is 0 (every utterance came out empty)."""
    return ratio_of_sums(a, b) if b.sum() else np.nan


def quality_columns(rows: pd.DataFrame) -> dict[str, float]:
    """WER with its interval, CER, NMOS, OVRL, SIG, BAK, SS of one system; NaN where nothing was scored."""
    rows = rows[rows.words.notna()]
    return {
        **estimate("WER %", ratio_of_sums, rows.word_errors, rows.words, scale=100),
        "CER %": 100 * ratio(rows.char_errors, rows.chars),
        "NMOS": rows.p808.mean(),
        "OVRL": rows.ovrl.mean(),
        "SIG": rows.sig.mean(),
        "BAK": rows.bak.mean(),
        "SS": rows.similarity.mean(),
    }


def speed_columns(rows: pd.DataFrame) -> dict[str, float]:
    """LM-RTF, RTF and speed-ups of one system over the baseline that was decoded in turn with it."""
    lm = rows.base_lm_seconds, rows.base_audio_seconds, rows.lm_seconds, rows.audio_seconds
    whole = rows.base_synthesis_seconds, rows.base_audio_seconds, rows.synthesis_seconds, rows.audio_seconds
    spoken = rows[(rows.tokens > 0) & (rows.base_tokens > 0)]
    per_token = (spoken.base_lm_seconds / spoken.base_tokens) / (spoken.lm_seconds / spoken.tokens)
    return {
        "LM-RTF": ratio(rows.lm_seconds, rows.audio_seconds),
        "RTF": ratio(rows.synthesis_seconds, rows.audio_seconds),
        **estimate("speed-up", corpus_speedup, *lm),
        **estimate("speed-up per token", lambda each: np.median(each, axis=-1), per_token),
        **estimate("RTF speed-up", corpus_speedup, *whole),
        "acceptance": ratio(rows.accepted, rows.drafted),
        "tokens per target call": pd.to_numeric(rows.tokens_per_target_call).mean(),
        "n": len(rows),
    }


# The paper's tables and figures


def _one_row_per_system(name: str, systems: dict, base: pd.DataFrame) -> pd.DataFrame:
    """Quality, speed and the paper's numbers of each system, paired with ``base``."""
    lines = []
    for label, ours in systems.items():
        ours, _ = paired(ours, base)
        theirs = {f"paper {column}": value for column, value in paper.of_setting(ours).items()}
        lines.append({name: label, **quality_columns(ours), **speed_columns(ours), **theirs})
    return pd.DataFrame(lines).set_index(name)


def table1(rows: pd.DataFrame) -> pd.DataFrame:
    """Autoregressive, draft and SSD beside the paper's: rows of one run -> one row per system."""
    systems = {name: of_method(rows, method) for method, name in NAMES.items()}
    return _one_row_per_system("system", systems, systems["Autoregressive"])


def table3(rows: pd.DataFrame) -> pd.DataFrame:
    """The autoregressive target, then SSD, one row per beta; the paper's beside it."""
    base = of_method(rows, "autoregressive")
    over_beta = {f"{beta:g}": ours for beta, ours in of_method(rows, "speculative").groupby("tolerance")}
    return _one_row_per_system("beta", {NAMES["autoregressive"]: base, **over_beta}, base)


def figure3(rows: pd.DataFrame) -> pd.DataFrame:
    """SSD, one row per L_d; the paper gives the speed-up at L_d 3."""
    lines = []
    for length, ours in of_method(rows, "speculative").groupby("draft_length"):
        theirs = paper.of_setting(ours).get("speed-up", np.nan)
        lines.append({"L_d": int(length), **speed_columns(ours), "paper speed-up": theirs})
    return pd.DataFrame(lines).set_index("L_d")


def quality(rows: pd.DataFrame) -> pd.DataFrame:
    """Every system that was scored against the autoregressive target (``statistics.quality``)."""
    scored = {label: ours for label, ours in by_system(rows).items() if ours.get("scored", ours.get("heard")).all()}
    return statistics.quality(scored, of_method(rows, "autoregressive"))


def stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Where the time of a synthesis goes, one row per method: PHASES in seconds per second of audio, RTF, shares.

    Where the draft decodes alone, what the loop calls 'verify' is the draft's work.
    """
    lines = []
    for method in [method for method in NAMES if (rows.method == method).any()]:
        ours = of_method(rows, method)
        seconds = pd.DataFrame(list(ours.seconds)).reindex(columns=PHASES).fillna(0.0).sum()
        spent = seconds / (ours.audio_seconds.sum() or np.nan)
        if method == "draft":
            spent["draft"], spent["verify"] = spent["draft"] + spent["verify"], 0.0
        whole = spent.sum(skipna=False)
        shares = {f"{phase} share %": 100 * seconds / whole for phase, seconds in spent.items()}
        shares["LM share %"] = 100 * spent[list(LM_PHASES)].sum() / whole
        speed = {column: value for column, value in speed_columns(ours).items() if column.startswith("RTF speed-up")}
        lines.append({"system": NAMES[method], **spent, "RTF": whole, **shares, **speed, "n": len(ours)})
    return pd.DataFrame(lines).set_index("system")


def measured_and_predicted(rows: pd.DataFrame) -> pd.DataFrame:
    """Speed-up per token, measured and by ``theory.predict``, one row per SSD setting."""
    lines = []
    for ours in only_ssd(rows).values():
        beta, length = ours.tolerance.iloc[0], int(ours.draft_length.iloc[0])
        with np.errstate(divide="ignore", invalid="ignore"):
            lines.append({"beta": beta, "L_d": length, **theory.predict(ours, length), "n": len(ours)})
    return pd.DataFrame(lines).set_index("beta")


# The paper's numbers and ours, quantity by quantity


class Quantity(NamedTuple):
    """One row of a comparison; ``theirs``: the paper's number, or what to say instead."""

    name: str
    theirs: float | str
    ours: float
    low: float = np.nan
    high: float = np.nan
    digits: int = 2


def _comparison(quantities) -> pd.DataFrame:
    """Text: columns paper, here; no interval where all its resamples agree, as of one utterance."""
    made = {}
    for name, theirs, ours, low, high, places in quantities:
        there = theirs if isinstance(theirs, str) else number(theirs, places)
        made[name] = {"paper": there, "here": number(ours, places, *(() if low == high else (low, high)))}
    return pd.DataFrame.from_dict(made, orient="index", columns=["paper", "here"]).rename_axis("quantity")


def _speedup(label: str, ours: pd.DataFrame) -> Quantity:
    values = list(speed_columns(ours).values())[2:5]
    return Quantity(f"{label}: speed-up of the LM", paper.of_setting(ours).get("speed-up", np.nan), *values)


def _acceptance(label: str, ours: pd.DataFrame) -> Quantity:
    values = estimate("acceptance", ratio_of_sums, ours.accepted, ours.drafted).values()
    return Quantity(f"{label}: accepted / drafted tokens", "not given", *values)


def quality_and_paper(rows: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Of each system the speed-up, and the differences from the target in ``columns`` (of the paper -> our measure)."""
    base, found = of_method(rows, "autoregressive"), []
    measures = {measure.name: measure for measure in statistics.MEASURES}
    for label, ours in by_system(rows).items():
        found.append(_speedup(label, ours))
        for column, name in columns.items():
            there = paper.of_setting(ours).get(column, np.nan) - paper.TABLE1[column]["autoregressive"]
            here = statistics.difference(ours, base, measures[name])
            values = here["difference"], here["low"], here["high"]
            found.append(Quantity(f"{label} - autoregressive: {name}", there, *values, digits(column)))
    return _comparison(found)


def figure3_and_paper(rows: pd.DataFrame) -> pd.DataFrame:
    best = Quantity("L_d of the highest speed-up", paper.LENGTH, figure3(rows)["speed-up"].idxmax(), digits=0)
    return _comparison([best, *(_speedup(label, ours) for label, ours in only_ssd(rows).items())])


def stages_and_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper gives the first number; the other two are derived (``paper.shares_with_ssd``)."""
    table, (share, whole) = stages(rows), paper.shares_with_ssd()
    before, ssd = (table.loc[NAMES[method]] for method in ("autoregressive", "speculative"))
    speedup = ssd["RTF speed-up"], ssd["RTF speed-up_low"], ssd["RTF speed-up_high"]
    first = "LM's share of the synthesis before SSD, %"
    return _comparison(
        [
            Quantity(first, f"about {100 * paper.LM_SHARE:.0f}", before["LM share %"], digits=0),
            Quantity("LM's share with SSD, %", f"{100 * share:.0f} (derived)", ssd["LM share %"], digits=0),
            Quantity("speed-up of the whole synthesis", f"{whole:.2f} (derived)", *speedup),
        ]
    )


def acceptance_and_paper(rows: pd.DataFrame, tolerance: float, draft_length: int) -> pd.DataFrame:
    label = f"SSD, beta {tolerance:g}, L_d {draft_length:g}"
    ours = by_system(rows)[label]
    calls = speed_columns(ours)["tokens per target call"]
    per_call = Quantity(f"{label}: tokens per target call", "not given", calls)
    return _comparison([_acceptance(label, ours), per_call, _speedup(label, ours)])


def theory_and_paper(rows: pd.DataFrame) -> pd.DataFrame:
    found = []
    for (label, ours), (_, line) in zip(only_ssd(rows).items(), measured_and_predicted(rows).iterrows(), strict=True):
        theirs = paper.of_setting(ours).get("speed-up", np.nan)
        values = line.measured, line.measured_low, line.measured_high
        found.append(Quantity(f"{label}: speed-up per token", theirs, *values))
    return _comparison(found)


def listen_and_paper(rows: pd.DataFrame) -> pd.DataFrame:
    systems = only_ssd(rows).items()
    return _comparison(quantity(*system) for system in systems for quantity in (_speedup, _acceptance))


# Text


def number(value: float, places: int, low: float = np.nan, high: float = np.nan) -> str:
    """The rounded number and its interval, if any."""
    if pd.isna(value):
        return "–"
    interval = f" [{low:.{places}f}, {high:.{places}f}]" if pd.notna(low) and pd.notna(high) else ""
    return f"{value:.{places}f}{interval}"


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Rounded text, each interval in the cell of its number, the paper's (if any) in a row below."""
    columns = [c for c in table if not c.startswith("paper ") and not c.endswith(("_low", "_high"))]
    lines, names = [], []
    for name, line in table.iterrows():
        names.append(name if isinstance(name, str) else f"{name:g}")
        bounds = {c: [line.get(f"{c.removesuffix(' %')}_{end}", np.nan) for end in ("low", "high")] for c in columns}
        lines.append([number(line[c], digits(c), *bounds[c]) for c in columns])
        theirs = {c: line.get(f"paper {c}", np.nan) for c in columns}
        if any(pd.notna(value) for value in theirs.values()):
            names.append(f"*{names[-1]}, paper*")
            lines.append(["" if pd.isna(value) else number(value, digits(c)) for c, value in theirs.items()])
    return pd.DataFrame(lines, index=pd.Index(names, name=table.index.name), columns=columns)


def readable_quality(table: pd.DataFrame) -> pd.DataFrame:
    """The differences as text, with their verdicts."""
    places = {measure.name: measure.digits for measure in statistics.MEASURES} | {"length ratio": 3}
    lines = table.itertuples()
    shown = {
        "measure": table.measure,
        "SSD or draft - autoregressive": [number(x.difference, places[x.measure], x.low, x.high) for x in lines],
        "margin": ["–" if pd.isna(margin) else f"± {margin:g}" for margin in table.margin],
    }
    return pd.DataFrame({**shown, "verdict": table.verdict, "n": table.n}, index=table.index)


def readable_acceptance(table: pd.DataFrame) -> pd.DataFrame:
    shown = {
        "at": [value if isinstance(value, str) else f"{value:g}" for value in table.value],
        "accepted / judged": [number(x.acceptance, 3, x.low, x.high) for x in table.itertuples()],
        "accepted / drafted": [number(value, 3) for value in table.of_drafted],
    }
    return pd.DataFrame({**shown, "judged": table.judged, "n": table.n}, index=table.index)


def markdown(table: pd.DataFrame) -> str:
    """A pipe table of a frame of text, its index first."""
    sides = ("left", *["right"] * len(table.columns))
    return table.to_markdown(disable_numparse=True, colalign=sides) + "\n"


def save(table: pd.DataFrame, folder: Path, name: str, text: str) -> None:
    """<folder>/tables/<name>.csv with all digits, <name>.md to read."""
    write_text(Path(folder) / "tables" / f"{name}.csv", table.to_csv())
    write_text(Path(folder) / "tables" / f"{name}.md", text)
