"""Data in, axes out; nothing is measured here. Every title is computed from the table that is drawn."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from ..files import write_bytes
from ..models.codec import TOKEN_RATE
from . import paper
from .rows import DECIBELS
from .style import DRAFT, PALETTE, SPEEDUP, SSD, TARGET, WER, colour, hollow, maths, titled
from .tables import NAMES, STAGES, number, of_method

KINDS = {  # what became of a token, in the order of the lanes from the top
    "sampled": PALETTE[7],
    "accepted": PALETTE[2],
    "bonus": PALETTE[0],
    "resampled": PALETTE[1],
    "rejected": "black",
    "discarded": PALETTE[5],
}
LABELS = {"rejected": "rejected draft", "discarded": "draft after it", "rest": "rest of the loop"}
STAGE_COLOURS = dict(zip(STAGES, (PALETTE[8], PALETTE[4], DRAFT, TARGET, PALETTE[3], PALETTE[9]), strict=True))


def timeline_events(row) -> pd.DataFrame:
    """Every token of a row, drafted or spoken, at its place in the audio: columns seconds, kind, round (from 0).

    A rejected draft stands at the place of its 'resampled' token; those drafted after it are 'discarded'.
    """
    events, offset, number_of_round = [], 0.0, 0
    for rounds, count in zip(row["rounds"], row["pieces"], strict=True):
        begin = 0
        for drafted, accepted in rounds or [(0, 0)] * count:
            added = "sampled" if not drafted else "bonus" if accepted == drafted else "resampled"
            kinds = ["accepted"] * accepted + [added]
            if begin + accepted > count:  # an accepted end of speech: nothing was added
                added, kinds = "stopped", kinds[:-1]
            lost = ["rejected"] * (added == "resampled")
            lost += ["discarded"] * (drafted - accepted - len(lost))
            places = [*enumerate(kinds, begin), *enumerate(lost, begin + accepted)]
            events += [(offset + i / TOKEN_RATE, kind, number_of_round) for i, kind in places]
            begin, number_of_round = begin + accepted + 1, number_of_round + 1
        offset += count / TOKEN_RATE + row["gap_seconds"]
    return pd.DataFrame(events, columns=["seconds", "kind", "round"])


def envelope(row) -> list[tuple[float, float]]:
    """(seconds, height from 0 to 1) of a row's sound, one for each token; [] where the row says nothing of it."""
    heights = [10 ** (DECIBELS * (ord(letter) - ord("z")) / 20) for letter in row.get("loudness") or ""]
    if not heights:  # rows from before there was that field say which tokens are silence
        heights = [0.5 if letter == "s" else 0.02 for letter in row["token_kinds"]]
    starts = np.cumsum([0.0, *(count / TOKEN_RATE + row["gap_seconds"] for count in row["pieces"])])
    seconds = [start + i / TOKEN_RATE for start, n in zip(starts, row["pieces"], strict=False) for i in range(n)]
    return list(zip(seconds, heights, strict=True)) if heights else []


def timeline(events: pd.DataFrame, ax, title: str = "") -> None:
    """Accepted, resampled and rejected tokens along the audio, as the paper's Figure 2; every other round is shaded."""
    events = events.reset_index()
    counts = events.kind.value_counts()
    lanes = [kind for kind in reversed(KINDS) if counts.get(kind, 0)]
    for y, kind in enumerate(lanes):
        times = events.seconds[events.kind == kind]
        ax.eventplot(times, lineoffsets=y, linelengths=0.75, linewidths=1.6, colors=[KINDS[kind]])
    spoken = events[~events.kind.isin(["rejected", "discarded"])]
    if counts.get("accepted", 0) + counts.get("rejected", 0):
        for which, times in spoken.groupby("round").seconds:
            if which % 2:
                ax.axvspan(times.min() - 0.5 / TOKEN_RATE, times.max() + 0.5 / TOKEN_RATE, color="0.92", zorder=0)
    ax.set_yticks(range(len(lanes)), [f"{LABELS.get(kind, kind)} ({counts[kind]})" for kind in lanes])
    ax.set(
        ylim=(-0.6, len(lanes) - 0.4), xlabel="seconds of audio (shaded, white: one round each, one call of the target)"
    )
    ax.set_xlim(left=-0.05)
    ax.set_title(maths(title), loc="left", fontsize=12)


def events_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's Figure 2 of the one SSD row: every token, its place and what became of it."""
    row = of_method(rows, "speculative").iloc[0]
    events = timeline_events(row).set_index("seconds")
    rate, per_call = (number(row[name], 2) for name in ("acceptance_rate", "tokens_per_target_call"))
    setting = f"SSD, beta {row.tolerance:g}, L_d {row.draft_length:g}"
    title = f"{setting}: {rate} of drafted tokens accepted, {per_call} tokens per target call"
    events.attrs |= {"title": title, "envelope": envelope(row)}
    return events


