"""What each drafter earns: tokens per call, its price, and the speed-up that both make; and how they learned."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .conclusions import value
from .style import SSD, TARGET, colour, legend_below, maths, titled
from .tables import readable
from .theory import setting

NOTEBOOK = "18_drafters"
LABELS = {"paper": "paper's", "hidden": "hidden-state"}  # other drafters bear the names that they have everywhere
# Where the logs of the bundled voice's drafters lie, from a results folder's parent -> the column of their acceptance.
LOGS = {
    "hidden-state, on the teacher's speech": ("hidden_log_second_run", "dev_acceptance_1"),
    "hidden-state, on the target's own": ("hidden_log_on_policy", "dev_acceptance_1"),
    "hidden-state, on the present target's": ("hidden_log_own_speech", "dev_acceptance_1"),
    "hidden-state, towards temperature 1": ("hidden_log_temperature_1", "dev_acceptance_1"),
    "block, towards temperature 1": ("block_log_own_speech", "dev_acceptance_1"),
    "on-policy draft": ("on_policy_log", "dev_acceptance"),
    "on-policy draft, of the present target": ("on_policy_log_own_speech", "dev_acceptance"),
    "on-policy draft, towards temperature 1": ("on_policy_log_temperature_1", "dev_acceptance"),
    "paper's draft, of the present target": ("draft_log_own_speech", "dev_acceptance"),
}


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per drafter, beta and L_d: acceptance, tokens a round, prices in target steps, speed-up and prediction.

    acceptance: of all drafted tokens; c, V: a draft step and a verification; predicted: tokens a round / (L_d c + V).
    """
    ssd = rows[rows.method == "speculative"]
    lines = []
    for (drafter, beta, length), of in ssd.groupby([ssd.drafter.fillna("paper"), "tolerance", "draft_length"]):
        lines.append(
            {
                "drafter": LABELS.get(drafter, drafter),
                "beta": beta,
                "L_d": int(length),
                "acceptance": of.accepted.sum() / of.drafted.sum(),
                **setting(of, int(length)),
                "n": len(of),
            }
        )
    return pd.DataFrame(lines).set_index("drafter")


def best(found: pd.DataFrame) -> pd.DataFrame:
    """Of each drafter and beta of ``table`` the fastest L_d, to read."""
    fastest = found.reset_index().sort_values("speed-up").groupby(["drafter", "beta"], sort=False).tail(1)
    return readable(fastest.sort_values(["beta", "speed-up"], ascending=[True, False]).set_index("drafter"))


def conclusion(found: pd.DataFrame) -> str:
    """Which drafter is the fastest at each beta, and what it has over the paper's: Markdown."""
    said = []
    for beta, of in found.groupby("beta"):
        papers, first = of.loc[[LABELS["paper"]]].sort_values("speed-up"), of.sort_values("speed-up").iloc[-1]
        line = f"**beta {beta:g}**: the {first.name} drafter with L_d {first.L_d:g} is the fastest, "
        line += f"{value(first, 'speed-up')} times as fast as the target alone"
        if first.name != LABELS["paper"]:
            best, paper = papers.iloc[-1], papers.set_index("L_d").loc[first.L_d]
            cheap, agreeing = first.c < paper.c, first.acceptance > paper.acceptance
            why = {(1, 1): "cheaper, and it agrees more", (1, 0): "cheaper, though it agrees less"}
            why |= {(0, 1): "dearer, but it agrees more", (0, 0): "dearer, and it agrees less"}
            line += (
                f"; the paper's has {value(best, 'speed-up')} (L_d {best.L_d:g}). With L_d {first.L_d:g} its step is "
            )
            line += f"{why[cheap, agreeing]} (c {first.c:.2f} and {paper.c:.2f}, acceptance {first.acceptance:.2f} and "
            line += f"{paper.acceptance:.2f})"
        said.append(f"{line}.")
    return "\n\n".join(said)


def draw(found: pd.DataFrame, axes) -> None:
    """``table`` -> speed-up over L_d, a panel for each beta, a line for each drafter; crosses: predicted."""
    shades = {
        name: SSD if name == LABELS["paper"] else colour(f"{name} drafter") for name in dict.fromkeys(found.index)
    }
    for ax, (beta, of) in zip(axes, found.groupby("beta"), strict=False):
        for drafter, shade in shades.items():
            line = of[of.index == drafter]
            ax.plot(line.L_d, line["speed-up"], "o-", color=shade, label=drafter)
            ax.vlines(line.L_d, line["speed-up_low"], line["speed-up_high"], color=shade)
            ax.plot(line.L_d, line["predicted"], "x", color=shade)
        ax.axhline(1, color=TARGET, linestyle=":")
        ax.set(xlabel=maths("L_d"), title=maths(f"beta {beta:g}"), xticks=sorted(set(found.L_d)))
    axes[0].set_ylabel("speed-up per token (cross: predicted)")
    legend_below(axes, 4)
    top = found.sort_values("speed-up").iloc[-1]
    titled(axes, f"Fastest: {top.name} drafter, beta {top.beta:g}, L_d {top.L_d:g}: {top['speed-up']:.2f} times")


def _log(folder: Path, name: str, column: str) -> pd.DataFrame:
    """The log ``name`` of ``folder``/voice/tables: labels, acceptance (its ``column``), all else; empty without it."""
    path = Path(folder) / "voice" / "tables" / f"{name}.csv"
    if not path.is_file():
        return pd.DataFrame(columns=["labels", "utterances", "acceptance"])
    return pd.read_csv(path).rename(columns={column: "acceptance"})


def logs(folder: Path) -> pd.DataFrame:
    """Acceptance on held-out speech over the draws that the drafters of ``folder``/voice/tables learned from.

    million draws: tokens that it had been taught to foresee, those of an earlier run of the same log included.
    """
    found = []
    for run, (name, column) in LOGS.items():
        log, seen = _log(folder, name, column), 0  # draws
        for _, part in log.groupby(log.get("run", pd.Series(0, log.index)), sort=False):
            found.append(part.assign(run=run, **{"million draws": (seen + part.labels) / 1e6}))
            seen += part.labels.max()
    columns = ["run", "million draws", "acceptance"]
    return pd.concat(found, ignore_index=True)[columns].dropna() if found else pd.DataFrame(columns=columns)


def by_size(folder: Path) -> pd.DataFrame:
    """Acceptance on held-out speech of hidden-state drafters that learned from so many utterances, all else equal.

    From ``folder``/voice/tables; a row for each evaluation: utterances, million draws, acceptance (of the first
    drafted token). Empty without such a log.
    """
    log = _log(folder, "hidden_log_by_size", "dev_acceptance_1").dropna(subset="acceptance").reset_index(drop=True)
    return log.assign(**{"million draws": log.labels / 1e6})[["utterances", "million draws", "acceptance"]]
