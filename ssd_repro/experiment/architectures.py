"""Does SSD's gain hold on other decoders? Voices of several families, decoded alike, and why it holds or does not.

A round makes tau tokens for L_d draft steps of c and one verification of V, in steps of the target: SSD is the faster
one where tau > L_d c + V.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd

from ..models.draft import layers_of
from . import run
from .conclusions import bounds, value
from .figures import PALETTE
from .provenance import row_context, write_provenance
from .rows import locked_rows, rows_of_folder, rows_together, to_frame
from .statistics import MEASURES, difference, ratio_of_sums
from .style import TARGET, maths, titled
from .systems import AUTOREGRESSIVE, System
from .tables import estimate, readable
from .theory import setting

NAME = "architectures"  # of the rows file
NOTEBOOK = "17_architectures"
STUDY = "family"
LABELS = {"qwen2": "Qwen2", "llama": "Llama", "qwen3": "Qwen3", "gpt_neox": "GPT-NeoX"}


def systems(tolerance: float, draft_length: int) -> list[System]:
    """The target, SSD without loss (whose sound is the target's: it is not scored), and SSD at the tolerance."""
    lossless = System("speculative", 0.0, draft_length, scored=False)
    return [AUTOREGRESSIVE, lossless, System("speculative", tolerance, draft_length)]


def measure(voices: list, asked: list[System], utterances, folder, **how) -> pd.DataFrame:
    """``run.run`` of every voice, and a row of what each is (``study`` "family"); how: repeats, models, progress."""
    frames = []
    for voice in voices:
        frames += [run.run(voice, asked, utterances, folder, NAME, **how), _described(voice, folder)]
    return pd.concat(frames, ignore_index=True)


def _described(voice, folder) -> pd.DataFrame:
    settings = {**row_context(voice.device), "study": STUDY, "weights": voice.weights_id}
    with locked_rows(folder, NAME) as path:
        known = rows_of_folder(folder)
        return to_frame(rows_together(path, known, {STUDY: settings}, partial(_facts, voice)))


def _facts(voice) -> dict[str, dict]:
    """Family, sizes, and parameters of the target."""
    config = voice.target.model.config
    sizes = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "draft_layers": len(layers_of(voice.draft.model)),
    }
    count = sum(parameter.numel() for parameter in voice.target.parameters())
    return {STUDY: {"family": config.model_type, **sizes, "parameters": count, "processes": 1}}


def recorded(rows: pd.DataFrame, voices: list, folder, profile: str, parameters: dict) -> dict:
    """The entry of provenance.json, its weights those of all voices."""
    shared = {name: getattr(voices[0], name) for name in ("device", "precision")}
    every = SimpleNamespace(weights_id=", ".join(voice.weights_id for voice in voices), **shared)
    known = parameters | {name: "" for name in ("trained", "work")}  # folders of this machine
    return write_provenance(folder, NOTEBOOK, every, profile, known, rows.key)


# ------------------------------------------------------------------------- from rows alone


