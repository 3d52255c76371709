"""Tables and figures of ``bench`` and ``growth``, and the summary of ``ssd-repro bench --json``; from rows alone."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..models.codec import TOKEN_RATE
from . import cost
from .acceptance import judged
from .statistics import corpus_speedup, paired, ratio_of_sums
from .style import PALETTE, SSD, TARGET, colour, legend_below, maths, titled
from .tables import estimate, number, readable
from .theory import expected_tokens

LABELS = {
    "hf_generate": "transformers generate",
    "hf_assisted": "transformers assisted generation",
    "hf_custom": "transformers, custom_generate=speculative_generate",
    "hf_custom_hidden": "transformers, custom_generate=speculative_generate, hidden drafter, block",
    "ar": "ours, autoregressive",
    "ssd0": "ours, SSD, beta 0",
    "ssd": "ours, SSD, beta {beta:g}",
    "ssd0_hidden": "ours, hidden-state drafter, beta 0",
    "ssd_hidden": "ours, hidden-state drafter, beta {beta:g}",
    "ssd0_block": "ours, block drafter, beta 0",
    "ssd_block": "ours, block drafter, beta {beta:g}",
    "ssd0_on-policy": "ours, on-policy draft, beta 0",
    "ssd_on-policy": "ours, on-policy draft, beta {beta:g}",
}
FASTER = {  # ratio of speeds: above 1 the second system is the faster one
    "ar_over_hf_generate": ("hf_generate", "ar"),
    "ssd_over_hf_assisted": ("hf_assisted", "ssd"),
    "ssd0_over_hf_assisted": ("hf_assisted", "ssd0"),
    "custom_over_assisted": ("hf_assisted", "hf_custom"),
    "custom_eager_over_assisted": ("hf_assisted", "hf_custom_eager"),
    "hf_custom_hidden_over_hf_assisted": ("hf_assisted", "hf_custom_hidden"),
    "ssd_over_ar": ("ar", "ssd"),
    "ssd0_over_ar": ("ar", "ssd0"),
    "lossless_hidden_over_ar": ("ar", "ssd0_hidden"),
    "ssd_hidden_over_ar": ("ar", "ssd_hidden"),
    "lossless_block_over_ar": ("ar", "ssd0_block"),
    "ssd_block_over_ar": ("ar", "ssd_block"),
    "lossless_on-policy_over_ar": ("ar", "ssd0_on-policy"),
    "ssd_on-policy_over_ar": ("ar", "ssd_on-policy"),
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
    first = of.iloc[0]
    label = LABELS[name.removesuffix("_eager").removesuffix("_compiled")].format(beta=first.tolerance)
    _, compiled, _ = first.runtime.partition("compiled")
    runtime = first.runtime.removeprefix("transformers, ")
    ours = label.startswith("ours") or runtime == "openvino"
    return f"{label}, compiled" if compiled else f"{label} ({runtime})" if ours else label


def faster(base: pd.DataFrame, ours: pd.DataFrame, name: str = "value") -> dict[str, float]:
    """How many times as many tokens a second, over all utterances, with its interval."""
    return estimate(name, corpus_speedup, base.lm_seconds, base.tokens, ours.lm_seconds, ours.tokens)


def side_by_side(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per system: milliseconds a token, over transformers' two, acceptance."""
    systems, lines = by_system(rows), []
    for name, of in systems.items():
        calls, drafted = (of[column].sum(min_count=1) for column in ("calls", "drafted"))
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
    if "forward_seconds" in ssd:  # not so with CUDA graphs
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


def draw_side_by_side(table: pd.DataFrame, ax) -> None:
    """``side_by_side`` -> a bar for each system, with its interval."""
    y = np.arange(len(table))
    ax.barh(y, table["ms / token"], color=[colour(name) for name in table.index])
    ax.hlines(y, table["ms / token_low"], table["ms / token_high"], color="black", linewidth=1.5)
    ends = np.fmax(table["ms / token"], table["ms / token_high"])
    for high, at, value in zip(ends, y, table["ms / token"], strict=True):
        ax.annotate(f"{value:.1f}", (high, at), (5, 0), textcoords="offset points", va="center")
    ax.set_yticks(y, [maths(name) for name in table.index])
    ax.set(xlabel="milliseconds per token (left is better)", ylim=(len(table) - 0.4, -0.6))
    ax.set_xlim(right=1.12 * ends.max())
    best = table.loc[table["ms / token"].idxmin()]
    over = number(best["over generate"], 2, best["over generate_low"], best["over generate_high"])
    titled(ax, f"Fastest: {best.name}, {best['ms / token']:.1f} ms per token, {over} times transformers' generate")


