"""The price of an acceptance rule: acceptance and total variation, from the draft's and the target's distributions.

Along what the target has said by itself every drafter proposes the next token at every place where the loop drafts;
p and q are what is sampled from there, RAS, nucleus and bans included. Nothing is drawn from the rules: of each place
``rules.emitted`` has the law of what they would say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..decoding.drafters import Tape
from ..decoding.rules import KINDS, MATCHED, emitted, overlap, total_variation
from ..decoding.speculative import ModelDrafter
from .provenance import row_context
from .rows import locked_rows, rows_of_folder, rows_together, to_frame
from .statistics import MEASURES, difference, ratio_of_sums
from .style import PALETTE, legend_below, titled
from .tables import estimate, number, quality_columns

PAPER = "paper"  # rule, and drafter
SAME = 0.001  # less than this of TV is no excess but rounding
GRIDS = {"betas": PAPER, "mixtures": "ensemble", "ranks": "top-k", "epsilons": "typical", "entropies": "fly"}
GRIDS |= {"cosines": "groups"}
TIGHT = (PAPER, "ensemble", "fly")  # rules whose own residual is the matched one


def rules_of(p: dict) -> list[str]:
    """A notebook's parameters -> the rules of its grids, and those whose residual is not matched once more with it.

    Beta 0 and the tolerance are always among them.
    """
    grids = p | {"betas": sorted({0.0, float(p["tolerance"]), *p["betas"]})}
    plain = [f"{kind}:{value:g}" for grid, kind in GRIDS.items() for value in grids[grid]]
    return plain + [MATCHED + each for each in plain if not each.startswith(TIGHT)]


@torch.inference_mode()
def along(voice, piece: list[int], name: str, tokens: list[int], stopped: bool) -> tuple[dict[str, Tensor], Tensor]:
    """A piece's text and what the target said to it -> p of each drafter, and q, of every place but the first: (n, V).

    The last place is that of the stop token, if the piece ended by one.
    """
    prefix, session = voice.prefix(piece, name), voice.models[0].session()
    config = voice.config(len(piece), 0.0, 1)
    tape = Tape.empty(config, session.prefill(prefix))
    makers = {n: partial(ModelDrafter, d) if hasattr(d, "session") else d for n, d in voice.drafters.items()}
    drafters = {drafter: make(prefix, session) for drafter, make in makers.items()}
    said, unused = torch.tensor(tokens, device=voice.device), torch.Generator(voice.device).manual_seed(0)
    p, q = {drafter: [] for drafter in drafters}, []
    for size in range(1, len(tokens) + stopped):
        tape.write(size - 1, said[size - 1])
        tape.size = size
        for drafter, proposing in drafters.items():
            proposing.rollback(size)
            p[drafter].append(proposing.propose(tape, 1, unused)[1])
        q.append(tape.probabilities(session.extend(tape.tokens(size - 1, size)[None])[0], size))
    nothing = torch.zeros(0, len(tape.ban_mask), device=voice.device)
    return {drafter: torch.cat([nothing, *each]) for drafter, each in p.items()}, torch.cat([nothing, *q])


def prices(voice, spoken: pd.DataFrame, names: list[str], folder, progress=iter) -> pd.DataFrame:
    """A row per utterance and drafter; what ``folder`` holds is not measured again.

    spoken: rows of the autoregressive target. ``overlap`` of a row is the sum over its ``places`` of sum min(p, q), and
    ``rules`` has of each rule the sums of acceptance, of TV, and of the mass that the target could not have said.
    """
    for name in names:
        voice.rule(name)  # one that is none is known before any work
    shared = {**row_context(voice.device), "weights": voice.weights_id, "study": "price", "names": names}
    shared |= {"runtime": voice.runtime, "precision": voice.precision, "sampler": asdict(voice.sampler)}
    found = []
    with locked_rows(folder, "price") as path:
        known = rows_of_folder(folder)
        for said in progress(spoken.to_dict("records")):
            about = {name: said[name] for name in ("text_id", "text", "voice", "seed")}
            same = {**shared, **about, "spoken": said["key"].partition("-")[0]}
            settings = {drafter: {**same, "drafter": drafter} for drafter in voice.drafters}
            found += rows_together(path, known, settings, partial(_price, voice, said, names))
    return to_frame(found)


def _price(voice, said: dict, names: list[str]) -> dict[str, dict]:
    """Drafter -> the numbers of its row."""
    found = {
        drafter: {"places": 0, "overlap": 0.0, "rules": dict.fromkeys(names, np.zeros(3)), "processes": 1}
        for drafter in voice.drafters
    }
    for drafts, q in _pieces(voice, said):
        for drafter, p in drafts.items():
            sums = found[drafter]
            sums["places"] += len(q)
            sums["overlap"] += float(overlap(p, q).sum())
            for name in names:
                acceptance, law = emitted(voice.rule(name), p, q)
                measured = acceptance.sum(), total_variation(law, q).sum(), law[q == 0].sum()
                sums["rules"][name] = sums["rules"][name] + [float(each) for each in measured]
    for sums in found.values():
        sums["rules"] = {name: measured.tolist() for name, measured in sums["rules"].items()}
    return found


def _pieces(voice, said: dict) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    begin = 0
    for piece, count in zip(voice.front.pieces(said["text"], said["voice"]), said["pieces"], strict=True):
        tokens = said["token_ids"][begin : begin + count]
        yield along(voice, piece, said["voice"], tokens, bool(said["stopped"]))
        begin += count


# ------------------------------------------------------------------------- from rows alone


def frontier(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per drafter and rule: acceptance, TV, the bound, the excess over it, and what was impossible."""
    lines = []
    for drafter, ours in rows[rows.study == "price"].groupby("drafter", sort=False):
        for name in ours.rules.iloc[0]:
            accepted, distance, impossible = np.array([each[name] for each in ours.rules], float).T
            columns = accepted, *ours[["overlap", "places"]].to_numpy(float).T
            kind, _, value = name.rpartition(":")
            line = {"rule": kind, "drafter": drafter, "value": float(value)}
            line |= estimate("acceptance", ratio_of_sums, accepted, ours.places)
            line |= estimate("TV", ratio_of_sums, distance, ours.places) | {"bound": _bound(*columns)}
            line |= estimate("excess", lambda far, *c: ratio_of_sums(far, c[-1]) - _bound(*c), distance, *columns)
            lines.append(line | {"impossible": ratio_of_sums(impossible, ours.places), "n": len(ours)})
    return pd.DataFrame(lines).set_index("rule")


