"""Of the target's own speech what was heard right is learned, each utterance heard once."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ssd_repro.errors import InputError
from ssd_repro.files import append_row
from ssd_repro.training import own_speech
from ssd_repro.training.corpus import MANIFEST, read_metadata

IDS = [row["id"] for row in read_metadata(MANIFEST)[:5]]
CODEC = SimpleNamespace(decode=lambda tokens, voice: np.full(len(tokens), voice, np.float32))


def spoken(folder, *ids, stopped=True, speech=(5, 6, 7)):
    folder.mkdir(exist_ok=True)
    for name in ids:
        append_row(folder / "00000.jsonl", {"id": name, "text_ids": [1], "speech": [*speech], "stopped": stopped})


def test_what_was_heard_right_is_kept_and_heard_once(tmp_path):
    samples, kept, calls = tmp_path / "samples", tmp_path / "heard.jsonl", []
    names = [f"{name}/0" for name in IDS]
    spoken(samples, *names[:3])
    spoken(samples, names[3], stopped=False)
    spoken(samples, names[4], speech=())
    verdicts = [(0, 0, 50), (1, 1, 50), (1, 2, 50)]  # right, a spelling, a word

    def hear(sound, text):
        calls.append((len(sound), text))
        return dict(zip(("word_errors", "char_errors", "chars"), verdicts[len(calls) - 1], strict=True))

    found = own_speech.heard_right(samples, kept, CODEC, hear)
    assert [example.id for example in found] == names[:2] and found[0].speech.tolist() == [5, 6, 7]
    texts = {row["id"]: row["text"] for row in read_metadata(MANIFEST)[:5]}
    assert calls == [(3, texts[name]) for name in IDS[:3]]
    kept.write_text(kept.read_text() + '{"id": "half')  # killed while it wrote
    again = own_speech.heard_right(samples, kept, CODEC, hear)
    assert len(calls) == 3 and [example.id for example in again] == names[:2]
    assert [json.loads(line)["id"] for line in kept.read_text().splitlines()] == names[:3]


def test_what_is_none_of_the_corpus_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no speech"):
        own_speech.heard_right(tmp_path / "none", tmp_path / "heard.jsonl", CODEC, None)
    spoken(tmp_path, f"{IDS[0]}/0", "somebody/0")
    with pytest.raises(InputError, match="holds somebody/0, which is none of the bundled corpus"):
        own_speech.heard_right(tmp_path, tmp_path / "heard.jsonl", CODEC, None)
