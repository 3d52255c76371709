"""Figures of what changes with beta, L_d and the rest: tables in, axes out, every title computed from the table."""

from __future__ import annotations

import numpy as np
import pandas as pd

from . import paper
from .style import PALETTE, SPEEDUP, SSD, TARGET, WER, hollow, legend_below, maths, titled
from .tables import number


def _over_setting(ax, x, table: pd.DataFrame, name: str, label: str) -> None:
    """A column of a table over the setting x, with its interval, and the paper's where known."""
    short = name.removesuffix(" %")
    ax.vlines(x, table[f"{short}_low"], table[f"{short}_high"], color=SSD, linewidth=2)
    ax.plot(x, table[name], "o-", color=SSD, markersize=4, label="SSD here, 95 % interval")
    theirs = table.get(f"paper {name}", pd.Series(np.nan, table.index))
    if (known := theirs.notna().to_numpy()).any():
        ax.plot(np.asarray(x)[known], theirs[known], linestyle="--", label="SSD, the paper's", **hollow("SSD"))
    ax.set(xlabel=maths(label))
    ax.grid(axis="y", alpha=0.3)


def table3(table: pd.DataFrame, axes) -> None:
    """``tables.table3`` -> speed-up (left) and WER (right) over beta; dotted: the autoregressive target."""
    ssd, base = table.iloc[1:], table.iloc[0]
    for ax, name in zip(axes, ("speed-up", "WER %"), strict=True):
        _over_setting(ax, [float(beta) for beta in ssd.index], ssd, name, "tolerance beta")
        ax.axhline(base[name], color=TARGET, linestyle=":", label="the target alone, here")
    axes[1].axhline(base["paper WER %"], color=TARGET, linestyle="--", linewidth=0.8, label="the target, the paper's")
    for ax, label, better in ((axes[0], SPEEDUP, "up"), (axes[1], WER, "down")):
        ax.set_ylabel(label)
        ax.set_title(f"{better} is better", loc="left", fontsize=9, color="0.4")
    axes[1].set(ylim=(0, 1.1 * np.nanmax(table[["WER_high", "paper WER %"]])))
    legend_below(axes)
    first, last = ssd.iloc[0], ssd.iloc[-1]
    text = f"From beta {ssd.index[0]} to beta {ssd.index[-1]} the speed-up goes from {first['speed-up']:.2f} to "
    text += f"{last['speed-up']:.2f}"
    if ssd["WER %"].notna().all():
        text += f" and the WER from {first['WER %']:.1f} to {last['WER %']:.1f} % "
        text += f"(the target alone: {base['WER %']:.1f} %)"
    titled(axes, text)


def figure3(table: pd.DataFrame, axes) -> None:
    """``tables.figure3`` -> speed-up (left), acceptance rate (right) over L_d."""
    label, best = "drafted tokens per round, L_d", table["speed-up"].fillna(0).idxmax()
    for ax, name in zip(axes, ("speed-up", "acceptance"), strict=True):
        _over_setting(ax, table.index, table, name, label)
        ax.set_xticks(list(table.index))
    axes[0].axhline(1, color=TARGET, linestyle=":", label="the target alone")
    axes[0].set(ylabel=SPEEDUP)
    axes[1].set(ylabel="accepted / drafted tokens")
    legend_below(axes, 3)
    fastest = number(*table.loc[best, ["speed-up"]], 2, *table.loc[best, ["speed-up_low", "speed-up_high"]])
    ends = [f"{number(table['acceptance'].iloc[end], 2)} at L_d {table.index[end]}" for end in (0, -1)]
    titled(
        axes,
        f"Fastest at L_d {best}, {fastest} times the target's speed (the paper: fastest at L_d {paper.LENGTH}); "
        f"the acceptance rate goes from {ends[0]} to {ends[1]}",
    )


def acceptance(table: pd.DataFrame, ax) -> None:
    """``tables.acceptance`` -> over beta large, by both definitions; all else small, on one zoomed axis."""
    figure, others = ax.figure, [curve for curve in table.index.unique() if curve != "beta"]
    ax.remove()
    axes = figure.subplot_mosaic([["beta"] * len(others), others], height_ratios=[1.15, 1])
    large = table.loc[["beta"]]
    for name, low, high, label, style in (
        ("acceptance", "low", "high", "accepted / judged drafts", "o-"),
        ("of_drafted", "of_drafted_low", "of_drafted_high", "accepted / drafted tokens", "s--"),
    ):
        ax = axes["beta"]
        away = large[name] - large[low], large[high] - large[name]
        how = {"color": SSD, "markersize": 3, "capsize": 5}
        ax.errorbar(large.value.astype(float), large[name], away, fmt=style, label=f"{label}, 95 % interval", **how)
    ax.set(xlabel=maths("tolerance beta"), ylabel="acceptance rate")
    ax.legend(frameon=False, loc="lower right")
    ax.grid(axis="y", alpha=0.3)
    small = table[table.index != "beta"]
    ends = small[["acceptance", "low", "high"]]
    room = 0.05 * (ends.max().max() - ends.min().min()) + 0.005
    for curve in others:
        _small(axes[curve], small.loc[[curve]], curve, curve is not others[0])
        axes[curve].set_ylim(ends.min().min() - room, ends.max().max() + room)
    axes[others[0]].set_ylabel("accepted / judged")
    titled(axes["beta"], _what_moves(table))


