"""The bundled voice says what it said before: the same seed, the same token ids, under every method.

A change here that is meant (decoding, sampling, text front end) raises ``experiment.provenance.PROTOCOL``; that, and
other weights, make golden_tokens.json anew: ``python tests/speech/test_golden.py``. A renaming must never change it.
"""

import json
from pathlib import Path

import pytest

import ssd_repro

FILE = Path(__file__).with_name("golden_tokens.json")
CASES = json.loads(FILE.read_text("utf-8"))
# The voice's files hold int8 and a scale of each row: int8 in memory rounds nothing more.
RUNTIMES = [("eager", "fp32"), ("openvino", "fp32"), ("openvino", "int8")]


@pytest.fixture(scope="module")
def voices():
    return {how: ssd_repro.load(device="cpu", threads=1, runtime=how[0], precision=how[1]) for how in RUNTIMES}


def named(value) -> str:
    return "-".join(value if isinstance(value, tuple) else (value["voice"], *map(str, value["system"].values())))


# in int8 each fourth of them, for time
@pytest.mark.parametrize(
    ("runtime", "case"), [(how, c) for how in RUNTIMES for c in (CASES[::4] if "int8" in how else CASES)], ids=named
)
def test_token_ids(case, runtime, voices):
    assert said(voices[runtime], case) == {name: case[name] for name in ("token_ids", "rounds")}


def said(voice, case) -> dict:
    take = voice.speak(case["text"], voice=case["voice"], seed=case["seed"], **case["system"])
    rounds = [[r.drafted, r.accepted] for sentence in take.sentences for r in sentence.rounds if r.drafted]
    return {"token_ids": list(take.token_ids), "rounds": rounds}


if __name__ == "__main__":
    reference = ssd_repro.load(device="cpu", threads=1, runtime="eager")
    FILE.write_text(json.dumps([case | said(reference, case) for case in CASES]) + "\n", "utf-8")
