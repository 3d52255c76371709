"""What counts as a change of the checkout; digests of files."""

import json
import subprocess

import pytest

from ssd_repro import files

NOTEBOOK = {
    "cells": [
        {
            "cell_type": "code",
            "execution_count": None,
            "id": "a",
            "metadata": {"tags": ["parameters"]},
            "outputs": [],
            "source": ["seed: int = 0\n", "voice: str = ''"],
        }
    ],
    "metadata": {"kernelspec": {"name": "python3"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A committed checkout with a notebook, a source and results."""
    for name in ("notebooks", "results", "ssd_repro"):
        (tmp_path / name).mkdir()
    (tmp_path / "notebooks" / "01.ipynb").write_text(json.dumps(NOTEBOOK))
    (tmp_path / "ssd_repro" / "a.py").write_text("a = 1\n")
    (tmp_path / "results" / "a.csv").write_text("1\n")
    person = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*person, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(files, "source_tree", lambda: tmp_path)
    assert files.git_state()["dirty"] is False and len(files.git_state()["commit"]) == 40
    return tmp_path


def notebook(checkout, **cell):
    whole = json.loads(json.dumps(NOTEBOOK))
    whole["cells"][0] |= cell
    whole["metadata"]["kernelspec"]["name"] = "another"
    (checkout / "notebooks" / "01.ipynb").write_text(json.dumps(whole, indent=1))


def test_running_and_saving_a_notebook_is_no_local_change(checkout):
    notebook(checkout, execution_count=3, outputs=[{"output_type": "stream", "name": "stdout", "text": "1"}])
    assert files.git_state()["dirty"] is False
    (checkout / "results" / "a.csv").write_text("2\n")
    assert files.git_state()["dirty"] is False


@pytest.mark.parametrize("change", ["source", "tags", "a cell more", "deleted", "broken", "a module", "a new file"])
def test_other_changes_of_the_checkout_are(checkout, change):
    path = checkout / "notebooks" / "01.ipynb"
    if change == "source":
        notebook(checkout, source=["seed: int = 1\n", "voice: str = ''"])
    elif change == "tags":
        notebook(checkout, metadata={})
    elif change == "a cell more":
        path.write_text(json.dumps(NOTEBOOK | {"cells": 2 * NOTEBOOK["cells"]}))
    elif change == "deleted":
        path.unlink()
    elif change == "broken":
        path.write_text("{")
    elif change == "a module":
        (checkout / "ssd_repro" / "a.py").write_text("a = 2\n")
    else:
        (checkout / "notebooks" / "02.ipynb").write_text(json.dumps(NOTEBOOK))
    assert files.git_state()["dirty"] is True


def test_a_digest_follows_the_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = files.file_digest(path)
    path.write_bytes(b"two")
    assert len(first) == 12 and files.file_digest(path) == files.sha256(path)[:12] != first
