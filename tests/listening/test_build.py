"""The design's balance, and a folder built from rows: the very sound, equally loud, no label to be seen."""

import io
import json
import shutil
from collections import Counter

import fake_voice
import numpy as np
import pytest
import soundfile
from conftest import ROOT
from made_ratings import asked, fill, make_test

from ssd_repro import cli
from ssd_repro.errors import InputError
from ssd_repro.experiment import report
from ssd_repro.files import append_row
from ssd_repro.listening import FORMAT, build, design, need, ratings
from ssd_repro.speech import load

pyloudnorm = pytest.importorskip("pyloudnorm", reason="the extra listen is not installed")
TWO_PIECES = " ".join(["This is a sentence that is long enough to be spoken on its own, in one piece."] * 4)
SYSTEMS = ["Autoregressive", "Draft", "SSD", "SSD, beta 0, L_d 3"]
PAIR = ("Autoregressive", "SSD")


@pytest.mark.parametrize(("voices", "per_voice"), [(6, 4), (2, 2), (1, 4), (6, 2), (3, 8)])
def test_every_listener_hears_every_text_once_and_every_system_equally_often(voices, per_voice):
    names = [f"v{v}" for v in range(voices) for _ in range(per_voice)]
    made = design.trials(names, SYSTEMS, PAIR)
    for group in range(4):
        own = [trial for trial in made if group in trial.groups]
        for part in ("NAT", "SIM"):
            rated = [trial for trial in own if trial.part == part and not trial.check]
            assert sorted(trial.utterance for trial in rated) == list(range(len(names)))
            assert set(Counter(trial.system for trial in rated).values()) == {len(names) // 4}
            by_voice = Counter((names[trial.utterance], trial.system) for trial in rated)
            assert max(by_voice.values()) - min([*by_voice.values(), 0 if per_voice < 4 else 9]) <= 1
        abx = [trial for trial in own if trial.part == "ABX" and not trial.check]
        assert len(abx) == len(names) // 2 and len({trial.utterance for trial in abx}) == len(abx)
        assert abs(Counter(trial.clips[2][0] for trial in abx)["SSD"] - len(abx) / 2) <= 0.5
        assert Counter(trial.part for trial in own if trial.check) == {"NAT": 2, "SIM": 2, "ABX": 2}
    heard = Counter((t.part, t.utterance, t.system) for t in made if t.system for _ in t.groups)
    assert set(heard.values()) == {1} and len(heard) == 2 * 4 * len(names)  # four listeners: everything once


def test_x_is_another_text_of_the_same_voice_by_the_system_that_is_right():
    names = ["a"] * 4 + ["b"] * 4
    for trial in design.trials(names, SYSTEMS, PAIR):
        if trial.part == "ABX":
            a, b, x = trial.clips
            assert {a[0], b[0]} == set(PAIR) and a[1] == b[1] == trial.utterance
            assert trial.right == ("A" if a[0] == x[0] else "B",) and names[x[1]] == names[a[1]]
            assert (x in (a, b)) == trial.check


def test_utterances_are_chosen_evenly_over_voices():
    voices = list("abcdef") * 5 + ["lonely"]
    chosen = design.choose(voices, 24, 4)
    assert Counter(voices[i] for i in chosen) == dict.fromkeys("abcdef", 4)
    assert [voices[i] for i in chosen] == sorted(voices[i] for i in chosen) and len(set(chosen)) == 24
    assert Counter(voices[i] for i in design.choose(voices, 4, 4)) == {"a": 2, "b": 2}
    for count, says in ((6, "multiple of 4"), (0, "at least 4"), (32, "at most 28")):
        with pytest.raises(InputError, match=says):
            design.choose(voices, count, 4)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    return make_test(fake_voice.FakeVoice(), folder), folder


@pytest.fixture
def made(built, tmp_path):
    shutil.copytree(built[1], tmp_path, dirs_exist_ok=True)
    return built[0], tmp_path / "test"


def test_the_sound_is_that_of_the_rows(fake, tmp_path):
    """From a row's tokens comes what ``speak`` gave, pauses between pieces included, and nothing is decoded."""
    fake.vocode = lambda tokens, voice: np.repeat(np.float32(tokens), 960) / 6561
    take = fake.speak(TWO_PIECES, voice="bf_emma", seed=3)
    row = {"token_ids": list(take.token_ids), "pieces": [len(s.tokens) for s in take.sentences]}
    row |= {"gap_seconds": take.gap_seconds, "voice": "bf_emma"}
    assert len(row["pieces"]) > 1 and np.array_equal(build.sound(fake, row), take.audio)
    row["pieces"].insert(1, 0)  # an empty piece has neither sound nor pause
    assert np.array_equal(build.sound(fake, row), take.audio)
    fill(fake, tmp_path / "results")
    decodes = len(fake.calls)
    make_test(fake, tmp_path)
    assert len(fake.calls) == decodes


def test_a_built_folder(made):
    key, folder = made
    names = {path.name for path in (folder / "audio").iterdir()}
    page = (folder / "index.html").read_text()
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert data["build"] == key["build"] and len(data["groups"]) == 4
    for group, trials in enumerate(data["groups"]):
        assert {trial["id"] for trial in trials} == set(asked(key, group + 1))
        assert {clip for trial in trials for clip in trial["clips"]} <= names
    for word in (*SYSTEMS[:3], "speculative", "bf_emma", "http:", "https:", "/* "):
        assert word not in page.replace(FORMAT, ""), word
    assert list(key["systems"]) == SYSTEMS and {len(s["rows"]) for s in key["systems"].values()} == {24}
    assert key == ratings.read_key(folder / "key.json") | {"trials": key["trials"], "plan": key["plan"]}


def test_all_clips_are_equally_loud_and_none_is_clipped(made):
    loudness = set()
    for path in (made[1] / "audio").iterdir():
        audio, rate = soundfile.read(path)
        loudness.add(round(pyloudnorm.Meter(rate).integrated_loudness(audio), 1))
        assert np.abs(audio).max() < 0.99
    assert loudness == {-23.0}


def test_a_loud_peak_lowers_all_clips_alike():
    """One clip with a peak that -23 LUFS would clip: all get quieter by the same."""
    even = np.sin(np.arange(48_000) / 5).astype(np.float32)
    peaky = 0.01 * even
    peaky[1000] = 1.0
    files, level = build._levelled({("a", 0): even, ("b", 0): peaky}, 24_000)
    sounds = [soundfile.read(io.BytesIO(content))[0] for _, content in files.values()]
    assert np.abs(sounds[1]).max() == pytest.approx(build.PEAK, abs=1e-3) and level < build.LEVEL - 3
    measured = [pyloudnorm.Meter(24_000).integrated_loudness(sound) for sound in sounds]
    assert measured == pytest.approx([level, level], abs=0.1)
    with pytest.raises(InputError, match="is silent"):
        build._levelled({("a", 0): np.zeros(48_000, np.float32)}, 24_000)


def test_the_same_rows_make_the_same_build_and_another_seed_another(fake, tmp_path, made):
    before = {path.name: path.read_bytes() for path in made[1].rglob("*.*")}
    assert make_test(fake, tmp_path)["build"] == made[0]["build"]
    assert before == {path.name: path.read_bytes() for path in made[1].rglob("*.*")}
    again = build.build(tmp_path / "results", made[1], "quick", 24, seed=1)
    assert again["build"] != made[0]["build"]
    (made[1] / "ratings").mkdir()
    (made[1] / "ratings" / "1-a.json").write_text("{}")
    with pytest.raises(InputError, match="has ratings of another build"):
        make_test(fake, tmp_path)
    assert ratings.read_key(made[1] / "key.json")["build"] == again["build"]


def test_the_lossless_drafter_is_the_fastest(fake, tmp_path):
    fill(fake, tmp_path)
    rows, about = build.rows_of_table1(tmp_path, "quick")
    slow = rows[rows.tolerance == 0].assign(draft_length=5.0, key=lambda r: r.key + "x")
    for factor, name in ((2, "SSD, beta 0, L_d 3"), (0.5, "SSD, beta 0, L_d 5")):
        changed = slow.assign(lm_seconds=slow.lm_seconds * factor)
        both = [*rows.to_dict("records"), *changed.to_dict("records")]
        found = build.systems_of(type(rows)(both), about, "quick")
        assert list(found) == [*SYSTEMS[:3], name]
        assert all(len(ours) == 24 for ours in found.values())


def test_empty_utterances_are_left_out_and_counted(fake, tmp_path):
    fill(fake, tmp_path / "results")
    path = tmp_path / "results" / "rows" / "table1.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"token_ids": [], "pieces": [0], "audio_seconds": 0.0}
    path.unlink()
    append_row(path, *rows)
    key = make_test(fake, tmp_path, 20)
    assert key["left out, silent or empty under a system"] == 1
    assert rows[0]["text_id"] not in {trial["text"] for trial in key["trials"].values()}


def test_bad_input_is_one_sentence_and_leaves_nothing(fake, tmp_path, capsys, monkeypatch):
    def refused(*more) -> str:
        command = ["listening-test", "build", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "test")]
        assert cli.main([*command, *more]) == 2
        assert not (tmp_path / "test").exists()
        return capsys.readouterr().err

    assert "has no rows of notebooks 01 and 02: run `ssd-repro run --profile quick --only 01 02` first" in refused()
    fill(fake, tmp_path / "results", 12)
    assert "--utterances must be a multiple of 4" in refused("--utterances", "10")
    assert "at most 12" in refused("--utterances", "24")
    fake.weights_id = "newer"
    assert "the rows are of voice fake, but the loaded one is newer" in refused("--utterances", "4")
    fake.weights_id, fake.audible = "fake", False
    assert "makes no sound" in refused("--utterances", "4")
    fake.audible = True
    monkeypatch.setattr("ssd_repro.listening.util.find_spec", lambda name: None)
    assert "pyloudnorm is missing: install the extra `ssd-repro[listen]`" in refused("--utterances", "4")
    with pytest.raises(InputError, match="starlette is missing"):
        need("starlette")
    monkeypatch.undo()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(InputError, match="is no listening test"):
        build._write(tmp_path / "mine", "", {}, {"build": "x"})


def test_the_bundled_voice_speaks_from_a_rows_tokens_as_it_did(tmp_path):
    """And committed rows are taken if they are of that voice, and refused if they are of a former one."""
    voice, mini = load.load(runtime="eager"), ROOT / "results" / "mini"
    take = voice.speak("Good morning.", voice="am_michael", seed=1)
    row = {"token_ids": take.token_ids, "pieces": [len(s.tokens) for s in take.sentences], "voice": "am_michael"}
    assert np.array_equal(build.sound(voice, row | {"gap_seconds": take.gap_seconds}), take.audio)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load", lambda *_, **__: voice)
        if report.rows_of_run(mini, "01_table1")[1]["weights"] == voice.weights_id:
            assert build.build(mini, tmp_path / "test", "mini", 4)["weights"] == voice.weights_id
        else:
            with pytest.raises(InputError, match=f"but the loaded one is {voice.weights_id}: make its rows"):
                build.build(mini, tmp_path / "test", "mini", 4)
