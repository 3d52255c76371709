"""The results page: ``<folder>/index.html``, one file, from the rows, tables, figures and samples of that folder."""

from __future__ import annotations

import json
import math
import re
from html import escape
from importlib import resources
from pathlib import Path

import pandas as pd

from ..files import write_text
from . import notebooks, paper, report, samples, statistics, tables, theory
from .provenance import all_provenance, machine
from .rows import rows_of_folder

NAME = "index.html"
LONG = 12  # lines; a longer table is folded
MEASURED = ["speed-up", "WER %", "acceptance", "tokens per target call"]  # what the sliders show
SLIDERS = {
    "table3": ("tolerance beta", 0.4),
    "figure3": ("drafted tokens per round, L_d", paper.LENGTH),
}  # and begin at
NOT_MADE = "There are no sound samples in this folder: <code>ssd-repro samples</code> makes them."
SCROLL = 'class="scroll" tabindex="0" role="region" aria-label="{}"'  # what is too wide moves in its own box
NO_SLIDERS = "<p>Neither Table 3 nor Figure 3 has been run in this folder.</p>"


def write(folder: Path) -> Path:
    """Make index.html of a results folder whose tables and figures ``report`` has made; what is missing is left out."""
    folder, known, ran = Path(folder), rows_of_folder(folder), all_provenance(folder)
    parts = {
        "title": escape(folder.resolve().name),
        "claims": claims(folder, known) if "01_table1" in ran else "<p>Table 1 has not been run in this folder.</p>",
        "samples": samples.shown(folder, known),
        "sliders": "".join(slider(folder, name, *about) for name, about in SLIDERS.items()) or NO_SLIDERS,
        "results": "".join(section(folder, name) for name in ran),
        "origin": "".join(origin(name, about, known) for name, about in ran.items()),
    }
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    page = re.sub("<!-- (" + "|".join(parts) + ") -->", lambda found: parts[found[1]], page)
    write_text(folder / NAME, page)
    return folder / NAME


# The first screen


def claims(folder: Path, known: dict) -> str:
    """Cards: SSD with the paper's draft, the fastest without loss, the fastest of all, beside the paper; and prices."""
    rows, about = report.rows_of_run(folder, "01_table1", known)
    base, systems = tables.of_method(rows, "autoregressive"), {}
    for name, ours in tables.by_system(rows).items():
        if (ours.method == "speculative").all():
            speed = tables.speedup("", statistics.paired(ours, base)[0], "lm_seconds", "audio_seconds").values()
            systems[name] = System(name, ours, int(ours.draft_length.iloc[0]), *speed)
    papers, lossless = next(iter(systems)), [name for name, one in systems.items() if one.beta == 0]
    headings = {papers: "The paper's draft"}
    for heading, names in (("Fastest, lossless", lossless), ("Fastest of all", systems)):
        if names:
            headings.setdefault(max(names, key=lambda name: systems[name].speed), heading)
    cards = "".join(card(heading, systems[name], base) for name, heading in headings.items())
    priced = "".join(price(one) for one in systems.values() if one.fixed)
    filled = {"cards": cards, "count": len(base), "why": why(systems[papers]), "rows": priced}
    return PRICES.format(**filled, voice=escape(about["weights"]))


class System:
    """A setting of SSD in Table 1: its rows, its speed-up with the interval, ``theory.predict`` of it, the paper's."""

    def __init__(self, name: str, rows: pd.DataFrame, length: int, speed: float, low: float, high: float) -> None:
        self.name, self.rows, self.length, self.speed = name, rows, length, speed
        self.interval = f"[{low:.2f}, {high:.2f}]" if pd.notna(low) and low != high else ""
        self.beta, self.paper, self.found = rows.tolerance.iloc[0], paper.of_setting(rows), theory.predict(rows, length)
        self.draft, self.verify, self.tokens = (
            self.found[name] for name in ("draft / target step", "verification / target step", "tokens per round")
        )
        self.round = length * self.draft + self.verify
        self.fixed = "confidence" not in rows or rows.confidence.isna().all()  # theory knows one draft length a round