def counted(events: pd.DataFrame) -> pd.DataFrame:
    """``events_of``, to read: how many tokens of each kind."""
    return pd.DataFrame({"tokens": events.kind.value_counts().reindex(KINDS).dropna().astype(int)})


def timeline_and_sound(events: pd.DataFrame, axes) -> None:
    """The sound's envelope, one value per token, above ``timeline``."""
    sound, lanes = axes
    sound.get_gridspec().set_height_ratios([1, 4])
    seconds, height = np.array(events.attrs["envelope"] or [(0.0, 0.0)]).T
    sound.fill_between(seconds, -height, height, step="mid", color=SSD, linewidth=0)
    sound.set(ylim=(-1, 1), yticks=[], ylabel="sound")
    sound.spines[:].set_color("none")
    timeline(events, lanes)
    sound.set(xlim=lanes.get_xlim(), xticks=[])
    titled(axes, events.attrs["title"])


def stages(table: pd.DataFrame, ax) -> None:
    """``tables.stages``: where the time of a synthesis goes, in % of the target's alone; last the paper's bar."""
    base = table["RTF"].iloc[0]
    names = [*table.index, "Autoregressive, the paper's"]
    for y, (_, line) in enumerate(table.iterrows()):
        _stacked(ax, y, line, base)
    lm = 100 * paper.LM_SHARE
    for left, width, label in ((0, lm, f"LM, about {lm:.0f} %"), (lm, 100 - lm, f"all else {100 - lm:.0f} %")):
        ax.barh(len(table), width, left=left, color="white", edgecolor=TARGET, hatch="//" if left else "")
        at = {"ha": "center", "va": "center", "bbox": {"color": "white", "pad": 1}}
        ax.text(left + width / 2, len(table), label, fontsize=9, **at)
    ax.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    widest = 100 * max(1, table["RTF"].max() / base)
    ax.set(xlim=(0, 1.42 * widest), xlabel="time of the whole synthesis, % of the autoregressive target's")
    ax.set_xticks(range(0, int(widest) + 1, 20))
    ax.invert_yaxis()
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": len(STAGES)}
    ax.legend(**above, frameon=False, columnspacing=0.9, handlelength=1.0, borderpad=0)
    titled(ax, _share_of_lm(table))


def _share_of_lm(table: pd.DataFrame) -> str:
    base, last = table.iloc[0], table.iloc[-1]
    text = (
        f"The language model takes {base['LM share %']:.0f} % of the target's synthesis (the paper's: about "
        f"{100 * paper.LM_SHARE:.0f} %)"
    )
    if len(table) == 1:
        return text
    faster = number(last["RTF speed-up"], 2, last["RTF speed-up_low"], last["RTF speed-up_high"])
    share = number(last["LM share %"], 0)
    return f"{text}; with {last.name} the whole is {faster} times as fast, and the share {share} %"


def _stacked(ax, y: float, line: pd.Series, base: float) -> None:
    """One bar of ``stages``: shares from 7 % of the axis inside, those below that in words at its end."""
    left, small = 0.0, []
    for stage, fill in STAGE_COLOURS.items():
        width, share = 100 * line[stage] / base, line[f"{stage} share %"]
        ax.barh(y, width, left=left, color=fill, label=None if y else LABELS.get(stage, stage))
        if width >= 7:
            dark = stage == "target"
            ax.text(left + width / 2, y, f"{share:.0f} %", ha="center", va="center", color="white" if dark else "black")
        elif share > 0:
            small.append(f"{LABELS.get(stage, stage).split()[0]} {share:.1f}" if share >= 0.05 else f"{stage} < 0.1")
        left += width
    words = f"RTF {number(line['RTF'], 3)}\n" + ", ".join(small) + " %" * bool(small)
    ax.text(left + 1.5, y, words, va="center", fontsize=9)


