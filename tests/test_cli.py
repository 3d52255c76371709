"""The commands: the JSON contract, bad input, notebooks that fail."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import soundfile
from conftest import ROOT

from ssd_repro import cli
from ssd_repro.errors import InputError
from ssd_repro.experiment import notebooks
from ssd_repro.files import locked
from ssd_repro.speech import load

FIELDS = {"method", "text", "voice", "tokens", "token_ids", "audio_seconds", "lm_seconds", "lm_rtf", "rtf", "seed"}
FIELDS |= {"target_calls", "draft_calls", "acceptance_rate", "tokens_per_target_call", "device", "out"}


def call(capsys, *arguments):
    """-> exit code, stdout, stderr of the command, run in this process."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# speak


@pytest.mark.parametrize("method", ["autoregressive", "draft", "speculative"])
def test_json_is_one_object_and_nothing_else(fake, capsys, tmp_path, monkeypatch, method):
    speak = fake.speak
    monkeypatch.setattr(fake, "speak", lambda *a, **k: print("a library's chatter") or speak(*a, **k))
    out = tmp_path / "a.wav"
    code, stdout, _ = call(capsys, "speak", "Good morning.", "--method", method, "--out", out, "--json")
    assert code == 0
    facts = json.loads(stdout)
    assert set(facts) >= FIELDS
    assert facts["method"] == method and facts["out"] == str(out)
    assert facts["tokens"] == len(facts["token_ids"])
    audio, rate = soundfile.read(out)
    assert len(audio) / rate == pytest.approx(facts["audio_seconds"], abs=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_same_seed_and_settings_same_tokens(fake, capsys):
    def tokens(*more):
        return json.loads(call(capsys, "speak", "Good morning.", "--json", *more)[1])["token_ids"]

    assert tokens("--seed", 5) == tokens("--seed", 5) != tokens("--seed", 6)


def test_without_loss_the_fastest_drafts_unless_another_is_named(fake, capsys):
    def drafter(*more):
        return json.loads(call(capsys, "speak", "Good morning.", "--json", *more)[1])["drafter"]

    assert drafter("--tolerance", 0) == "paper"  # this voice has no other
    fake.drafters["hidden"] = fake.drafters["paper"]
    assert (drafter("--tolerance", 0), drafter()) == ("hidden", "paper")
    assert drafter("--tolerance", 0, "--drafter", "paper") == "paper"


def test_for_a_person(fake, capsys):
    code, stdout, stderr = call(capsys, "speak", "Good morning.")
    assert code == 0 and "acceptance rate" in stdout and "--out FILE.wav" in stdout and not stderr


BAD = {
    "empty": (["speak", ""], "text is empty"),
    "blank": (["speak", " \t\n"], "text is empty"),
    "punctuation": (["speak", "?!..."], "only punctuation"),
    "5,001 characters": (["speak", "a" * 5001], "5001 characters"),
    "emoji": (["speak", "hello 🙂"], "U+1F642"),
    "other script": (["speak", "привет"], "U+043F"),
    "voice": (["speak", "hi", "--voice", "nobody"], "'nobody'"),
    "method": (["speak", "hi", "--method", "magic"], "'magic'"),
    "tolerance -0.1": (["speak", "hi", "--tolerance", "-0.1"], "-0.1"),
    "tolerance nan": (["speak", "hi", "--tolerance", "nan"], "nan"),
    "tolerance 1.5": (["speak", "hi", "--tolerance", "1.5"], "1.5"),
    "tolerance x": (["speak", "hi", "--tolerance", "x"], "must be a number, got 'x'"),
    "verification": (["speak", "hi", "--verification", "all", "--tolerance", "0"], "verification is 'all'"),
    "block with tolerance": (["speak", "hi", "--verification", "block"], "tolerance is 0.4; with block verification"),
    "confidence 2": (["speak", "hi", "--confidence", "2"], "confidence is 2.0"),
    "draft length 0": (["speak", "hi", "--draft-length", "0"], "is 0"),
    "draft length 65": (["speak", "hi", "--draft-length", "65"], "65"),
    "draft length 2.5": (["speak", "hi", "--draft-length", "2.5"], "must be a whole number, got '2.5'"),
    "seed -1": (["speak", "hi", "--seed", "-1"], "-1"),
    "seed x": (["speak", "hi", "--seed", "x"], "whole number"),
    "out no wav": (["speak", "hi", "--out", "a.mp3"], "a.mp3"),
    "out without folder": (["speak", "hi", "--out", "no/such/a.wav"], "cannot write into no/such"),
    "command": (["sing"], "sing"),
    "nothing": ([], "required"),
    "no text": (["speak"], "text"),
    "unknown option": (["speak", "hi", "--beta", "1"], "--beta"),
    "profile": (["run", "--profile", "huge"], "'huge'"),
    "notebook": (["run", "--only", "77"], "'77'"),
    "parameter name": (["run", "-p", "sed", "1"], "'sed'"),
    "parameter type": (["run", "-p", "seed", "one"], "seed must be int, got 'one'"),
    "parameter type 2": (["run", "-p", "sentences", "2.5"], "sentences must be int, got '2.5'"),
    "processes": (["run", "--processes", "0"], "--processes must be a whole number of at least 1, got 0"),
    "parameter type 3": (["run", "-p", "tolerance", "high"], "tolerance must be float, got 'high'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_no_file(fake, capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, sentence = BAD[name]
    if arguments and arguments[0] == "speak" and "--out" not in arguments and len(arguments) > 1:
        arguments = [*arguments, "--out", "a.wav"]
    if arguments and arguments[0] == "run":
        arguments = [*arguments, "--out", "results"]
    code, stdout, stderr = call(capsys, *arguments)
    assert code == 2 and stdout == ""
    assert len(stderr.splitlines()) == 1 and sentence in stderr
    assert fake.calls == [] and list(tmp_path.iterdir()) == []


def test_output_paths_that_cannot_be_written(fake, capsys, tmp_path):
    folder = tmp_path / "folder.wav"
    folder.mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    for path, sentence in ((folder, "is a folder"), (tmp_path / "pipe.wav", "not a file that can be replaced")):
        code, _, stderr = call(capsys, "speak", "hi", "--out", path)
        assert code == 2 and sentence in stderr and fake.calls == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.wav", "pipe.wav"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can write")
def test_a_folder_that_cannot_be_written(fake, capsys):
    code, _, stderr = call(capsys, "speak", "hi", "--out", "/proc/a.wav")
    assert code == 2 and "cannot write into /proc" in stderr and fake.calls == []


def test_a_disk_that_fills_up_while_saving(fake, capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, stderr = call(capsys, "speak", "hi", "--out", tmp_path / "a.wav")
    assert code == 2 and "No space left on device" in stderr and list(tmp_path.iterdir()) == []


def test_an_old_file_stays_until_the_new_one_is_whole(fake, capsys, tmp_path):
    out = tmp_path / "a.wav"
    out.write_bytes(b"old")
    assert call(capsys, "speak", "hi", "--out", out, "--tolerance", "7")[0] == 2 and out.read_bytes() == b"old"
    assert call(capsys, "speak", "hi", "--out", out)[0] == 0 and out.read_bytes()[:4] == b"RIFF"
    assert stat.S_IMODE(out.stat().st_mode) & 0o444


def test_cuda_without_one_and_weights_that_are_missing(capsys, tmp_path):
    import torch

    code, _, stderr = call(capsys, "speak", "hi", "--weights", tmp_path)
    assert code == 2 and "missing" in stderr and len(stderr.splitlines()) == 1
    if not torch.cuda.is_available():
        code, _, stderr = call(capsys, "speak", "hi", "--device", "cuda")
        assert code == 2 and "cuda" in stderr and len(stderr.splitlines()) == 1
    code, _, stderr = call(capsys, "speak", "hi", "--device", "tpu")
    assert code == 2 and "'tpu'" in stderr


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--profile", "huge"], ["speak", "hi", "--seed", "x"]])
def test_help_and_usage_errors_come_without_torch(arguments):
    code = (
        f"import sys; from ssd_repro import cli\ntry: cli.main({arguments})\n"
        "except SystemExit: pass\nassert not {'torch', 'papermill'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=os.environ | {"PYTHONPATH": ROOT})


def test_the_installed_command_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "ssd_repro", "speak", "hi", "--draft-length", "2.5"]
    environment = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_threads_are_the_voices(fake, capsys, monkeypatch):
    monkeypatch.setattr(
        load, "load", lambda *_, threads=None, **__: fake if threads == 3 else pytest.fail(f"{threads}")
    )
    assert call(capsys, "speak", "hi", "--threads", 3)[0] == 0


# run


def notebook(path, *cells, parameters="seed: int = 0  # a number"):
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    book = nbformat.v4.new_notebook(cells=[first, *(nbformat.v4.new_code_cell(cell) for cell in cells)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)


@pytest.fixture
def books(tmp_path, monkeypatch):
    """A notebooks folder with 00_good, 01_bad, 10_train and the profile quick; -> (it, results)."""
    folder = tmp_path / "books"
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "quick.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(notebooks, "notebooks_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder, Path("results")


def test_a_notebook_that_fails_is_named_and_kept_until_it_is_repaired(books, capsys):
    folder, out = books
    notebook(folder / "00_good.ipynb", "print(seed)")
    notebook(folder / "01_bad.ipynb", "fine = 1", "raise KeyError('no luck')")
    code, stdout, stderr = call(capsys, "run", "--out", out, "-p", "seed", "7")
    assert code == 1 and stdout == ""
    assert "notebook 01_bad.ipynb failed in cell " in stderr and "KeyError: 'no luck'" in stderr
    assert sorted(path.name for path in out.glob("*.ipynb")) == ["00_good.ipynb", "01_bad.failed.ipynb"]
    done = nbformat.read(out / "00_good.ipynb", as_version=4)
    assert done.cells[-1].outputs[0].text == "7\n"
    assert str(folder) not in (out / "00_good.ipynb").read_text()

    notebook(folder / "01_bad.ipynb", "1 / 1")
    notebook(folder / "02_refuses.ipynb", "class InputError(ValueError): pass\nraise InputError('voice is x')")
    code, _, stderr = call(capsys, "run", "--out", out, "--only", "01", "02")
    assert code == 2 and "InputError: voice is x" in stderr
    names = sorted(path.name for path in out.glob("*.ipynb"))
    assert names == ["00_good.ipynb", "01_bad.ipynb", "02_refuses.failed.ipynb"]


def test_a_run_says_how_far_it_is_and_at_last_what_was_made(books, capsys, monkeypatch):
    folder, out = books
    clock = iter([0, 60, 100, 130, 200, 210])
    monkeypatch.setattr(notebooks, "monotonic", lambda: next(clock))
    monkeypatch.setattr(notebooks, "execute", lambda path, *_: path.stem == "01_bad")
    for name in ("00_a", "01_bad", "02_c"):
        notebook(folder / f"{name}.ipynb")
    (out / "tables").mkdir(parents=True)
    for end in ("csv", "md"):
        (out / "tables" / f"one.{end}").write_text("")
    code, _, stderr = call(capsys, "run", "--out", out)
    begun = [line for line in stderr.splitlines() if line.startswith("[")]
    assert code == 1 and begun[2] == f"[3/3] 02_c -> {out / '02_c.ipynb'}"
    assert "  1 min 00 s; about 2 min 00 s left" in stderr and "  30 s; about 45 s left" in stderr
    *_, total, first, second, third = stderr.splitlines()
    assert total == f"{out}: 2 of 3 notebooks in 1 min 40 s; the folder holds 1 tables and 0 figures"
    assert [line.split()[:2] for line in (first, second, third)] == [
        ["00_a", "1"],
        ["01_bad.failed", "30"],
        ["02_c", "10"],
    ]


def test_durations_are_words():
    said = [notebooks.duration(seconds) for seconds in (0.4, 59.4, 61, 3600, 3720)]
    assert said == ["0 s", "59 s", "1 min 01 s", "1 h 00 min", "1 h 02 min"]


def test_training_notebooks_run_only_when_asked_for(books):
    folder, _ = books
    for name in ("00_a", "01_b", "10_train"):
        notebook(folder / f"{name}.ipynb")

    def names(only):
        return [path.stem for path in notebooks.choose_notebooks(only)]

    assert names([]) == ["00_a", "01_b"]
    assert names(["10"]) == names(["10_train"]) == ["10_train"]
    assert names(["01", "00_a.ipynb"]) == ["00_a", "01_b"]
    notebook(folder / "00_z.ipynb")
    assert names(["00"]) == ["00_a", "00_z"]
    with pytest.raises(InputError, match="'b'"):
        names(["b"])


def test_a_profile_that_sets_what_no_notebook_has(books, capsys):
    folder, out = books
    notebook(folder / "00_good.ipynb")
    (folder / "profiles" / "quick.yaml").write_text("sede: 1\n")
    code, _, stderr = call(capsys, "run", "--out", out)
    assert code == 2 and "'sede'" in stderr and not out.exists()
    (folder / "profiles" / "quick.yaml").write_text("seed: 1e-3\n")  # YAML reads a string
    code, _, stderr = call(capsys, "run", "--out", out)
    assert code == 2 and "seed must be int, got '1e-3'; to YAML that is text" in stderr
    (folder / "profiles" / "quick.yaml").write_text("seed: null\n")
    code, _, stderr = call(capsys, "run", "--out", out)
    assert code == 2 and "the profile leaves seed open: add -p seed VALUE (seed: a number)" in stderr


def test_run_help_lists_notebooks_and_profiles(books, capsys):
    folder, _ = books
    notebook(folder / "00_good.ipynb")
    (folder / "profiles" / "quick.yaml").write_text("# Few sentences.\nseed: 1\n")
    code, stdout, _ = call(capsys, "run", "--help")
    assert code == 0 and "00_good" in stdout and "quick" in stdout and "Few sentences." in stdout


def test_two_runs_into_one_folder(books, capsys):

    folder, out = books
    notebook(folder / "00_good.ipynb")
    with locked(out / ".run.lock"):
        code, _, stderr = call(capsys, "run", "--out", out)
    assert code == 2 and "another run is writing into" in stderr


def test_progress_bars_and_folders_are_tidied(tmp_path):
    path = tmp_path / "a.ipynb"
    notebook(path, "x")
    book = nbformat.read(path, as_version=4)
    book.metadata["papermill"] = {"input_path": str(path), "output_path": str(path)}
    pieces = ["0%|  |", "\r50%|# |", "\r100%|##|\nnext"]
    book.cells[1].outputs = [nbformat.v4.new_output("stream", name="stderr", text=text) for text in pieces]
    nbformat.write(book, path)
    notebooks.tidy(path, "01_a.ipynb")
    assert str(tmp_path) not in path.read_text()
    assert [out.text for out in nbformat.read(path, as_version=4).cells[1].outputs] == ["100%|##|\nnext"]
