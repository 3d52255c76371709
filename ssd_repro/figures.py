"""Data in, axes out; nothing is measured here. Colours: seaborn's colour-blind palette."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns

from .tables import NAMES

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


def timeline_events(take) -> pd.DataFrame:
    """Every token, drafted or spoken, at its place in the audio: columns seconds, kind.

    In a round that rejects its k-th draft, that one is 'rejected' at the place of the
    'resampled' token, and those drafted after it are 'discarded'.
    """
    from .codec import TOKEN_RATE
    events, offset = [], 0.0
    for sentence in take.sentences:
        begin = 0
        for turn in sentence.rounds:
            kinds = ["accepted"] * turn.accepted + [turn.kind] * (turn.emitted - turn.accepted)
            lost = ["rejected"] * (turn.kind == "resampled")
            lost += ["discarded"] * (turn.drafted - turn.accepted - len(lost))
            events += [(offset + (begin + i) / TOKEN_RATE, kind) for i, kind in enumerate(kinds)]
            events += [
                (offset + (begin + turn.accepted + i) / TOKEN_RATE, kind) for i, kind in enumerate(lost)
            ]
            begin += turn.emitted
        offset += len(sentence.tokens) / TOKEN_RATE + take.gap_seconds
    return pd.DataFrame(events, columns=["seconds", "kind"])


def timeline(events: pd.DataFrame, ax, title: str = ""):
    """Accepted, resampled and rejected tokens along the audio, as the paper's Figure 2."""
    counts = events.kind.value_counts()
    lanes = [kind for kind in KINDS if counts.get(kind, 0)]
    for y, kind in enumerate(reversed(lanes)):
        times = events.seconds[events.kind == kind]
        ax.eventplot(times, lineoffsets=y, linelengths=0.75, linewidths=1.6, colors=[KINDS[kind]])
    ax.set_yticks(
        range(len(lanes)), [f"{LABELS.get(k, k)} ({counts[k]})" for k in reversed(lanes)], fontsize=11
    )
    ax.set_ylim(-0.6, len(lanes) - 0.4)
    ax.set_xlim(left=-0.05)
    ax.set_xlabel("seconds of audio")
    ax.set_title(title, loc="left")
    sns.despine(ax=ax, left=True)
    return ax


def phase_frame(takes) -> pd.DataFrame:
    """Seconds of each phase for each second of audio: a line a method.

    Where the draft speaks alone, what the loop calls 'verify' is the draft's work.
    """
    lines = {}
    for take in takes:
        seconds = dict(take.seconds)
        if take.method == "draft":
            seconds["draft"] += seconds.pop("verify")
        lines[take.method] = {phase: seconds.get(phase, 0.0) / take.audio_seconds for phase in PHASES}
    return pd.DataFrame.from_dict(lines, orient="index")


def phases(table: pd.DataFrame, ax):
    """Stacked bars from ``phase_frame``: where the time of a synthesis goes."""
    left = np.zeros(len(table))
    names = [NAMES[method] for method in table.index]
    for phase, colour in PHASES.items():
        ax.barh(names, table[phase], left=left, color=colour, label=PHASE_LABELS.get(phase, phase))
        left += table[phase].to_numpy()
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


def save(figure, folder: Path, name: str) -> None:
    """<folder>/figures/<name>.png and .svg, the same bytes for the same figure."""
    folder = Path(folder) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", bbox_inches="tight", dpi=160, metadata={"Software": None})


def losses(log: pd.DataFrame, term: str, ax):
    """One loss term over the steps of a training log: in training and, as dev_<term>, held out."""
    for name, label, colour in ((term, "training", PALETTE[0]), (f"dev_{term}", "held out", PALETTE[1])):
        if name in log:
            known = log.dropna(subset=[name])
            ax.plot(known["step"], known[name], color=colour, label=label)
    ax.set(xlabel="step", ylabel=term)
    ax.legend(frameon=False)
    return ax