def _small(ax, part: pd.DataFrame, curve: str, inner: bool) -> None:
    """One of the small multiples."""
    named = isinstance(part["value"].iloc[0], str)
    x = range(len(part)) if named else part["value"].astype(float)
    ax.vlines(x, part["low"], part["high"], color=SSD, linewidth=2)
    ax.plot(x, part["acceptance"], "o" if named else "o-", color=SSD, markersize=4)
    if named:
        ax.set_xticks(x, [value.replace("_", " ") for value in part["value"]], rotation=90, fontsize=8)
        ax.set_xlim(-0.6, len(part) - 0.4)
    elif (part["value"] % 1 == 0).all():
        ax.set_xticks(part["value"].astype(int)[:: 1 + len(part) // 5])
    else:
        ax.set_xticks(ends := [x.min(), x.max()], [f"{end:g}" for end in ends])
    ax.set_title(maths(SMALL.get(curve, curve)), loc="left", fontsize=9)
    ax.tick_params(labelleft=not inner)
    ax.grid(axis="y", alpha=0.3)


SMALL = {
    "position in the draft": "position in\nthe draft",
    "along the utterance": "along the\nutterance, 0–1",
    "what the token carries": "what it\ncarries",
}


def _what_moves(table: pd.DataFrame) -> str:
    """Over beta from where to where, and what else moves the acceptance most."""
    beta = table.loc[["beta"]]
    ends = [f"{beta['acceptance'].iloc[end]:.2f} at beta {beta['value'].iloc[end]:g}" for end in (0, -1)]
    rates = table[table.index != "beta"].groupby(level=0).acceptance
    widest = (rates.max() - rates.min()).nlargest(1)
    rest = "".join(f"; with {name} it varies by {by:.2f}, with all else less" for name, by in widest.items())
    return f"Share of the judged drafts that is accepted: {ends[0]}, {ends[1]}{rest}"


PREDICTIONS = {
    "formula": ("o", PALETTE[7], "one acceptance rate, verification = a target step"),
    "positions": ("s", PALETTE[1], "acceptance by position of the draft"),
    "costs": ("D", PALETTE[0], "and the measured cost of verification"),
}


def theory(table: pd.DataFrame, ax) -> None:
    """``tables.measured_and_predicted`` -> measured over predicted speed-up; on the line theory is right."""
    if table["measured"].isna().all():  # nothing was spoken
        return
    for name, (marker, shade, label) in PREDICTIONS.items():
        ax.plot(table[name], table["measured"], marker, color=shade, label=label, alpha=0.9)
    ax.vlines(table["costs"], table["measured_low"], table["measured_high"], color=PALETTE[0], linewidth=1.5)
    table = table.reset_index()
    for line in table[(table.beta == paper.TOLERANCE) & (table.L_d == paper.LENGTH)].itertuples():
        aside = {"textcoords": "offset points", "arrowprops": {"arrowstyle": "-", "color": "0.4"}}
        label = maths(f"the paper's setting,\nbeta {line.beta:g}, L_d {line.L_d}")
        ax.annotate(label, (line.costs, line.measured), (-20, 45), ha="right", va="center", **aside)
    values = table[[*PREDICTIONS, "measured", "measured_low", "measured_high"]]
    low, high = np.nanmin(values), np.nanmax(values)
    ends = low - 0.08 * (high - low) - 0.02, high + 0.08 * (high - low) + 0.02
    ax.plot(ends, ends, color="grey", linestyle=":", label="theory is right")
    ax.set(xlabel="predicted speed-up per token, times", ylabel="measured speed-up per token, times")
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    legend_below(ax)
    ax.grid(alpha=0.3)
    off = {name: (table[name] / table["measured"] - 1).abs().max() for name in PREDICTIONS}
    titled(
        ax,
        f"With the measured costs theory is at most {100 * off['costs']:.0f} % off the measured speed-up, "
        f"with the formula alone {100 * off['formula']:.0f} %",
    )
