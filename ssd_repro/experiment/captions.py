"""What stands below the tables: how to read them, and what their rows say, computed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from . import speed, statistics, tables
from .rows import SILENCE_DB, busy, count_empty

INTERVALS = "[low, high]: 95 % bootstrap intervals over utterances."
SPEED = (
    "Speed-up: LM-RTF of the autoregressive target, decoded in turn with the system, over the system's; per token: "
    "median over utterances; RTF speed-up: of the whole synthesis. The paper's LM-RTF is an A100's: compare ratios."
)
TABLE = f"{INTERVALS} NMOS is DNSMOS P808_MOS. {SPEED}"
QUALITY = (
    "Paired differences (same text, voice, seed) with 95 % bootstrap intervals. 'Shown equivalent': two one-sided "
    f"tests at 5 % against the margins {statistics.MARGINS}; 'shown different': the interval leaves 0 out; 'no "
    "difference shown' is neither, and does not mean equal. Length ratio: seconds of audio over the target's."
)
MACHINES = (
    "SIM-MOS, NAT-MOS: people's ratings, 1 to 5, by `ssd-repro listening-test`; the paper's with ± half of its 95 % "
    "interval. Machine: no rating but a model's prediction; NMOS is DNSMOS P808_MOS."
)
STAGES = (
    "RTF: seconds of work per second of audio; target: its steps, in SSD verifications. LM share: prefill to the loop."
)
ACCEPTANCE = (
    f"{INTERVALS} Accepted / judged: of the drafted tokens up to a round's first rejection; accepted / drafted: of "
    "all. A rejected draft counts where it would have stood, and for what the token in its place carries: silence is "
    f"{-SILENCE_DB:g} dB below the loud tokens of its utterance, boundary is a token on either side of a change."
)
ARCHITECTURES = (
    "Targets of one size, trained alike from the same speech tokens; the family of the decoder alone differs. "
    "Speed-up: of the LM, per token, over the target decoded in turn. More WER: points that SSD at the tolerance has "
    "over the target."
)
WHY = (
    "Acceptance: accepted / drafted. Price: L_d c + V, a round's in steps of the target; c is a draft step, V the "
    "verification. Predicted: tokens a round / price."
)
THEORY = (
    "Speed-up per token, over all utterances together. Formula: (1 - alpha^(L_d+1)) / ((1 - alpha)(c L_d + 1)), "
    "Leviathan et al. 2023, alpha = accepted / judged, c = draft step / target step; positions: with the acceptance "
    "rate of each position of the draft; costs: also with the measured cost of the verification. The residue: prefill "
    "% and loop % of SSD's LM time, which no prediction counts; left %: first tokens, rounds that the end cuts short, "
    "and the prefill of the baseline."
)
BENCH = (
    f"{INTERVALS} Same weights, prompts, sampler, seeds, threads, least and most tokens, in turns utterance by "
    "utterance; prefill and stop token count. Sampler: the voice's without RAS, one code for all. Assisted generation: "
    "our draft, L_d tokens a round, schedule constant, threshold 0; its distribution is that of "
    "beta 0. Over: speeds, above 1 is faster."
)
DRAFTERS = (
    f"{INTERVALS} Of each drafter and beta the fastest L_d; the CSV has all. Acceptance: accepted / drafted. c, V: "
    "a draft step and a verification, sampling and judging included, in steps of the target. Speed-up: of the LM, per "
    "token, over the target decoded in turn. Predicted: tokens a round / (L_d c + V)."
)
RATIOS = (
    f"{INTERVALS} x_over_y: times as many tokens a second. verify and draft over step: prices in the loop of SSD at "
    "the tolerance, in steps of our autoregressive target, sampling and judging included. outside_forwards: share of "
    "a round outside the models' forwards, from a pass of its own."
)
MEMORY = (
    "Parameters. Own: the draft's bottom layers and head, the rest being the target's; alone: what a draft takes that "
    "shares nothing but embeddings, as where a runtime packs each model's weights for itself (openvino)."
)
PRICES = (
    "A prediction but for the prices: these are measured in the loop at random weights, sampling included, and the "
    "speed-up is what they make of the acceptance of the voice's own rows, (1 - alpha^(L_d+1)) / ((1 - alpha)(c L_d + "
    "V)); a draft of one layer would have to earn that acceptance. c, V: draft step and verification in target steps. "
    "Floor: bytes of weights and cache over the machine's GB/s, or, of products in fp32, operations over its GFLOP/s, "
    "whichever is longer."
)
LENGTHS = (
    "One utterance that is not let stop, prefill included, and what the process (on a GPU: torch) had grown by; cache: "
    "computed. Floor: bytes of weights and cache of a target step over the machine's GB/s."
)
BATCHES = (
    "The same utterances, so many at once, with the paper's draft, L_d and beta as in the other tables; "
    "prefill included, and the time of a batch is that until its last row has ended. One measurement, no interval."
)
PRICE = (
    "Means over all places where the loop drafts, along what the target says by itself. Acceptance: of a draft, "
    "expected; TV: total variation between what the rule then says and the target, 0 to 1; bound: max(0, "
    "acceptance - sum min(p, q)), below which no rule comes; excess: TV less the bound; target cannot say: the "
    "probability of tokens that the target's own sampling excludes there. matched: normalize(max(0, q - p a)) after a "
    f"rejection. {INTERVALS}"
)
EQUAL = f"Parameter, TV and excess are interpolated between two points of a rule's grid. {PRICE}"
HEARD = f"more WER: points above the target without a draft, paired. Acceptance: accepted / drafted. {TABLE}"
TIMELINE = "Every token of the SSD sentence; figure: the paper's Figure 2, below the envelope of the sound."
TRADEOFF = (
    f"{INTERVALS} WER rise: points over the autoregressive target on the same utterances. Speed-up: LM-RTF of the "
    "target over the system's."
)


def findings(rows: pd.DataFrame) -> str:
    """What these rows say of the speed-up: numbers computed from them, the machine and the metrics that they name."""
    found, said = tables.measured_and_predicted(rows).reset_index(), []
    if len(found := found.dropna(subset=["alpha", "costs", "measured"])):
        beta, length = (_range(found[column], "g") for column in ("beta", "L_d"))
        draft, verify = (_range(found[f"{step} / target step"]) for step in ("draft", "verification"))
        said = [
            f"SSD, beta {beta}, L_d {length}: {_range(found.alpha)} of the judged drafts are accepted; a draft step "
            f"costs {draft}, a verification {verify} target steps. These predict a speed-up per token of "
            f"{_range(found.costs)}; measured: {_range(found.measured)}."
        ]
    runtime = ", " + rows.runtime if "runtime" in rows else ""  # rows from before there was a choice are eager
    machines = (rows.chip + " (" + rows.device + runtime + ", " + rows.precision + ")").unique()
    said.append(f"Timed on {' and '.join(machines)}.")
    if len(scored := rows[rows.words.notna()]):
        said.append(f"WER by Whisper {_names(scored.whisper)}, SS by {_names(scored.speaker)}.")
    return " ".join(said)


def _range(values: pd.Series, form: str = ".2f") -> str:
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (values.min(), values.max())))


def _names(values: pd.Series) -> str:
    """Each once; of a model's folder its name alone."""
    return " and ".join(dict.fromkeys(Path(value).name for value in values))


def machine_listeners(rows: pd.DataFrame) -> str:
    """What the columns of Table 2 are, and how far its two predictors of naturalness agree on these rows."""
    if not tables.has(rows, "distillmos"):
        return MACHINES
    both = rows[["distillmos", "p808"]].dropna()
    r, low, high = tables.estimate("", statistics.pearson, both.distillmos, both.p808).values()
    return (
        f"{MACHINES} Correlation of DistillMOS with P808_MOS over {len(both)} rows: {tables.number(r, 2, low, high)}."
    )


def caveats(rows: pd.DataFrame) -> str:
    """What to know of these rows: empty utterances, and a machine that did other work; '' if there is nothing."""
    counts = {tables.NAMES[method]: count_empty(ours) for method, ours in rows.groupby("method", sort=False)}
    said = [f"{name}: {count} of {len(rows)} rows are empty utterances." for name, count in counts.items() if count]
    if share := busy(rows):
        said.append(f"Warning: the machine was not idle: other work ran beside {100 * share:.0f} % of these rows.")
    return " ".join(said)


def predicted(rows: pd.DataFrame) -> str:
    return f"{speed.begins(rows)} {PRICES}"
