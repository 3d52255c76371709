"""A notebook's cells in this process: no kernel to start, and fakes can be put in its place."""

import nbformat
from conftest import ROOT


def run_notebook(name: str, profile: dict | None = None, **parameters) -> dict:
    """Execute the code of notebooks/``name`` -> its variables. Nothing is shown.

    Of ``profile`` those values are taken that it declares, as papermill does.
    """
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    first, *rest = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    space = {"__name__": "__main__"}
    exec(compile(first, name, "exec", dont_inherit=True), space)
    unknown = parameters.keys() - space["__annotations__"].keys()
    assert not unknown, f"{name} has no parameters {unknown}"
    space |= {key: value for key, value in (profile or {}).items() if key in space["__annotations__"]} | parameters
    for source in rest:
        exec(compile(source, name, "exec", dont_inherit=True), space)
    return space
