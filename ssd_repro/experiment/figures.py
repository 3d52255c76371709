"""Data in, axes out; nothing is measured here. Colours: seaborn's colour-blind palette."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns

from ..files import write_bytes
from ..models.codec import TOKEN_RATE
from .tables import PHASES

PALETTE = sns.color_palette("colorblind")
KINDS = {  # what became of a token, in the order of the lanes from the top
    "sampled": PALETTE[7],
    "accepted": PALETTE[2],
    "bonus": PALETTE[0],
    "resampled": PALETTE[1],
    "rejected": "black",
    "discarded": PALETTE[5],
}
LABELS = {"rejected": "rejected draft", "discarded": "draft after it"}
PHASE_COLOURS = dict(zip(PHASES, (PALETTE[i] for i in (5, 4, 1, 0, 7, 2)), strict=True))
PHASE_LABELS = {"verify": "target", "rest": "rest of the loop"}


def timeline_events(row) -> pd.DataFrame:
    """Every token of a row, drafted or spoken, at its place in the audio: columns seconds, kind.

    In a round that rejects its k-th draft, that one is 'rejected' at the place of the
    'resampled' token, and those drafted after it are 'discarded'.
    """
    events, offset = [], 0.0
    for rounds, count in zip(row["rounds"], row["pieces"], strict=True):
        begin = 0
        for drafted, accepted in rounds or [(0, 0)] * count:
            added = "sampled" if not drafted else "bonus" if accepted == drafted else "resampled"
            kinds = ["accepted"] * accepted + [added]
            if begin + accepted > count:  # an accepted end of speech: nothing was added
                added, kinds = "stopped", kinds[:-1]
            lost = ["rejected"] * (added == "resampled")
            lost += ["discarded"] * (drafted - accepted - len(lost))
            events += [(offset + (begin + i) / TOKEN_RATE, kind) for i, kind in enumerate(kinds)]
            events += [(offset + (begin + accepted + i) / TOKEN_RATE, kind) for i, kind in enumerate(lost)]
            begin += accepted + 1
        offset += count / TOKEN_RATE + row["gap_seconds"]
    return pd.DataFrame(events, columns=["seconds", "kind"])


def timeline(events: pd.DataFrame, ax, title: str = ""):
    """Accepted, resampled and rejected tokens along the audio, as the paper's Figure 2."""
    counts = events.kind.value_counts()
    lanes = [kind for kind in KINDS if counts.get(kind, 0)]
    for y, kind in enumerate(reversed(lanes)):
        times = events.seconds[events.kind == kind]
        ax.eventplot(times, lineoffsets=y, linelengths=0.75, linewidths=1.6, colors=[KINDS[kind]])
    ax.set_yticks(range(len(lanes)), [f"{LABELS.get(k, k)} ({counts[k]})" for k in reversed(lanes)], fontsize=11)
    ax.set_ylim(-0.6, len(lanes) - 0.4)
    ax.set_xlim(left=-0.05)
    ax.set_xlabel("seconds of audio")
    ax.set_title(title, loc="left")
    sns.despine(ax=ax, left=True)
    return ax


def stages(table: pd.DataFrame, ax):
    """Stacked bars from ``tables.stages``: where the time of a synthesis goes."""
    left = np.zeros(len(table))
    for phase, colour in PHASE_COLOURS.items():
        ax.barh(table.index, table[phase], left=left, color=colour, label=PHASE_LABELS.get(phase, phase))
        for y, (seconds, whole) in enumerate(zip(table[phase], table["RTF"], strict=True)):
            if seconds > 0.05 * table["RTF"].max():
                ax.annotate(f"{100 * seconds / whole:.0f} %", (left[y] + seconds / 2, y), ha="center", va="center")
        left += table[phase].to_numpy()
    for y, (_, line) in enumerate(table.iterrows()):
        text = f" RTF {line.RTF:.3f}, LM {line['LM share %']:.0f} %"
        ax.annotate(text, (left[y], y), va="center")
    ax.set_xlim(0, 1.35 * left.max())
    ax.invert_yaxis()
    ax.set_xlabel("seconds of work for one second of audio")
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(PHASES)}
    ax.legend(**above, frameon=False, columnspacing=1.0, handlelength=1.2)
    sns.despine(ax=ax)
    return ax


