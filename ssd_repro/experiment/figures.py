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
LABELS = {"rejected": "rejected draft", "discarded": "draft after it", "verify": "target", "rest": "rest of the loop"}
PHASE_COLOURS = dict(zip(PHASES, (PALETTE[i] for i in (5, 4, 1, 0, 7, 2)), strict=True))
HOLLOW = {"markerfacecolor": "white", "markersize": 7, "label": "paper"}  # the paper's points


def timeline_events(row) -> pd.DataFrame:
    """Every token of a row, drafted or spoken, at its place in the audio: columns seconds, kind.

    A rejected draft stands at the place of its 'resampled' token; those drafted after it are 'discarded'.
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


def timeline(events: pd.DataFrame, ax, title: str = "") -> None:
    """Accepted, resampled and rejected tokens along the audio, as the paper's Figure 2."""
    events, title = events.reset_index(), title or events.attrs.get("title", "")
    counts = events.kind.value_counts()
    lanes = [kind for kind in reversed(KINDS) if counts.get(kind, 0)]
    for y, kind in enumerate(lanes):
        times = events.seconds[events.kind == kind]
        ax.eventplot(times, lineoffsets=y, linelengths=0.75, linewidths=1.6, colors=[KINDS[kind]])
    ax.set_yticks(range(len(lanes)), [f"{LABELS.get(kind, kind)} ({counts[kind]})" for kind in lanes], fontsize=11)
    ax.set(ylim=(-0.6, len(lanes) - 0.4), xlabel="seconds of audio")
    ax.set_xlim(left=-0.05)
    ax.set_title(title, loc="left")


def stages(table: pd.DataFrame, ax) -> None:
    """Stacked bars from ``tables.stages``: where the time of a synthesis goes."""
    left = np.zeros(len(table))
    for phase, colour in PHASE_COLOURS.items():
        bars = ax.barh(table.index, table[phase], left=left, color=colour, label=LABELS.get(phase, phase))
        shares = table[f"{phase} share %"].where(table[phase] > 0.05 * table["RTF"].max())
        ax.bar_label(bars, ["" if np.isnan(share) else f"{share:.0f} %" for share in shares], label_type="center")
        left += table[phase].to_numpy()
    whole = zip(table["RTF"], table["LM share %"], strict=True)
    ax.bar_label(bars, [f" RTF {rtf:.3f}, LM {share:.0f} %" for rtf, share in whole])
    ax.set(xlim=(0, 1.35 * left.max()), xlabel="seconds of work for one second of audio")
    ax.invert_yaxis()
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(PHASES)}
    ax.legend(**above, frameon=False, columnspacing=1.0, handlelength=1.2)


def table1(table: pd.DataFrame, axes) -> None:
    """``tables.table1`` -> relative LM-RTF (left) and WER (right): ours filled, below it the paper's hollow."""
    wer = [table[name] for name in ("WER %", "WER_low", "WER_high", "paper WER %")]
    relative = [1 / table[name] for name in ("speed-up", "speed-up_high", "speed-up_low", "paper speed-up")]
    panels = ("LM-RTF, autoregressive = 1", 2, relative), ("WER, %", 1, wer)
    y = np.arange(len(table))
    for ax, (label, digits, (ours, low, high, theirs)) in zip(axes, panels, strict=True):
        ax.hlines(y - 0.13, low, high, color=PALETTE[0], linewidth=2)
        filled = {"color": PALETTE[0], "markersize": 8, "clip_on": False, "zorder": 3}
        ax.plot(ours, y - 0.13, "o", label="this repository", **filled)
        ax.plot(theirs, y + 0.13, "D", color=PALETTE[1], **HOLLOW)
        for values, place, above in ((ours, y - 0.13, 7), (theirs, y + 0.13, -16)):
            for at in zip(values, place, strict=True):
                ax.annotate(f"{at[0]:.{digits}f}", at, (0, above), textcoords="offset points", ha="center")
        ax.set_yticks(y, table.index)
        ax.set(ylim=(len(table) - 0.4, -0.6), xlabel=label)
        ax.set_xlim(left=0)
        ax.grid(axis="x", alpha=0.3)
    axes[0].legend(loc="upper left", frameon=False)


