import os
import signal
import sys
from pathlib import Path

import pytest

from ssd_repro.experiment import metrics, provenance

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job has SIGINT ignored, and so would have the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]


def as_rank(monkeypatch, rank, world):
    """As if this process were one of a torch.distributed group, whose fellows never keep it waiting."""
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "barrier", lambda: None)


@pytest.fixture
def fake(monkeypatch):
    """A FakeVoice that also ``ssd_repro.load`` gives, and metrics without models."""
    import fake_voice

    from ssd_repro.speech import load

    voice = fake_voice.FakeVoice()
    monkeypatch.setattr(load, "load", lambda path=None, device="auto", **_: voice)
    monkeypatch.setattr(metrics, "measure", fake_voice.fake_measure)
    monkeypatch.setattr(metrics, "load", lambda *_: None)
    monkeypatch.setattr(metrics, "models", lambda whisper="", speaker="": {"whisper": whisper, "speaker": speaker})
    monkeypatch.setattr(provenance.LoadMeter, "other_load", lambda _: 0.0)
    return voice


@pytest.fixture
def fake_environment():
    """For subprocesses that shall use the fakes."""
    path = os.pathsep.join([str(ROOT / "tests" / "fake_site"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
