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
PHASES = {  # of take.seconds, in the order of work
    "text": PALETTE[5],
    "prefill": PALETTE[4],
    "draft": PALETTE[1],
    "verify": PALETTE[0],
    "rest": PALETTE[7],
    "codec": PALETTE[2],
}
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
    for phase, colour in PHASES.items():
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
    ax.legend(ncols=len(PHASES), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False,
              columnspacing=1.0, handlelength=1.2)  # fmt: skip
    sns.despine(ax=ax)
    return ax


def _beside(ax, table: pd.DataFrame, ours, interval, paper, digits: int):
    """Points with intervals: ours filled, the paper's hollow, a line a system."""
    y = np.arange(len(table))
    low, high = interval
    ax.hlines(y - 0.13, low, high, color=PALETTE[0], linewidth=2)
    ax.plot(ours, y - 0.13, "o", color=PALETTE[0], markersize=8, clip_on=False,
            zorder=3, label="this repository")  # fmt: skip
    ax.plot(paper, y + 0.13, "D", color=PALETTE[1], markerfacecolor="white", markersize=7, label="paper")
    for here, there, place in zip(ours, paper, y, strict=True):
        ax.annotate(f"{here:.{digits}f}", (here, place - 0.13), (0, 7), textcoords="offset points", ha="center")
        ax.annotate(f"{there:.{digits}f}", (there, place + 0.13), (0, -16), textcoords="offset points", ha="center")
    ax.set_yticks(y, table.index)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.grid(axis="x", alpha=0.3)
    sns.despine(ax=ax)
    return ax


def table1(table: pd.DataFrame, axes):
    """``tables.table1`` -> relative LM-RTF (left) and WER (right), each beside the paper's."""
    left, right = axes
    relative = 1 / table["speed-up"]
    bounds = 1 / table["speed-up_high"], 1 / table["speed-up_low"]
    _beside(left, table, relative, bounds, 1 / table["paper speed-up"], 2)
    left.set_xlabel("LM-RTF, autoregressive = 1")
    _beside(right, table, table["WER %"], (table["WER_low"], table["WER_high"]), table["paper WER %"], 1)
    right.set_xlabel("WER, %")
    left.legend(loc="lower left", frameon=False)
    return axes


def _ours_over(ax, x, table: pd.DataFrame, name: str):
    """A column of a table over x, its interval as bars, the paper's where it has one."""
    short = name.removesuffix(" %")
    low, high = table[f"{short}_low"], table[f"{short}_high"]
    ax.vlines(x, low, high, color=PALETTE[0], linewidth=2)
    ax.plot(x, table[name], "o-", color=PALETTE[0], markersize=7, label="this repository")
    if f"paper {name}" in table:
        known = table[f"paper {name}"].notna().to_numpy()
        ax.plot(np.asarray(x)[known], table[f"paper {name}"][known], "D--", color=PALETTE[1], markerfacecolor="white",
                markersize=7, label="paper")  # fmt: skip
    ax.grid(axis="y", alpha=0.3)
    sns.despine(ax=ax)


def table3(table: pd.DataFrame, axes):
    """``tables.table3`` -> speed-up (left) and WER (right) over beta; dashed: the autoregressive target."""
    left, right = axes
    ssd, base = table.iloc[1:], table.iloc[0]
    x = [float(beta) for beta in ssd.index]
    _ours_over(left, x, ssd, "speed-up")
    left.axhline(1, color="grey", linestyle=":")
    left.set(xlabel="tolerance beta", ylabel="speed-up of the LM")
    _ours_over(right, x, ssd, "WER %")
    right.axhline(base["WER %"], color=PALETTE[0], linestyle=":")
    right.axhline(base["paper WER %"], color=PALETTE[1], linestyle=":")
    right.set(xlabel="tolerance beta", ylabel="WER, %")
    left.legend(frameon=False)
    return axes


def figure3(table: pd.DataFrame, axes):
    """``tables.figure3`` -> speed-up (left), acceptance rate (right) over L_d."""
    left, right = axes
    _ours_over(left, table.index, table, "speed-up")
    left.axhline(1, color="grey", linestyle=":")
    left.set(xlabel="drafted tokens a round, L_d", ylabel="speed-up of the LM")
    left.legend(frameon=False)
    right.plot(table.index, table["acceptance"], "o-", color=PALETTE[2], markersize=7)
    right.set(xlabel="drafted tokens a round, L_d", ylabel="accepted / drafted", ylim=(0, 1))
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


PREDICTIONS = {"formula": ("o", "one acceptance rate, verification = a target step"),
               "positions": ("s", "acceptance by position of the draft"),
               "costs": ("D", "and the measured cost of verification")}  # fmt: skip


def _apart(table: pd.DataFrame, column: str, least: float) -> pd.DataFrame:
    """Of rows in the order of ``column`` those that lie ``least`` beyond the one kept before: room for a label."""
    kept: list[int] = []
    for i, value in enumerate(table[column]):
        if not kept or value - table[column].iloc[kept[-1]] >= least:
            kept.append(i)
    return table.iloc[kept]


def theory(table: pd.DataFrame, ax):
    """``tables.measured_and_predicted`` -> measured over predicted speed-up; on the line theory is right. Points that lie close share a label."""
    for (name, (marker, label)), colour in zip(PREDICTIONS.items(), (PALETTE[7], PALETTE[1], PALETTE[0]), strict=True):
        ax.plot(table[name], table["measured"], marker, color=colour, label=label, alpha=0.9)
    ax.vlines(table["costs"], table["measured_low"], table["measured_high"], color=PALETTE[0], linewidth=1.5)
    for beta, line in _apart(table.sort_values("costs"), "costs", 0.04).iterrows():
        ax.annotate(
            f"{beta:g}/{line.L_d:g}", (line.costs, line.measured), (5, -9), textcoords="offset points", fontsize=8
        )
    values = table[[*PREDICTIONS, "measured"]]
    ends = 0.95 * values.min().min(), 1.05 * values.max().max()
    ax.plot(ends, ends, color="grey", linestyle=":")
    ax.set(xlabel="predicted speed-up a token", ylabel="measured (beta/L_d)")
    ax.legend(frameon=False, loc="upper left")
    ax.grid(alpha=0.3)
    sns.despine(ax=ax)
    return ax


def save(figure, folder: Path, name: str) -> None:
    """<folder>/figures/<name>.png and .svg, the same bytes for the same figure."""
    for kind, unsaid in (("svg", "Date"), ("png", "Software")):
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), io.BytesIO() as made:
            figure.savefig(made, format=kind, bbox_inches="tight", dpi=160, metadata={unsaid: None})
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
