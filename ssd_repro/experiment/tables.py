"""Rows in, tables out; nothing is measured here. Every table is a frame of plain numbers, *_low and
*_high the bounds of an interval; ``readable`` makes text of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..files import source_tree, write_text
from . import acceptance as acceptance_module
from . import statistics, theory
from .rows import rows_of_folder, to_frame
from .statistics import bootstrap, corpus_speedup, paired, ratio_of_sums

NAMES = {"autoregressive": "Autoregressive", "draft": "Draft", "speculative": "SSD"}
# The paper's Table 1 (arXiv 2505.15380); its NMOS column is not named, ours is P808_MOS.
PAPER_TABLE1 = pd.DataFrame(
    {"WER %": [3.67, 16.13, 5.70], "NMOS": [3.96, 3.95, 3.94], "SS": [0.62, 0.61, 0.63],
     "LM-RTF": [0.504, 0.222, 0.360]},
    index=list(NAMES),
)  # fmt: skip
PAPER_TABLE3 = pd.DataFrame(  # its Table 3, by beta
    {"WER %": [6.34, 5.71, 6.08, 6.29, 5.70], "NMOS": [3.86, 3.90, 3.92, 3.93, 3.94],
     "SS": [0.62, 0.50, 0.62, 0.62, 0.63], "LM-RTF": [0.509, 0.444, 0.408, 0.386, 0.360]},
    index=[0.0, 0.1, 0.2, 0.3, 0.4],
)  # fmt: skip
PAPER_LENGTH = 3  # L_d of Tables 1 and 3; by Figure 3 LM-RTF over L_d = 1..8 is lowest there
PAPER_TOLERANCE = 0.4  # beta of Table 1 and Figure 3
PAPER_LM_SHARE = 0.70  # Figure 1b: of CosyVoice 2's synthesis time
PHASES = ("text", "prefill", "draft", "verify", "rest", "codec")  # of a row's seconds, in the order of work
LM_PHASES = PHASES[1:5]


def median(x):
    return np.median(x, axis=-1)


# Lines of tables


def numbers(name: str, value: float, interval: tuple[float, float]) -> dict:
    """A cell and its interval, in columns <name>_low and <name>_high (without the per cent sign)."""
    low, high = interval
    short = name.removesuffix(" %")
    return {name: value, f"{short}_low": low, f"{short}_high": high}


def quality_line(rows: pd.DataFrame) -> dict:
    """WER with its interval, CER, NMOS, OVRL, SIG, BAK, SS of one system; NaN where nothing was heard."""
    rows = rows[rows.words.notna()]
    columns = rows.word_errors.astype(float), rows.words.astype(float)
    wer, low, high = (np.nan,) * 3
    if len(rows):
        wer, (low, high) = ratio_of_sums(*columns), bootstrap(ratio_of_sums, *columns)
    return {
        **numbers("WER %", 100 * wer, (100 * low, 100 * high)),
        "CER %": 100 * ratio_of_sums(rows.char_errors, rows.chars) if len(rows) else np.nan,
        "NMOS": rows.p808.mean(),
        "OVRL": rows.ovrl.mean(),
        "SIG": rows.sig.mean(),
        "BAK": rows.bak.mean(),
        "SS": rows.similarity.mean(),
    }


def speed_line(rows: pd.DataFrame) -> dict:
    """LM-RTF, RTF and speed-ups of one system over the baseline that was decoded in turn with it."""
    seconds = rows.base_lm_seconds, rows.base_audio_seconds, rows.lm_seconds, rows.audio_seconds
    whole = rows.base_synthesis_seconds, rows.base_audio_seconds, rows.synthesis_seconds, rows.audio_seconds
    per_token = (rows.base_lm_seconds / rows.base_tokens) / (rows.lm_seconds / rows.tokens)
    drafted = rows.drafted.sum()
    return {
        "LM-RTF": ratio_of_sums(rows.lm_seconds, rows.audio_seconds),
        "RTF": ratio_of_sums(rows.synthesis_seconds, rows.audio_seconds),
        **numbers("speed-up", corpus_speedup(*seconds), bootstrap(corpus_speedup, *seconds)),
        **numbers("speed-up a token", median(per_token), bootstrap(median, per_token)),
        **numbers("RTF speed-up", corpus_speedup(*whole), bootstrap(corpus_speedup, *whole)),
        "acceptance": rows.accepted.sum() / drafted if drafted else np.nan,
        "tokens a target call": pd.to_numeric(rows.tokens_per_target_call).mean(),
        "n": len(rows),
    }


def of_method(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    chosen = rows[rows.method == method]
    if chosen.empty:
        raise InputError(f"there are no rows of the method {method}: run the notebook again")
    return chosen


def paper_line(paper: pd.Series | None) -> dict:
    """The paper's numbers and its speed-up, as columns 'paper ...'."""
    if paper is None:
        return {}
    speedup = PAPER_TABLE1["LM-RTF"]["autoregressive"] / paper["LM-RTF"]
    return {**{f"paper {name}": value for name, value in paper.items()}, "paper speed-up": speedup}


