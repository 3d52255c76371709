"""The paper's numbers (Lin et al., Interspeech 2025, arXiv 2505.15380). It names no NMOS column; ours is P808_MOS."""

from __future__ import annotations

import pandas as pd

LENGTH = 3  # L_d of Tables 1 and 3; in Figure 3 LM-RTF over L_d = 1..8 is lowest there
TOLERANCE = 0.4  # beta of Table 1
LM_SHARE = 0.70  # Figure 1b: the language model's share of CosyVoice 2's synthesis time
SETTINGS = {  # Table 1, then Table 3 by beta; Table 1's SSD has beta 0.4
    "autoregressive": [3.67, 3.96, 0.62, 0.504],
    "draft": [16.13, 3.95, 0.61, 0.222],
    0.0: [6.34, 3.86, 0.62, 0.509],
    0.1: [5.71, 3.90, 0.50, 0.444],
    0.2: [6.08, 3.92, 0.62, 0.408],
    0.3: [6.29, 3.93, 0.62, 0.386],
    0.4: [5.70, 3.94, 0.63, 0.360],
}
NUMBERS = pd.DataFrame.from_dict(SETTINGS, orient="index", columns=["WER %", "NMOS", "SS", "LM-RTF"])
NUMBERS["speed-up"] = NUMBERS["LM-RTF"]["autoregressive"] / NUMBERS["LM-RTF"]
OTHERWISE = ["drafter", "verification", "confidence"]  # of a row: set where SSD is not as in the paper
RATED = ("SIM-MOS", "NAT-MOS")
LISTENERS = pd.DataFrame.from_dict(  # Table 2; ±: half of its 95 % interval
    {
        "Autoregressive": [3.789, 0.148, 3.930, 0.147],
        "Draft": [3.737, 0.141, 3.820, 0.143],
        "SSD": [3.784, 0.152, 3.925, 0.139],
    },
    orient="index",
    columns=["SIM-MOS", "SIM-MOS ±", "NAT-MOS", "NAT-MOS ±"],
)


def of_setting(rows: pd.DataFrame) -> pd.Series:
    """The paper's numbers for the one setting of these rows; empty where it has none."""
    setting = rows.method.iloc[0]
    if rows.reindex(columns=OTHERWISE).notna().any(axis=None):
        return pd.Series(dtype=float)  # it had one draft alone, and one way to judge it
    if setting == "speculative" and (rows.draft_length == LENGTH).all() and rows.tolerance.nunique() == 1:
        setting = rows.tolerance.iloc[0]
    return NUMBERS.loc[setting] if setting in NUMBERS.index else pd.Series(dtype=float)


def with_ssd() -> tuple[float, float]:
    """Derived from Figure 1b and the LM-RTFs, if all else stays: the LM's share with SSD, the whole's speed-up."""
    lm = LM_SHARE / NUMBERS["speed-up"][0.4]
    return lm / (1 - LM_SHARE + lm), 1 / (1 - LM_SHARE + lm)
