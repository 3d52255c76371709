"""The paper's numbers (Lin et al., Interspeech 2025, arXiv 2505.15380). It names no NMOS column; ours is P808_MOS."""

from __future__ import annotations

import pandas as pd

LENGTH = 3  # L_d of Tables 1 and 3; in Figure 3 LM-RTF over L_d = 1..8 is lowest there
LM_SHARE = 0.70  # Figure 1b: the language model's share of CosyVoice 2's synthesis time
_COLUMNS = ["WER %", "NMOS", "SS", "LM-RTF"]
TABLE1 = pd.DataFrame.from_dict(
    {
        "autoregressive": [3.67, 3.96, 0.62, 0.504],
        "draft": [16.13, 3.95, 0.61, 0.222],
        "speculative": [5.70, 3.94, 0.63, 0.360],
    },
    orient="index",
    columns=_COLUMNS,
)
TABLE3 = pd.DataFrame.from_dict(  # by beta
    {
        0.0: [6.34, 3.86, 0.62, 0.509],
        0.1: [5.71, 3.90, 0.50, 0.444],
        0.2: [6.08, 3.92, 0.62, 0.408],
        0.3: [6.29, 3.93, 0.62, 0.386],
        0.4: [5.70, 3.94, 0.63, 0.360],
    },
    orient="index",
    columns=_COLUMNS,
)


def of_setting(rows: pd.DataFrame) -> pd.Series:
    """The paper's numbers, its speed-up among them, for the one setting of these rows; empty where it has none."""
    first = rows.iloc[0]
    if first.method != "speculative":
        line = TABLE1.loc[first.method]
    elif (rows.draft_length == LENGTH).all() and (rows.tolerance == first.tolerance).all():
        line = TABLE3.loc[first.tolerance] if first.tolerance in TABLE3.index else pd.Series(dtype=float)
    else:
        line = pd.Series(dtype=float)
    if line.empty:
        return line
    return pd.concat([line, pd.Series({"speed-up": TABLE1["LM-RTF"]["autoregressive"] / line["LM-RTF"]})])


def shares_with_ssd() -> tuple[float, float]:
    """Derived from Figure 1b and the LM-RTFs, if the rest stays: the LM's share with SSD, the whole's speed-up."""
    lm = LM_SHARE * TABLE1["LM-RTF"]["speculative"] / TABLE1["LM-RTF"]["autoregressive"]
    whole = 1 - LM_SHARE + lm
    return lm / whole, 1 / whole