def card(heading: str, one: System, base: pd.DataFrame) -> str:
    wer = statistics.difference(one.rows, base, statistics.MEASURES[0])
    change = f"{wer['difference']:+.1f} points" + f" [{wer['low']:+.1f}, {wer['high']:+.1f}]" * pd.notna(wer["low"])
    speed, rise, whose = "not in the paper", "", "paper"
    if one.beta in paper.NUMBERS.index:
        theirs, their_base = paper.NUMBERS.loc[one.beta], paper.NUMBERS.loc["autoregressive"]
        whose = "paper" if len(one.paper) else f"the paper's draft at beta {one.beta:g}, L_d {paper.LENGTH}"
        speed, rise = f"{theirs['speed-up']:.2f}×", f"{theirs['WER %'] - their_base['WER %']:+.1f} points"
    return (
        f'<article class="card"><h3>{escape(heading)}</h3><p class="system">{samples.label(one.name)}</p>'
        f'<p class="big">{one.speed:.2f}× <small>{one.interval}</small></p>'
        f'<p class="wer">WER {change if pd.notna(wer["difference"]) else "not scored"}</p>'
        f'<p class="note">{escape(wer["verdict"])}</p>'
        f'<p class="theirs">{samples.label(whose)}: <b>{speed}</b>{rise and f", WER {rise}"}</p></article>'
    )


def why(one: System) -> str:
    """What a round costs here, and what it may cost for the paper's speed-up."""
    said = (
        f"{samples.label(one.name)} gives {one.tokens:.2f} tokens a round. A round costs {one.round:.2f} steps of the "
        f"target: {one.length * one.draft:.2f} for {one.length} draft steps, {one.verify:.2f} for the verification. "
    )
    if "speed-up" in one.paper:
        theirs = one.paper["speed-up"]
        said += f"For the paper's {theirs:.2f}× with as many tokens it would be {one.tokens / theirs:.2f} steps."
    return said


def price(one: System) -> str:
    calls = pd.to_numeric(one.rows.tokens_per_target_call).mean()
    values = [one.tokens, calls, one.draft, one.verify, one.round, one.found["costs"]]
    theirs = tables.number(one.paper.get("speed-up", math.nan), 2)
    cells = [*(f"{value:.2f}" for value in values), f"{one.speed:.2f} {one.interval}", theirs]
    return f'<tr><th scope="row">{samples.label(one.name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


PRICES = """<div class="cards">{cards}</div>
<p class="note">Speed-up of the language model over the target alone, and WER minus the target's; 95 % intervals over
{count} utterances. Paper: Tables 1 and 3, on an A100. Voice {voice}.</p>
<h3>Why it differs from the paper</h3>
<p>{why} Speed-up ≈ N / (L<sub>d</sub>·c + V):</p>
<div class="scroll" tabindex="0" role="region" aria-label="What a round costs"><table class="sortable" id="prices">
<thead><tr><th>system</th><th>N, tokens per round</th><th>tokens per target call</th><th>c, draft step</th>
<th>V, verification</th><th>L<sub>d</sub>·c&nbsp;+&nbsp;V</th><th>speed-up, predicted</th><th>measured</th>
<th>paper</th></tr></thead><tbody>{rows}</tbody></table></div>
<p class="note">c and V in steps of the target. Predicted per token, measured per second of audio; tokens per target
call counts the prefill as a call. Settings with an adaptive draft length have no such prediction.</p>"""


# Settings, results, origin


