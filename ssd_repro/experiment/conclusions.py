"""What a notebook concludes: sentences over the numbers of its tables, never fixed ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from IPython.display import Markdown

from .tables import digits, number


def conclude(*sentences: str) -> Markdown:
    return Markdown(f"**Conclusion.** {' '.join(sentences)}")


def value(line: Mapping, name: str) -> str:
    """The number ``name`` of a table's line, and its interval if it has one: '1.13 [1.10, 1.15]'."""
    low, high = bounds(line, name)
    return number(line[name], digits(name), low, high)


def bounds(line: Mapping, name: str) -> tuple[float, float]:
    short = name.removesuffix(" %")
    return line.get(f"{short}_low", float("nan")), line.get(f"{short}_high", float("nan"))


def faster(line: Mapping, name: str = "speed-up") -> str:
    """What the interval of a ratio of speeds shows: 'faster', 'slower', or neither."""
    low, high = bounds(line, name)
    return "faster" if low > 1 else "slower" if high < 1 else "not shown to be faster or slower"


def of_table1(folder: Path) -> str:
    """SSD's speed-up as notebook 01 measured it into this results folder, or that it has not."""
    path = Path(folder) / "tables" / "table1.csv"
    if not path.is_file():
        return "Notebook 01 measures it (Table 1); it has not run into this folder."
    ssd = pd.read_csv(path, index_col="system").loc["SSD"]
    return f"Table 1 of this folder: {value(ssd, 'speed-up')} times as fast as the target, over {ssd.n:g} utterances."