def _systems_and_paper(ax, table: pd.DataFrame, ours, low, high, theirs, digits: int) -> None:
    """One row per system: ours filled with its interval, below it the paper's hollow."""
    y = np.arange(len(table))
    ax.hlines(y - 0.13, low, high, color=PALETTE[0], linewidth=2)
    filled = {"markersize": 8, "clip_on": False, "zorder": 3}
    ax.plot(ours, y - 0.13, "o", color=PALETTE[0], label="this repository", **filled)
    ax.plot(theirs, y + 0.13, "D", color=PALETTE[1], markerfacecolor="white", markersize=7, label="paper")
    for values, place, above in ((ours, -0.13, 7), (theirs, 0.13, -16)):
        for x, row in zip(values, y, strict=True):
            at = (x, row + place), (0, above)
            ax.annotate(f"{x:.{digits}f}", *at, textcoords="offset points", ha="center")
    ax.set_yticks(y, table.index)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.grid(axis="x", alpha=0.3)
    sns.despine(ax=ax)


def table1(table: pd.DataFrame, axes):
    """``tables.table1`` -> relative LM-RTF (left) and WER (right), each beside the paper's."""
    left, right = axes
    relative = (1 / table[name] for name in ("speed-up", "speed-up_high", "speed-up_low", "paper speed-up"))
    _systems_and_paper(left, table, *relative, 2)
    left.set_xlabel("LM-RTF, autoregressive = 1")
    _systems_and_paper(right, table, *(table[name] for name in ("WER %", "WER_low", "WER_high", "paper WER %")), 1)
    right.set_xlabel("WER, %")
    left.legend(loc="lower left", frameon=False)
    return axes


def _over_setting(ax, x, table: pd.DataFrame, name: str, label: str) -> None:
    """A column of a table over the setting x (its name: ``label``), with its interval, and the paper's where known."""
    short = name.removesuffix(" %")
    ax.vlines(x, table[f"{short}_low"], table[f"{short}_high"], color=PALETTE[0], linewidth=2)
    ax.plot(x, table[name], "o-", color=PALETTE[0], markersize=7, label="this repository")
    theirs = table.get(f"paper {name}", pd.Series(np.nan, table.index))
    if (known := theirs.notna().to_numpy()).any():
        hollow = {"markerfacecolor": "white", "markersize": 7, "label": "paper"}
        ax.plot(np.asarray(x)[known], theirs[known], "D--", color=PALETTE[1], **hollow)
    if name == "speed-up":
        ax.axhline(1, color="grey", linestyle=":")
        ax.legend(frameon=False)
    ax.set(xlabel=label, ylabel="speed-up of the LM" if name == "speed-up" else "WER, %")
    ax.grid(axis="y", alpha=0.3)
    sns.despine(ax=ax)


def table3(table: pd.DataFrame, axes):
    """``tables.table3`` -> speed-up (left) and WER (right) over beta; dotted: the autoregressive target."""
    ssd, base = table.iloc[1:], table.iloc[0]
    for ax, name in zip(axes, ("speed-up", "WER %"), strict=True):
        _over_setting(ax, [float(beta) for beta in ssd.index], ssd, name, "tolerance beta")
    axes[1].axhline(base["WER %"], color=PALETTE[0], linestyle=":")
    axes[1].axhline(base["paper WER %"], color=PALETTE[1], linestyle=":")
    return axes


def figure3(table: pd.DataFrame, axes):
    """``tables.figure3`` -> speed-up (left), acceptance rate (right) over L_d."""
    left, right = axes
    label = "drafted tokens per round, L_d"
    _over_setting(left, table.index, table, "speed-up", label)
    right.plot(table.index, table["acceptance"], "o-", color=PALETTE[2], markersize=7)
    right.set(xlabel=label, ylabel="accepted / drafted", ylim=(0, 1))
    right.grid(axis="y", alpha=0.3)
    sns.despine(ax=right)
    for ax in axes:
        ax.set_xticks(list(table.index))
    return axes