WANTED = 1.4  # the paper's speed-up


def _prices(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per point and drafter of ``growth.prices``: prices, floors, and the speed-up that they predict."""
    spoken, lines = rows[rows.study.isna() & (rows.method == "speculative")], []
    alpha = judged(spoken).accepted.mean()
    for row in rows[rows.study == "prices"].itertuples():
        models = {name: cost.Geometry(**row.models[name]) for name in ("target", "draft")}
        context, length = row.prompt + row.tokens / 2, row.draft_length

        def floor(model: cost.Geometry, tokens: int, row=row, context=context) -> float:
            read = cost.read_in_step(model, row.precision, context) / row.gb_per_second / 1e6
            if row.precision in ("bf16", "w8a8"):  # gflop_per_second is of fp32: such products are faster
                return read
            return max(read, tokens * model.flops(context) / row.gflop_per_second / 1e6)

        c, v = row.draft_ms / row.step_ms, row.verify_ms / row.step_ms
        lines.append(
            {
                "size": row.size,
                "drafter": row.drafter,
                "threads": row.threads,
                "L_d": int(length),
                "weights, MB": cost.BYTES[row.precision] * models["target"].step / 1e6,
                "step, ms": row.step_ms,
                "its floor": floor(models["target"], 1),
                "V": v,
                "V's floor": floor(models["target"], int(length) + 1) / row.step_ms,
                "c": c,
                "c's floor": floor(models["draft"], 1) / row.step_ms,
                "predicted speed-up": expected_tokens(alpha, int(length)) / (length * c + v),
            }
        )
    return pd.DataFrame(lines)


def over_sizes(rows: pd.DataFrame) -> pd.DataFrame:
    """Prices at the first number of threads and L_d that every size was measured at."""
    found = _prices(rows)
    for column in ("threads", "L_d"):
        found = found[found[column] == found.groupby(column)["size"].nunique().idxmax()]
    return found


def over_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """Prices of the voice's own size, by threads and L_d."""
    found = _prices(rows)
    return found[found["size"] == found["size"].iloc[0]].sort_values(["drafter", "threads", "L_d"])


def readable_prices(table: pd.DataFrame) -> pd.DataFrame:
    labels = table["size"] + ", " + table["drafter"]
    return readable(table.drop(columns=["size", "drafter"]).set_index(pd.Index(labels, name="target, draft")))


def begins(rows: pd.DataFrame) -> str:
    """At which sizes the predicted speed-up is WANTED or more, for each drafter."""
    table, said = over_sizes(rows), []
    for drafter, part in table.groupby("drafter", sort=False):
        enough = part["size"][part["predicted speed-up"] >= WANTED]
        said.append(f"{drafter}: {', '.join(enough) or 'at no size'}")
    return f"A speed-up of {WANTED} is predicted for {'; '.join(said)}."


def over_batches(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per number of sequences at once: tokens per second of both methods, and their ratio."""
    found = rows[rows.study == "batches"].assign(rate=lambda of: of.tokens / of.lm_seconds)
    rate = found.pivot_table(index="batch", columns="method", values="rate")
    return pd.DataFrame(
        {
            "autoregressive, tokens / s": rate.autoregressive,
            "SSD, tokens / s": rate.speculative,
            "speed-up": rate.speculative / rate.autoregressive,
            "SSD over one at a time": rate.speculative / rate.speculative.iloc[0],
            "utterances": found.groupby("batch").utterances.first(),
        }
    ).rename_axis("sequences at once")


def over_lengths(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per length of an utterance: time a token of both methods, memory, and the floor of a target's step."""
    length = rows[rows.study == "lengths"]
    base, ssd = (length[length.method == method].iloc[0] for method in ("autoregressive", "speculative"))
    models = {name: cost.Geometry(**base.models[name]) for name in ("target", "draft")}
    lines = []
    for (count, seconds, grown), (other, theirs, both) in zip(base.marks, ssd.marks, strict=True):
        cached = base.prompt + count / 2
        cells = 2 if base.precision == "bf16" else 4
        lines.append(
            {
                "seconds of speech": count / TOKEN_RATE,
                "autoregressive, ms / token": 1000 * seconds / count,
                "SSD, ms / token": 1000 * theirs / other,
                "speed-up": (seconds / count) / (theirs / other),
                "floor, ms": cost.read_in_step(models["target"], base.precision, cached) / base.gb_per_second / 1e6,
                "autoregressive, MB": grown / 1e6,
                "SSD, MB": both / 1e6,
                "cache, MB": cells * models["target"].cache * (base.prompt + count) / 1e6,
                "both caches, MB": cells * sum(m.cache for m in models.values()) * (base.prompt + count) / 1e6,
            }
        )
    return pd.DataFrame(lines).set_index("seconds of speech")


def draw_sizes(table: pd.DataFrame, axes) -> None:
    """``over_sizes`` -> predicted speed-up (left), V and c with their floors (right), over the target's weights."""
    left, right = axes
    table = table.sort_values("weights, MB", kind="stable")
    for shade, (drafter, part) in zip(PALETTE, table.groupby("drafter", sort=False), strict=False):
        x = part["weights, MB"]
        left.plot(x, part["predicted speed-up"], "o-", color=shade, label=drafter)
        right.plot(x, part["c"], "o-", color=shade, label=f"draft step, {drafter}")
        right.plot(x, part["c's floor"], ":", color=shade)
    right.plot(x, part["V"], "s-", color=TARGET, label="verification")
    right.plot(x, part["V's floor"], ":", color=TARGET, label="dotted: floors")
    for size, megabytes, value in zip(part["size"], x, part["predicted speed-up"], strict=True):
        left.annotate(size, (megabytes, value), (0, 7), textcoords="offset points", ha="center", fontsize=8.5)
    left.axhline(WANTED, color="grey", linestyle="--", label=f"the paper's {WANTED}")
    left.axhline(1, color="grey", linestyle=":")
    for ax, label in ((left, "predicted speed-up, times"), (right, "price, target steps")):
        ax.set(xscale="log", xlabel="weights that a step of the target reads, MB", ylabel=label)
        ax.set_xticks(x, [f"{megabytes:.0f}" for megabytes in x])
        ax.minorticks_off()
        ax.grid(axis="y", alpha=0.3)
    legend_below(axes)
    ends = table.groupby("drafter", sort=False)["predicted speed-up"].agg(["first", "last"])
    sizes = table["size"].iloc[0], table["size"].iloc[-1]
    said = [f"{line['first']:.2f} to {line['last']:.2f} with {name}" for name, line in ends.iterrows()]
    titled(axes, f"Predicted speed-up from {sizes[0]} to {sizes[1]}: {'; '.join(said)}")


def draw_settings(table: pd.DataFrame, axes) -> None:
    """``over_settings`` -> over L_d the predicted speed-up (left), V and L_d c (right), by drafter and threads."""
    left, right = axes
    for shade, ((drafter, threads), part) in zip(PALETTE, table.groupby(["drafter", "threads"]), strict=False):
        label = f"{drafter}, {threads:g} thread{'s' * (threads > 1)}"
        left.plot(part["L_d"], part["predicted speed-up"], "o-", color=shade, label=label)
        right.plot(part["L_d"], part["V"], "s-", color=shade)
        right.plot(part["L_d"], part["L_d"] * part["c"], "o--", color=shade)
    left.axhline(1, color="grey", linestyle=":")
    left.set(ylabel="predicted speed-up, times")
    right.set(ylabel="target steps: verification (solid), draft (dashed)")
    for ax in axes:
        ax.set(xlabel=maths("drafted tokens per round, L_d"))
        ax.grid(axis="y", alpha=0.3)
    legend_below(axes)
    best = table.loc[table["predicted speed-up"].idxmax()]
    where = f"L_d {best['L_d']:g}, threads: {best['threads']:g}, {best['drafter']}"
    titled(axes, f"The best prediction is a speed-up of {best['predicted speed-up']:.2f}: {where}")


def draw_lengths(table: pd.DataFrame, axes) -> None:
    """``over_lengths`` -> milliseconds a token (left) and MB (right) over the length of the utterance."""
    shades = {"autoregressive": TARGET, "SSD": SSD, "floor": TARGET, "cache": TARGET, "both caches": SSD}
    styles = {"autoregressive": "o-", "SSD": "s-"}
    for ax, unit, name in zip(axes, ("ms", "MB"), ("milliseconds per token", "memory, MB"), strict=True):
        for column in (column for column in table if column.partition(", ")[2].startswith(unit)):
            line = column.partition(", ")[0]
            ax.plot(table.index, table[column], styles.get(line, ":"), color=shades[line], label=line)
        ax.set(xlabel="seconds of speech", ylabel=name)
        ax.set_ylim(bottom=0)
        ax.grid(axis="y", alpha=0.3)
        ax.legend(frameon=False, fontsize=9)
    ends = [f"{table['speed-up'].iloc[end]:.2f} for {table.index[end]:g} s" for end in (0, -1)]
    titled(axes, f"SSD's speed-up by the length of an utterance: {ends[0]}, {ends[1]} of speech")
