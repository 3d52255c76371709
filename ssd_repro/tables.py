"""Rows in, tables out; nothing is measured here.

``python -m ssd_repro.tables results/quick README.md`` makes the tables of a results folder
anew from its rows, without a model, and puts them between the markers of README.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import InputError
from .experiment import read_rows, to_frame, write_text

NAMES = {"autoregressive": "Autoregressive", "draft": "Draft", "speculative": "SSD"}
# The paper's Table 1 (arXiv 2505.15380); its NMOS column is not named, ours is P808_MOS.
PAPER_TABLE1 = pd.DataFrame(
    {"WER %": [3.67, 16.13, 5.70], "NMOS": [3.96, 3.95, 3.94], "SS": [0.62, 0.61, 0.63],
     "LM-RTF": [0.504, 0.222, 0.360]},
    index=list(NAMES),
)  # fmt: skip
DRAWS = 2000  # bootstrap resamples
TABLE1_NOTE = (
    "[low, high]: 95 % bootstrap intervals over utterances. NMOS is DNSMOS P808_MOS. Speed-up: corpus "
    "LM-RTF of the autoregressive target over this system's; speed-up a token: median over utterances of "
    "the ratio of LM seconds a token. The paper's LM-RTF is an A100's: compare ratios."
)


def bootstrap(statistic, *columns, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % interval of ``statistic(*columns)``, whole utterances resampled, paired over columns.

    columns (n,); ``statistic`` takes them as (draws, n) and reduces the last axis.
    """
    columns = [np.asarray(column, float) for column in columns]
    pick = np.random.default_rng(seed).integers(len(columns[0]), size=(draws, len(columns[0])))
    values = statistic(*(column[pick] for column in columns))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def ratio_of_sums(a, b):
    """Corpus ratio sum a / sum b over the last axis: WER, LM-RTF, acceptance."""
    return np.asarray(a).sum(-1) / np.asarray(b).sum(-1)


def corpus_speedup(base_lm, base_audio, lm, audio):
    """LM-RTF of the baseline / LM-RTF of the system, each over all utterances."""
    return ratio_of_sums(base_lm, base_audio) / ratio_of_sums(lm, audio)


