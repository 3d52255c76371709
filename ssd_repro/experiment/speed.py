"""Tables and figures of what ``bench`` measured, and the summary of ``ssd-repro bench --json``; from rows alone."""

from __future__ import annotations

import numpy as np
import pandas as pd

from . import cost
from .figures import PALETTE
from .statistics import corpus_speedup, paired, ratio_of_sums
from .tables import estimate

LABELS = {
    "hf_generate": "transformers generate",
    "hf_assisted": "transformers assisted generation",
    "ar": "ours, autoregressive",
    "ssd0": "ours, SSD, beta 0",
    "ssd": "ours, SSD, beta {beta:g}",
}
FASTER = {  # ratio of speeds: above 1 the second system is the faster one
    "ar_over_hf_generate": ("hf_generate", "ar"),
    "ssd_over_hf_assisted": ("hf_assisted", "ssd"),
    "ssd0_over_hf_assisted": ("hf_assisted", "ssd0"),
    "ssd_over_ar": ("ar", "ssd"),
    "ssd0_over_ar": ("ar", "ssd0"),
    "hf_assisted_over_hf_generate": ("hf_generate", "hf_assisted"),
    "ar_eager_over_hf_generate": ("hf_generate", "ar_eager"),
    "ssd_eager_over_hf_assisted": ("hf_assisted", "ssd_eager"),
    "ssd0_eager_over_hf_assisted": ("hf_assisted", "ssd0_eager"),
    "ssd_eager_over_ar_eager": ("ar_eager", "ssd_eager"),
    "ar_over_hf_generate_compiled": ("hf_generate_compiled", "ar"),
    "ssd_over_hf_assisted_compiled": ("hf_assisted_compiled", "ssd"),
}


def by_system(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """System -> its rows, all in one order of utterances."""
    first = rows[rows.system == rows.system.iloc[0]]
    return {name: paired(of, first)[0] for name, of in rows.groupby("system", sort=False)}


def _label(name: str, of: pd.DataFrame) -> str:
    plain = name.removesuffix("_eager").removesuffix("_compiled")
    return f"{LABELS[plain].format(beta=of.tolerance.iloc[0])} ({of.runtime.iloc[0].partition(', ')[2] or of.runtime.iloc[0]})"


def faster(base: pd.DataFrame, ours: pd.DataFrame, name: str = "value") -> dict[str, float]:
    """How many times as many tokens a second, over all utterances, with its interval."""
    return estimate(name, corpus_speedup, base.lm_seconds, base.tokens, ours.lm_seconds, ours.tokens)


def side_by_side(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per system: milliseconds a token, over transformers' two, acceptance."""
    systems, lines = by_system(rows), []
    for name, of in systems.items():
        calls, drafted = (of[column].sum() if column in of else np.nan for column in ("calls", "drafted"))
        lines.append(
            {
                "system": _label(name, of),
                **estimate("ms / token", ratio_of_sums, 1000 * of.lm_seconds, of.tokens),
                **faster(systems["hf_generate"], of, "over generate"),
                **faster(systems["hf_assisted"], of, "over assisted generation"),
                "acceptance": of.accepted.sum() / drafted if drafted else np.nan,
                "tokens per target call": (of.tokens - of.pieces).sum() / calls,
                "n": len(of),
            }
        )
    return pd.DataFrame(lines).set_index("system")


def phases(of: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(list(of.seconds), index=of.index)


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per ratio: speeds of FASTER; prices in steps of our autoregressive target; the share outside forwards.

    Prices are those of the loop, of what it books as verify and draft: forward, sampling and judging.
    """
    systems = by_system(rows)
    found = {name: faster(*(systems[s] for s in pair)) for name, pair in FASTER.items() if set(pair) <= set(systems)}
    step, ssd = systems["ar"], systems["ssd"]
    seconds = phases(step).verify, step.calls
    for name, phase, count in (("verify_over_step", "verify", "calls"), ("draft_over_step", "draft", "drafted")):
        found[name] = estimate("value", corpus_speedup, phases(ssd)[phase], ssd[count], *seconds)
    outside = ssd.round_seconds - ssd.forward_seconds
    found["outside_forwards"] = estimate("value", ratio_of_sums, outside, ssd.round_seconds)
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("ratio").assign(n=len(ssd))


def summary(rows: pd.DataFrame) -> dict:
    """What ``ssd-repro bench --json`` prints: numbers, and beside them the 95 % interval of each under its name."""
    made, ours = ratios(rows), rows[rows.system == "ar"].iloc[0]
    tokens = {
        name: estimate("value", ratio_of_sums, 1000 * of.lm_seconds, of.tokens) for name, of in by_system(rows).items()
    }
    both = {"ms_per_token": tokens, "ratios": made.to_dict("index")}
    said = {part: {name: round(x["value"], 4) for name, x in values.items()} for part, values in both.items()}
    said["intervals"] = {
        part: {name: [round(x["value_low"], 4), round(x["value_high"], 4)] for name, x in values.items()}
        for part, values in both.items()
    }
    about = {name: ours[name] for name in ("device", "runtime", "precision", "chip", "weights")}
    return {**said, **about, "threads": int(ours.threads), "utterances": int(made.n.iloc[0])}


def readable_ratios(table: pd.DataFrame) -> pd.DataFrame:
    text = [f"{x.value:.3f} [{x.value_low:.3f}, {x.value_high:.3f}]" for x in table.itertuples()]
    return pd.DataFrame({"value": text, "n": table.n}, index=table.index)


def draw_side_by_side(table: pd.DataFrame, ax) -> None:
    """``side_by_side`` -> a bar for each system, with its interval."""
    y, ours = np.arange(len(table)), table.index.str.startswith("ours")
    ax.barh(y, table["ms / token"], color=[PALETTE[0] if own else PALETTE[7] for own in ours])
    ax.hlines(y, table["ms / token_low"], table["ms / token_high"], color="black", linewidth=1.5)
    ends = zip(table["ms / token_high"], y, table["ms / token"], strict=True)
    for high, at, value in ends:
        ax.annotate(f"{value:.1f}", (high, at), (5, 0), textcoords="offset points", va="center")
    ax.set_yticks(y, table.index)
    ax.set(xlabel="milliseconds a token", ylim=(len(table) - 0.4, -0.6))
    ax.set_xlim(right=1.12 * table["ms / token_high"].max())


def cost_note(rows: pd.DataFrame) -> str:
    return f"Computed from the models' sizes and the rounds of these rows. {cost.energy_note(rows)}"
