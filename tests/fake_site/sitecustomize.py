"""On PYTHONPATH of a test's subprocess: the voice and the metrics are the fakes."""

import sys

from ssd_repro.experiment import metrics

if "ipykernel_launcher" in sys.argv[0] or "-m" in sys.orig_argv or "-c" in sys.orig_argv:
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import fake_voice

    from ssd_repro.speech import load

    load.load = fake_voice.fake_load
    metrics.measure = fake_voice.fake_measure
    metrics.load = lambda *_: None
    metrics.models = lambda whisper="", speaker="": {"whisper": whisper, "speaker": speaker}
