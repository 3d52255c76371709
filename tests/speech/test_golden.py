"""The bundled voice says what it said before: the same seed, the same token ids, under every method.

golden_tokens.json was made before the package was put into folders. A change here that is meant
(decoding, sampling, text front end or weights) raises ``experiment.provenance.PROTOCOL`` and makes
the file anew; a renaming must never change it.
"""

import json
from pathlib import Path

import pytest

import ssd_repro

CASES = json.loads(Path(__file__).with_name("golden_tokens.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def voices():
    return {runtime: ssd_repro.load(device="cpu", threads=1, runtime=runtime) for runtime in ("eager", "openvino")}


@pytest.mark.parametrize("runtime", ["eager", "openvino"])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['voice']}-{'-'.join(map(str, case['system'].values()))}"
)
def test_token_ids(case, runtime, voices):
    take = voices[runtime].speak(case["text"], voice=case["voice"], seed=case["seed"], **case["system"])
    rounds = [[r.drafted, r.accepted] for sentence in take.sentences for r in sentence.rounds if r.drafted]
    assert list(take.token_ids) == case["token_ids"] and rounds == case["rounds"]
