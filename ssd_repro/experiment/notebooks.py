"""Notebooks: their parameters, the profiles that set these, and how they are executed."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from time import monotonic

from ..errors import InputError
from ..files import locked, source_tree
from ..processes import is_first, is_launched, launched_group, run_in_processes
from . import notebook_html, setups
from .provenance import relative, results_folder

COMMITTED = "mini"  # the profile whose results README shows
QUIET = "ignore:pkg_resources is deprecated:UserWarning,ignore:resource_tracker:UserWarning"  # pyworld's; on Ctrl-C
FIRST_TRAINING = "10"  # notebooks numbered from here on train: they run with --only alone


def notebooks_folder() -> Path:
    """The checkout's notebooks, or the copy inside an installed package."""
    root = source_tree()
    folder = root / "notebooks" if root else Path(__file__).parents[1] / "notebooks"
    if not folder.is_dir():
        raise InputError("no notebooks are installed: install ssd-repro from a clone of its repository")
    return folder


def all_notebooks() -> list[Path]:
    return sorted(notebooks_folder().glob("[0-9][0-9]_*.ipynb"))


def all_profiles() -> list[Path]:
    return sorted((notebooks_folder() / "profiles").glob("*.yaml"))


def setup_settings() -> dict[str, None]:
    """Names of the settings that any setup has: parameters of each notebook that has a ``setup``, though undeclared."""
    return dict.fromkeys(setups.sections(notebooks_folder() / "setups.yaml")[setups.FIRST])


def with_settings(values: dict) -> dict:
    """A notebook's parameters with, in place of ``setup``, its settings; those that stand among the parameters win."""
    values = dict(values)
    if "setup" not in values:
        return values
    settings = setups.settings_of(values.pop("setup"), notebooks_folder() / "setups.yaml") | values
    check_given({name: "" for name in settings if settings[name] is None})
    return settings


def first_line(path: Path) -> str:
    text = path.read_text("utf-8")
    text = json.loads(text)["cells"][0]["source"][0] if path.suffix == ".ipynb" else text
    return text.splitlines()[0].strip("# ")


def choose_notebooks(only: list[str]) -> list[Path]:
    """The notebooks that ``only`` names by number, stem or file name; all result notebooks by default."""
    known = {path: {path.name[:2], path.stem, path.name} for path in all_notebooks()}
    if unknown := [name for name in only if name not in set().union(*known.values())]:
        raise InputError(f"unknown notebook {unknown[0]!r}: choose among {', '.join(path.stem for path in known)}")
    return [path for path, names in known.items() if (names & set(only) if only else path.name < FIRST_TRAINING)]


def declared(path: Path) -> dict[str, dict]:
    """name -> {inferred_type_name, default, help} (all strings) of a notebook's parameters."""
    import papermill

    return papermill.inspect_notebook(str(path))


def known_anywhere() -> set[str]:
    """Names of parameters, and of the settings of setups where a notebook has one."""
    names = {name for path in all_notebooks() for name in declared(path)}
    return names | set(setup_settings()) if "setup" in names else names


def one_line(text: str) -> None:
    """Print over what was printed before: a training's log in a notebook."""
    print(f"\r{text:<160}", end="", flush=True)


def progress(items: Iterable, **options) -> Iterable:
    """tqdm on stdout: on stderr a notebook shows it in red."""
    from tqdm import tqdm

    return tqdm(items, file=sys.stdout, **options)


def check_parameters(namespace: dict) -> dict:
    """For a notebook's second cell: ``globals()`` in, its parameters out, each of the type that its cell declares.

    InputError also for a name that papermill injected and no notebook declares; one profile serves all notebooks.
    """
    kinds = dict(namespace["__annotations__"])
    cells = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]  # papermill's
    injected = [statement.targets[0].id for cell in cells for statement in ast.parse(cell).body]
    if foreign := [name for name in injected if name not in kinds]:
        settings = setup_settings() if "setup" in kinds else {}
        check_names(foreign, known_anywhere(), [*kinds, *settings])
        kinds |= {name: str for name in foreign if name in settings}
    check_given({name: "" for name in kinds if namespace[name] is None})
    return with_settings({name: as_declared(name, kind, namespace[name]) for name, kind in kinds.items()})


def check_names(names, known, suggested=None) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"unknown parameter {name!r}: choose one of {', '.join(suggested or known)}")


