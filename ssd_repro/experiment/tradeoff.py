"""What speed costs in words: speed-up over word error rate of everything that was measured and scored, and the paper's.

A table from rows and its figure; nothing is measured here.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import pandas as pd
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MultipleLocator, NullLocator

from . import paper, statistics, tables
from .statistics import ratio_of_sums
from .style import DRAFT, SPEEDUP, TARGET, WER, colour, hollow, legend_below, maths, titled
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


EDGE = 1.3  # the axis ends this far beyond all but the paper's draft, which an arrow at the edge then names
MARKS = "osv^D"  # of a drafter's systems that differ in more than beta


def draw(table: pd.DataFrame, ax) -> None:
    """``of_rows`` -> speed-up over WER, one mark per system, each of SSD's with its beta; the paper's hollow."""
    here, theirs = table[table["of"] == "here"], table[table["of"] == "paper"]
    far = theirs[theirs["WER %"] > EDGE * table["WER %"].drop(theirs.index[1]).max()]
    for system, line in here.iterrows():
        light = {"color": colour(system), "alpha": 0.22, "linewidth": 3, "zorder": 1}
        ax.vlines(line["WER %"], line["speed-up_low"], line["speed-up_high"], **light)
        ax.hlines(line["speed-up"], line["WER_low"], line["WER_high"], **light)
    used = {}  # colour -> how many systems have it
    for name, points in here[here.beta.notna()].groupby(_system, sort=False):
        shade = colour(points.index[0])
        used[shade] = used.get(shade, -1) + 1
        style = {"color": shade, "marker": MARKS[used[shade] % len(MARKS)], "markersize": 7, "zorder": 4}
        _path(ax, points, linestyle="-", linewidth=1.2, label=maths(name), **style)
    ssd = theirs[theirs.beta.notna()]
    _path(ax, ssd, linestyle="--", linewidth=1, label=maths(f"SSD of the paper, L_d {paper.LENGTH}"), **hollow("SSD"))
    labels = [(line, f"{line.beta:g}", colour(name)) for name, line in here[here.beta.notna()].iterrows()]
    labels += [(ssd.loc[end], f"{ssd.beta[end]:g}", "0.35") for end in (ssd.beta.idxmin(), ssd.beta.idxmax())]
    for part, own in ((here, True), (theirs.drop(far.index), False)):
        for system, line in part[part.beta.isna()].iterrows():
            style = {"color": colour(system), "marker": "o", "markersize": 7, "zorder": 4} if own else hollow(system)
            ax.plot(line["WER %"], line["speed-up"], linestyle="", **style)
            what = {"autoregressive": "target alone", "draft": "draft alone"}[system.lower().split()[-1]]
            labels.append((line, what if own else f"the paper's {what.split()[0]}", colour(system)))
    ax.axhline(1, color=TARGET, linestyle=":", linewidth=0.8, zorder=0)
    ax.set(xlabel=f"{WER} (left is better)", ylabel=f"{SPEEDUP} (up is better)")
    ax.set_xlim(0, 1.04 * max(table["WER %"].drop(far.index).max(), here["WER_high"].max()))
    ax.set_yscale("log")
    ax.margins(y=0.08)
    ax.yaxis.set_major_locator(MultipleLocator(0.25))
    ax.yaxis.set_major_formatter("{x:.2f}")
    ax.yaxis.set_minor_locator(NullLocator())
    for _, line in far.iterrows():
        text = f"the paper's draft: {line['WER %']:.1f} %, {number(line['speed-up'], 2)} times"
        edge, y = ax.get_xlim()[1], line["speed-up"]
        arrow = {"arrowstyle": "-|>", "color": DRAFT}
        ax.annotate(text, (edge, y), (-26, 0), textcoords="offset points", ha="right", va="center", arrowprops=arrow)
    ax.text(0.01, 0.98, maths("numbers: beta"), transform=ax.transAxes, va="top", color="0.4", style="italic")
    ax.grid(alpha=0.2)
    legend_below(ax)
    titled(ax, _bought(here, theirs))
    _place(ax, labels, table)


def _system(name: str) -> str:
    """A system's name without its beta; the paper's draft is named."""
    name = re.sub(r", beta [\d.]+", "", name)
    return name if "drafter" in name else name.replace("SSD", "SSD, the paper's draft")


def _path(ax, points: pd.DataFrame, **style) -> None:
    points = points.sort_values("beta")
    ax.plot(points["WER %"], points["speed-up"], **style)


def _place(ax, labels: list[tuple], table: pd.DataFrame) -> None:
    """(line, text, colour): each text beside its point, where it covers fewest points, texts and lines."""
    ax.figure.draw_without_rendering()  # the layout is known only then
    marks = ax.transData.transform(table[["WER %", "speed-up"]].to_numpy(float))
    lines = np.concatenate([_dense(line.get_path().interpolated(40), line) for line in ax.lines[:-1]])
    taken, renderer, scale = [], ax.figure.canvas.get_renderer(), ax.figure.dpi / 72
    for line, text, shade in labels:
        made = ax.annotate(maths(text), (line["WER %"], line["speed-up"]), color=shade, fontsize=9, zorder=5)
        made.set(path_effects=[withStroke(linewidth=2.5, foreground="white")], ha="center", va="center")
        size = made.get_window_extent(renderer)
        half = np.array([size.width, size.height]) / 2
        own, best = ax.transData.transform((line["WER %"], line["speed-up"])), None
        for far, turn in itertools.product((5, 8, 12), np.arange(0, 2 * np.pi, np.pi / 8)):
            centre = own + (half + far * scale) * (np.cos(turn), np.sin(turn))
            low, high = centre - half - scale, centre + half + scale
            over = sum(np.all((low < b) & (high > a)) for a, b in taken)
            covered = np.all((marks > low - 3 * scale) & (marks < high + 3 * scale), 1).sum()
            crossed = np.all((lines > low) & (lines < high), 1).sum()
            outside = not (ax.bbox.contains(*low) and ax.bbox.contains(*high))
            cost = (20 * over + 10 * covered + 50 * outside + 0.2 * crossed + 0.4 * far, centre, (low, high))
            best = cost if best is None or cost[0] < best[0] else best
        made.set_position(ax.transData.inverted().transform(best[1]))
        taken.append(best[2])


def _dense(path, line) -> np.ndarray:
    """Points along a drawn line, in pixels."""
    return line.get_transform().transform(path.vertices)


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
