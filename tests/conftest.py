import os
import sys
from pathlib import Path

import pytest

from ssd_repro.experiment import metrics

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fake(monkeypatch):
    """A FakeVoice that also ``ssd_repro.load`` gives, and metrics without models."""
    import fake_voice

    from ssd_repro.speech import load

    voice = fake_voice.FakeVoice()
    monkeypatch.setattr(load, "load", lambda path=None, device="auto", **_: voice)
    monkeypatch.setattr(metrics, "measure", fake_voice.fake_measure)
    monkeypatch.setattr(metrics, "load", lambda *_: None)
    return voice


@pytest.fixture
def fake_environment():
    """For subprocesses that shall use the fakes."""
    path = os.pathsep.join([str(ROOT / "tests" / "fake_site"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
