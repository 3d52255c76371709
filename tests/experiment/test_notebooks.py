"""The notebooks: clean sources, typed parameters, every profile; executed with the fake voice and the bundled one."""

import ast
import json
import os
import subprocess
import sys

import matplotlib
import nbformat
import pytest
import yaml
from conftest import ROOT

from ssd_repro import cli, files
from ssd_repro.errors import InputError
from ssd_repro.experiment import notebooks, provenance, report
from ssd_repro.experiment import rows as rows_module
from ssd_repro.experiment.systems import System
from ssd_repro.models import checkpoints

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
RESULTS = [path for path in NOTEBOOKS if path.name < notebooks.FIRST_TRAINING]
BY_NUMBER = {int(path.name[:2]): path for path in RESULTS}  # of the two 00 the second: it needs a voice
PROFILES = sorted((FOLDER / "profiles").glob("*.yaml"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def execute(path, parameters, cells=None):
    """The first ``cells`` code cells (all by default) in this process, as papermill makes them -> their namespace."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = parameterize_notebook(
        load_notebook_node(str(path)), parameters, kernel_name="python3", language="python"
    )
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"][:cells]
    namespace = {"__name__": "__main__", "In": []}
    for source in sources:
        namespace["In"].append(source)
        exec(compile(source, path.name, "exec", dont_inherit=True), namespace)
    return namespace


# sources


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_sources_are_clean(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in code_cells(path):
        assert cell.outputs == [] and cell.execution_count is None
    first, second = code_cells(path)[:2]
    assert first.metadata.tags == ["parameters"]
    lines = first.source.splitlines()
    statements = ast.parse(first.source).body
    assert len(statements) == len(lines)  # flat: one per line
    for statement, line in zip(statements, lines, strict=True):
        assert isinstance(statement, ast.AnnAssign) and "  # " in line
        value = ast.literal_eval(statement.value)  # nothing derived
        assert notebooks.as_declared(statement.target.id, ast.unparse(statement.annotation), value) == value
    assert "notebooks.check_parameters(globals())" in second.source


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_notebook_asks_shows_its_equation_and_concludes_from_numbers(path):
    cells = nbformat.read(path, as_version=4).cells
    said = [cell.source for cell in cells if cell.cell_type == "markdown"]
    title, *rest = said[0].splitlines()
    assert title.startswith("# ") and cells[0].cell_type == "markdown"
    assert any("?" in line for line in rest) and "$$" in said[0] and "\\" in said[0].split("$$")[1]
    assert "Try this" in said[-1] and "`" in said[-1]
    last = list(ast.walk(ast.parse(code_cells(path)[-1].source)))
    computed = [node for node in last if isinstance(node, ast.FormattedValue)]
    assert len(computed) >= 3 or any(isinstance(n, ast.Attribute) and n.attr == "conclusion" for n in last)
    assert not any(isinstance(node.value, ast.Constant) for node in computed)


def test_the_page_of_the_notebooks_names_each_of_them():
    page = (FOLDER / "README.md").read_text()
    assert [path.stem for path in NOTEBOOKS if f"({path.name})" not in page] == []


def test_papermill_sees_the_same_parameters():
    for path in NOTEBOOKS:
        statements = ast.parse(code_cells(path)[0].source).body
        seen = {name: parameter["inferred_type_name"] for name, parameter in notebooks.declared(path).items()}
        assert seen == {s.target.id: ast.unparse(s.annotation) for s in statements}
        assert notebooks.defaults(path) == {s.target.id: ast.literal_eval(s.value) for s in statements}


# parameters


def accepts(kind, value, is_text=False):
    try:
        notebooks.as_declared("x", kind, value, is_text)
    except InputError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("int", [3], [True, 2.5, 3.0, "3", None]),
        ("float", [0.5, 3], [True, "0.5"]),
        ("str", ["x"], [1, None]),
        ("bool", [True], [1, "true"]),
        ("list[int]", [[1, 2], []], [[1, "2"], [1.5], 1]),
        ("list[float]", [[0.1, 1]], [["0.1"], [True]]),
    ],
)
def test_values_fit_the_declared_type(kind, good, bad):
    assert all(accepts(kind, value) for value in good) and not any(accepts(kind, value) for value in bad)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "3", 3),
        ("int", "2.5", None),
        ("float", "1e-3", 0.001),
        ("float", "high", None),
        ("str", "007", "007"),
        ("bool", "true", True),
        ("bool", "False", False),
        ("bool", "maybe", None),
        ("list[float]", "[0, 0.4]", [0.0, 0.4]),
        ("list[int]", "[1, 2.5]", None),
        ("list[int]", "1", None),
    ],
)
def test_texts_of_the_command_line_become_the_declared_type(kind, text, value):
    if value is None:
        with pytest.raises(InputError) as refused:
            notebooks.as_declared("x", kind, text, is_text=True)
        assert str(refused.value) == f"parameter x must be {kind}, got {text!r}"
    else:
        made = notebooks.as_declared("x", kind, text, is_text=True)
        assert made == value and type(made) is type(value)


def test_a_number_that_yaml_reads_as_text_is_explained():
    with pytest.raises(InputError, match=r"must be float, got '1e-3'; to YAML that is text: write numbers as 1\.0e-3"):
        notebooks.as_declared("x", float, yaml.safe_load("1e-3"))
    assert notebooks.as_declared("x", float, yaml.safe_load("1.0e-3")) == 0.001


# profiles: by papermill alone, and by the command


GIVEN = dict.fromkeys(("weights", "draft", "data"), "given")  # what the profile paper leaves open


def values_of(profile):
    return yaml.safe_load(profile.read_text()) | (GIVEN if profile.stem == "paper" else {})


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_every_notebook_runs_with_every_profile_by_papermill_alone(profile):
    """Cut to the parameter check. Papermill injects the whole profile, whatever a notebook declares."""
    for path in NOTEBOOKS:
        parameters = notebooks.check_parameters(execute(path, values_of(profile), cells=2))
        assert parameters["profile"] == profile.stem == provenance.results_folder("", parameters["profile"]).name
        given = {k: v for k, v in GIVEN.items() if parameters.get(k) == v}
        declared = {k: v for k, v in values_of(profile).items() if k in notebooks.declared(path)}
        assert parameters == notebooks.with_settings(notebooks.defaults(path) | declared | given)
        assert given or profile.stem != "paper" or "setup" not in notebooks.declared(path)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_every_profile_fits_the_command(profile):
    values = notebooks.read_profile(profile.stem)
    given = list(GIVEN.items()) if profile.stem == "paper" else []
    parameters = notebooks.parameters_for(NOTEBOOKS, values, given)
    assert all(chosen["profile"] == profile.stem for chosen in parameters.values())


def test_what_no_notebook_has_or_the_profile_leaves_open_is_an_error():
    path, paper = BY_NUMBER[1], FOLDER / "profiles" / "paper.yaml"
    with pytest.raises(InputError, match="unknown parameter 'sed': choose one of sentences, "):
        execute(path, {"sed": 1}, cells=3)
    with pytest.raises(InputError, match="seed must be int, got 'one'"):
        execute(path, {"seed": "one"}, cells=3)
    with pytest.raises(InputError, match="leaves weights, draft, data open: add -p weights VALUE -p draft VALUE"):
        execute(path, yaml.safe_load(paper.read_text()), cells=3)
    with pytest.raises(InputError, match="leaves draft, data open"):
        notebooks.parameters_for([path], notebooks.read_profile("paper"), [("weights", "somewhere")])


# setups: voice, machine and metric models by one name


def test_a_setup_becomes_its_settings_and_single_ones_win():
    path = BY_NUMBER[1]
    plain, changed, given = (
        notebooks.check_parameters(execute(path, values, cells=2))
        for values in ({}, {"setup": "gpu precision=fp32 weights='a b'"}, {"setup": "gpu", "device": "cpu"})
    )
    assert "setup" not in plain and (plain["device"], plain["precision"], plain["weights"]) == ("auto", "auto", "")
    assert (changed["device"], changed["precision"], changed["weights"]) == ("cuda", "fp32", "a b")
    assert (given["device"], given["precision"], given["runtime"]) == ("cpu", "bf16", "graphs")
    chosen = notebooks.parameters_for([path], {"setup": "gpu"}, [("device", "cpu")])[path]
    assert notebooks.with_settings(notebooks.defaults(path) | chosen) == given and chosen["setup"] == "gpu device=cpu"
    empty = notebooks.parameters_for([path], {"setup": "gpu"}, [("weights", "a b"), ("whisper", "")])[path]
    assert empty == {"setup": "gpu weights='a b' whisper=''"} and notebooks.with_settings(empty)["whisper"] == ""


def test_the_command_of_a_row_names_what_differs_from_the_setup_of_its_profile():
    own = notebooks.with_settings(notebooks.defaults(BY_NUMBER[1]) | notebooks.read_profile("gpu"))
    about = {"profile": "gpu", "parameters": own | {"precision": "fp32", "draft_length": 2}}
    assert notebooks.command("01_table1", about, 1) == "ssd-repro run --profile gpu -p precision fp32 -p draft_length 2"


@pytest.mark.parametrize(
    ("setup", "about"),
    [
        ("nobody", "unknown setup 'nobody': choose one of bundled, gpu, cosyvoice"),
        ("bundled speed=9", "'speed=9' must be SETTING=VALUE with one of the settings weights, draft, "),
        ("bundled precision", "'precision' must be SETTING=VALUE"),
        ("bundled weights='a", "must be a name, then NAME=VALUE"),
        ("", "must be a name"),
    ],
)
def test_a_setup_that_is_none_is_one_sentence(setup, about):
    with pytest.raises(InputError, match=about):
        notebooks.check_parameters(execute(BY_NUMBER[1], {"setup": setup}, cells=2))
    with pytest.raises(InputError, match=about):
        notebooks.parameters_for([BY_NUMBER[1]], {}, [("setup", setup)])


def test_notebooks_ask_for_few_things():
    """Beside the folder's two names: what the experiment is, and one setup in place of nine settings."""
    settings = set(notebooks.setup_settings())
    for path in RESULTS:
        names = set(notebooks.declared(path))
        assert not names & settings, path.stem
    assert all(len(notebooks.declared(BY_NUMBER[number])) <= 8 for number in (1, 2, 3, 4))


# executed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with out/: both 00 by the command and 04 by papermill alone, in kernels with the fake voice."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "fake_site"), str(ROOT)]))
        assert cli.main(["run", "--only", "00", "--out", "out"]) == 0
        command = [sys.executable, "-m", "papermill", str(BY_NUMBER[4]), "out/04_stages.ipynb"]
        command += ["-f", str(FOLDER / "profiles" / "quick.yaml"), "-p", "out", "out"]
        command += ["-p", "sentences", "2", "-p", "repeats", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def here(fake, monkeypatch, results):
    """-> execute a notebook in this process into the same folder, in a cluster's shell that nothing was launched in."""
    matplotlib.use("agg")
    monkeypatch.chdir(results)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    quick = values_of(FOLDER / "profiles" / "quick.yaml")
    small = {"sentences": 2, "repeats": 1, "temperatures": [1.0], "out": "out"}
    small |= {
        "utterances": 2,
        "longest": 6,
        "sizes": ["2x128"],
        "thread_counts": [1],
        "seconds": [1],
        "batches": [1, 2],
        "price_tokens": 8,
    }
    return lambda number, **other: execute(BY_NUMBER[number], quick | small | other)


def test_notebooks_make_results_and_no_row_twice(here, fake, results):
    out = results / "out"
    for number in (1, 2, 3, 5, 6, 7, 8, 9):
        here(number)
    decodes, measured = len(fake.calls), [(out / "rows" / f"{name}.jsonl").read_bytes() for name in ("bench", "growth")]
    for number in (1, 4, 6, 7, 8, 9):
        here(number)
    assert len(fake.calls) == decodes
    assert measured == [(out / "rows" / f"{name}.jsonl").read_bytes() for name in ("bench", "growth")]
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*") if path.suffix != ".lock"}
    # the others: report
    shown = {name: e for name, e in report.EXHIBITS.items() if not e.of_folder or name == "tradeoff"}
    exhibits = [(name, e) for name, e in shown.items() if e.notebook < "10"]
    assert names == {
        *("00_algorithm.ipynb", "00_listen.ipynb", "04_stages.ipynb", "provenance.json"),
        *("00_algorithm.html", "00_listen.html"),
        *(
            f"rows/{name}.jsonl"
            for name in ("listen", "table1", "tolerance", "draft_length", "bench", "growth", "price")
        ),
        *(f"tables/{name}.{end}" for name, _ in exhibits for end in ("csv", "md")),
        *(f"figures/{name}.{end}" for name, e in exhibits if e.draw for end in ("png", "svg", "pdf")),
        *(f"figures/algorithm.{end}" for end in ("png", "svg", "pdf")),
    }
    made = sum(len(files.read_rows(path)) for path in (out / "rows").glob("[ltd]*.jsonl"))
    assert made == 3 + 2 * (3 + 1 + 1)  # listen; then AR, draft, SSD; beta 0; L_d 1: each once
    about = json.loads((out / "provenance.json").read_text())
    assert set(about) == {path.stem for path in RESULTS} - {"00_algorithm"}  # which has no rows
    assert about["01_table1"]["parameters"]["sentences"] == 2 and about["01_table1"]["profile"] == "quick"


def test_results_name_no_folder_of_this_machine(results):
    for name in ("00_algorithm.ipynb", "00_listen.ipynb", "00_listen.html", "provenance.json"):
        text = (results / "out" / name).read_text()
        assert str(results) not in text and str(ROOT) not in text and sys.prefix not in text, name


def test_a_notebook_decodes_the_systems_that_its_cell_names(here, fake):
    namespace = here(1)
    before, chosen = len(fake.calls), [*namespace["systems"], System("speculative", 0.9, 2)]
    rows, about = namespace["study"].decode(chosen)
    assert len(rows) == 2 * 4 and len(fake.calls) - before == 2 + 2 * 2  # the new one, and its baseline
    assert about["keys"] == list(rows.key)


def test_bad_input_is_an_error_before_anything_is_decoded(here):
    with pytest.raises(InputError, match="'nobody'"):
        here(0, voice="nobody")


@pytest.mark.skipif(not (checkpoints.BUNDLED / "voice.json").exists(), reason="no bundled voice in this checkout")
def test_the_bundled_voice_with_the_real_metrics(tmp_path, monkeypatch):
    pytest.importorskip("resemblyzer", reason="the extra eval is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--only", "02", "--out", "out", "-p", "sentences", "1", "-p", "tolerances", "[0.4]"]
    assert cli.main(arguments) == 0
    rows = rows_module.to_frame(files.read_rows(tmp_path / "out" / "rows" / "tolerance.jsonl"))
    assert set(rows.method) == {"autoregressive", "speculative"} and len(rows) == 2 and rows.repeatable.all()
    assert rows.p808.between(1, 5).all() and rows.similarity.between(0.4, 1).all()
    assert (tmp_path / "out" / "tables" / "table3.csv").exists()
    assert sys.prefix not in (tmp_path / "out" / "02_tolerance.ipynb").read_text()
