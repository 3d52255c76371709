"""Several processes: shares, merging, the rows of two real processes."""

import multiprocessing
import os
from datetime import timedelta

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from conftest import as_rank

import ssd_repro
from ssd_repro import files as files_module
from ssd_repro import processes
from ssd_repro.errors import InputError
from ssd_repro.experiment import metrics, provenance
from ssd_repro.experiment import rows as rows_module
from ssd_repro.experiment import run as run_module
from ssd_repro.experiment.systems import System
from ssd_repro.models import checkpoints
from ssd_repro.speech import sentences

SYSTEMS = [System("autoregressive"), System("draft"), System("speculative", 0.4, 3)]
TIMES = [
    *("lm_seconds", "lm_seconds_each", "synthesis_seconds", "seconds", "base_lm_seconds", "base_prefill_seconds"),
    *("base_synthesis_seconds", "processes", "other_load"),
]


def run(voice, folder, count=7, **other):
    said = sentences.utterances(count, voice.names)
    return run_module.run(voice, SYSTEMS, said, folder, "table1", **other)


def test_only_an_initialised_group_makes_several_processes(fake, tmp_path, monkeypatch):
    """A pod of a cluster sets RANK and WORLD_SIZE, also where a notebook is opened in it and nothing was launched."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert processes.process() == (0, 1)
    processes.wait_for_all()
    assert len(run(fake, tmp_path, count=3, repeats=1)) == 9 and files(tmp_path) == {"table1.jsonl"}
    as_rank(monkeypatch, 2, 4)
    assert processes.process() == (2, 4)


def _in_group(rank, store, found):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    fellows = [own.pid for own in provenance.LoadMeter().own]
    processes.wait_for_all()
    found.put((processes.process(), os.getpid(), sorted(fellows)))
    processes.wait_for_all()
    dist.destroy_process_group()


def test_a_real_group_knows_its_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    group = [context.Process(target=_in_group, args=(rank, tmp_path / "store", found)) for rank in (0, 1)]
    for process in group:
        process.start()
    told = sorted(found.get(timeout=60) for _ in group)
    for process in group:
        process.join()
    assert [whoami for whoami, *_ in told] == [(0, 2), (1, 2)]
    assert all({pid for _, pid, _ in told} <= set(fellows) for *_, fellows in told)


def files(folder):
    return {path.name for path in (folder / "rows").glob("*.jsonl")}


def test_shares_of_several_processes_are_the_rows_of_one(fake, tmp_path, monkeypatch):
    alone = run(fake, tmp_path / "alone")
    folder, fake.calls = tmp_path / "shared", []
    shares = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        shares.append(set(run(fake, folder).key))
    assert set.union(*shares) == set(alone.key) and sum(map(len, shares)) == len(alone) == 21
    assert len(fake.calls) == 3 * 3 + 2 * 21  # every process warms up
    assert files(folder) == {f"table1.rank{rank}.jsonl" for rank in range(3)}
    as_rank(monkeypatch, 0, 1)
    fake.calls = []
    for _ in range(2):  # merging again changes nothing
        merged = run(fake, folder)
        assert set(merged.processes) == {3}
        pd.testing.assert_frame_equal(merged.assign(processes=1), alone)
        assert fake.calls == [] and files(folder) == {"table1.jsonl"}
        assert len(files_module.read_rows(folder / "rows" / "table1.jsonl")) == 21


def test_resumes_with_another_number_of_processes(fake, tmp_path, monkeypatch):
    run(fake, tmp_path, count=1)  # one process, one sentence
    as_rank(monkeypatch, 1, 3)
    run(fake, tmp_path)  # two sentences more; its fellows were killed
    with (tmp_path / "rows" / "table1.rank1.jsonl").open("a") as handle:
        handle.write('{"half')
    fake.calls = []
    for rank in (0, 1):
        as_rank(monkeypatch, rank, 2)
        run(fake, tmp_path)
    assert len(fake.calls) == 2 * 3 + 2 * 3 * (7 - 3)
    as_rank(monkeypatch, 0, 1)
    run(fake, tmp_path)
    rows = files_module.read_rows(tmp_path / "rows" / "table1.jsonl")
    assert len(rows) == len({row["key"] for row in rows}) == 21


def test_a_killed_merge_loses_and_doubles_nothing(fake, tmp_path, monkeypatch):
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        run(fake, tmp_path, count=3)
    as_rank(monkeypatch, 0, 1)
    path = tmp_path / "rows" / "table1.jsonl"
    parts = {part: part.read_bytes() for part in path.parent.glob("*.rank*.jsonl")}
    rows_module.merge_rows(path)
    whole = path.read_bytes()
    for cut in [0, *range(1, len(whole), len(whole) // 25), len(whole)]:
        path.write_bytes(whole[:cut])  # the kill: so much was written, and no part removed
        for part, data in parts.items():
            part.write_bytes(data)
        rows_module.merge_rows(path)
        assert path.read_bytes() == whole and files(tmp_path) == {"table1.jsonl"}


def test_a_part_is_removed_only_when_its_rows_are_kept(fake, tmp_path, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    run(fake, tmp_path, count=2)
    as_rank(monkeypatch, 0, 1)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
        patch.setattr(os, "fsync", full)
        rows_module.merge_rows(tmp_path / "rows" / "table1.jsonl")
    assert len(files_module.read_rows(tmp_path / "rows" / "table1.rank1.jsonl")) == 3


def test_nobody_merges_while_a_process_writes(fake, tmp_path, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    run(fake, tmp_path, count=2)
    as_rank(monkeypatch, 0, 1)
    lock = tmp_path / "rows" / "table1.rank1.lock"
    with files_module.locked(lock), pytest.raises(InputError, match="another run is writing"):
        run(fake, tmp_path, count=2)
    assert files(tmp_path) == {"table1.rank1.jsonl"}
    with files_module.locked(tmp_path / "rows" / "table1.lock"), pytest.raises(InputError, match="another run"):
        as_rank(monkeypatch, 0, 2)
        run(fake, tmp_path, count=2)


def test_no_process_measures_while_another_is_timed(fake, tmp_path, monkeypatch):
    """A barrier after the warm-up and after each block of decoding or measuring, also for a process without work."""
    order = []
    decode, measure = fake.decode, metrics.measure
    monkeypatch.setattr(fake, "decode", lambda *a, **k: order.append("decode") or decode(*a, **k))
    monkeypatch.setattr(metrics, "measure", lambda *a: order.append("measure") or measure(*a))
    monkeypatch.setattr(run_module, "wait_for_all", lambda: order.append("wait"))
    block = ["decode", "wait", "measure", "wait"]
    warm = ["decode", "wait"]
    for rank, expected in ((0, [*warm, *block, *block]), (1, [*warm, *block, "wait", "wait"])):
        as_rank(monkeypatch, rank, 2)
        order.clear()
        run(fake, tmp_path, count=2 * run_module.BLOCK + 1, repeats=1)
        short = [kind for i, kind in enumerate(order) if kind == "wait" or i == 0 or order[i - 1] != kind]
        assert short == expected


def _member(rank, folder, voice=None):
    voice = voice or ssd_repro.load(device="cpu")
    store, patience = f"file://{folder}/store", timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    _short(voice, folder)
    dist.destroy_process_group()


def _second_member(_, folder):
    _member(1, folder)


def _short(voice, folder):
    """Two words in each of two voices, not scored: models of metrics are slow to load, and tested elsewhere."""
    said = [sentences.Utterance(str(i), "Good day.", name, i) for i, name in enumerate(voice.names[:2])]
    systems = [System("speculative", 0.4, 3, scored=False)]
    return run_module.run(voice, systems, said, folder, "table1", repeats=1)


@pytest.mark.skipif(not (checkpoints.BUNDLED / "voice.json").exists(), reason="no bundled voice in this checkout")
def test_two_processes_with_the_bundled_voice(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    second = torch.multiprocessing.spawn(_second_member, (two,), nprocs=1, join=False)
    voice = ssd_repro.load(device="cpu")
    _member(0, two, voice)
    second.join()
    assert files(two) == {"table1.rank0.jsonl", "table1.rank1.jsonl"}
    shared, alone = _short(voice, two), _short(voice, one)
    assert files(two) == {"table1.jsonl"} and len(alone) == 2 and set(shared.processes) == {2}
    pd.testing.assert_frame_equal(alone.drop(columns=TIMES), shared.drop(columns=TIMES))
