"""Notebooks: their parameters, profiles, and how they are executed."""

from __future__ import annotations

import ast
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from ..errors import InputError
from ..files import locked, source_tree
from ..processes import end_with_parent, launch, process
from .provenance import results_folder


def fits(value, kind: str) -> bool:
    """Whether ``value`` is of the type named ``kind``: str, int, float, bool or list[...]."""
    if kind.startswith("list"):
        inner = kind[5:-1]
        return isinstance(value, list) and (not inner or all(fits(item, inner) for item in value))
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    return isinstance(value, {"str": str, "int": int, "float": (int, float)}[kind])


def check_parameters(namespace: dict) -> dict:
    """For a notebook's second cell: ``globals()`` in, its parameters out.

    InputError for a value of another type than the parameters cell declares, and for a name
    that papermill injected though that cell has none such (papermill itself only warns).
    """
    kinds = {
        name: kind if isinstance(kind, str) else str(kind) if "[" in str(kind) else kind.__name__
        for name, kind in namespace.get("__annotations__", {}).items()
    }
    for cell in namespace.get("In", []):
        if cell.startswith("# Parameters\n"):
            for statement in ast.parse(cell).body:
                name = statement.targets[0].id
                if name not in kinds:
                    raise InputError(f"unknown parameter {name!r}: choose one of {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not fits(namespace[name], kind):
            raise InputError(f"parameter {name} must be {kind}, got {namespace[name]!r}")
    return {name: namespace[name] for name in kinds}


COMMITTED = "mini"  # the profile whose results README shows
FIRST_TRAINING = "10"  # notebooks numbered from here on train: they run with --only alone


def notebooks_folder() -> Path:
    """The checkout's notebooks, or the copy inside an installed package."""

    root = source_tree()
    folder = root / "notebooks" if root else Path(__file__).parents[1] / "notebooks"
    if not folder.is_dir():
        raise InputError("no notebooks are installed: install ssd-repro from a clone of its repository")
    return folder


def choose_notebooks(folder: Path, only: list[str]) -> list[Path]:
    """The notebooks that ``only`` names by number, stem or file name; all result notebooks by default."""
    known = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not only:
        return [path for path in known if path.name[:2] < FIRST_TRAINING]
    chosen = []
    for name in only:
        fits = [path for path in known if name in (path.name[:2], path.stem, path.name)]
        if not fits:
            raise InputError(f"unknown notebook {name!r}: choose among {', '.join(p.stem for p in known)}")
        chosen += fits
    return sorted(set(chosen))


def read_profile(folder: Path, name: str) -> dict:
    import yaml

    known = {path.stem: path for path in sorted((folder / "profiles").glob("*.yaml"))}
    if name not in known:
        raise InputError(f"unknown profile {name!r}: choose one of {', '.join(known)}")
    values = yaml.safe_load(known[name].read_text("utf-8"))
    if not isinstance(values, dict):
        raise InputError(f"profile {name} must hold lines NAME: VALUE")
    return values


def declared(path: Path) -> dict[str, str]:
    """Name -> type of a notebook's parameters, from its parameters cell."""
    import papermill

    return {name: p["inferred_type_name"] for name, p in papermill.inspect_notebook(str(path)).items()}


def parse_value(name: str, text: str, kind: str):
    """The VALUE of -p as the parameters cell's type; InputError if it is not of that type."""
    import yaml

    try:
        value = text if kind == "str" else float(text) if kind == "float" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        value = None
    if not fits(value, kind):
        raise InputError(f"parameter {name} must be {kind}, got {text!r}")
    return value


def parameters_for(kinds: dict[Path, dict[str, str]], profile: dict, given: list) -> dict[Path, dict]:
    """Each notebook's parameters: those it declares, from the profile and then from -p."""

    every = {name: kind for declared in kinds.values() for name, kind in declared.items()}
    for name, _ in given:
        if name not in every:
            raise InputError(f"unknown parameter {name!r}: choose one of {', '.join(every)}")
    values = {name: value for name, value in profile.items() if name in every}
    for name, value in values.items():
        if value is not None and not fits(value, every[name]):
            raise InputError(f"the profile's {name} must be {every[name]}, got {value!r}")
    values |= {name: parse_value(name, text, every[name]) for name, text in given}
    return {path: {n: v for n, v in values.items() if n in declared} for path, declared in kinds.items()}


def check_profile(folder: Path, name: str, profile: dict) -> None:
    """A name in a profile that no notebook declares is a mistake."""
    known = {n for path in folder.glob("[0-9][0-9]_*.ipynb") for n in declared(path)}
    unknown = sorted(set(profile) - known)
    if unknown:
        raise InputError(f"profile {name} sets {unknown[0]!r}, which no notebook has")


def run_notebooks(options) -> int:

    folder = notebooks_folder()
    chosen = choose_notebooks(folder, options.only)
    profile = read_profile(folder, options.profile)
    check_profile(folder, options.profile, profile)
    out = results_folder(str(options.out or ""), options.profile)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give the name of a folder")
    parameters = parameters_for({path: declared(path) for path in chosen}, profile, options.parameters)
    check_given(options.profile, parameters)
    fixed = {"profile": options.profile, "out": _as_typed(out)}
    rank, world = process()
    end_with_parent()
    if options.processes < 1:
        raise InputError(f"--processes must be a whole number of at least 1, got {options.processes}")
    if options.processes > 1 and world == 1:
        with locked(out / ".run.lock"):
            pass  # what can be refused is refused before there are processes
        return launch(options.processes, options.arguments)
    code = 0
    with nullcontext() if rank else locked(out / ".run.lock"):
        if world > 1:
            share_rows({path: fixed | parameters[path] for path in chosen})
            if rank:
                return 0
        for path in chosen:
            code = max(code, execute(path, out, fixed | parameters[path]))
    return code


def check_given(name: str, parameters: dict[Path, dict]) -> None:
    """InputError if a parameter that the profile leaves open (null) was not set with -p."""
    import papermill

    missing = {n: path for path, values in parameters.items() for n, value in values.items() if value is None}
    if missing:
        asked = " ".join(f"-p {n} VALUE" for n in missing)
        about = "; ".join(f"{n}: {papermill.inspect_notebook(str(path))[n]['help']}" for n, path in missing.items())
        raise InputError(f"profile {name} needs {asked} ({about})")


def share_rows(parameters: dict[Path, dict]) -> None:
    """Each process makes the rows of its share of utterances; returns when all have.

    A process runs a notebook's own statements up to its last ``experiment.run``, which knows
    the process's rank. What follows (tables, figures) is left to rank 0, which afterwards
    executes the notebooks alone and finds all rows made.
    """
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=30))  # a share may take hours longer than another
    for path, values in parameters.items():
        if code := code_of_rows(path):
            space = {"__name__": "__main__"}
            injected = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
            first, *rest = code
            for source in (first, injected, *rest):
                exec(compile(source, path.name, "exec", dont_inherit=True), space)
    dist.barrier()
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # the notebooks run in one process
        os.environ.pop(name, None)