# The paper's tables and figures


def table1(rows: pd.DataFrame) -> pd.DataFrame:
    """Autoregressive, draft and SSD beside the paper's: rows of one run -> a line a system."""
    base, lines = of_method(rows, "autoregressive"), []
    for method, name in NAMES.items():
        ours, _ = paired(of_method(rows, method), base)
        paper = paper_line(PAPER_TABLE1.loc[method]) if method != "speculative" or _as_the_paper(ours) else {}
        lines.append({"system": name, **quality_line(ours), **speed_line(ours), **paper})
    return pd.DataFrame(lines).set_index("system")


def _as_the_paper(ssd: pd.DataFrame) -> bool:
    """Whether SSD rows have the setting of the paper's Table 1."""
    return bool((ssd.draft_length == PAPER_LENGTH).all() and np.allclose(ssd.tolerance.astype(float), PAPER_TOLERANCE))


def systems(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Label -> rows, of all systems but the autoregressive: the draft, then SSD by beta and L_d."""
    rows = rows[rows.temperature.isna()]
    found = {NAMES["draft"]: rows[rows.method == "draft"]} if (rows.method == "draft").any() else {}
    ssd = rows[rows.method == "speculative"]
    for (beta, length), group in ssd.groupby(["tolerance", "draft_length"]):
        found[f"SSD, beta {beta:g}, L_d {length:g}"] = group
    return found


def quality(rows: pd.DataFrame) -> pd.DataFrame:
    """Every system that was heard against the autoregressive target (``compare.quality``)."""
    scored = {name: group for name, group in systems(rows).items() if group.scored.all()}
    return statistics.quality(scored, of_method(rows, "autoregressive"))


def table3(rows: pd.DataFrame) -> pd.DataFrame:
    """SSD over beta, a line each, above it the autoregressive target; the paper's beside it."""
    base = of_method(rows, "autoregressive")
    first = {"beta": NAMES["autoregressive"], **quality_line(base), **speed_line(base)}
    lines = [first | paper_line(PAPER_TABLE1.loc["autoregressive"])]
    for beta, ours in of_method(rows, "speculative").groupby("tolerance"):
        ours, _ = paired(ours, base)
        known = beta in PAPER_TABLE3.index and (ours.draft_length == PAPER_LENGTH).all()
        paper = paper_line(PAPER_TABLE3.loc[beta] if known else None)
        lines.append({"beta": f"{beta:g}", **quality_line(ours), **speed_line(ours), **paper})
    return pd.DataFrame(lines).set_index("beta")


def figure3(rows: pd.DataFrame) -> pd.DataFrame:
    """SSD over L_d, a line each; the paper's number for L_d 3 is its Table 1's."""
    lines = []
    for length, ours in of_method(rows, "speculative").groupby("draft_length"):
        paper = paper_line(PAPER_TABLE1.loc["speculative"]) if _as_the_paper(ours) else {}
        paper = {name: value for name, value in paper.items() if name == "paper speed-up"}
        lines.append({"L_d": int(length), **speed_line(ours), **paper})
    return pd.DataFrame(lines).set_index("L_d")


def stages(rows: pd.DataFrame) -> pd.DataFrame:
    """Where the time of a synthesis goes, a line a method: seconds of each of PHASES a second of audio, RTF, shares.

    Where the draft speaks alone, what the loop calls 'verify' is the draft's work.
    """
    lines = []
    for method in [method for method in NAMES if (rows.method == method).any()]:
        ours = of_method(rows, method)
        spent = pd.DataFrame(list(ours.seconds)).reindex(columns=PHASES).fillna(0.0).sum() / ours.audio_seconds.sum()
        if method == "draft":
            spent["draft"], spent["verify"] = spent["draft"] + spent["verify"], 0.0
        lm = spent[list(LM_PHASES)].sum()
        speed = {k: v for k, v in speed_line(ours).items() if k.startswith("RTF speed-up")}
        shares = {f"{phase} share %": 100 * seconds / spent.sum() for phase, seconds in spent.items()}
        lines.append({"system": NAMES[method], **spent, "RTF": spent.sum(), **shares,
                      "LM share %": 100 * lm / spent.sum(), **speed, "n": len(ours)})  # fmt: skip
    return pd.DataFrame(lines).set_index("system")


def acceptance(rows: pd.DataFrame, tolerance: float, draft_length: int) -> pd.DataFrame:
    """The acceptance-rate curves (``curves.acceptance``)."""
    return acceptance_module.acceptance(rows, tolerance, draft_length)


def measured_and_predicted(rows: pd.DataFrame) -> pd.DataFrame:
    """Speed-up a token, measured and by ``theory.predict``, a line for each SSD setting."""
    lines = []
    ssd = rows[(rows.method == "speculative") & rows.temperature.isna()]
    for (beta, length), ours in ssd.groupby(["tolerance", "draft_length"]):
        lines.append({"beta": beta, "L_d": int(length), **theory.predict(ours, int(length)), "n": len(ours)})
    return pd.DataFrame(lines).set_index("beta")


# The paper's numbers and ours, quantity by quantity


def _versus(lines) -> pd.DataFrame:
    """(quantity, paper, ours, low, high, digits) ... -> a frame of text."""
    made = {}
    for quantity, paper, ours, low, high, digits in lines:
        there = "–" if paper is None else paper if isinstance(paper, str) else f"{paper:.{digits}f}"
        interval = "" if low is None or pd.isna(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
        made[quantity] = {"paper": there, "here": "–" if pd.isna(ours) else f"{ours:.{digits}f}{interval}"}
    frame = pd.DataFrame.from_dict(made, orient="index", columns=["paper", "here"])
    frame.index.name = "quantity"
    return frame


def _speedup(name: str, line: pd.Series) -> tuple:
    paper = line.get("paper speed-up")
    return name, None if pd.isna(paper) else paper, line["speed-up"], line["speed-up_low"], line["speed-up_high"], 2


def _delta(name: str, paper: float | None, quality_rows: pd.DataFrame, measure: str, digits: int) -> tuple:
    line = quality_rows[quality_rows.measure == measure].iloc[0]
    return name, paper, line.difference, line.low, line.high, digits


def versus_table1(rows: pd.DataFrame) -> pd.DataFrame:
    table, paper, lines = table1(rows), PAPER_TABLE1, []
    shown = {"WER %": ("WER, points", 1), "NMOS": ("P808 (NMOS)", 2), "SS": ("SS", 2)}
    verdicts = quality(rows)
    for method, label in (("draft", verdicts.index[0]), ("speculative", verdicts.index[-1])):
        name, known = NAMES[method], pd.notna(table.loc[NAMES[method]].get("paper WER %", np.nan))
        lines.append(_speedup(f"{name}: speed-up of the LM", table.loc[name]))
        for column, (measure, digits) in shown.items():
            there = paper[column][method] - paper[column]["autoregressive"] if known else None
            lines.append(_delta(f"{name} - autoregressive: {measure}", there, verdicts.loc[label], measure, digits))
    return _versus(lines)


def versus_table3(rows: pd.DataFrame) -> pd.DataFrame:
    table, lines, verdicts = table3(rows), [], quality(rows)
    for (beta, line), label in zip(table.iloc[1:].iterrows(), verdicts.index.unique(), strict=True):
        lines.append(_speedup(f"beta {beta}: speed-up of the LM", line))
        there = line.get("paper WER %", np.nan) - PAPER_TABLE1["WER %"]["autoregressive"]
        paper = None if pd.isna(there) else there
        lines.append(_delta(f"beta {beta}: WER - autoregressive, points", paper, verdicts.loc[label], "WER, points", 1))
    return _versus(lines)


def versus_figure3(rows: pd.DataFrame) -> pd.DataFrame:
    table = figure3(rows)
    best = ("L_d of the highest speed-up", PAPER_LENGTH, float(table["speed-up"].idxmax()), None, None, 0)
    return _versus([best, *(_speedup(f"L_d {length}: speed-up of the LM", line) for length, line in table.iterrows())])


def versus_stages(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper gives the first number; the other two follow from it and its LM-RTFs, if the rest stays as it is."""
    table = stages(rows)
    after = PAPER_LM_SHARE * PAPER_TABLE1["LM-RTF"]["speculative"] / PAPER_TABLE1["LM-RTF"]["autoregressive"]
    whole = 1 - PAPER_LM_SHARE + after
    before, ssd = table.loc[NAMES["autoregressive"]], table.loc[NAMES["speculative"]]
    return _versus([
        ("LM's share of the synthesis before SSD, %", f"about {100 * PAPER_LM_SHARE:.0f}", before["LM share %"], None, None, 0),
        ("LM's share with SSD, %", f"{100 * after / whole:.0f} (derived)", ssd["LM share %"], None, None, 0),
        ("speed-up of the whole synthesis", f"{1 / whole:.2f} (derived)", ssd["RTF speed-up"],
         ssd["RTF speed-up_low"], ssd["RTF speed-up_high"], 2),
    ])  # fmt: skip


def versus_acceptance(rows: pd.DataFrame, tolerance: float, draft_length: int) -> pd.DataFrame:
    ssd = systems(rows)[f"SSD, beta {tolerance:g}, L_d {draft_length:g}"]
    line = speed_line(ssd)
    low, high = bootstrap(ratio_of_sums, ssd.accepted, ssd.drafted)
    return _versus([
        ("accepted / drafted tokens", "not given", line["acceptance"], low, high, 2),
        ("tokens a target call", "not given", line["tokens a target call"], None, None, 2),
        _speedup("speed-up of the LM", pd.Series(line | {"paper speed-up": _paper_speedup(tolerance, draft_length)})),
    ])  # fmt: skip


def versus_theory(rows: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for beta, line in measured_and_predicted(rows).iterrows():
        name, paper = f"beta {beta:g}, L_d {line.L_d:g}", _paper_speedup(beta, line.L_d)
        there = None if pd.isna(paper) else paper
        lines.append((f"{name}: speed-up a token", there, line.measured, line.measured_low, line.measured_high, 2))
    return _versus(lines)


def versus_listen(rows: pd.DataFrame) -> pd.DataFrame:
    ssd = of_method(rows, "speculative").iloc[0]
    speedup = corpus_speedup(*([ssd[name]] for name in ("base_lm_seconds", "base_audio_seconds", "lm_seconds",
                                                        "audio_seconds")))  # fmt: skip
    paper = _paper_speedup(ssd.tolerance, ssd.draft_length)
    return _versus([
        ("speed-up of the LM, this sentence", None if pd.isna(paper) else paper, speedup, None, None, 2),
        ("accepted / drafted tokens, this sentence", "not given", ssd.acceptance_rate, None, None, 2),
    ])  # fmt: skip


def _paper_speedup(tolerance: float, draft_length: float) -> float:
    """The paper's speed-up at a setting of its Table 3 (all at L_d 3); NaN elsewhere."""
    known = draft_length == PAPER_LENGTH and tolerance in PAPER_TABLE3.index
    return paper_line(PAPER_TABLE3.loc[tolerance])["paper speed-up"] if known else np.nan


# Text


DIGITS = {"L_d": 0, "WER %": 1, "CER %": 1, "NMOS": 2, "OVRL": 2, "SIG": 2, "BAK": 2, "SS": 2, "text": 4, "prefill": 4,
          "draft": 4, "verify": 4, "rest": 4, "codec": 4, "LM-RTF": 3, "RTF": 3, **{f"{phase} share %": 1 for phase in PHASES}, "LM share %": 1, "speed-up": 2,
          "speed-up a token": 2, "RTF speed-up": 2, "acceptance": 2, "tokens a target call": 2, "alpha": 2,
          "draft / target step": 2, "verification / target step": 2, "tokens a round": 2, "measured": 2, "formula": 2,
          "positions": 2, "costs": 2, "measured / formula": 2, "measured / costs": 2, "prefill %": 1, "loop %": 1,
          "left %": 1, "n": 0}  # fmt: skip


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Rounded text, each interval in the cell of its number, the paper's (if any) in a line below."""
    columns = [name for name in DIGITS if name in table]
    lines, names = [], []
    for name, line in table.iterrows():
        names.append(name if isinstance(name, str) else f"{name:g}")
        lines.append([_cell(line, column) for column in columns])
        paper = {c: line[f"paper {c}"] for c in columns if f"paper {c}" in line and pd.notna(line[f"paper {c}"])}
        if paper:
            names.append(f"*{names[-1]}, paper*")
            lines.append([f"{paper[c]:.{DIGITS[c]}f}" if c in paper else "" for c in columns])
    return pd.DataFrame(lines, index=pd.Index(names, name=table.index.name), columns=columns)


def _cell(line: pd.Series, name: str) -> str:
    bounds = [line.get(f"{name.removesuffix(' %')}_{end}") for end in ("low", "high")]
    return _number(line[name], bounds, DIGITS[name])


def _number(value: float, bounds, digits: int) -> str:
    if pd.isna(value):
        return "–"
    known = all(bound is not None and pd.notna(bound) for bound in bounds)
    return f"{value:.{digits}f}" + (" [{:.{d}f}, {:.{d}f}]".format(*bounds, d=digits) if known else "")


def readable_quality(table: pd.DataFrame) -> pd.DataFrame:
    """The differences as text, with their verdicts."""
    digits = {m.name: m.digits for m in statistics.MEASURES} | {"length ratio": 3}
    made = [
        {"measure": line.measure, "SSD or draft - autoregressive": _number(line.difference, (line.low, line.high), digits[line.measure]),
         "margin": "–" if pd.isna(line.margin) else f"± {line.margin:g}", "verdict": line.verdict, "n": line.n}
        for line in table.itertuples()
    ]  # fmt: skip
    return pd.DataFrame(made, index=table.index)


def readable_acceptance(table: pd.DataFrame) -> pd.DataFrame:
    made = [
        {"at": line.value if isinstance(line.value, str) else f"{line.value:g}",
         "accepted / judged": _number(line.acceptance, (line.low, line.high), 3),
         "accepted / drafted": "–" if pd.isna(line.of_drafted) else f"{line.of_drafted:.3f}",
         "judged": line.judged, "n": line.n}
        for line in table.itertuples()
    ]  # fmt: skip
    return pd.DataFrame(made, index=table.index)


def markdown(table: pd.DataFrame) -> str:
    """A pipe table of a frame of strings, its index first."""
    head = [table.index.name or "", *table.columns]
    lines = [head, ["---"] + ["--:"] * len(table.columns)]
    lines += [[name, *cells] for name, cells in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def save(table: pd.DataFrame, folder: Path, name: str, text: str) -> None:
    """<folder>/tables/<name>.csv with all digits, <name>.md to read."""
    write_text(Path(folder) / "tables" / f"{name}.csv", table.to_csv())
    write_text(Path(folder) / "tables" / f"{name}.md", text)


# Where rows come from


def provenance(folder: Path) -> dict:
    """provenance.json of a results folder."""
    path = Path(folder) / "provenance.json"
    if not path.exists():
        raise InputError(f"{path} is missing: `ssd-repro run` makes it")
    return json.loads(path.read_text("utf-8"))


def rows_of_run(folder: Path, notebook: str) -> tuple[pd.DataFrame, dict]:
    """The rows of the run that provenance.json tells of, and that entry of it."""
    about = provenance(folder).get(notebook)
    if about is None:
        raise InputError(f"{folder}/provenance.json tells of no {notebook}: run that notebook first")
    known = rows_of_folder(folder)
    lost = [key for key in about["keys"] if key not in known]
    if lost:
        raise InputError(f"{folder}/rows lacks {len(lost)} rows of that run: run {notebook} again")
    return to_frame(known[key] for key in about["keys"]), about


def source_line(folder: Path, about: dict, rows: pd.DataFrame) -> str:
    """One sentence under a table: hardware, command, commit."""
    commit = (about["commit"] or "unknown")[:10] + (" with local changes" if about["dirty"] else "")
    processes, threads = rows.processes.max(), f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    command = f"ssd-repro run --profile {about['profile']}"
    if processes > 1:
        threads, command = f"{threads} in each of {processes} processes", f"{command} --processes {processes}"
    return (
        f"{about['date'][:10]}, {about['chip']}, {threads}, torch {about['torch']}, commit {commit}, voice "
        f"{about['weights']}: `{command}` -> `{_below(folder)}`."
    )


def _below(folder: Path) -> str:
    """A results folder's name from the checkout or the working directory on, where it lies there."""
    for root in (source_tree(), Path.cwd()):
        if root and Path(folder).resolve().is_relative_to(root):
            return Path(folder).resolve().relative_to(root).as_posix()
    return Path(folder).as_posix()


def put_between(text: str, name: str, inside: str) -> str:
    """Replace what stands between <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise InputError(f"the markers {begin} and {end} are missing")
    return text.partition(begin)[0] + f"{begin}\n{inside.strip()}\n{end}" + text.partition(end)[2]