def _over_setting(ax, x, table: pd.DataFrame, name: str, label: str) -> None:
    """A column of a table over the setting x (its name: ``label``), with its interval, and the paper's where known."""
    short = name.removesuffix(" %")
    ax.vlines(x, table[f"{short}_low"], table[f"{short}_high"], color=PALETTE[0], linewidth=2)
    ax.plot(x, table[name], "o-", color=PALETTE[0], markersize=7, label="this repository")
    theirs = table.get(f"paper {name}", pd.Series(np.nan, table.index))
    if (known := theirs.notna().to_numpy()).any():
        ax.plot(np.asarray(x)[known], theirs[known], "D--", color=PALETTE[1], **HOLLOW)
    if name == "speed-up":
        ax.axhline(1, color="grey", linestyle=":")
        ax.legend(frameon=False)
    ax.set(xlabel=label, ylabel="speed-up of the LM" if name == "speed-up" else "WER, %")
    ax.grid(axis="y", alpha=0.3)


def table3(table: pd.DataFrame, axes) -> None:
    """``tables.table3`` -> speed-up (left) and WER (right) over beta; dotted: the autoregressive target."""
    ssd, base = table.iloc[1:], table.iloc[0]
    for ax, name in zip(axes, ("speed-up", "WER %"), strict=True):
        _over_setting(ax, [float(beta) for beta in ssd.index], ssd, name, "tolerance beta")
    axes[1].axhline(base["WER %"], color=PALETTE[0], linestyle=":")
    axes[1].axhline(base["paper WER %"], color=PALETTE[1], linestyle=":")


def figure3(table: pd.DataFrame, axes) -> None:
    """``tables.figure3`` -> speed-up (left), acceptance rate (right) over L_d."""
    left, right = axes
    label = "drafted tokens per round, L_d"
    _over_setting(left, table.index, table, "speed-up", label)
    right.plot(table.index, table["acceptance"], "o-", color=PALETTE[2], markersize=7)
    right.set(xlabel=label, ylabel="accepted / drafted", ylim=(0, 1))
    right.grid(axis="y", alpha=0.3)
    for ax in axes:
        ax.set_xticks(list(table.index))


def acceptance(table: pd.DataFrame, axes) -> None:
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
    for ax in axes.flat[table.index.nunique() :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("accepted / judged")


PREDICTIONS = {
    "formula": ("o", PALETTE[7], "one acceptance rate, verification = a target step"),
    "positions": ("s", PALETTE[1], "acceptance by position of the draft"),
    "costs": ("D", PALETTE[0], "and the measured cost of verification"),
}


def theory(table: pd.DataFrame, ax) -> None:
    """``tables.measured_and_predicted`` -> measured over predicted speed-up; on the line theory is right.

    Points that lie close share a label.
    """
    for name, (marker, colour, label) in PREDICTIONS.items():
        ax.plot(table[name], table["measured"], marker, color=colour, label=label, alpha=0.9)
    ax.vlines(table["costs"], table["measured_low"], table["measured_high"], color=PALETTE[0], linewidth=1.5)
    labelled = -np.inf
    for beta, line in table.sort_values("costs").iterrows():
        if line.costs - labelled >= 0.04:
            labelled, at = line.costs, (line.costs, line.measured)
            ax.annotate(f"{beta:g}/{line.L_d:g}", at, (5, -9), textcoords="offset points", fontsize=8)
    values = table[[*PREDICTIONS, "measured"]]
    ends = 0.95 * values.min().min(), 1.05 * values.max().max()
    ax.plot(ends, ends, color="grey", linestyle=":")
    ax.set(xlabel="predicted speed-up per token", ylabel="measured (beta/L_d)")
    ax.legend(frameon=False, loc="upper left")
    ax.grid(alpha=0.3)


def save(figure, folder: Path, name: str) -> None:
    """<folder>/figures/<name>.png and .svg, the same bytes for the same figure."""
    for kind, left_out in (("svg", "Date"), ("png", "Software")):
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), io.BytesIO() as made:
            figure.savefig(made, format=kind, bbox_inches="tight", dpi=160, metadata={left_out: None})
            write_bytes(Path(folder) / "figures" / f"{name}.{kind}", made.getvalue())


def losses(log: pd.DataFrame, term: str, ax) -> None:
    """One loss term over the steps of a training log: in training and, as dev_<term>, held out."""
    for name, label, colour in ((term, "training", PALETTE[0]), (f"dev_{term}", "held out", PALETTE[1])):
        if name in log:
            known = log.dropna(subset=[name])
            ax.plot(known["step"], known[name], color=colour, label=label)
    ax.set(xlabel="step", ylabel=term)
    ax.legend(frameon=False)
