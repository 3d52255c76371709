"""How figures look: a colour for each system, typeset symbols, and a title that says the finding."""

from __future__ import annotations

import re
import textwrap

import numpy as np
import seaborn as sns

PALETTE = sns.color_palette("colorblind")
WIDTH = 8  # inches: at the 800 pixels of a page ten points of text are 14 pixels
TARGET, DRAFT, SSD = "0.3", PALETTE[1], PALETTE[0]
COLOURS = {  # part of a system's name -> its colour in every figure; the first that fits
    "transformers": PALETTE[7],
    "hidden": PALETTE[2],
    "block drafter": PALETTE[9],
    "on-policy": PALETTE[3],
    "early-exit": PALETTE[5],
    "drafter": PALETTE[4],
    "SSD": SSD,
    "draft": DRAFT,
    "autoregressive": TARGET,
}
SYMBOLS = {"beta": r"$\beta$", "alpha": r"$\alpha$", "L_d": "$L_d$"}
NAMES = "|".join(SYMBOLS)
SPEEDUP = "speed-up over the target, times"
WER = "word error rate, %"


def colour(system: str):
    return next(found for part, found in COLOURS.items() if part.lower() in system.lower())


def hollow(system: str) -> dict:
    """The paper's points: the colour says which system, an empty diamond that it is the paper's."""
    return {"color": colour(system), "marker": "D", "markerfacecolor": "white", "markersize": 7, "zorder": 3}


def maths(text: str) -> str:
    """beta, L_d and alpha typeset, and "= " before their number."""
    return re.sub(rf"\b({NAMES})\b([ \xa0]\d)?", lambda m: SYMBOLS[m[1]] + (m[2] and f" = {m[2][1]}" or ""), text)


def titled(axes, finding: str) -> None:
    """The finding above the whole figure, in lines that fit its width."""
    figure = np.ravel(axes)[0].figure
    unbroken = re.sub(rf"\b({NAMES}) (\d)", "\\1\xa0\\2", finding)
    lines = textwrap.fill(unbroken, int(10.7 * figure.get_figwidth()))
    figure.suptitle(maths(lines), x=0.01, ha="left", fontsize=12)


def legend_below(axes, ncols: int = 2) -> None:
    """One legend for all of the axes below the figure, each label once."""
    every = list(np.ravel(axes))
    found = {label: line for ax in every for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    every[0].figure.legend(found.values(), found, loc="outside lower left", ncols=ncols, frameon=False)
