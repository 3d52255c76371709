"""The notebooks: clean sources; executed with the fake voice, and once with the bundled one."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT

from ssd_repro import files
from ssd_repro.experiment import notebooks, report
from ssd_repro.experiment import rows as rows_module
from ssd_repro.models import checkpoints

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
RESULTS = [path for path in NOTEBOOKS if path.name[:2] < notebooks.FIRST_TRAINING]


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_sources_are_clean(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in cells(path):
        assert cell.outputs == [] and cell.execution_count is None
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.FunctionDef)]
    first, second = cells(path)[:2]
    assert first.metadata.tags == ["parameters"]
    lines = first.source.splitlines()
    statements = ast.parse(first.source).body
    assert len(statements) == len(lines)  # flat: one a line
    for statement, line in zip(statements, lines, strict=True):
        assert isinstance(statement, ast.AnnAssign) and "  # " in line
        value = ast.literal_eval(statement.value)  # nothing derived
        assert notebooks.fits(value, ast.unparse(statement.annotation))
    assert "experiment.check_parameters(globals())" in second.source


def test_papermill_sees_the_same_parameters():
    for path in NOTEBOOKS:
        statements = ast.parse(cells(path)[0].source).body
        assert notebooks.declared(path) == {s.target.id: ast.unparse(s.annotation) for s in statements}


def test_profiles_set_only_what_notebooks_have():
    for path in (FOLDER / "profiles").glob("*.yaml"):
        profile = yaml.safe_load(path.read_text())
        notebooks.check_profile(FOLDER, path.stem, profile)
        notebooks.parameters_for({book: notebooks.declared(book) for book in NOTEBOOKS}, profile, [])


def run(environment, folder, *arguments):
    command = [sys.executable, "-m", "ssd_repro", "run", "--out", "out", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_run_makes_results_and_makes_no_row_twice(fake_environment, tmp_path):
    small = ["-p", "sentences", "2", "-p", "repeats", "1", "-p", "temperatures", "[1.0]"]
    done = run(fake_environment, tmp_path, *small)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*") if path.suffix != ".lock"}
    exhibits = report.EXHIBITS.items()
    assert names == {
        *(f"{path.stem}.ipynb" for path in RESULTS), "provenance.json",
        *(f"rows/{name}.jsonl" for name in ("listen", "table1", "tolerance", "draft_length")),
        *(f"tables/{name}.{end}" for name, _ in exhibits for end in ("csv", "md")),
        *(f"figures/{name}.{end}" for name, e in exhibits if e.draw for end in ("png", "svg")),
    }  # fmt: skip
    grid = sum(len(files.read_rows(path)) for path in (out / "rows").glob("*.jsonl"))
    assert grid == 3 + 2 * (3 + 2 + 2)  # listen; then AR, draft, SSD; beta 0 and 1; L_d 1 and 6: each once
    about = json.loads((out / "provenance.json").read_text())
    assert about["01_table1"]["parameters"]["sentences"] == 2 and about["01_table1"]["profile"] == "quick"
    rows = (out / "rows" / "table1.jsonl").read_bytes()
    assert len(rows.splitlines()) == 6
    for path in [*out.glob("*.ipynb"), out / "provenance.json"]:
        text = path.read_text()
        assert str(tmp_path) not in text and str(ROOT) not in text and sys.prefix not in text, path.name
    assert run(fake_environment, tmp_path, "--only", "01", *small[:6]).returncode == 0
    assert (out / "rows" / "table1.jsonl").read_bytes() == rows


def test_bad_input_reaches_the_user_from_inside_of_a_notebook(fake_environment, tmp_path):
    done = run(fake_environment, tmp_path, "--only", "00", "-p", "voice", "nobody")
    assert done.returncode == 2
    assert "00_listen.ipynb failed in cell" in done.stderr and "'nobody'" in done.stderr
    assert [path.name for path in (tmp_path / "out").glob("*.ipynb")] == ["00_listen.failed.ipynb"]


def test_an_unknown_parameter_that_papermill_injects_is_an_error(fake_environment, tmp_path):
    command = [sys.executable, "-m", "papermill", FOLDER / "00_listen.ipynb", "a.ipynb", "-p", "sed", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=fake_environment, capture_output=True, text=True)
    assert done.returncode and "unknown parameter 'sed'" in done.stderr


@pytest.mark.skipif(not (checkpoints.BUNDLED / "voice.json").exists(), reason="no bundled voice in this checkout")
def test_the_bundled_voice_with_the_real_metrics(tmp_path):
    pytest.importorskip("resemblyzer", reason="the extra eval is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run(environment, tmp_path, "--only", "01", "-p", "sentences", "2", "-p", "repeats", "1")
    assert done.returncode == 0, done.stderr
    rows = rows_module.to_frame(files.read_rows(tmp_path / "out" / "rows" / "table1.jsonl"))
    assert len(rows) == 6 and rows.repeatable.all()
    assert rows.p808.between(1, 5).all() and rows.similarity.between(0.4, 1).all()
    assert Path(tmp_path, "out", "tables", "table1.csv").exists()
    assert sys.prefix not in Path(tmp_path, "out", "01_table1.ipynb").read_text()
