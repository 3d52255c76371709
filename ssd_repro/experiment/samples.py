"""Sound samples of a results folder: utterances chosen by a rule, their sound from the rows' own tokens.

Nothing is decoded again: whoever listens hears what the tables measured.
"""

from __future__ import annotations

import base64
import io
import json
import re
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError, check_number
from ..files import git_state, write_bytes, write_text
from ..models.codec import TOKEN_RATE
from ..speech import load
from . import figures, metrics, report, tables

SAME = ["text_id", "voice", "seed"]  # the columns that make an utterance
COMPRESSION = 0.85  # libsndfile's, of MP3 at a constant rate: 32 kbit/s of mono at 24 kHz
NOT_MADE = "There are no sound samples in this folder: <code>ssd-repro samples</code> makes them."
RULE = (
    "Of the utterances that every system speaks, sorted by the WER of SSD: at even steps from the best to the worst, "
    "and the second worst."
)


def make(folder: Path, count: int = 8) -> dict:
    """Write ``<folder>/samples/*.mp3`` and samples.json from the rows of notebook 01 -> samples.json's content.

    InputError if those rows are missing, unscored, or of another voice than the one that is here.
    """
    check_number("sentences", count, 1, 100, whole=True)
    rows, about = report.rows_of_run(folder, "01_table1")
    systems, place = systems_of(rows), Path(folder) / "samples"
    chosen, voice = choose(systems, count), voice_of(about)
    made, files = [], {}
    for number, utterance in enumerate(chosen, 1):
        for name, ours in systems.items():
            row = ours.loc[utterance]
            file = f"{number:02}-{re.sub('[^a-z0-9.]+', '-', name.lower())}.mp3"
            files[file] = encoded(sound(voice, row), voice.sample_rate)
            made.append({"file": file, "system": name, **_facts(row)})
    for stale in set(place.glob("*.mp3")) - {place / file for file in files}:
        stale.unlink()
    for file, content in files.items():
        write_bytes(place / file, content)
    whole = {"rule": RULE, "weights": voice.weights_id, **git_state(), "samples": made}
    write_text(place / "samples.json", json.dumps(whole, ensure_ascii=False) + "\n")
    return whole


def _facts(row) -> dict:
    """Of a row what belongs beside its sound; rounds: [drafted, accepted] of each, for each piece of the text."""
    known = {name: row[name] for name in ("key", *SAME, "text", "transcript", "rounds", "pieces", "gap_seconds")}
    errors, words = int(row["word_errors"]), int(row["words"])
    heard = marked(row["text"], row["transcript"]) if errors else [["", row["transcript"]]]
    return {**known, "seed": int(row["seed"]), "word_errors": errors, "words": words, "heard": heard}


def systems_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Name -> rows by SAME of each system of Table 1."""
    systems = {tables.NAMES["autoregressive"]: tables.of_method(rows, "autoregressive"), **tables.by_system(rows)}
    return {name: ours.set_index(SAME, drop=False) for name, ours in systems.items()}


def choose(systems: dict[str, pd.DataFrame], count: int) -> list[tuple]:
    """SAME of ``count`` utterances by RULE, best first; of fewer than three no second worst."""
    spoken = [ours[(ours.tokens > 0) & (ours.words > 0)] for ours in systems.values()]
    common = [index for index in spoken[0].index if all(index in ours.index for ours in spoken)]
    if not common:
        raise InputError("no utterance of Table 1 was spoken and scored under every system: run 01_table1 again")
    papers = next(ours for ours in spoken if (ours.method == "speculative").all())
    wer = (papers.word_errors / papers.words).loc[common].sort_values(kind="stable")
    if count >= len(wer):
        return list(wer.index)
    if count < 3:
        return [wer.index[i] for i in np.linspace(0, len(wer) - 1, count).round().astype(int)]
    steps = np.linspace(0, len(wer) - 3, count - 2).round().astype(int)
    return [wer.index[i] for i in (*steps, len(wer) - 2, len(wer) - 1)]


def marked(text: str, transcript: str) -> list[list[str]]:
    """The transcript in parts [kind, words]: '' as written, 'wrong', or 'missing' (words of the text alone).

    Words are compared as the WER compares them, by Whisper's normaliser, but one by one.
    """
    clean = metrics.normaliser()
    written, heard = (
        [(token, i) for i, w in enumerate(x.split()) for token in clean(w).split()] for x in (text, transcript)
    )
    texts, words = text.split(), transcript.split()
    codes = SequenceMatcher(None, [t for t, _ in written], [t for t, _ in heard], autojunk=False).get_opcodes()
    wrong = {i for kind, _, _, begin, end in codes if kind != "equal" for _, i in heard[begin:end]}
    parts, shown = [], 0
    for kind, first, last, begin, end in codes:
        upto = heard[end - 1][1] + 1 if end > begin else shown
        parts += [["wrong" if i in wrong else "", words[i]] for i in range(shown, upto)]
        shown = max(shown, upto)
        if kind == "delete":
            parts += [["missing", texts[i]] for i in sorted({i for _, i in written[first:last]})]
    parts += [["", word] for word in words[shown:]]
    together: list[list[str]] = []
    for kind, word in parts:
        if together and together[-1][0] == kind:
            together[-1][1] += f" {word}"
        else:
            together.append([kind, word])
    return together


def voice_of(about: dict):
    """The voice that made the rows of this entry of provenance.json. InputError if another one is here."""
    given = {name: about["parameters"].get(name, "") for name in ("draft", "data", "front_end")}
    given["front_end"] = given["front_end"] or "upstream"
    voice = load.load(about["parameters"].get("weights") or None, runtime="eager", **given)
    if voice.weights_id != about["weights"]:
        raise InputError(
            f"the rows are of voice {about['weights']}, but the loaded one is {voice.weights_id}: make its rows "
            f"with `ssd-repro run --profile {about['profile']} --only 01 02`"
        )
    if not voice.audible:
        raise InputError("the rows are of front_end tokens, which makes no sound: nothing can be listened to")
    return voice


def sound(voice, row) -> np.ndarray:
    """What ``Voice.speak`` gave for this row, from its tokens -> float32 (samples,) at the voice's rate."""
    ends = np.cumsum(row["pieces"])
    pieces = [row["token_ids"][end - n : end] for n, end in zip(row["pieces"], ends, strict=True) if n]
    gap = np.zeros(int(row["gap_seconds"] * voice.sample_rate), np.float32)
    parts = [part for piece in pieces for part in (gap, voice.vocode(tuple(piece), row["voice"]))]
    return np.concatenate(parts[1:])