def acceptance(table: pd.DataFrame, axes):
    """``tables.acceptance`` -> a panel for each curve: accepted / judged, with intervals."""
    for ax, curve in zip(axes.flat, table.index.unique(), strict=False):
        part = table.loc[[curve]]
        named = isinstance(part["value"].iloc[0], str)
        x = range(len(part)) if named else part["value"].astype(float)
        ax.vlines(x, part["low"], part["high"], color=PALETTE[0], linewidth=2)
        ax.plot(x, part["acceptance"], "o" if named else "o-", color=PALETTE[0], markersize=6, clip_on=False)
        if named:
            ax.set_xticks(x, [value.replace("_", "\n").replace(" of ", " of\n") for value in part["value"]], fontsize=8)
        elif (part["value"] % 1 == 0).all():
            ax.set_xticks(part["value"].astype(int))
        ax.set_title(curve, loc="left", fontsize=11)
        ax.set_ylim(0, 1)
        ax.grid(axis="y", alpha=0.3)
        sns.despine(ax=ax)
    for ax in axes.flat[table.index.nunique() :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("accepted / judged")
    return axes


PREDICTIONS = {
    "formula": ("o", PALETTE[7], "one acceptance rate, verification = a target step"),
    "positions": ("s", PALETTE[1], "acceptance by position of the draft"),
    "costs": ("D", PALETTE[0], "and the measured cost of verification"),
}


def _spaced(table: pd.DataFrame, column: str, least: float) -> pd.DataFrame:
    """Of rows in the order of ``column`` those that lie ``least`` beyond the one kept before: room for a label."""
    kept: list[int] = []
    for i, value in enumerate(table[column]):
        if not kept or value - table[column].iloc[kept[-1]] >= least:
            kept.append(i)
    return table.iloc[kept]


def theory(table: pd.DataFrame, ax):
    """``tables.measured_and_predicted`` -> measured over predicted speed-up; on the line theory is right.

    Points that lie close share a label.
    """
    for name, (marker, colour, label) in PREDICTIONS.items():
        ax.plot(table[name], table["measured"], marker, color=colour, label=label, alpha=0.9)
    ax.vlines(table["costs"], table["measured_low"], table["measured_high"], color=PALETTE[0], linewidth=1.5)
    for beta, line in _spaced(table.sort_values("costs"), "costs", 0.04).iterrows():
        at = (line.costs, line.measured), (5, -9)
        ax.annotate(f"{beta:g}/{line.L_d:g}", *at, textcoords="offset points", fontsize=8)
    values = table[[*PREDICTIONS, "measured"]]
    ends = 0.95 * values.min().min(), 1.05 * values.max().max()
    ax.plot(ends, ends, color="grey", linestyle=":")
    ax.set(xlabel="predicted speed-up per token", ylabel="measured (beta/L_d)")
    ax.legend(frameon=False, loc="upper left")
    ax.grid(alpha=0.3)
    sns.despine(ax=ax)
    return ax


def save(figure, folder: Path, name: str) -> None:
    """<folder>/figures/<name>.png and .svg, the same bytes for the same figure."""
    for kind, left_out in (("svg", "Date"), ("png", "Software")):
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), io.BytesIO() as made:
            figure.savefig(made, format=kind, bbox_inches="tight", dpi=160, metadata={left_out: None})
            write_bytes(Path(folder) / "figures" / f"{name}.{kind}", made.getvalue())


def losses(log: pd.DataFrame, term: str, ax):
    """One loss term over the steps of a training log: in training and, as dev_<term>, held out."""
    for name, label, colour in ((term, "training", PALETTE[0]), (f"dev_{term}", "held out", PALETTE[1])):
        if name in log:
            known = log.dropna(subset=[name])
            ax.plot(known["step"], known[name], color=colour, label=label)
    ax.set(xlabel="step", ylabel=term)
    ax.legend(frameon=False)
    return ax
