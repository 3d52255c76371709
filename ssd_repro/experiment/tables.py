"""Rows in, tables out; nothing is measured here.

Every table is a frame of plain numbers: <name>_low and <name>_high bound the interval of <name>, 'paper <name>' is
the paper's. ``readable`` makes text of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ..decoding.result import PHASES as LM_PHASES
from ..errors import InputError
from ..files import write_text
from . import paper, statistics, theory
from .statistics import bootstrap, corpus_speedup, paired, ratio_of_sums

NAMES = {"autoregressive": "Autoregressive", "draft": "Draft", "speculative": "SSD"}
VERIFY = "verify"  # what rows call the part of the target; readers see "target"
PHASES = ("text", *LM_PHASES, "codec")  # of a row's seconds, in the order of work
STAGES = tuple("target" if phase == VERIFY else phase for phase in PHASES)
MEANS = {"NMOS": "p808", "DistillMOS": "distillmos", "OVRL": "ovrl", "SIG": "sig", "BAK": "bak", "SS": "similarity"}
MACHINES = ("NMOS", "DistillMOS", "OVRL", "SS")  # of MEANS, those that predict what listeners rate
SPEEDUP = "speed-up of the LM"
COUNTS = dict.fromkeys(("n", "n needed", "listeners", "L_d", "threads"), 0)
POINTS = dict.fromkeys(("WER rise", "WER difference", "sd", "beta"), 1)
DIGITS = {**COUNTS, **POINTS, **dict.fromkeys(("value", "LM-RTF", "RTF"), 3), **dict.fromkeys(STAGES, 4)}


def digits(column: str) -> int:
    return DIGITS.get(column, 1 if column.endswith("%") else 2)


def of_method(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """Rows of one method, SSD's with the paper's draft. InputError if there are none."""
    chosen = of_papers_draft(rows)
    chosen = chosen[chosen.method == method]
    if chosen.empty:
        raise InputError(f"there are no rows of the method {method}: run the notebook again")
    return chosen


def of_papers_draft(rows: pd.DataFrame) -> pd.DataFrame:
    """Without rows of other drafters, of block verification, of adaptive drafts; older rows lack these columns."""
    return rows[rows.reindex(columns=paper.OTHERWISE).isna().all(axis=1)]


def ssd_settings(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Label -> rows of each beta and L_d with the paper's draft, at the voice's own temperature."""
    rows = of_papers_draft(rows)
    ssd = rows[(rows.method == "speculative") & rows.temperature.isna()].groupby(["tolerance", "draft_length"])
    return {f"SSD, beta {beta:g}, L_d {length:g}": group for (beta, length), group in ssd}