def encoded(audio: np.ndarray, rate: int) -> bytes:
    """float32 (samples,) -> MP3, which every browser plays."""
    import soundfile

    with io.BytesIO() as buffer:
        how = {"bitrate_mode": "CONSTANT", "compression_level": COMPRESSION}
        soundfile.write(buffer, np.clip(audio, -1, 1), rate, format="MP3", subtype="MPEG_LAYER_III", **how)
        return buffer.getvalue()


# The page's part on sound


def shown(folder: Path, known: dict) -> str:
    """HTML of the samples whose row (of ``known``, by key) is still there, by utterance; or that there are none."""
    place = Path(folder) / "samples" / "samples.json"
    if not place.is_file():
        return f'<p class="note">{NOT_MADE}</p>'
    about, groups = json.loads(place.read_text("utf-8")), {}
    for sample in about["samples"]:
        if sample["key"] in known and (place.parent / sample["file"]).is_file():
            groups.setdefault((sample["text"], sample["voice"], sample["seed"]), []).append(sample)
    said = "".join(
        f'<article class="said"><h3>“{escape(text)}”</h3><p class="note">voice {escape(voice)}, seed {seed}</p>'
        f"{''.join(take(place.parent, sample) for sample in group)}</article>"
        for (text, voice, seed), group in groups.items()
    )
    lost = len(about["samples"]) - sum(map(len, groups.values()))
    stale = f" {lost} samples are of rows that are no longer here, and are left out." if lost else ""
    commit = (about["commit"] or "unknown")[:10] + (" with local changes" if about["dirty"] else "")
    made = (
        f"{about['rule']} The rows' own tokens through the codec of voice {about['weights']}, commit {commit}.{stale}"
    )
    return f'{said}<p class="note">{escape(made)}</p>'


def take(place: Path, sample: dict) -> str:
    """A system's name, WER, player, timeline and transcript."""
    sound = base64.b64encode((place / sample["file"]).read_bytes()).decode()
    tags = {"": "{}", "wrong": "<mark>{}</mark>", "missing": "<del>{}</del>"}
    heard = " ".join(tags[kind].format(escape(words)) for kind, words in sample["heard"])
    wer, spoken = 100 * sample["word_errors"] / sample["words"], escape(f"{sample['system']}: {sample['text']}")
    return (
        f'<div class="take"><h4>{label(sample["system"])}</h4><p class="rate{" bad" * (wer > 0)}">WER {wer:.0f} % '
        f"<small>{sample['word_errors']} of {sample['words']} words</small></p>"
        f'<audio controls preload="metadata" aria-label="{spoken}" src="data:audio/mpeg;base64,{sound}"></audio>'
        f'{timeline(sample)}<p class="heard">{heard or "<i>nothing was heard</i>"}</p></div>'
    )


def timeline(sample: dict) -> str:
    """What became of each token, for the page's script to draw: kind -> places in tokens. '' if nothing was drafted."""
    if not any(drafted for rounds in sample["rounds"] for drafted, _ in rounds):
        return ""
    events = figures.timeline_events(sample)
    seconds = {kind: events.seconds[events.kind == kind] for kind in figures.KINDS}
    places = {kind: [round(TOKEN_RATE * t) for t in at] for kind, at in seconds.items() if len(at)}
    counted = ", ".join(f"{figures.LABELS.get(kind, kind)} {len(at)}" for kind, at in places.items())
    data = escape(json.dumps(places, separators=(",", ":")))
    drawn = f'data-rate="{TOKEN_RATE}" data-tokens="{data}"'
    return f'<div class="timeline" role="img" aria-label="tokens: {counted}" {drawn}></div>'


def label(name: str) -> str:
    """A text as HTML, beta and L_d typeset."""
    return escape(name).replace("beta", "β").replace("L_d", "L<sub>d</sub>")