def code_of_rows(path: Path) -> list[str]:
    """The parameters cell of a notebook and its statements up to the last ``experiment.run``; [] without."""
    import nbformat

    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    statements = [(i > 0, ast.unparse(s)) for i, cell in enumerate(cells) for s in ast.parse(cell).body]
    last = max((i for i, (_, code) in enumerate(statements) if "experiment.run(" in code), default=None)
    if last is None:
        return []
    return [cells[0], *(code for body, code in statements[: last + 1] if body)]


def _as_typed(path: Path) -> str:
    """Relative to the working directory where it lies below it: results name no machine's folders."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


def execute(source: Path, out: Path, parameters: dict) -> int:
    """Run one notebook into ``out``; only a finished one gets its own name. -> exit code."""
    import papermill

    running, failed, done = (out / f"{source.stem}.{end}" for end in ("running.ipynb", "failed.ipynb", "ipynb"))
    print(f"{source.stem} -> {done}", file=sys.stderr)
    os.environ.setdefault("PYTHONWARNINGS", "ignore:pkg_resources is deprecated:UserWarning")  # pyworld's
    try:
        papermill.execute_notebook(str(source), str(running), parameters, kernel_name="python3",
                                   language="python", stderr_file=sys.stderr,
                                   extra_arguments=["--IPKernelApp.log_level=ERROR"])  # fmt: skip
    except papermill.PapermillExecutionError as error:
        os.replace(running, failed)
        print(
            f"ssd-repro: notebook {source.name} failed in cell {error.cell_index}: {error.ename}: {error.evalue} "
            f"(kept as {failed})",
            file=sys.stderr,
        )
        return 2 if error.ename == "InputError" else 1
    except OSError as error:  # papermill saves after each cell
        raise InputError(f"cannot write {running}: {error.strerror or error}; rows and {done.name} are kept") from error
    tidy(running, source)
    os.replace(running, done)
    failed.unlink(missing_ok=True)
    return 0


def tidy(path: Path, source: Path) -> None:
    """Keep a progress bar's last state alone, and of papermill's notes no folder of this machine."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    about = notebook.metadata.get("papermill", {})
    about.update({key: Path(about[key]).name for key in ("input_path", "output_path") if about.get(key)})
    about.update({"input_path": source.name, "output_path": source.name})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined_streams(cell.outputs)
    nbformat.write(notebook, path)


def joined_streams(outputs: list) -> list:
    """Neighbouring pieces of stdout or stderr as one, each line as a terminal shows it at the end."""
    joined: list = []
    for output in outputs:
        if joined and "name" in output and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n"))
    return joined