def _bound(accepted, shared, places):
    """max(0, mean acceptance - mean sum min(p, q)), over all places of the last axis."""
    return np.maximum(0.0, ratio_of_sums(accepted, places) - ratio_of_sums(shared, places))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    symbols = {kind: each.parameter for kind, each in KINDS.items()}
    lines = table.reset_index().to_dict("records")
    shown = {
        "drafter": table.drafter,
        "parameter": [f"{symbols[x['rule'].removeprefix(MATCHED)]} {x['value']:.3g}" for x in lines],
        "acceptance": [number(x["acceptance"], 3, x.get("acceptance_low"), x.get("acceptance_high")) for x in lines],
        "TV": [number(x["TV"], 3, x.get("TV_low"), x.get("TV_high")) for x in lines],
        "bound": [number(x["bound"], 3) for x in lines],
        "excess": [number(x["excess"], 3, x.get("excess_low"), x.get("excess_high")) for x in lines],
        "target cannot say": [number(x["impossible"], 3) for x in lines],
    }
    return pd.DataFrame({**shown, "n": table.n}, index=table.index)


def at_equal_acceptance(rows: pd.DataFrame, tolerance: float, draft_length: int | None = None) -> pd.DataFrame:
    """Every rule where it accepts as much as the paper's at ``tolerance``, between two values of its grid; by excess.

    Rules whose grid does not come so far are left out.
    """
    table, lines = frontier(rows), []
    for drafter, ours in table.groupby("drafter", sort=False):
        at = ours[(ours.index == PAPER) & np.isclose(ours.value, tolerance)].iloc[0]
        for rule, grid in ours.groupby(level=0, sort=False):
            grid = grid.sort_values("acceptance")
            if grid.acceptance.iloc[0] <= at.acceptance <= grid.acceptance.iloc[-1]:
                line = {c: np.interp(at.acceptance, grid.acceptance, grid[c]) for c in ("value", "TV", "impossible")}
                line |= {"excess": line["TV"] - at.bound, **at[["acceptance", "bound", "n"]]}
                lines.append({"rule": rule, "drafter": drafter, **line})
    order = {drafter: i for i, drafter in enumerate(table.drafter.unique())}
    found = pd.DataFrame(lines).sort_values("excess", kind="stable")
    return found.sort_values("drafter", key=lambda d: d.map(order), kind="stable").set_index("rule")