def check_given(missing: dict[str, str]) -> None:
    """InputError if there are parameters (name -> what it is) that the profile leaves open and -p does not give."""
    if missing:
        options = " ".join(f"-p {name} VALUE" for name in missing)
        about = "; ".join(f"{name}: {text}" for name, text in missing.items() if text)
        raise InputError(f"the profile leaves {', '.join(missing)} open: add {options}" + f" ({about})" * bool(about))


def as_declared(name: str, kind, value, is_text: bool = False):
    """``value``, or what the text of a -p says, as ``kind``: a type or its name."""
    import pydantic

    adapter = pydantic.TypeAdapter(kind)
    try:
        if not is_text:
            return adapter.validate_python(value, strict=True)
        return adapter.validate_json(value, strict=True) if "list" in str(kind) else adapter.validate_strings(value)
    except pydantic.ValidationError:
        wanted = kind.__name__ if kind in (str, int, float, bool) else kind
        exponent = not is_text and re.search(r"'[-+]?[\d.]+[eE]", repr(value))
        hint = "; to YAML that is text: write numbers as 1.0e-3" if exponent else ""
        raise InputError(f"parameter {name} must be {wanted}, got {value!r}{hint}") from None


def read_profile(name: str) -> dict:
    """name -> value of notebooks/profiles/<name>.yaml."""
    import yaml

    known = {path.stem: path for path in all_profiles()}
    if name not in known:
        raise InputError(f"unknown profile {name!r}: choose one of {', '.join(known)}")
    values = yaml.safe_load(known[name].read_text("utf-8"))
    if not isinstance(values, dict):
        raise InputError(f"profile {name} must hold lines NAME: VALUE")
    if unknown := sorted(set(values) - known_anywhere()):
        raise InputError(f"profile {name} sets {unknown[0]!r}, which no notebook has")
    return values


def parameters_for(notebooks: list[Path], profile: dict, options: list[tuple[str, str]]) -> dict[Path, dict]:
    """Each notebook's parameters: those it declares, of the profile and then of the options -p."""
    known = {path: declared(path) for path in notebooks}
    for parameters in known.values():
        if "setup" in parameters:
            parameters |= {name: {"inferred_type_name": "str", "help": ""} for name in setup_settings()}
    about = {name: parameter for parameters in known.values() for name, parameter in parameters.items()}
    check_names(dict(options), about)
    kinds = {name: parameter["inferred_type_name"] for name, parameter in about.items()}
    given = {name: as_declared(name, kinds[name], text, is_text=True) for name, text in options}
    values = {name: value for name, value in profile.items() if name in about} | given
    check_given({name: about[name]["help"] for name, value in values.items() if value is None})
    values = {name: as_declared(name, kinds[name], value) for name, value in values.items()}
    return {path: _folded({n: v for n, v in values.items() if n in known[path]}, known[path]) for path in notebooks}


def _folded(values: dict, known: dict[str, dict]) -> dict:
    """Settings go behind the notebook's ``setup``: papermill warns of a parameter that it does not declare."""
    if "setup" in known:
        base = values.get("setup", ast.literal_eval(known["setup"]["default"]))
        settings = {name: values[name] for name in setup_settings() if name in values}
        values = {name: value for name, value in values.items() if name not in settings}
        values["setup"] = " ".join([base, *(f"{name}={shlex.quote(value)}" for name, value in settings.items())])
        with_settings(values)  # one that is none, or leaves something open, is known before any work
    return values


