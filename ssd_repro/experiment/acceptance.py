"""Acceptance rates from rows: which drafted token was judged where, and how it went."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .statistics import LEAST, bootstrap, ratio_of_sums

PARTS = 10  # of an utterance


def rounds_of(rows: pd.DataFrame):
    """(drafted, accepted) of every round that drafted, but for one that an accepted end of speech cut short."""
    for pieces, counts in zip(rows.rounds, rows.pieces, strict=True):
        for piece, tokens in zip(pieces, counts, strict=True):
            begin = 0
            for drafted, accepted in piece:
                if drafted and begin + accepted <= tokens:
                    yield drafted, accepted
                begin += accepted + 1


def piece_events(rounds, tokens: int):
    """(position in the draft from 1, token of the piece from 0, accepted) of each judged draft of a sentence.

    A round ends with its first rejection: what was drafted after it, or after an accepted
    end of speech (the token number ``tokens``), was not judged.
    """
    begin = 0
    for drafted, accepted in rounds:
        yield from ((i + 1, begin + i, True) for i in range(accepted))
        if accepted < drafted and begin + accepted <= tokens:
            yield accepted + 1, begin + accepted, False
        begin += accepted + 1


def kinds(letters: str) -> list[str]:
    """``rows.token_kinds`` of a sentence -> of each token speech, silence, or boundary: beside a change."""
    names = {"s": "speech", ".": "silence"}
    padded = letters[:1] + letters + letters[-1:]
    changes = [len(set(padded[i : i + 3])) > 1 for i in range(len(letters))]
    return ["boundary" if change else names[letter] for letter, change in zip(letters, changes, strict=True)]


def row_events(row) -> list[tuple]:
    """Of one row's judged drafts: (position in the draft, share of the utterance gone, kind of token, accepted)."""
    events, begin = [], 0
    for rounds, count in zip(row["rounds"], row["pieces"], strict=True):
        known = kinds(row["token_kinds"][begin : begin + count])
        for position, token, accepted in piece_events(rounds, count):
            kind = "end of speech" if token >= count else known[token] if known else "unknown"
            events.append((position, min((begin + token) / max(row["tokens"], 1), 1.0), kind, accepted))
        begin += count
    return events


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per judged draft: utterance (its number in ``rows``), position, along (0 to 1), kind, accepted."""
    lines = [(i, *event) for i, row in enumerate(rows.to_dict("records")) for event in row_events(row)]
    return pd.DataFrame(lines, columns=["utterance", "position", "along", "kind", "accepted"])


def rate(events: pd.DataFrame, by: str) -> pd.DataFrame:
    """Accepted / judged for each value of ``by``; its 95 % interval over utterances where there are enough."""
    lines = []
    for value, group in events.groupby(by, sort=True):
        each = group.groupby("utterance").accepted.agg(["sum", "size"])
        enough = len(each) >= LEAST
        low, high = bootstrap(ratio_of_sums, each["sum"], each["size"]) if enough else (np.nan, np.nan)
        lines.append((value, group.accepted.mean(), low, high, len(group), len(each)))
    return pd.DataFrame(lines, columns=["value", "acceptance", "low", "high", "judged", "n"])


def over_setting(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """``rate`` for each value of a setting; also accepted / drafted, the paper's acceptance rate."""
    parts = []
    for value, group in rows.groupby(column, sort=True):
        line = rate(judged(group).assign(value=value), "value")
        low, high = bootstrap(ratio_of_sums, group.accepted, group.drafted) if len(group) >= LEAST else (np.nan, np.nan)
        drafted = {"of_drafted_low": low, "of_drafted_high": high}
        parts.append(line.assign(of_drafted=ratio_of_sums(group.accepted, group.drafted), **drafted))
    return pd.concat(parts, ignore_index=True)


def acceptance(rows: pd.DataFrame, tolerance: float, draft_length: int) -> pd.DataFrame:
    """All curves: columns curve, value, acceptance (accepted / judged), low, high, judged, n, of_drafted (its
    interval _low, _high).

    Curves against a setting vary that one alone from (tolerance, draft_length, the voice's temperature); those within
    the utterance are of that point, the position within the draft of its longest draft.
    """
    ssd = rows[rows.method == "speculative"]
    own = ssd.temperature.isna()
    beta, length = np.isclose(ssd.tolerance.astype(float), tolerance), ssd.draft_length == draft_length
    point, longest = ssd[own & beta & length], ssd[own & beta]
    longest = longest[longest.draft_length == longest.draft_length.max()]
    prompt_speaker = point.voice.str.partition("_")[0]  # a LibriTTS prompt is <speaker>_<chapter>_...
    point = point.assign(speaker=point.voice.where(point.front_end == "bundled", prompt_speaker))
    heat, events = ssd[beta & length], judged(point)
    heat = heat.assign(temperature=heat.temperature.fillna(heat.sampler.map(lambda s: s["temperature"])))
    parts = np.minimum((events.along * PARTS).astype(int), PARTS - 1)
    curves = {
        "beta": over_setting(ssd[own & length], "tolerance"),
        "L_d": over_setting(ssd[own & beta], "draft_length"),
        "temperature": over_setting(heat, "temperature"),
        "position in the draft": rate(judged(longest), "position"),
        "along the utterance": rate(events.assign(part=(parts + 0.5) / PARTS), "part"),
        "what the token carries": rate(events, "kind"),
        "voice": over_setting(point, "speaker"),
    }
    return pd.concat([frame.assign(curve=name) for name, frame in curves.items()]).set_index("curve")
