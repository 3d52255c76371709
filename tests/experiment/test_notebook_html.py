"""Executed notebooks as HTML: code folded, figures once, players in, nothing of a kernel."""

import nbformat
from nbformat import v4

from ssd_repro.experiment import notebook_html

EVIL = "a < b and <b>bold</b>"
PNG = "iVBORw0KGgo="
AUDIO = '<audio controls="" src="data:audio/wav;base64,UklGRg=="></audio>'


def executed(folder, words="No formula."):
    """An executed notebook: a figure in two kinds, a player, a table, a widget with its state."""
    outputs = [
        v4.new_output("display_data", {"image/png": PNG, "text/plain": "<Figure size 100x100>"}),
        v4.new_output("display_data", {"text/html": AUDIO, "text/plain": "Take(...)"}),
        v4.new_output("execute_result", {"text/markdown": "| a |\n|:--|\n| 1 |", "text/plain": "<Markdown object>"}),
        v4.new_output("execute_result", {notebook_html.WIDGET: {"model_id": "x"}, "text/plain": "VBox(children=())"}),
        v4.new_output("stream", name="stdout", text="100%"),
    ]
    cells = [v4.new_markdown_cell(f"# Heard & seen\n\n{words}"), v4.new_code_cell(f"# {EVIL}", outputs=outputs)]
    notebook = v4.new_notebook(cells=cells, metadata={"widgets": {"state": {"x": "STATE"}}})
    path = folder / "07_made.ipynb"
    nbformat.write(notebook, path)
    return path


def test_what_a_browser_needs_and_no_more(tmp_path):
    path = executed(tmp_path)
    before = path.read_bytes()
    assert notebook_html.write_all(tmp_path) == [tmp_path / "07_made.html"] and path.read_bytes() == before
    text = (tmp_path / "07_made.html").read_text("utf-8")
    assert "<title>Heard &amp; seen</title>" in text and 'href="index.html"' in text and f'href="{path.name}"' in text
    assert text.count(PNG) == 1 and text.count(AUDIO) == 1 and "<td" in text and "100%" in text
    for left_out in ("Figure size", "Take(", "Markdown object", "VBox", "STATE", "<b>bold", "http"):
        assert left_out not in text, left_out
    assert "<details><summary>code</summary><pre># a &lt; b and" in text and len(text) < 10_000


def test_mathjax_only_where_there_is_a_formula(tmp_path):
    text = notebook_html.write(executed(tmp_path, r"$$ \frac{a}{b} $$")).read_text("utf-8")
    assert text.count("mathjax@3") == 1 and r"\frac{a}{b}" in text


def test_what_failed_or_runs_has_no_page(tmp_path):
    path = executed(tmp_path)
    for end in ("failed", "running"):
        path.rename(tmp_path / f"07_made.{end}.ipynb")
        assert notebook_html.write_all(tmp_path) == []
        path = tmp_path / f"07_made.{end}.ipynb"
