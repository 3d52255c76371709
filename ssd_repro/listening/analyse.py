"""The paper's Table 2 from ratings: MOS, is SSD equivalent to autoregressive, ABX against chance.

Intervals resample listeners and texts, both crossed (Owen 2007, "The pigeonhole bootstrap"). The mixed model is
rating ~ SSD with random effects of listener, text, and of both on the difference, by REML (statsmodels).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..experiment import paper, statistics, tables
from ..experiment.report import LISTENED
from ..files import write_text
from . import need
from .power import Plan
from .ratings import Heard, read, read_key

MOS = {"SIM": "SIM-MOS", "NAT": "NAT-MOS"}  # in the paper's order
BASE, OURS = "Autoregressive", "SSD"


def analyse(paths: Sequence[Path], key_path: Path | None = None, results: Path | None = None, say=print) -> None:
    """Say, as Markdown, what the ratings show; and save Table 2 into ``results``, if given.

    InputError where fewer listeners count than the build's plan asks for: no mean is printed then.
    """
    need("statsmodels")
    key = read_key(key_path or _beside(paths[0]))
    heard, plan = read(paths, key), Plan(**key["plan"])
    for file, reason in heard.left_out.items():
        say(f"left out: {file}: {reason}\n")
    mark = f"**SYNTHETIC RATINGS: {heard.synthetic} of {len(heard.rows)} rows were given by no listener.** "
    mark = mark if heard.synthetic else ""
    if heard.listeners < (needed := plan.listeners()):
        raise InputError(
            f"{heard.listeners} listeners count, {needed} are needed to show equivalence within ± {plan.margin:g} with "
            f"power {plan.power:g}: {needed - heard.listeners} more, and no means until then"
        )
    if mark and results:
        raise InputError(f"{heard.synthetic} ratings are synthetic: they do not go into {results}")
    table = table2(heard.rows, list(key["systems"]))
    about = f"{heard.listeners} listeners, build {key['build']}, voice {key['weights']}."
    say(f"{mark}{about}\n\n{tables.markdown(readable(table))}")
    say("[low, high]: 95 % bootstrap intervals over listeners and texts; the paper's ± is its own 95 % interval.\n")
    say(tables.markdown(compare(heard.rows, plan)))
    say(
        f"{OURS} - {BASE.lower()}, in points. Verdict: by the bootstrap, equivalent if its 90 % interval lies within "
        f"± {plan.margin:g}. Model: mixed, with p of two one-sided tests against that margin (TOST), and of no "
        "difference; sd: of a rating, of the difference by listener, by text (planned: "
        f"{plan.residual:g}, {plan.by_listener:g}, {plan.by_text:g}).\n"
    )
    say(f"{mark}{abx(heard)}")
    if results:
        write_text(results / LISTENED, table.assign(listeners=heard.listeners, build=key["build"]).to_csv())


def _beside(path: Path) -> Path:
    """key.json of the folder that the ratings lie in, or of the one above."""
    folder = path if path.is_dir() else path.parent
    return next((p for p in (folder / "key.json", folder.parent / "key.json") if p.is_file()), folder / "key.json")


def resampled(rows: pd.DataFrame, draws: int = statistics.DRAWS, seed: int = 0) -> pd.DataFrame:
    """Means by part and system in every draw of listeners and of texts, from the same draws -> (draws, part x system).

    A row weighs how often its listener was drawn times how often its text was.
    """
    dice, weights = np.random.default_rng(seed), 1
    for column in ("listener", "text"):
        codes, names = pd.factorize(rows[column])
        weights = weights * dice.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)[:, codes]
    values, means = rows.value.to_numpy(float), {}
    for group, places in rows.groupby(["part", "system"]).indices.items():
        total = weights[:, places].sum(1)
        means[group] = weights[:, places] @ values[places] / np.where(total, total, np.nan)
    return pd.DataFrame(means)


def _rated(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.part.isin(list(MOS)) & ~rows.check.astype(bool)]


def table2(rows: pd.DataFrame, systems: list[str]) -> pd.DataFrame:
    """One line per system: <MOS>, <MOS>_low, <MOS>_high, and n, the ratings behind each."""
    rated = _rated(rows)
    draws, means = resampled(rated), rated.astype({"value": float}).groupby(["part", "system"]).value.mean()
    lines = []
    for system in systems:
        line = {"system": system}
        for part, name in MOS.items():
            low, high = np.nanpercentile(draws[part, system], [2.5, 97.5])
            line |= {name: means[part, system], f"{name}_low": low, f"{name}_high": high}
        lines.append(line | {"n": int((rated.system == system).sum() / len(MOS))})
    return pd.DataFrame(lines).set_index("system")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    text = tables.readable(table)
    for name in MOS.values():
        there = paper.LISTENERS.reindex(table.index)
        both = zip(there[name], there[f"{name} ±"], strict=True)
        text[f"{name}, paper"] = ["–" if pd.isna(mean) else f"{mean:.2f} ± {half:.2f}" for mean, half in both]
    return text


def compare(rows: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """SSD against autoregressive, one line per MOS, as text."""
    rated = _rated(rows)
    draws, lines = resampled(rated), []
    for part, name in MOS.items():
        own = rated[(rated.part == part) & rated.system.isin([OURS, BASE])].astype({"value": float})
        difference = draws[part, OURS] - draws[part, BASE]
        inner, outer = (np.nanpercentile(difference, ends) for ends in ([5, 95], [2.5, 97.5]))
        means = own.groupby("system").value.mean()
        lines.append(
            {
                "rating": name,
                "difference": tables.number(means[OURS] - means[BASE], 2, *outer),
                "90 %": f"[{inner[0]:.2f}, {inner[1]:.2f}]",
                "verdict": statistics.verdict(inner, outer, plan.margin, own.text.nunique()),
                **mixed_model(own, plan.margin),
            }
        )
    return pd.DataFrame(lines).set_index("rating")


def mixed_model(rows: pd.DataFrame, margin: float) -> dict[str, str]:
    """Difference with its standard error, p of TOST and of no difference, and standard deviations; '–' without a fit.

    rows: ratings of two systems, value as float.
    """
    from scipy.stats import norm
    from statsmodels.regression.mixed_linear_model import MixedLM

    columns = ["model", "p, TOST", "p, no difference", "sd"]
    data = rows.assign(ours=np.where(rows.system == OURS, 0.5, -0.5), all=1)
    effects = {"listener": "0 + C(listener)", "text": "0 + C(text)"}
    effects |= {f"{name} on it": f"0 + C({name}):ours" for name in effects}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance of 0 is on the boundary
        model = MixedLM.from_formula("value ~ ours", data, groups="all", re_formula="0", vc_formula=effects)
        try:
            fit = model.fit(reml=True)
            value, error = fit.params["ours"], fit.bse["ours"]
        except np.linalg.LinAlgError:
            return dict.fromkeys(columns, "–")
    if not (fit.converged and np.isfinite(error)):
        return dict.fromkeys(columns, "–")
    tost = max(norm.sf((value + margin) / error), norm.cdf((value - margin) / error))
    spread = dict(zip(model.exog_vc.names, np.sqrt(fit.vcomp), strict=True))
    found = (np.sqrt(fit.scale), spread["listener on it"], spread["text on it"])
    values = (f"{value:.2f} ± {error:.2f}", f"{tost:.3f}", f"{2 * norm.sf(abs(value / error)):.3f}")
    return dict(zip(columns, (*values, ", ".join(f"{sd:.2f}" for sd in found)), strict=True))


def abx(heard: Heard) -> str:
    """How often X was told, against chance."""
    from scipy.stats import binomtest

    told = heard.rows[(heard.rows.part == "ABX") & ~heard.rows.check.astype(bool)].passed.astype(bool)
    test = binomtest(int(told.sum()), len(told), 0.5, alternative="two-sided")
    low, high = test.proportion_ci(0.95, "wilson")
    return (
        f"ABX, autoregressive against SSD: X was told in {told.sum()} of {len(told)} trials, "
        f"{100 * told.mean():.0f} % [{100 * low:.0f}, {100 * high:.0f}]; chance is 50 %, p = {test.pvalue:.3g} "
        "(binomial, two-sided; trials of one listener count as independent)."
    )
