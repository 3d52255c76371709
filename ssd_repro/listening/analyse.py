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
from ..experiment.provenance import all_provenance
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
    if (needed := plan.listeners()) is None or heard.listeners < needed:
        aim = f"to show equivalence within ± {plan.margin:g} with power {plan.power:g}"
        asked = f"no number of them is enough {aim} on {plan.utterances} utterances: build a test of more"
        raise InputError(
            f"{heard.listeners} listeners count, "
            + (asked if needed is None else f"{needed} are needed {aim}: {needed - heard.listeners} more")
            + "; no means until then"
        )
    if mark and results:
        raise InputError(f"{heard.synthetic} ratings are synthetic: they do not go into {results}")
    if results and all_provenance(results).get("01_table1", {}).get("weights") != key["weights"]:
        raise InputError(f"Table 1 of {results} is not of voice {key['weights']}, which the test is of")
    table = table2(heard.rows, list(key["systems"]))
    about = f"{heard.listeners} listeners, build {key['build']}, voice {key['weights']}."
    say(f"{mark}{about}\n\n{tables.markdown(readable(table))}")
    say(
        "[low, high]: 95 % bootstrap intervals over listeners and texts, both resampled, which makes them rather too "
        "wide than too narrow; the paper's ± is its own 95 % interval.\n"
    )
    say(tables.markdown(compare(heard.rows, plan)))
    say(
        f"{OURS} - {BASE.lower()}, in points. Model: mixed, difference ± standard error. Equivalent: two one-sided "
        f"tests (TOST) at {plan.level:g} against ± {plan.margin:g}. sd: of a rating, of the difference by listener, by "
        f"text (planned: {plan.residual:g}, {plan.by_listener:g}, {plan.by_text:g}).\n"
    )
    say(f"{mark}{abx(heard)}")
    if results:
        about = {"listeners": heard.listeners, "build": key["build"], "weights": key["weights"]}
        write_text(results / LISTENED, table.assign(**about).to_csv())


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
        low, high = np.nanpercentile(draws[part, OURS] - draws[part, BASE], [2.5, 97.5])
        means, model = own.groupby("system").value.mean(), mixed_model(own, plan.margin)
        difference = tables.number(means[OURS] - means[BASE], 2, low, high)
        line = {"rating": name, "difference": difference, "model": "no fit", "verdict": "–"}
        if model:
            line["model"] = f"{model['difference']:.2f} ± {model['error']:.2f}"
            line |= {"p, TOST": f"{model['tost']:.3f}", "p, no difference": f"{model['p']:.3f}"}
            line["sd"] = ", ".join(f"{sd:.2f}" for sd in model["sd"])
            different = statistics.SHOWN_DIFFERENT if model["p"] < plan.level else statistics.NOT_SHOWN
            line["verdict"] = statistics.SHOWN_EQUIVALENT if model["tost"] < plan.level else different
        lines.append(line)
    return pd.DataFrame(lines).set_index("rating")


def mixed_model(rows: pd.DataFrame, margin: float) -> dict | None:
    """difference, its standard error, p of TOST and of no difference, standard deviations; None without a fit.

    rows: ratings of two systems, value as float. sd: of a rating, of the difference by listener, by text.
    """
    from scipy.stats import norm
    from statsmodels.regression.mixed_linear_model import MixedLM

    data = rows.assign(ours=np.where(rows.system == OURS, 0.5, -0.5), all=1)
    effects = {"listener": "0 + C(listener)", "text": "0 + C(text)"}
    effects |= {f"{name} on it": f"0 + C({name}):ours" for name in effects}
    model = MixedLM.from_formula("value ~ ours", data, groups="all", vc_formula=effects)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance of 0 lies on the boundary
        try:
            fit = model.fit(reml=True, method="powell")  # by gradients it often stays far from there
        except np.linalg.LinAlgError:
            return None
    value, error = fit.params["ours"], fit.bse["ours"]
    if not (fit.converged and np.isfinite(error)):
        return None
    spread = dict(zip(model.exog_vc.names, np.sqrt(fit.vcomp), strict=True))
    return {
        "difference": value,
        "error": error,
        "tost": max(norm.sf((value + margin) / error), norm.cdf((value - margin) / error)),
        "p": 2 * norm.sf(abs(value / error)),
        "sd": [np.sqrt(fit.scale), spread["listener on it"], spread["text on it"]],
    }


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
