"""``ssd-repro run`` in several processes: started by it, by accelerate launch, refused, interrupted, killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import process_tasks
import pytest
from conftest import ROOT

from ssd_repro import cli, files, processes
from ssd_repro.errors import InputError
from ssd_repro.experiment import report, run, studies, tables
from ssd_repro.speech import sentences

SMALL = ["run", "--out", "out", "-p", "repeats", "1"]


def rows_of(folder, name):
    return files.read_rows(folder / "out" / "rows" / f"{name}.jsonl")


def start(environment, folder, *arguments):
    """The command, in a process group of its own as a terminal makes it -> its process."""
    command = [sys.executable, "-m", "ssd_repro", *SMALL, "--only", "03", *arguments]
    environment = {name: value for name, value in environment.items() if name != "PYTHONWARNINGS"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_rows(going, folder, pattern):
    while not any(path.stat().st_size for path in (folder / "out" / "rows").glob(pattern)):
        assert going.poll() is None, going.stderr.read()
        time.sleep(0.02)


def what_was_said(error):
    """Lines of stderr but progress bars and the names of notebooks."""
    lines = (line.rpartition("\r")[2] for line in error.splitlines())
    return [line for line in lines if line.strip() and "|" not in line and " -> " not in line]


def test_an_interrupted_run_is_one_sentence_and_goes_on(fake_environment, tmp_path):
    going = start(fake_environment, tmp_path, "-p", "sentences", "100")
    wait_for_rows(going, tmp_path, "draft_length.jsonl")
    os.killpg(going.pid, signal.SIGINT)
    _, error = going.communicate()
    assert going.returncode == 130
    assert what_was_said(error) == ["ssd-repro: interrupted; the same command goes on where it was"]
    assert (
        0 < len(rows_of(tmp_path, "draft_length")) < 3 * 100
        and not (tmp_path / "out" / "03_draft_length.ipynb").exists()
    )
    with files.locked(tmp_path / "out" / ".run.lock"), files.locked(tmp_path / "out" / "rows" / "draft_length.lock"):
        pass


def test_interrupted_processes_are_one_sentence(tmp_path):
    code = (
        "import sys, process_tasks; from ssd_repro import cli; from ssd_repro.experiment import studies\n"
        "cli._make_rows = process_tasks.hang\n"
        "sys.exit(cli.main(['run', '--only', '03', '--processes', '2', '--out', 'out']))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    going = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not all((tmp_path / "out" / rank).exists() for rank in "01"):
        assert going.poll() is None, going.stderr.read()
        time.sleep(0.02)
    os.killpg(going.pid, signal.SIGINT)
    _, error = going.communicate()
    assert going.returncode == 130
    assert what_was_said(error) == ["ssd-repro: interrupted; the same command goes on where it was"]


def test_processes_end_with_their_parent_and_the_next_run_makes_the_rows_of_one(fake_environment, tmp_path):
    """kill -9 of the command: its processes go too, the locks are free, and the next run goes on."""
    parallel = ["-p", "sentences", "24", "--processes", "2"]
    going = start(fake_environment, tmp_path, *parallel)
    wait_for_rows(going, tmp_path, "*.rank1.jsonl")
    going.kill()
    going.wait()
    locks = [
        tmp_path / "out" / name for name in (".run.lock", "rows/draft_length.lock", "rows/draft_length.rank1.lock")
    ]
    for _ in range(100):
        try:
            for lock in locks:
                with files.locked(lock):
                    pass
            break
        except InputError:
            time.sleep(0.1)
    else:
        pytest.fail("a process outlived the command")

    going = start(fake_environment, tmp_path, *parallel)
    _, error = going.communicate()
    assert going.returncode == 0, error
    rows = rows_of(tmp_path, "draft_length")
    assert len(rows) == len({row["key"] for row in rows}) == 2 * 24
    assert {row["processes"] for row in rows} == {2} and not any(row["scored"] for row in rows)
    assert "in each of 2 processes" in (tmp_path / "out" / "tables" / "figure3.md").read_text()
    assert os.listdir(tmp_path / "out" / "figures") and (tmp_path / "out" / "03_draft_length.ipynb").exists()


def test_a_process_that_refuses_says_so_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cli, "_make_rows", process_tasks.refuse)
    out = tmp_path / "out"
    command = ["run", "--only", "03", "--processes", "2", "--out", str(out), "-p", "draft_lengths", "[65]"]
    assert cli.main(command) == 2
    assert capfd.readouterr().err == "ssd-repro: draft_lengths are [65]\n"
    assert [path.name for path in out.iterdir()] == [".run.lock"]


def test_each_process_has_its_rank_its_gpu_and_its_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processes.run_in_processes(2, process_tasks.tell, tmp_path)
    threads = max(1, os.cpu_count() // 2)
    told = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert told == [f"{rank} of 2, GPU {rank}, {threads} threads" for rank in (0, 1)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and processes.process() == (0, 1)


def test_two_launched_processes_make_the_table_of_one(fake, fake_environment, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "ssd_repro", *SMALL, "--only", "01", "-p", "sentences", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=fake_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert {path.name for path in (out / "rows").glob("*.jsonl")} == {"table1.jsonl"}
    assert {path.name for path in out.glob("*.ipynb")} == {"01_table1.ipynb"}
    rows = rows_of(tmp_path, "table1")
    assert len(rows) == 9 and {row["processes"] for row in rows} == {2}
    systems = studies.STUDIES["01_table1"][1]({"tolerance": 0.4, "draft_length": 3})
    alone = run.run(fake, systems, sentences.utterances(3, fake.names), tmp_path / "alone", "table1", repeats=1)
    pd.testing.assert_frame_equal(tables.table1(alone), tables.table1(report.rows_of_run(out, "01_table1")[0]))
