"""README's first screen, made from the tables of one results folder: what was measured, four to five rows, and why.

Beside it a paragraph on each machine of ELSEWHERE, from the folders next to it, and the words of the lossless drafter,
on more utterances where ``voice`` has them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from ..errors import InputError
from . import paper
from .conclusions import value
from .provenance import all_provenance, machine
from .tables import number

BEGINS = ("**Measured:**", "| | WER %, here |", "**Why:**")  # of the three paragraphs
ELSEWHERE = {"**On a GPU**": "gpu", "**On another machine**": "xeon"}  # how a paragraph begins -> its results folder
BETA = 0.4  # of the paper's Table 1


def renew(text: str, folder: Path) -> str:
    """A page with its three paragraphs anew. InputError if it lacks one.

    A page that has none of them, and a folder whose Table 1 or theory is missing, change nothing.
    """
    files = [Path(folder) / "tables" / f"{name}.csv" for name in ("table1", "theory")]
    if not any(begin in text for begin in BEGINS) or not all(file.is_file() for file in files):
        return text
    table, theory = (pd.read_csv(file) for file in files)
    paragraphs = text.split("\n\n")
    about = all_provenance(folder).get("01_table1", {})
    voice = about.get("weights")
    words = _words(Path(folder).parent / "voice" / "tables" / "lossless.csv", voice)
    words = words or _words(Path(folder) / "tables" / "equivalence.csv")
    made = dict(zip(BEGINS, made_of(table.set_index("system"), theory, words, about), strict=True))
    for begin, name in ELSEWHERE.items():
        there = Path(folder).parent / name
        if begin in text and (other := there / "tables" / "table1.csv").is_file():
            about = all_provenance(there)["01_table1"]
            made[begin] = _elsewhere(begin, pd.read_csv(other).set_index("system"), about, voice)
    for begin, paragraph in made.items():
        places = [i for i, old in enumerate(paragraphs) if old.startswith(begin)]
        if len(places) != 1:
            raise InputError(f"the page has {len(places)} paragraphs that begin with {begin!r}; it must have one")
        paragraphs[places[0]] = paragraph
    return "\n\n".join(paragraphs)


def made_of(
    table: pd.DataFrame, theory: pd.DataFrame, words: dict[str, str], about: dict | None = None
) -> tuple[str, str, str]:
    """table: Table 1 by system; theory: the table of that name; words: ``_words``; about: the entry of
    provenance.json that made Table 1 -> the three paragraphs.
    """
    lossless, own = _fastest(table, "beta 0, "), _fastest(table, f"on-policy drafter, beta {BETA:g}, ")
    rise = paper.NUMBERS.loc[BETA]["WER %"] - paper.NUMBERS.loc["autoregressive"]["WER %"]
    kept = table[table["WER %"] <= table.loc["Autoregressive"]["WER %"] + rise]  # it costs no more words than theirs
    tolerant = _fastest(kept, f"beta {BETA:g}, ")
    rows = {
        "target alone (autoregressive)": (table.loc["Autoregressive"], paper.NUMBERS.loc["autoregressive"]),
        "draft alone": (table.loc["Draft"], paper.NUMBERS.loc["draft"]),
        f"SSD, beta {BETA:g}, the paper's recipe": (table.loc["SSD"], paper.NUMBERS.loc[BETA]),
    }
    if own is not None:
        rows[f"SSD, beta {BETA:g}, the same layers trained on the target's own speech"] = (own, None)
    if lossless is not None:
        rows[lossless.name] = (lossless, paper.NUMBERS.loc[0.0])
    if tolerant is not None and (own is None or tolerant.name != own.name):
        rows[tolerant.name] = (tolerant, None)
    said = "" if lossless is None else words.get(lossless.name, "")
    where = f" on {_where(about, table)}," if about else ""
    return _claim(table, lossless, where) + said, _table(rows), _why(table.loc["SSD"], theory)


def _words(path: Path, voice: str | None = None) -> dict[str, str]:
    """System -> what its words were, on how many utterances: of ``equivalence.of_rows`` at ``path``, of ``voice``."""
    found, said = pd.read_csv(path) if path.is_file() else pd.DataFrame(), {}
    if voice:
        found = found[found.voice == voice] if "voice" in found else found[:0]
    for _, row in found[found.n > 0].iterrows() if len(found) else ():
        shown = number(row["WER difference"], 1, row["WER difference_low"], row["WER difference_high"])
        verdict = {"yes": "equivalent within one point", "no": "not equivalent within one point"}
        verdict = verdict.get(row.equivalent, "equivalence within one point not shown")
        said[row.system] = (
            f" Its words, on {row.n} utterances: {shown} points of WER from the target's (90 %), {verdict}."
        )
    return said


def _fastest(table: pd.DataFrame, setting: str) -> pd.Series | None:
    """Of the systems with a drafter beyond the paper's at this setting, if there are any."""
    some = table[[setting in f"{name}, " for name in table.index]]
    return None if some.empty else some.loc[some["speed-up"].idxmax()]