def conclusion(rows: pd.DataFrame, tolerance: float) -> str:
    """What the rows say of the paper's rule, and of the others at its acceptance: Markdown."""
    said, grids = [], frontier(rows)
    for drafter, table in at_equal_acceptance(rows, tolerance).groupby("drafter", sort=False):
        lossless = grids[(grids.drafter == drafter) & (grids.value == 0)].loc[[PAPER]].acceptance.iloc[0]
        paper, others = table.loc[PAPER], table.drop(PAPER)
        met = [rule for rule, line in others.iterrows() if line.excess < SAME]
        above = [f"{rule} {line.TV:.3f}" for rule, line in others.iterrows() if line.excess >= SAME]
        verdict = "on the bound" if paper.excess < SAME else f"{paper.excess:.3f} above the bound"
        said.append(
            f"**Drafter {drafter}.** Lossless, {lossless:.3f} of the drafts are accepted; at beta {tolerance:g} "
            f"{paper.acceptance:.3f}, for a total variation from the target of {paper.TV:.3f}: {verdict}. "
            f"{100 * paper.impossible:.1f} % of what is then said is such as the target could not have said."
            + f" As much acceptance for as little: {', '.join(met)}." * bool(met)
            + f" For more: {', '.join(above)}." * bool(above)
        )
    return "\n\n".join(said)


def draw(table: pd.DataFrame, axes) -> None:
    """``frontier`` -> TV over acceptance, a panel for each of at most four drafters, a line for each rule."""
    kinds = list(dict.fromkeys(rule.removeprefix(MATCHED) for rule in table.index))
    panels = list(table.groupby("drafter", sort=False))[: len(axes)]
    for ax, (drafter, ours) in zip(axes, panels, strict=False):
        low = (ours.acceptance - ours.bound)[ours.bound > 0]
        free = low.mean() if len(low) else 1.0  # sum min(p, q)
        ax.fill_between([0, free, 1], [0, 0, 1 - free], color="0.88", label="no rule gets here")
        for rule, grid in ours.groupby(level=0, sort=False):
            kind, grid = rule.removeprefix(MATCHED), grid.sort_values("acceptance")
            colour, style = PALETTE[kinds.index(kind)], ":" if rule.startswith(MATCHED) else "-"
            look = {"markersize": 10, "markerfacecolor": "none"} if kind == PAPER else {"markersize": 4}  # seen around
            ax.plot(grid.acceptance, grid.TV, f"o{style}", color=colour, linewidth=1.2, label=rule, **look)
        ax.set(xlabel="acceptance", title=f"{drafter} drafter")
        ax.set_xlim(max(0.0, min(ours.acceptance) - 0.03), 1.03)
        ax.set_ylim(-0.01, 1.08 * table.TV.max())
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("total variation from the target")
    for ax in axes[len(panels) :]:
        ax.remove()
    legend_below(axes[: len(panels)], ncols=4)
    tight = [rule for rule, grid in table.groupby(level=0, sort=False) if grid.excess.max() < SAME]
    titled(axes[0], f"On the bound, below which no rule comes: {', '.join(tight) or 'none of these rules'}")


def heard(rows: pd.DataFrame) -> pd.DataFrame:
    """The autoregressive target, then each rule that was decoded: quality, and WER points over the target's."""
    spoken = rows[rows.study.isna()]
    base, lines = spoken[spoken.method == "autoregressive"], []
    for label, ours in {"no draft": base, **_by_rule(spoken)}.items():
        line = quality_columns(ours)
        if ours is not base:
            found = difference(ours, base, MEASURES[0])
            names = {"difference": "more WER", "low": "more WER_low", "high": "more WER_high"}
            line |= {column: found[name] for name, column in names.items()}
            line |= {"acceptance": ratio_of_sums(ours.accepted, ours.drafted)}
        calls = pd.to_numeric(ours.tokens_per_target_call).mean()
        lines.append({"rule": label, **line, "tokens per target call": calls, "n": len(ours)})
    return pd.DataFrame(lines).set_index("rule")


def _by_rule(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    ssd = rows[rows.method == "speculative"]
    names = ssd.get("rule", pd.Series(None, ssd.index, object)).fillna(ssd.tolerance.map("paper:{:g}".format))
    return dict(iter(ssd.groupby(names, sort=False)))