def by_family(rows: pd.DataFrame) -> dict[str, tuple[pd.Series, pd.DataFrame]]:
    """Label -> what the voice is, and its decoded rows."""
    decoded, found = rows[rows.study.isna()], {}
    for _, about in rows[rows.study == STUDY].iterrows():
        found[LABELS.get(about.family, about.family)] = about, decoded[decoded.weights == about.weights]
    return found


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per family: WER, and for each beta acceptance, tokens a round, the price of a round, speed-ups.

    price: L_d c + V in target steps. speed-up: measured, per token, with its interval; predicted: tokens a round over
    their price.
    """
    lines = []
    for label, (about, part) in by_family(rows).items():
        base, ssd = part[part.method == "autoregressive"], part[part.method == "speculative"]
        line = {"family": label, "parameters, M": about.parameters / 1e6}
        scored = base[base.words.notna()]
        line |= estimate("WER %", ratio_of_sums, scored.word_errors, scored.words, scale=100)
        for beta, point in ssd.groupby("tolerance"):
            line |= _point(f"beta {beta:g}", point)
            heard = point[point.words.notna()]
            if len(heard):
                more = difference(heard, base, MEASURES[0])
                names = {"difference": "more WER", "low": "more WER_low", "high": "more WER_high"}
                line |= {column: more[name] for name, column in names.items()}
        lines.append(line | {"n": len(base)})
    return pd.DataFrame(lines).set_index("family")


def _point(at: str, rows: pd.DataFrame) -> dict[str, float]:
    """The columns of one setting of SSD; ``at`` ends their names."""
    length = int(rows.draft_length.iloc[0])
    found = setting(rows, length)
    found["price"] = length * found["c"] + found["V"]
    named = ((name.partition("_"), value) for name, value in found.items())
    return {
        **estimate(f"acceptance, {at}", ratio_of_sums, rows.accepted, rows.drafted),
        **{f"{name}, {at}{line}{end}": value for (name, line, end), value in named},
    }


def settings_of(found: pd.DataFrame) -> list[str]:
    """["beta 0", ...] of a ``table``."""
    return [column.removeprefix("predicted, ") for column in found if column.startswith("predicted, ")]


def speeds(found: pd.DataFrame) -> pd.DataFrame:
    """Of a ``table``, to read: what is heard, and how fast it is."""
    names = ["parameters, M", "WER %", "more WER", *(f"speed-up, {at}" for at in settings_of(found)), "n"]
    shown = readable(found)
    return shown[[name for name in names if name in shown]]


def reasons(found: pd.DataFrame) -> pd.DataFrame:
    """Of a ``table``, to read: a row per family and beta, what a round makes and what it costs."""
    names, lines = ("acceptance", "tokens a round", "c", "V", "price", "predicted"), {}
    for label, line in found.iterrows():
        for at in settings_of(found):
            columns = {name + end: f"{name}, {at}{end}" for name in names for end in ("", "_low", "_high")}
            lines[f"{label}, {at}"] = {name: line[column] for name, column in columns.items() if column in line}
    return readable(pd.DataFrame.from_dict(lines, orient="index").rename_axis("family"))


def verdict(line: pd.Series, at: str) -> str:
    """Whether SSD is the faster one, and by which of the three numbers it is not."""
    low, high = bounds(line, f"speed-up, {at}")
    tokens, c, verify = (line[f"{name}, {at}"] for name in ("tokens a round", "c", "V"))
    shown = f"{at}: {value(line, f'speed-up, {at}')} times as fast"
    if low > 1:
        return f"{shown}, it holds"
    doubt = "it does not hold" if high < 1 else "it is not shown to hold"
    price = line[f"price, {at}"]
    if tokens > price:
        why = f"{tokens:.2f} tokens a round would pay for its price of {price:.2f}: prefill and ends of speech take it"
    else:
        drafts = price - verify
        larger = f"the drafts ({drafts:.2f})" if drafts > verify else f"the verification ({verify:.2f})"
        why = f"a round costs {price:.2f} target steps, most of it {larger}, and makes {tokens:.2f} tokens (c {c:.2f})"
    return f"{shown}, {doubt}: {why}"


def conclusion(rows: pd.DataFrame) -> str:
    """What the rows say of each family: Markdown."""
    found = table(rows)
    asked = settings_of(found)
    said = [f"**{label}.** {'; '.join(verdict(line, at) for at in asked)}." for label, line in found.iterrows()]
    held = {at: int((found[f"speed-up, {at}_low"] > 1).sum()) for at in asked}
    whole = "; ".join(f"at {at} on {count} of {len(found)}" for at, count in held.items())
    return "\n\n".join([*said, f"The gain holds {whole} families."])


def draw(found: pd.DataFrame, axes) -> None:
    """``table`` -> speed-up, measured and predicted (left), and tokens a round over their price."""
    left, right = axes
    asked, places = settings_of(found), np.arange(len(found))
    for i, (at, shade) in enumerate(zip(asked, PALETTE, strict=False)):
        y = places + 0.3 * (i - (len(asked) - 1) / 2)
        speeds = found[f"speed-up, {at}"]
        left.plot(speeds, y, "o", color=shade, label=maths(at))
        left.hlines(y, found[f"speed-up, {at}_low"], found[f"speed-up, {at}_high"], color=shade)
        left.plot(found[f"predicted, {at}"], y, "x", color=shade)
        right.plot(found[f"price, {at}"], found[f"tokens a round, {at}"], "o", color=shade)
        for label, line in found.iterrows():
            at_point = (line[f"price, {at}"], line[f"tokens a round, {at}"])
            right.annotate(label, at_point, (5, 4), textcoords="offset points", fontsize=8.5)
    left.axvline(1, color="grey", linestyle=":")
    left.set_yticks(places, found.index)
    left.set(xlabel="speed-up per token (cross: predicted)", ylim=(len(found) - 0.5, -0.5))
    left.legend(frameon=False, fontsize=9)
    ends = [found[f"price, {at}"] for at in asked] + [found[f"tokens a round, {at}"] for at in asked]
    low, high = min(map(min, ends)), max(map(max, ends))
    right.plot([low, high], [low, high], color=TARGET, linestyle=":")
    right.set(xlabel="price of a round, target steps", ylabel="tokens a round (above the line SSD pays)")
    best = asked[-1]
    fast, slow = found[f"speed-up, {best}"].max(), found[f"speed-up, {best}"].min()
    titled(axes, f"Speed-up at {best}: {slow:.2f} to {fast:.2f} over {len(found)} families")