def _where(about: dict, table: pd.DataFrame) -> str:
    """The machine, how it computed, and on how many sentences."""
    chip = re.sub(r"\(R\)| Processor", "", machine(about))
    precision = about.get("precision") or about["parameters"]["precision"]
    how = ("" if precision == "fp32" else f"{precision}, ") + ("CUDA graphs, " if about["device"] == "cuda" else "")
    return f"{chip}, {how}{table.loc['Autoregressive'].n:g} sentences"


def _claim(table: pd.DataFrame, lossless: pd.Series | None, where: str) -> str:
    ssd, alone, theirs = table.loc["SSD"], table.loc["Autoregressive"], paper.NUMBERS["speed-up"]
    said = (
        f"{BEGINS[0]}{where} with the paper's recipe at beta {BETA:g} speech is made {value(ssd, 'speed-up')} times as "
        f"fast as by the target alone (the paper: {theirs[BETA]:.2f}), and its word error rate goes from "
        f"{alone['WER %']:.1f} to {ssd['WER %']:.1f} %."
    )
    if lossless is None:
        return said
    return (
        f"{said} Without any loss (beta 0: exactly the target's distribution) the best drafter here makes it "
        f"{value(lossless, 'speed-up')} times as fast (the paper: {theirs[0.0]:.2f})."
    )


def _elsewhere(begin: str, table: pd.DataFrame, about: dict, voice: str | None) -> str:
    """table: its Table 1 by system; about: the entry of provenance.json that made it; voice: this folder's."""
    ssd, alone, lossless = table.loc["SSD"], table.loc["Autoregressive"], _fastest(table, "beta 0, ")
    other = f", with another voice than above, {about['weights']}" if voice != about["weights"] else ""
    said = (
        f"{begin} ({_where(about, table)}{other}) the paper's recipe is {value(ssd, 'speed-up')} times as "
        "fast as the target alone"
    )
    if (own := _fastest(table, f"on-policy drafter, beta {BETA:g}, ")) is not None:
        said += (
            f", the same layers trained on the target's own speech {value(own, 'speed-up')} times, at a WER of "
            f"{own['WER %']:.1f} % against {alone['WER %']:.1f} %"
        )
    tolerant = _fastest(table, f"drafter, beta {BETA:g}, ")
    return (
        f"{said}; without any loss the best drafter makes it {value(lossless, 'speed-up')} times as fast, at beta "
        f"{BETA:g} {value(tolerant, 'speed-up')} times, at a WER of {tolerant['WER %']:.1f} %."
    )


def _table(rows: dict[str, tuple[pd.Series, pd.Series | None]]) -> str:
    lines = [f"{BEGINS[1]} speed-up, here | WER %, paper | speed-up, paper |", "| --- | --: | --: | --: | --: |"]
    for name, (ours, theirs) in rows.items():
        wer, gain = ("–", "–") if theirs is None else (f"{theirs['WER %']:.1f}", f"{theirs['speed-up']:.2f}")
        here, gain = ("1", "1") if ours.name == "Autoregressive" else (value(ours, "speed-up"), gain)
        lines.append(f"| {name} | {ours['WER %']:.1f} | {here} | {wer} | {gain} |")
    return "\n".join(lines)


def _why(ssd: pd.Series, theory: pd.DataFrame) -> str:
    at = theory[(theory.beta == BETA) & (theory.L_d == paper.LENGTH)]
    said = (
        f"{BEGINS[2]} the speed-up is (tokens per target call) / (L_d c + V), where c is the price of a draft step and "
        "V that of a verification, both in steps of the target."
    )
    if len(at) != 1:
        return said
    at, tokens = at.iloc[0], ssd["tokens per target call"]
    c, v = at["draft / target step"], at["verification / target step"]
    return (
        f"{said} Here a target call gives {tokens:.2f} tokens, c is {c:.2f} and V {v:.2f}: {tokens:.2f} / "
        f"({paper.LENGTH} x {c:.2f} + {v:.2f}) = {tokens / (paper.LENGTH * c + v):.2f}, and reading the text first "
        f"(both models' prefill, which no draft shortens) is {at['prefill %']:.0f} % of SSD's time."
    )
