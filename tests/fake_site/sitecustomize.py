"""On PYTHONPATH of a test's subprocess: where something is decoded, the voice and the metrics are the fakes."""

import os
import sys

kernel = "ipykernel_launcher" in sys.argv[0] or "ipykernel_launcher" in sys.orig_argv
worker = any("spawn_main" in argument for argument in sys.orig_argv) or "TORCHELASTIC_RUN_ID" in os.environ
if kernel or worker:  # others need not wait for these imports
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import fake_voice

    from ssd_repro.experiment import metrics
    from ssd_repro.speech import load

    load.load = fake_voice.fake_load
    metrics.measure = fake_voice.fake_measure
    metrics.load = lambda *_: None
    metrics.models = lambda whisper="", speaker="": {"whisper": whisper, "speaker": speaker}
