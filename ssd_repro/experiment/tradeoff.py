"""What speed costs in words: speed-up over word error rate of everything that was measured and scored, and the paper's.

A table from rows and its figure; nothing is measured here.
"""

from __future__ import annotations

import pandas as pd

from . import paper, statistics, tables
from .statistics import ratio_of_sums
from .style import SPEEDUP, TARGET, WER, colour, hollow, legend_below, maths, titled
from .tables import NAMES, by_system, estimate, number, of_method, speedup


def of_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Speed-up and WER of every scored system, SSD's one row per drafter, beta and L_d; then the paper's settings.

    WER rise: in points over the autoregressive target on the same utterances. drafter: '' is the paper's draft.
    """
    scored = rows[rows.words.notna()].sort_values(["text_id", "voice", "seed"])
    base = of_method(scored, "autoregressive")
    lines = []
    for name, ours in ({NAMES["autoregressive"]: base} | by_system(scored)).items():
        first, (same, target) = ours.iloc[0], _same_utterances(ours, base)
        rise = statistics.difference(same, target, statistics.MEASURES[0])
        wer = estimate("WER %", ratio_of_sums, ours.word_errors, ours.words, scale=100)
        over = {"WER rise": rise["difference"], "WER rise_low": rise["low"], "WER rise_high": rise["high"]}
        drafter = first.get("drafter")
        setting = {"drafter": "" if pd.isna(drafter) else drafter, "beta": first.tolerance, "L_d": first.draft_length}
        speed = speedup("speed-up", ours, "lm_seconds", "audio_seconds")
        lines.append({"system": name, "of": "here", **setting, **speed, **wer, **over, "n": len(ours)})
    return pd.DataFrame([*lines, *_of_paper()]).set_index("system")


def _same_utterances(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of both the rows of those utterances that both have, for a notebook may take more of them than another."""
    ours, theirs = (rows.set_index(["text_id", "voice", "seed"]) for rows in (ours, theirs))
    both = ours.index.intersection(theirs.index)
    return ours.loc[both].reset_index(), theirs.loc[both].reset_index()


def _of_paper() -> list[dict]:
    """The paper's systems and tolerances as lines of ``of_rows``; WER rise: in points over its target."""
    wer, lines = paper.NUMBERS["WER %"], []
    for setting, numbers in paper.NUMBERS.iterrows():
        beta = {"beta": setting, "L_d": paper.LENGTH} if isinstance(setting, float) else {}
        name = f"SSD, beta {setting:g}, L_d {paper.LENGTH}" if beta else setting
        rise = {"WER rise": numbers["WER %"] - wer["autoregressive"]}
        lines.append({"system": f"the paper's {name}", "of": "paper", "drafter": "", **beta, **rise, **numbers})
    return [{k: v for k, v in line.items() if k not in ("NMOS", "SS", "LM-RTF")} for line in lines]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    return tables.readable(table.drop(columns=["of", "drafter"]))


def draw(table: pd.DataFrame, ax) -> None:
    """``of_rows`` -> speed-up over WER, both with intervals; the paper's hollow."""
    here, theirs = table[table["of"] == "here"], table[table["of"] == "paper"]
    for system, line in here.iterrows():
        ax.vlines(line["WER %"], line["speed-up_low"], line["speed-up_high"], color=colour(system), alpha=0.6)
        ax.hlines(line["speed-up"], line["WER_low"], line["WER_high"], color=colour(system), alpha=0.6)
    for part, own in ((here, True), (theirs, False)):
        ssd = part[part.beta.notna()]
        for (drafter, length), points in ssd.groupby(["drafter", "L_d"], sort=False):
            points, shade = points.sort_values("beta"), colour(points.index[0])
            style = {"color": shade, "marker": "o"} if own else hollow("SSD")
            name = f"SSD, {drafter} drafter" if drafter else "SSD, the paper's draft"
            label = f"{name}, L_d {length:g}" if own else f"hollow: the paper's; SSD, L_d {length:g}"
            ax.plot(points["WER %"], points["speed-up"], linestyle="-" if own else "--", label=maths(label), **style)
        for system, line in part[part.beta.isna()].iterrows():
            style = {"color": colour(system), "marker": "o"} if own else hollow(system)
            label = {"autoregressive": "target alone"}.get(system.lower(), f"{system.lower()} alone")
            ax.plot(line["WER %"], line["speed-up"], linestyle="", label=label if own else None, **style)
    _betas(ax, table)
    ax.axhline(1, color=TARGET, linestyle=":", linewidth=0.8)
    ax.text(0.01, 0.99, "better: up and left", transform=ax.transAxes, va="top", color="0.4", style="italic")
    ax.set(xlabel=WER, ylabel=SPEEDUP)
    ax.set_xlim(left=0)
    ax.grid(alpha=0.3)
    legend_below(ax)
    titled(ax, _bought(here, theirs))


def _betas(ax, table: pd.DataFrame) -> None:
    """Beside each point of ours its beta, unless another label stands there; of the paper's first and last.

    Those of the paper's draft stand on the right of their points, those of other drafters on the left.
    """
    taken, points = [], table[table.beta.notna()]
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.3}
    aside = {"textcoords": "offset points", "fontsize": 8.5, "bbox": ground}
    for system, line in points[points["of"] == "here"].iterrows():
        x, y, other = line["WER %"], line["speed-up"], bool(line.drafter)
        if all(abs(x - a) > 1 or abs(y - b) > 0.05 or other != c for a, b, c in taken):
            taken.append((x, y, other))
            place = {"xytext": (-6, 5) if other else (7, -11), "ha": "right" if other else "left"}
            ax.annotate(maths(f"beta {line.beta:g}"), (x, y), color=colour(system), **place, **aside)
    theirs = points[points["of"] == "paper"]
    for end, below in ((theirs.beta.idxmin(), -15), (theirs.beta.idxmax(), 8)):
        line = theirs.loc[end]
        ax.annotate(maths(f"beta {line.beta:g}"), (line["WER %"], line["speed-up"]), (0, below), ha="center", **aside)


def _bought(here: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """The paper's setting here and there, speed-up and rise in WER, and the fastest setting without loss."""
    said, exact = [], here[here.beta == 0]
    for part, where in ((here, "here"), (theirs, "in the paper")):
        at = part[(part.drafter == "") & (part.beta == paper.TOLERANCE) & (part.L_d == paper.LENGTH)]
        for _, line in at.iterrows():
            faster = number(line["speed-up"], 2)
            said.append(f"{faster} times the speed for {line['WER rise']:+z.1f} points of WER {where}")
    text = f"SSD, beta {paper.TOLERANCE}, L_d {paper.LENGTH}: {', '.join(said)}"
    for system, line in exact.nlargest(1, "speed-up").iterrows():
        text += f"; lossless at best {number(line['speed-up'], 2)} times ({system.removeprefix('SSD, ')})"
    return text
