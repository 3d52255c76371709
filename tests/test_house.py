"""The layers of the package: imports go one way only, at the top of the file, and never round in a circle."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

PACKAGE = ROOT / "ssd_repro"
BASE = ("errors", "files", "processes")
MAY_IMPORT = {
    "decoding": ("errors", "decoding"),
    "models": (*BASE, "decoding", "models"),
    "speech": (*BASE, "decoding", "models", "speech"),
    "experiment": (*BASE, "decoding", "models", "speech", "experiment"),
    "listening": (*BASE, "decoding", "models", "speech", "experiment", "listening"),
    "training": (*BASE, "decoding", "models", "speech", "training"),
    **dict.fromkeys(BASE, BASE),
}
THIN = ("__init__", "__main__", "cli")  # these load the rest when it is asked for


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path, tree) -> list[tuple[ast.stmt, str]]:
    """(statement, module of the package that it imports)."""
    home, found = name_of(path).split("."), []
    if path.stem != "__init__":
        home = home[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            whole = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found += [(node, name if (name := f"{whole}.{a.name}") in MODULES else whole) for a in node.names]
    return found


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("module", [m for m in MODULES if layer(m) not in THIN])
def test_imports_go_one_way(module):
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    for node, imported in imports(MODULES[module], tree):
        if not imported.startswith("ssd_repro"):
            allowed = {"torch", *sys.stdlib_module_names}
            assert layer(module) != "decoding" or imported.split(".")[0] in allowed, f"{module} imports {imported}"
            continue
        assert layer(imported) in MAY_IMPORT[layer(module)], f"{module} imports {imported}"
        assert node in tree.body, f"{module} hides its import of {imported} inside a function"


def test_there_is_no_circle():
    graph = {
        module: {m for _, m in imports(path, ast.parse(path.read_text("utf-8"))) if m in MODULES and m != module}
        for module, path in MODULES.items()
        if layer(module) not in THIN
    }
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph) > 20  # CycleError names a circle


def test_files_stay_small():
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text("utf-8").splitlines())) > 360}
    assert not long