def _pair(rows: pd.DataFrame, method: str, base: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of ``base`` and of ``method`` for the same text, voice and seed, in one order."""
    same = ["text_id", "voice", "seed"]
    ours, theirs = (rows[rows.method == m].set_index(same).sort_index() for m in (method, base))
    if not ours.index.equals(theirs.index) or not ours.index.is_unique:
        raise InputError(f"the rows of {method} and {base} are not of the same utterances")
    return theirs, ours


def table1_line(rows: pd.DataFrame, method: str, base: str = "autoregressive") -> dict:
    """One line of Table 1, plain numbers; *_low and *_high are the bounds of an interval."""
    theirs, ours = _pair(rows, method, base)
    errors = ours.word_errors, ours.words
    seconds = theirs.lm_seconds, theirs.audio_seconds, ours.lm_seconds, ours.audio_seconds
    per_token = (theirs.lm_seconds / theirs.tokens) / (ours.lm_seconds / ours.tokens)

    def median(x):
        return np.median(x, axis=-1)

    wer, speedup = bootstrap(ratio_of_sums, *errors), bootstrap(corpus_speedup, *seconds)
    token = bootstrap(median, per_token)
    return {
        "system": NAMES[method],
        "WER %": 100 * ratio_of_sums(*errors),
        "WER_low": 100 * wer[0],
        "WER_high": 100 * wer[1],
        "NMOS": ours.p808.mean(),
        "OVRL": ours.ovrl.mean(),
        "SS": ours.similarity.mean(),
        "LM-RTF": ratio_of_sums(ours.lm_seconds, ours.audio_seconds),
        "RTF": ratio_of_sums(ours.synthesis_seconds, ours.audio_seconds),
        "speed-up": corpus_speedup(*seconds),
        "speed-up_low": speedup[0],
        "speed-up_high": speedup[1],
        "speed-up a token": median(per_token),
        "speed-up a token_low": token[0],
        "speed-up a token_high": token[1],
        "acceptance": ratio_of_sums(ours.accepted, ours.drafted) if ours.drafted.sum() else np.nan,
        "tokens a target call": pd.to_numeric(ours.tokens_per_target_call).mean(),
        "n": len(ours),
        **{f"paper {name}": value for name, value in PAPER_TABLE1.loc[method].items()},
        "paper speed-up": PAPER_TABLE1["LM-RTF"][base] / PAPER_TABLE1["LM-RTF"][method],
    }


def table1(rows: pd.DataFrame) -> pd.DataFrame:
    """Autoregressive, draft and SSD beside the paper's: rows of one run -> a line a system."""
    return pd.DataFrame([table1_line(rows, method) for method in NAMES]).set_index("system")


DIGITS = {"WER %": 1, "NMOS": 2, "OVRL": 2, "SS": 2, "LM-RTF": 3, "RTF": 3, "speed-up": 2,
          "speed-up a token": 2, "acceptance": 2, "tokens a target call": 2, "n": 0}  # fmt: skip


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Rounded text, each interval in the cell of its number, the paper's in a line below."""
    lines = {}
    for system, line in table.iterrows():
        lines[system] = {name: _cell(line, name, digits) for name, digits in DIGITS.items()}
        paper = {name: f"{line[f'paper {name}']:.{DIGITS[name]}f}" if f"paper {name}" in line else ""
                 for name in DIGITS}  # fmt: skip
        lines[f"*{system}, paper*"] = paper
    frame = pd.DataFrame.from_dict(lines, orient="index")
    frame.index.name = table.index.name
    return frame


def _cell(line: pd.Series, name: str, digits: int) -> str:
    if pd.isna(line[name]):
        return "–"
    bounds = [line.get(f"{name.removesuffix(' %')}_{end}") for end in ("low", "high")]
    interval = "" if None in bounds else " [{:.{d}f}, {:.{d}f}]".format(*bounds, d=digits)
    return f"{line[name]:.{digits}f}{interval}"


def markdown(table: pd.DataFrame) -> str:
    """A pipe table of a frame of strings, its index first."""
    head = [table.index.name or "", *table.columns]
    lines = [head, ["---"] + ["--:"] * len(table.columns)]
    lines += [[name, *cells] for name, cells in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def save(table: pd.DataFrame, folder: Path, name: str, note: str = "") -> None:
    """<folder>/tables/<name>.csv with all digits, <name>.md to read."""
    write_text(Path(folder) / "tables" / f"{name}.csv", table.to_csv())
    write_text(Path(folder) / "tables" / f"{name}.md", markdown(readable(table)) + f"\n{note}\n")


def rows_of_run(folder: Path, notebook: str, name: str) -> tuple[pd.DataFrame, dict]:
    """The rows of the run that provenance.json tells of, and that entry of it."""
    path = Path(folder) / "provenance.json"
    if not path.exists():
        raise InputError(f"{path} is missing: `ssd-repro run` makes it")
    about = json.loads(path.read_text("utf-8")).get(notebook)
    if about is None:
        raise InputError(f"{path} tells of no {notebook}: run that notebook first")
    wanted = set(about["keys"])
    rows = [row for row in read_rows(Path(folder) / "rows" / f"{name}.jsonl") if row["key"] in wanted]
    if {row["key"] for row in rows} != wanted:
        raise InputError(f"{folder}/rows/{name}.jsonl lacks rows of that run: run {notebook} again")
    return to_frame({row["key"]: row for row in rows}.values()), about


def source_line(folder: Path, about: dict) -> str:
    """One sentence under a table: hardware, command, commit."""
    commit = (about["commit"] or "unknown")[:10] + (" with local changes" if about["dirty"] else "")
    return (
        f"{about['date'][:10]}, {about['chip']}, {about['threads']} threads, torch {about['torch']}, "
        f"commit {commit}, voice {about['weights']}: `ssd-repro run --profile {about['profile']}` -> "
        f"`{Path(folder).as_posix()}`."
    )


def put_between(text: str, name: str, inside: str) -> str:
    """Replace what stands between <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise InputError(f"the markers {begin} and {end} are missing")
    return text.partition(begin)[0] + f"{begin}\n{inside.strip()}\n{end}" + text.partition(end)[2]


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m ssd_repro.tables RESULTS_FOLDER README.md", file=sys.stderr)
        return 2
    folder, readme = map(Path, arguments)
    try:
        rows, about = rows_of_run(folder, "01_table1", "table1")
        table = table1(rows)
        save(table, folder, "table1", TABLE1_NOTE)
        inside = markdown(readable(table)) + f"\n{TABLE1_NOTE} {source_line(folder, about)}"
        write_text(readme, put_between(readme.read_text("utf-8"), "table1", inside))
    except InputError as error:
        print(f"ssd_repro.tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