def command(notebook: str, about: dict, processes: int, whole: bool = False) -> str:
    """The command that makes rows of this entry of provenance.json, with each setting in which it differs from the
    profile of today; ``whole``: with the notebook and the folder, too."""
    if about["profile"] == "bench":
        return "ssd-repro bench"
    given, words = about.get("parameters") or {}, ["ssd-repro", "run", "--profile", about["profile"]]
    words += ["--only", notebook[:2]] if whole else []
    words += ["--out", given["out"]] if whole and given.get("out") else []
    words += ["--processes", f"{processes:g}"] if processes > 1 else []
    try:
        (path,) = choose_notebooks([notebook])
        known = with_settings(defaults(path) | read_profile(about["profile"]))
    except InputError:
        known = {}
    for name, value in given.items():
        if name in known and name not in ("profile", "out") and value != known[name]:
            words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def run_notebooks(
    profile: str, only: list[str], out: str, options: list[tuple[str, str]], processes: int, make_rows: Callable
) -> int:
    """``ssd-repro run``: execute notebooks into the results folder -> exit code.

    Several processes make the rows first, by make_rows(notebook -> parameters); then one executes the notebooks.
    """
    notebooks, folder = choose_notebooks(only), results_folder(out, profile)
    fixed = {"profile": profile, "out": relative(folder, Path.cwd())}
    given = {path: values | fixed for path, values in parameters_for(notebooks, read_profile(profile), options).items()}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {out} is a file: give the name of a folder")
    if processes < 1:
        raise InputError(f"--processes must be a whole number of at least 1, got {processes}")
    os.environ.setdefault("PYTHONWARNINGS", QUIET)
    with locked(folder / ".run.lock") if is_first() else nullcontext():
        if is_launched() or processes > 1:
            complete = {path.stem: with_settings(defaults(path) | values) for path, values in given.items()}
            if not is_launched():
                run_in_processes(processes, make_rows, complete)
            else:
                with launched_group():
                    make_rows(complete)
        return execute_all(given, folder) if is_first() else 0


def defaults(path: Path) -> dict:
    return {name: ast.literal_eval(parameter["default"]) for name, parameter in declared(path).items()}


def execute_all(given: dict[Path, dict], out: Path) -> int:
    """Execute notebooks (-> their parameters) in turn, say how far it is, and at last what was made -> exit code."""
    took, codes, count = [], [], len(given)
    for number, (path, values) in enumerate(given.items(), 1):
        _log(f"[{number}/{count}] {path.stem} -> {out / path.name}")
        began = monotonic()
        codes.append(execute(path, out, values))
        took.append(monotonic() - began)
        if left := count - number:
            _log(
                f"  {duration(took[-1])}; about {duration(sum(took) / number * left)} left, if the others take as long"
            )
    made = {part: len({path.stem for path in (out / part).glob("*.*")}) for part in ("tables", "figures")}
    _log(f"\n{out}: {count - sum(map(bool, codes))} of {count} notebooks in {duration(sum(took))}; ", end="")
    _log(f"the folder holds {made['tables']} tables and {made['figures']} figures")
    for path, seconds, code in zip(given, took, codes, strict=True):
        _log(f"  {path.stem + ('.failed' if code else ''):<24} {duration(seconds):>12}  {first_line(path)}")
    return max(codes)


def _log(text: str, end: str = "\n") -> None:
    print(text, file=sys.stderr, end=end, flush=True)


def duration(seconds: float) -> str:
    """To the second, from a minute on in minutes, from an hour on in hours: '2 min 05 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def execute(source: Path, out: Path, parameters: dict) -> int:
    """Only a finished notebook gets its own name in ``out``. -> exit code."""
    import papermill

    running, failed, done = (out / f"{source.stem}.{end}" for end in ("running.ipynb", "failed.ipynb", "ipynb"))
    try:
        # a kernel that is asked to end while it decodes would print tracebacks
        kernel = {"kernel_name": "python3", "language": "python", "shutdown_kernel": "immediate", "start_timeout": 600}
        quiet = {"stderr_file": sys.stderr, "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
        papermill.execute_notebook(str(source), str(running), parameters, **kernel, **quiet)
    except papermill.PapermillExecutionError as error:
        os.replace(running, failed)
        about = f"failed in cell {error.cell_index}: {error.ename}: {error.evalue} (kept as {failed})"
        _log(f"ssd-repro: notebook {source.name} {about}")
        return 2 if error.ename == "InputError" else 1
    except OSError as error:  # papermill saves after each cell
        raise InputError(f"cannot write {running}: {error.strerror or error}; rows and {done.name} are kept") from error
    tidy(running, source.name)
    os.replace(running, done)
    failed.unlink(missing_ok=True)
    notebook_html.write(done)
    return 0


def tidy(path: Path, name: str) -> None:
    """Of progress bars keep the last state alone, and of papermill's notes no folder of this machine."""
    import nbformat
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    notebook, _ = CoalesceStreamsPreprocessor().preprocess(nbformat.read(path, as_version=4), {})
    notebook.metadata.get("papermill", {}).update(input_path=name, output_path=name)
    nbformat.write(notebook, path)
