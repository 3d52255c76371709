"""Executed notebooks as single HTML files to read in a browser: code folded, figures, tables and players in place."""

from __future__ import annotations

from pathlib import Path

from ..files import write_text

WIDGET = "application/vnd.jupyter.widget-view+json"  # asks for a kernel, or for scripts from elsewhere
KINDS = ("text/html", "image/svg+xml", "image/png", "text/markdown", "text/latex", "text/plain")  # the first is shown
# nbconvert's "basic" is the cells without the 300 kB of style sheets of its other templates
TEMPLATE = r"""{%- extends 'basic/index.html.j2' -%}
{% block header %}<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ resources.title | escape }}</title>
{% if resources.maths %}<script>MathJax = {tex: {inlineMath: [["$", "$"]]}, svg: {fontCache: "global"}};</script>
<script async src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-svg.js"></script>{% endif %}
<style>
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.55 system-ui, sans-serif; color: #1b1d21; }
pre { overflow-x: auto; background: #f6f7f9; padding: .6rem .8rem; font-size: .85rem; line-height: 1.4; }
summary { cursor: pointer; color: #5c6370; font-size: .85rem; } code { font-size: .9em; }
.output_area, .rendered_html { overflow-x: auto; } .output_area img, svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; } .anchor-link { display: none; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #dcdfe4; }
th:first-child { text-align: left; }
</style></head><body>
{% set name = resources.source | escape %}
<p><a href="index.html">All results of this folder</a>; this notebook: <a href="{{ name }}">{{ name }}</a></p>
{% endblock header %}
{% block input %}<details><summary>code</summary><pre>{{ cell.source | escape }}</pre></details>{% endblock input %}
{% block footer %}</body></html>
{% endblock footer %}"""


def write(executed: Path) -> Path:
    """<name>.html beside an executed <name>.ipynb. Formulas are set by MathJax where there is a net, else are TeX."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook, target = nbformat.read(executed, as_version=4), executed.with_suffix(".html")
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_lean(output) for output in cell.outputs if WIDGET not in output.get("data", {})]
    maths = any("$" in cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = notebook.cells[0].source.splitlines()[0].strip("# ") if notebook.cells else executed.stem
    exporter = HTMLExporter(raw_template=TEMPLATE, exclude_input_prompt=True, exclude_output_prompt=True)
    about = {"title": title, "maths": maths, "source": executed.name}
    write_text(target, exporter.from_notebook_node(notebook, about)[0])
    return target


def write_all(folder: Path) -> list[Path]:
    """Of every executed notebook of a results folder, its HTML."""
    return [write(path) for path in sorted(Path(folder).glob("[0-9][0-9]_*.ipynb")) if path.stem.count(".") == 0]


def _lean(output):
    """Of an output's several kinds only the one that a browser shows: figures and sounds stand there once."""
    if kind := next((kind for kind in KINDS if kind in output.get("data", {})), None):
        output.data = {kind: output.data[kind]}
        output.metadata["alt"] = "figure" if kind.startswith("image") else ""
    return output