def other_drafters(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Label -> rows of SSD otherwise than in the paper: by drafter, beta, L_d, verification and confidence."""
    columns = ["drafter", "tolerance", "draft_length", "verification", "confidence"]
    others = rows[rows.reindex(columns=paper.OTHERWISE).notna().any(axis=1)]
    how = others.reindex(columns=columns).astype(object)
    how = how.fillna({"drafter": "paper", "verification": "", "confidence": 0})
    found = {}
    for (name, beta, n, jointly, trust), part in others.groupby([how[column] for column in columns]):
        more = f", {jointly}" * bool(jointly) + f", adaptive {trust:g}" * bool(trust)
        found[f"SSD, {name} drafter, beta {beta:g}, L_d {n:g}{more}"] = part
    return found


def by_system(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Label -> rows of the draft, then of SSD by beta and L_d, and by drafter."""
    draft = rows[(rows.method == "draft") & rows.temperature.isna()]
    return ({NAMES["draft"]: draft} if len(draft) else {}) | ssd_settings(rows) | other_drafters(rows)


def estimate(name: str, statistic, *columns, scale: float = 1) -> dict[str, float]:
    """A number over utterances and its interval; NaN where there is nothing to divide by, no interval of one."""
    value, low, high, short = np.nan, np.nan, np.nan, name.removesuffix(" %")
    if len(columns[0]):
        value = statistic(*(np.asarray(column, float) for column in columns))
    if len(columns[0]) > 1:
        low, high = bootstrap(statistic, *columns)
    return {name: scale * value, f"{short}_low": scale * low, f"{short}_high": scale * high}


def speedup(name: str, rows: pd.DataFrame, seconds: str, size: str) -> dict[str, float]:
    """``corpus_speedup`` of the column ``seconds`` per ``size``."""
    columns = [f"base_{seconds}", f"base_{size}", seconds, size]
    return estimate(name, corpus_speedup, *(rows[column] for column in columns))


def has(rows: pd.DataFrame, column: str) -> bool:
    """Whether these rows were measured so: older ones, or those made without DistillMOS, were not."""
    return column in rows and bool(rows[column].notna().any())


def quality_columns(rows: pd.DataFrame) -> dict[str, float]:
    rows = rows[rows.words.notna()]
    wer = estimate("WER %", ratio_of_sums, rows.word_errors, rows.words, scale=100)
    means = {name: rows[column].mean() for name, column in MEANS.items() if has(rows, column)}
    return {**wer, "CER %": 100 * ratio_of_sums(rows.char_errors, rows.chars), **means}


def speed_columns(rows: pd.DataFrame) -> dict[str, float]:
    """LM-RTF, RTF and speed-ups of one system over the baseline that was decoded in turn with it."""
    spoken = rows[(rows.tokens > 0) & (rows.base_tokens > 0)]
    per_token = (spoken.base_lm_seconds / spoken.base_tokens) / (spoken.lm_seconds / spoken.tokens)
    return {
        "LM-RTF": ratio_of_sums(rows.lm_seconds, rows.audio_seconds),
        "RTF": ratio_of_sums(rows.synthesis_seconds, rows.audio_seconds),
        **speedup("speed-up", rows, "lm_seconds", "audio_seconds"),
        **estimate("speed-up per token", lambda each: np.median(each, axis=-1), per_token),
        **speedup("RTF speed-up", rows, "synthesis_seconds", "audio_seconds"),
        **estimate("acceptance", ratio_of_sums, rows.accepted, rows.drafted),
        "tokens per target call": pd.to_numeric(rows.tokens_per_target_call).mean(),
        "n": len(rows),
    }


def _one_row_per_system(name: str, systems: dict) -> pd.DataFrame:
    lines = (
        {name: label, **quality_columns(ours), **speed_columns(ours), **paper.of_setting(ours).add_prefix("paper ")}
        for label, ours in systems.items()
    )
    return pd.DataFrame(lines).set_index(name)


def table1(rows: pd.DataFrame) -> pd.DataFrame:
    """Autoregressive, draft and SSD, then SSD with other drafters."""
    base = of_method(rows, "autoregressive")
    systems = {name: of_method(rows, method) for method, name in NAMES.items()} | other_drafters(rows)
    systems = {name: paired(ours, base)[0] for name, ours in systems.items()}
    return _one_row_per_system("system", systems)


def table2(rows: pd.DataFrame, rated: pd.DataFrame) -> pd.DataFrame:
    """Table 1's systems by listeners (``rated``: ``ssd-repro listening-test analyse``; NaN without) and by machines."""
    measured = table1(of_papers_draft(rows))
    listened = [f"{name}{end}" for name in paper.RATED for end in ("", "_low", "_high")] + ["listeners"]
    table = rated.reindex(index=measured.index, columns=listened)
    machines = measured[[name for name in MACHINES if name in measured]].add_suffix(" (machine)")
    return table.join(machines).join(paper.LISTENERS.add_prefix("paper ")).assign(n=measured.n)


def readable_table2(table: pd.DataFrame) -> pd.DataFrame:
    text = readable(table)
    for name, label in zip(table.index, (label for label in text.index if not label.startswith("*")), strict=True):
        for rating in paper.RATED:
            if pd.isna(table.loc[name, rating]):
                text.loc[label, rating] = "not yet rated"
            text.loc[f"*{name}, paper*", rating] += f" ± {table.loc[name, f'paper {rating} ±']:.2f}"
    return text


def table3(rows: pd.DataFrame) -> pd.DataFrame:
    """The autoregressive target, then SSD, one row per beta."""
    base = of_method(rows, "autoregressive")
    over_beta = of_method(rows, "speculative").groupby("tolerance")
    systems = {f"{beta:g}": paired(ours, base)[0] for beta, ours in over_beta}
    return _one_row_per_system("beta", {NAMES["autoregressive"]: base, **systems})


def figure3(rows: pd.DataFrame) -> pd.DataFrame:
    """SSD, one row per L_d; the paper gives the speed-up at L_d 3."""
    lines = [
        {"L_d": int(length), **speed_columns(ours), "paper speed-up": paper.of_setting(ours).get("speed-up", np.nan)}
        for length, ours in of_method(rows, "speculative").groupby("draft_length")
    ]
    return pd.DataFrame(lines).set_index("L_d")


def quality(rows: pd.DataFrame) -> pd.DataFrame:
    """Every system that was scored against the autoregressive target, one line per measure."""
    base = of_method(rows, "autoregressive")
    compared = (
        {"system": name, "measure": measure.name, **statistics.difference(ours, base, measure)}
        for name, ours in by_system(rows).items()
        for measure in statistics.MEASURES
        if ours.scored.all() and (has(base, measure.top) or measure.top != "distillmos")
    )
    columns = ["system", "measure", "difference", "low", "high", "margin", "verdict", "n"]
    return pd.DataFrame(list(compared), columns=columns).set_index("system")


def stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Where the time of a synthesis goes, one row per method: STAGES in seconds per second of audio, RTF, shares."""
    lines = []
    for method, ours in ((method, rows[rows.method == method]) for method in NAMES if method in set(rows.method)):
        spent = pd.DataFrame(list(ours.seconds)).reindex(columns=PHASES).fillna(0.0).sum()
        spent /= ours.audio_seconds.sum() or np.nan
        if method == "draft":  # alone: the loop books its work as the target's
            spent["draft"], spent[VERIFY] = spent["draft"] + spent[VERIFY], 0.0
        whole = spent.sum(skipna=False)
        share, spent.index = 100 * spent[list(LM_PHASES)].sum() / whole, STAGES
        shares = {f"{phase} share %": 100 * seconds / whole for phase, seconds in spent.items()}
        shares["LM share %"] = share
        speed = {column: value for column, value in speed_columns(ours).items() if column.startswith("RTF speed-up")}
        lines.append({"system": NAMES[method], **spent, "RTF": whole, **shares, **speed, "n": len(ours)})
    return pd.DataFrame(lines).set_index("system")


def measured_and_predicted(rows: pd.DataFrame) -> pd.DataFrame:
    """Speed-up per token, measured and by ``theory.predict``, one row per SSD setting."""
    lines = []
    for ours in ssd_settings(rows).values():
        beta, length = ours.tolerance.iloc[0], int(ours.draft_length.iloc[0])
        lines.append({"beta": beta, "L_d": length, **theory.predict(ours, length), "n": len(ours)})
    return pd.DataFrame(lines).set_index("beta")


def _quantity(name: str, theirs, ours: float, low=np.nan, high=np.nan, places: int = 2) -> dict[str, str]:
    """One row of a comparison, as text."""
    there = theirs if isinstance(theirs, str) else number(theirs, places)
    return {"quantity": name, "paper": there, "here": number(ours, places, low, high)}


def _comparison(quantities) -> pd.DataFrame:
    return pd.DataFrame(quantities).set_index("quantity")


QUANTITIES = {  # name -> value and bounds, as ``estimate`` gives them, from the rows of one SSD setting
    SPEEDUP: lambda ours: speedup("", ours, "lm_seconds", "audio_seconds"),
    "speed-up per token": lambda ours: speedup("", ours, "lm_seconds", "tokens"),
    "accepted / drafted tokens": lambda ours: estimate("", ratio_of_sums, ours.accepted, ours.drafted),
    "tokens per target call": lambda ours: {"": speed_columns(ours)["tokens per target call"]},
}


def _compared(label: str, ours: pd.DataFrame, name: str) -> dict[str, str]:
    theirs = paper.of_setting(ours).get("speed-up", np.nan) if name.startswith("speed-up") else "not given"
    return _quantity(f"{label}: {name}", theirs, *QUANTITIES[name](ours).values())


def ssd_and_paper(rows: pd.DataFrame, names, tolerance=None, draft_length=None) -> pd.DataFrame:
    """The QUANTITIES ``names`` of every SSD setting, or of that one."""
    if tolerance is not None:
        rows = rows[(rows.tolerance == tolerance) & (rows.draft_length == draft_length)]
    return _comparison(_compared(label, ours, name) for label, ours in ssd_settings(rows).items() for name in names)


def quality_and_paper(rows: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Of each system the speed-up, and the differences from the target in ``columns`` (of the paper -> our measure)."""
    base, found = of_method(rows, "autoregressive"), []
    measures = {measure.name: measure for measure in statistics.MEASURES}
    for label, ours in by_system(rows).items():
        ours, _ = paired(ours, base)
        found.append(_compared(label, ours, SPEEDUP))
        for column, name in columns.items():
            there = paper.of_setting(ours).get(column, np.nan) - paper.NUMBERS[column]["autoregressive"]
            here = statistics.difference(ours.reset_index(), base, measures[name])
            values = here["difference"], here["low"], here["high"]
            found.append(_quantity(f"{label} - autoregressive: {name}", there, *values, digits(column)))
    return _comparison(found)


def figure3_and_paper(rows: pd.DataFrame) -> pd.DataFrame:
    best = _quantity("L_d of the highest speed-up", paper.LENGTH, figure3(rows)["speed-up"].idxmax(), places=0)
    return pd.concat([_comparison([best]), ssd_and_paper(rows, [SPEEDUP])])


def stages_and_paper(rows: pd.DataFrame) -> pd.DataFrame:
    table, (share, whole) = stages(rows), paper.with_ssd()
    before, ssd = (table.loc[NAMES[method]] for method in ("autoregressive", "speculative"))
    first, speed = f"about {100 * paper.LM_SHARE:.0f}", ssd.filter(like="RTF speed-up")
    found = [
        _quantity("LM's share of the synthesis before SSD, %", first, before["LM share %"], places=0),
        _quantity("LM's share with SSD, %", f"{100 * share:.0f} (derived)", ssd["LM share %"], places=0),
        _quantity("speed-up of the whole synthesis", f"{whole:.2f} (derived)", *speed),
    ]
    return _comparison(found)


def number(value: float, places: int, low: float = np.nan, high: float = np.nan) -> str:
    """Rounded, no minus before a zero; with its interval, unless that says the same again."""
    if pd.isna(value):
        return "–"
    if value == low == high == round(value):
        return f"{value:z.0f}"  # a system beside itself
    low, high = (np.nan if bound is None else bound for bound in (low, high))
    text, *bounds = (f"{x:z.{places}f}" for x in (value, low, high))
    known = pd.notna(low) and pd.notna(high) and set(bounds) != {text}
    return f"{text} [{', '.join(bounds)}]" if known else text


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Rounded text, each interval in the cell of its number, the paper's (if any) in a row below."""
    columns = [c for c in table if not c.startswith("paper ") and not c.endswith(("_low", "_high"))]
    lines, labels = [], []
    for name, line in table.iterrows():
        labels.append(name if isinstance(name, str) else f"{name:g}")
        bounds = {c: [line.get(f"{c.removesuffix(' %')}_{end}", np.nan) for end in ("low", "high")] for c in columns}
        lines.append([number(line[c], digits(c), *bounds[c]) for c in columns])
        theirs = line.reindex([f"paper {c}" for c in columns])
        if theirs.notna().any():
            labels.append(f"*{labels[-1]}, paper*")
            both = zip(columns, theirs, strict=True)
            lines.append(["" if pd.isna(value) else number(value, digits(c)) for c, value in both])
    return pd.DataFrame(lines, index=pd.Index(labels, name=table.index.name), columns=columns)


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
    lines = list(table.itertuples())
    shown = {
        "at": [value if isinstance(value, str) else f"{value:g}" for value in table.value],
        "accepted / judged": [number(x.acceptance, 3, x.low, x.high) for x in lines],
        "accepted / drafted": [number(x.of_drafted, 3, x.of_drafted_low, x.of_drafted_high) for x in lines],
    }
    return pd.DataFrame({**shown, "judged": table.judged, "n": table.n}, index=table.index)


def markdown(table: pd.DataFrame) -> str:
    sides = ("left", *["right"] * len(table.columns))
    return table.to_markdown(disable_numparse=True, colalign=sides) + "\n"


def save(table: pd.DataFrame, folder: Path, name: str, text: str) -> None:
    """<folder>/tables/<name>.csv with all digits, <name>.md to read."""
    write_text(Path(folder) / "tables" / f"{name}.csv", table.to_csv())
    write_text(Path(folder) / "tables" / f"{name}.md", text)