def slider(folder: Path, name: str, what: str, begin: float) -> str:
    """A slider over the settings of a table of measured numbers; '' if the table is not there."""
    place = folder / "tables" / f"{name}.csv"
    if not place.is_file():
        return ""
    table = pd.read_csv(place, index_col=0).drop(index=tables.NAMES["autoregressive"], errors="ignore")
    readable, settings = tables.readable(table), []
    names = [column for column in MEASURED if column in readable]
    for setting, line in readable[names].iterrows():
        if setting.startswith("*"):  # the paper's line belongs to the one above it
            settings[-1]["paper"] = list(line)
        else:
            settings.append({"at": setting, "here": list(line), "paper": []})
    at = min(range(len(settings)), key=lambda i: abs(float(settings[i]["at"]) - begin))
    boxes = "".join(f"<div><dt>{escape(column)}</dt><dd><b></b><span></span></dd></div>" for column in names)
    data = json.dumps(settings, ensure_ascii=False).replace("<", "\\u003c")
    return (
        f'<div class="slider" id="slider-{name}"><label for="range-{name}">{samples.label(what)} = '
        f'<output for="range-{name}"></output></label>'
        f'<input type="range" id="range-{name}" min="0" max="{len(settings) - 1}" value="{at}">'
        f'<dl aria-live="polite">{boxes}</dl><script type="application/json">{data}</script></div>'
    )


def section(folder: Path, notebook: str) -> str:
    """Figures, then tables of one notebook, under the title of its executed copy; '' if it shows none."""
    names = [name for name, exhibit in report.EXHIBITS.items() if exhibit.notebook == notebook]
    drawn = "".join(figure(folder / "figures" / f"{name}.svg", name) for name in names)
    listed = "".join(table(folder / "tables" / f"{name}.md", name) for name in names)
    executed, title, link = folder / f"{notebook}.ipynb", notebook, ""
    if executed.is_file():
        title = notebooks.first_line(executed)
        files = [path.name for path in (executed.with_suffix(".html"), executed) if path.is_file()]
        links = ", ".join(f'<a href="{name}">{name}</a>' for name in files)
        link = f'<p class="note">Executed notebook: {links}</p>'
    return f"<section><h3>{samples.label(title)}</h3>{link}{drawn}{listed}</section>" if drawn + listed else ""


def figure(place: Path, name: str) -> str:
    """An SVG of matplotlib's, its ids made the page's own; '' if there is none."""
    if not place.is_file():
        return ""
    svg = place.read_text("utf-8")
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="figure {name}" ', 1)
    return f'<figure {SCROLL.format(f"figure {name}")} id="figure-{name}">{svg}</figure>'


def table(place: Path, name: str) -> str:
    """A table of tables/<name>.md, the readable one, and what stands below it; '' if it is not there or empty."""
    if not place.is_file():
        return ""
    lines = place.read_text("utf-8").splitlines()
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    if not body:  # of measures that nothing was scored by
        return ""
    below = samples.label(" ".join(line for line in lines if not line.startswith("|")))
    note = re.sub("`(.+?)`", r"<code>\1</code>", below)
    rows = ""
    for first, *cells in body:
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        of_paper = ' class="paper"' * first.startswith("*")  # the script keeps it below the line before it
        rows += f'<tr{of_paper}><th scope="row">{samples.label(first.strip("*"))}</th>{line}</tr>'
    heads = "".join(f'<th scope="col">{samples.label(cell)}</th>' for cell in head)
    return (
        f"<details{' open' * (len(body) <= LONG)}><summary>{name.replace('_', ' ')}, lines: {len(body)}</summary>"
        f'<div {SCROLL.format(f"table {name}")}><table class="sortable" id="table-{name}"><thead><tr>{heads}</tr>'
        f'</thead><tbody>{rows}</tbody></table></div><p class="note">{note}</p></details>'
    )


def origin(notebook: str, about: dict, known: dict) -> str:
    """Command, commit, machine and versions of one entry of provenance.json."""
    processes = max((known[key].get("processes", 1) for key in about["keys"] if key in known), default=1)
    versions = {"python": about["python"], **about["versions"]}
    facts = {
        "command": f"<code>{escape(notebooks.command(notebook, about, processes, whole=True))}</code>",
        "commit": escape((about["commit"] or "unknown") + (" with local changes" if about["dirty"] else "")),
        "date": escape(about["date"]),
        "machine": escape(f"{machine(about)}, {about['cores']} cores, {about['threads']} threads, {about['system']}"),
        "voice": escape(about["weights"]),
        "rows": len(about["keys"]),
        "versions": escape(", ".join(f"{name} {version}" for name, version in versions.items() if version)),
    }
    lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return f"<details><summary>{escape(notebook)}</summary><dl>{lines}</dl></details>"