def table1(table: pd.DataFrame, axes) -> None:
    """``tables.table1`` -> speed-up (left), WER (right) with intervals; below each point the paper's, hollow."""
    panels = (("speed-up", 2, f"{SPEEDUP}\n(right is better)"), ("WER %", 1, f"{WER}\n(left is better)"))
    y = np.arange(len(table))
    axes[0].figure.set_figheight(1.7 + 0.56 * len(table))
    for ax, (name, places, label) in zip(axes, panels, strict=True):
        short = name.removesuffix(" %")
        for at, (system, line) in enumerate(table.iterrows()):
            value, low, high, theirs = (line[c] for c in (name, f"{short}_low", f"{short}_high", f"paper {name}"))
            ax.hlines(at - 0.2, low, high, color=colour(system), linewidth=2)
            ax.plot(value, at - 0.2, "o", color=colour(system), markersize=8, zorder=3)
            ax.plot(theirs, at + 0.2, **hollow(system))
            for x, end, place in ((value, max(value, high), at - 0.2), (theirs, theirs, at + 0.2)):
                if pd.notna(x):
                    aside = {"textcoords": "offset points", "va": "center"}
                    ax.annotate(f"{x:.{places}f}", (end, place), (8, 0), **aside)
        ax.set_xlim(0, 1.18 * np.nanmax(table[[name, f"{short}_high", f"paper {name}"]]))
        ax.set(ylim=(len(table) - 0.5, -0.6), xlabel=label)
        ax.set_yticks(y, [maths(name.replace(" drafter, ", " drafter,\n")) for name in table.index])
        ax.grid(axis="x", alpha=0.3)
    axes[1].set_yticklabels([])
    axes[0].axvline(1, color="grey", linestyle=":")
    axes[0].figure.legend(*_ours_and_theirs(), loc="outside lower left", ncols=2, frameon=False)
    titled(axes, _faster_and_wrong(table))


def _ours_and_theirs() -> tuple[list, list[str]]:
    """A legend in the target's colour: filled is measured here, hollow the paper's."""
    line = matplotlib.lines.Line2D
    handles = (
        line([], [], marker="o", linestyle="-", color=TARGET),
        line([], [], linestyle="", **hollow(NAMES["autoregressive"])),
    )
    return list(handles), ["measured here, 95 % interval", "the paper's"]


def _faster_and_wrong(table: pd.DataFrame) -> str:
    """Of Table 1 SSD's speed-up and rise in WER beside the paper's, and the fastest other drafter's."""
    base, others = table.iloc[0], table.iloc[3:]

    def said(line: pd.Series) -> str:
        speed = number(line["speed-up"], 2, line["speed-up_low"], line["speed-up_high"])
        more = line["WER %"] - base["WER %"]
        return f"{speed} times the target's speed, WER " + (f"{more:+z.1f} points" if pd.notna(more) else "not scored")

    ssd = table.loc[NAMES["speculative"]]
    theirs, rise = ssd["paper speed-up"], ssd["paper WER %"] - base["paper WER %"]
    text = f"SSD: {said(ssd)}" + (f" (the paper: {theirs:.2f}, {rise:+.1f})" if pd.notna(theirs) else "")
    return text + "".join(f"; {line.name}: {said(line)}" for _, line in others.nlargest(1, "speed-up").iterrows())


def save(figure, folder: Path, name: str) -> None:
    """<folder>/figures/<name>.png, .svg and .pdf, the same bytes for the same figure."""
    for kind, left_out in (("svg", "Date"), ("png", "Software"), ("pdf", "CreationDate")):
        fonts = {"svg.hashsalt": name, "svg.fonttype": "none", "pdf.fonttype": 42}
        with matplotlib.rc_context(fonts), io.BytesIO() as made:
            figure.savefig(made, format=kind, bbox_inches="tight", dpi=160, metadata={left_out: None})
            write_bytes(Path(folder) / "figures" / f"{name}.{kind}", made.getvalue())


TERMS = {  # of a training log, in words and units
    "loss": "loss, nats per token",
    "speech": "cross-entropy of the target,\nnats per speech token",
    "draft": "cross-entropy of the draft's\nlayers, nats per speech token",
    "phone": "cross-entropy of the phone\nheads, nats per phone",
    "overlap": "overlap of draft and target,\nsum of min(p, q)",
    "spectrum": "distance of spectra,\nin their standard deviation",
    "f0": "distance of log pitch, in its\nstandard deviation",
    "ctc": "CTC loss, nats per phone",
}


def losses(log: pd.DataFrame, term: str, ax) -> None:
    """One loss term over the steps of a training log: in training and, as dev_<term>, held out."""
    for name, label, shade in ((term, "training", PALETTE[0]), (f"dev_{term}", "held out", PALETTE[1])):
        if name in log:
            known = log.dropna(subset=[name])
            ax.plot(known["step"], known[name], "." if len(known) == 1 else "-", color=shade, label=label)
            first, last = known[name].iloc[[0, -1]]
            ax.set_title(f"{label}: from {first:.2f} to {last:.2f}", loc="left", fontsize=10)
    ax.set(xlabel="training step")
    ax.set_ylabel(TERMS.get(term, term), fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False)
