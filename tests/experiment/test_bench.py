"""Side by side with transformers, and what a token costs: tiny models, rows with known answers."""

import json

import fake_voice
import pandas as pd
import pytest
import torch
from toys import generator, p_value, tiny_lm

from ssd_repro import cli
from ssd_repro.decoding.result import DecodeConfig
from ssd_repro.decoding.sampling import Sampler, probabilities
from ssd_repro.decoding.speculative import autoregressive
from ssd_repro.errors import InputError
from ssd_repro.experiment import baselines, bench, cost, growth, report, speed
from ssd_repro.models.draft import make_draft
from ssd_repro.models.families import small_qwen2
from ssd_repro.models.hidden_draft import HiddenDraft, HiddenDraftLM
from ssd_repro.models.speech_lm import SpeechLM

TARGET = tiny_lm(layers=4)
DRAFT = make_draft(TARGET, bottom=1, top=1).requires_grad_(False)
PREFIX = torch.randn(1, 7, 16, generator=generator(3))
HIDDEN = HiddenDraft(TARGET, rank=8).begin_from(TARGET)
THEIRS = baselines.Transformers(TARGET, DRAFT, HIDDEN)


# transformers


@pytest.mark.parametrize("lm", [TARGET, DRAFT], ids=["target", "draft"])
@torch.inference_mode()
def test_the_exported_models_logits_are_ours(lm):
    model, tokens = baselines.export(lm), torch.randint(0, 13, (1, 9), generator=generator())
    session = lm.session()
    ours = torch.cat((session.prefill(PREFIX)[:, None], session.extend(tokens)), 1)
    theirs = model(torch.cat((baselines.prompt(model, PREFIX), tokens), 1)).logits
    torch.testing.assert_close(theirs[:, 6:], ours, atol=1e-5, rtol=1e-5)
    assert all(a is b for a, b in zip(model.model.layers.parameters(), lm.model.layers.parameters(), strict=True))
    assert model.model.embed_tokens is not lm.model.embed_tokens and lm.model.config.vocab_size == 5


@pytest.mark.parametrize(
    "how",
    [(False,), (True,), (True, "eager"), (True, "openvino"), (True, "eager", "hidden")],
    ids=["generate", "assisted", "custom", "openvino", "hidden"],
)
@pytest.mark.parametrize("low", [0, 12])
def test_greedy_tokens_are_ours(how, low):
    greedy = DecodeConfig(sampler=Sampler(temperature=0), max_tokens=30, min_tokens=low, stop_ids=(11, 12))
    ours = autoregressive(TARGET, PREFIX, greedy, generator())
    made = THEIRS.decode(THEIRS.prompt(PREFIX), greedy, 0, *how)
    assert tuple(made[: len(ours.tokens)]) == ours.tokens and len(ours.tokens) >= low
    assert len(made) == len(ours.tokens) + ours.stopped and (not ours.stopped or made[-1] in (11, 12))


def test_the_exported_hidden_drafter_is_ours():
    made, ours = THEIRS.hidden, list(HIDDEN.parameters())
    own = [p for p in made.parameters() if p is not made.get_input_embeddings().weight]
    assert {id(p) for p in own} == {id(p) for p in ours} - {id(HIDDEN.get_input_embeddings().weight)}
    assert made.get_input_embeddings() is THEIRS.target.get_input_embeddings() and made.taps == HIDDEN.taps


@pytest.mark.parametrize("custom", [("",), ("eager",), ("openvino",), ("eager", "hidden")], ids="-".join)
def test_assisted_generation_draws_from_our_sampler(custom):
    """Chi-square of 150 sequences of 3 tokens; fails by chance once in 10,000 seeds, and these are fixed."""
    config = DecodeConfig(
        sampler=Sampler(temperature=0.8, top_k=2, top_p=1.0, ras=False), max_tokens=3, stop_ids=(12,), tolerance=0.0
    )
    law, session = {(): 1.0}, TARGET.session()
    with torch.inference_mode():
        first = session.prefill(PREFIX)[0]
        for _ in range(3):
            following = {}
            for past, mass in law.items():
                logits = first
                if past:
                    session.crop(7)
                    logits = session.extend(torch.tensor([past]))[0, -1]
                step = probabilities(logits, None, config.sampler).tolist()
                ended = bool(past) and past[-1] == 12
                following |= {past: mass} if ended else {(*past, t): mass * p for t, p in enumerate(step) if p}
            law = following
    ids, counts = THEIRS.prompt(PREFIX), {}
    for seed in range(150):
        made = tuple(THEIRS.decode(ids, config, seed, True, *custom))
        counts[made] = counts.get(made, 0) + 1
    assert len(law) > 5 and p_value(counts, law) > 1e-4


def test_a_long_prompt_is_refused_and_a_missing_compiler_said(monkeypatch, tmp_path, capsys):
    with pytest.raises(InputError, match="2049 positions"):
        baselines.prompt(THEIRS.target, torch.zeros(1, 2049, 16))
    monkeypatch.setattr(baselines.shutil, "which", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    voice = fake_voice.FakeVoice()
    rows = bench.measure(voice, voice.utterances(1), tmp_path, longest=4, compile=True)
    assert "needs a C++ compiler" in capsys.readouterr().err and not rows.system.str.contains("compiled").any()


# measuring


def test_each_system_once_and_no_utterance_twice(tmp_path, monkeypatch):
    voice, taken = fake_voice.FakeVoice(), []
    take = bench.Bench.take
    monkeypatch.setattr(bench.Bench, "take", lambda self, c, *rest: taken.append(c.system) or take(self, c, *rest))
    rows = bench.measure(voice, voice.utterances(2), tmp_path, longest=8)
    names = ["hf_generate", "hf_assisted", "hf_custom", "ar", "ssd0", "ssd"]
    warm, apart = names, names[3:]
    assert taken == [*warm, *names, *apart, *names[1:], names[0], *apart] and list(rows.system) == 2 * names
    assert (rows.tokens == 8).all() and (rows.lm_seconds > 0).all() and rows.key.is_unique
    ours = rows[rows.runtime == "eager"]
    assert (ours.forward_seconds < ours.round_seconds).all() and (ours.forward_seconds > 0).all()
    assert set(rows.precision) == {"fp32"} and not any(sampler["ras"] for sampler in rows.sampler)
    again = bench.measure(voice, voice.utterances(2), tmp_path, longest=8)
    assert len(taken) == 6 + 2 * 9 and list(again.key) == list(rows.key)
    more = bench.measure(voice, voice.utterances(2), tmp_path, longest=8, tolerance=0.2)  # other company: all anew
    assert not set(more.key) & set(rows.key)


def test_ours_on_a_fast_runtime_are_measured_on_eager_too():
    names = [(c.system, c.runtime) for c in bench.contenders("openvino", 0.4, compile=True)]
    assert len(names) == 12 and ("ssd", "openvino") in names and ("ssd_eager", "eager") in names
    more = bench.contenders("openvino", 0.4, False, ["hidden"])[-2:]
    assert [(c.system, c.tolerance, c.drafter) for c in more] == [
        ("ssd0_hidden", 0.0, "hidden"),
        ("ssd_hidden", 0.4, "hidden"),
    ]
    assert {("hf_assisted_compiled", "transformers, compiled"), ("hf_custom", "transformers, openvino")} <= {*names}
    assert ("hf_custom_eager", "transformers") in names


def test_a_hidden_drafter_is_measured_inside_transformers_on_eager(tmp_path):
    voice = fake_voice.FakeVoice()
    hidden = HiddenDraft(voice.target).begin_from(voice.target)
    voice.target.taps, voice.drafters["hidden"] = hidden.taps, HiddenDraftLM(hidden, hidden.lm)
    rows = bench.measure(voice, voice.utterances(1), tmp_path, longest=6)
    (row,) = rows[rows.system == "hf_custom_hidden"].itertuples()
    assert (row.runtime, row.tolerance, row.drafter, row.tokens) == ("transformers", 0.0, "hidden", 6)
    assert "hf_custom_hidden_over_hf_assisted" in speed.ratios(rows).index
    assert "transformers, custom_generate=speculative_generate, hidden drafter, block" in speed.side_by_side(rows).index
    alone = bench.measure(voice, voice.utterances(1), tmp_path, longest=6, drafter="paper")
    assert set(rows.system) - set(alone.system) == {"hf_custom_hidden", "ssd0_hidden", "ssd_hidden"}


def test_bench_as_a_command(fake, tmp_path, capsys):
    command = ["bench", "--utterances", "2", "--longest", "6", "--out", str(tmp_path), "--json"]
    assert cli.main(command) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    known = {"ar_over_hf_generate", "ssd_over_hf_assisted", "ssd_over_ar", "ssd0_over_ar", "custom_over_assisted"}
    assert known <= set(said["ratios"])
    assert {"verify_over_step", "draft_over_step", "outside_forwards"} <= set(said["ratios"])
    assert set(said["intervals"]["ratios"]) == set(said["ratios"]) and said["utterances"] == 2
    assert (said["device"], said["runtime"]) == ("cpu", "eager") and said["threads"] >= 1
    low, high = said["intervals"]["ms_per_token"]["ar"]
    assert 0 < low <= said["ms_per_token"]["ar"] <= high
    before = (tmp_path / "tables" / "bench.md").read_bytes()
    assert b"`ssd-repro bench`" in before
    assert cli.main(["report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "tables" / "bench.md").read_bytes() == before
    assert "Energy: not available here." in (tmp_path / "tables" / "cost.md").read_text() or cost.joules(fake.device)
    for wrong in ("--utterances 0", "--tolerance 2", "--repeats 0", "--longest -1", "--drafter nobody"):
        assert cli.main([*command, *wrong.split()]) == 2
    assert capsys.readouterr().err.count("ssd-repro: ") == 5


# tables


def made_rows():
    """Two utterances of 10 and 30 tokens; seconds that sums and means tell apart."""
    geometry = cost.facts(TARGET, DRAFT)
    systems = {"hf_generate": (None, 20), "hf_assisted": (0.0, 40), "ar": (None, 10), "ssd": (0.4, 8)}
    rows = []
    for name, (beta, ms) in systems.items():
        for i, (tokens, extra) in enumerate(((10, 1.0), (30, 2.0))):
            ours, rounds = name in ("ar", "ssd"), (tokens if beta is None else tokens // 2) - 1
            row = {"system": name, "text_id": str(i), "voice": "v", "seed": i, "tolerance": beta, "draft_length": 3}
            row |= {
                "tokens": tokens,
                "lm_seconds": extra * ms * tokens / 1000,
                "runtime": "eager" if ours else "transformers",
            }
            row |= {"joules": None, "pieces": 1, "precision": "fp32", "prefix": 7, "geometry": geometry}
            if ours:
                row |= {"calls": rounds, "drafted": 0 if beta is None else 3 * rounds, "accepted": rounds}
                row |= {"seconds": {"verify": (0.01 if beta is None else 0.012) * rounds, "draft": 0.009 * rounds}}
                row |= {"round_seconds": 2.0, "forward_seconds": 1.5 + extra / 10}
            rows.append(row)
    return pd.DataFrame(rows)


def test_ratios_by_hand():
    table = speed.ratios(made_rows())
    assert table.value["ar_over_hf_generate"] == pytest.approx(2) and table.value["ssd_over_ar"] == pytest.approx(1.25)
    assert table.value["ssd_over_hf_assisted"] == pytest.approx(5)
    assert table.value["verify_over_step"] == pytest.approx(1.2)
    assert table.value["draft_over_step"] == pytest.approx(0.3)
    assert table.value["outside_forwards"] == pytest.approx(1 - (1.6 + 1.7) / 4)
    side = speed.side_by_side(made_rows()).loc["ours, autoregressive (eager)"]
    assert side["ms / token"] == pytest.approx(10 * (10 + 60) / 40) and side["over generate"] == pytest.approx(2)


def test_cost_by_hand():
    for lm in (TARGET, DRAFT):
        sizes = cost.Geometry.of(lm)
        assert sizes.parameters == sum(p.numel() for p in lm.parameters())
        embeddings = lm.model.embed_tokens.weight.numel() + lm.speech_embedding.weight.numel()
        assert sizes.step == sizes.parameters - embeddings
    table, rows = cost.of_rows(made_rows()), made_rows()
    target, draft = (cost.Geometry.of(lm) for lm in (TARGET, DRAFT))
    context = int(7 + 20 / 2)
    read = {m: 4 * (m.step + m.cache * context) for m in (target, draft)}
    rounds, emitted = 4 + 14, 40 - 2
    line = table.loc["SSD, beta 0.4, L_d 3"]
    assert line["MB read / token"] == pytest.approx(rounds * (3 * read[draft] + read[target]) / emitted / 1e6)
    work = 3 * draft.flops(context) + 4 * target.flops(context)
    assert line["MFLOP / token"] == pytest.approx(rounds * work / emitted / 1e6)
    assert "not available" in cost.note(rows) and "RAPL" in cost.note(rows.assign(joules=1.0))
    extra = cost.memory(rows)
    own = sum(p.numel() for p in [*DRAFT.model.layers[0].parameters(), *DRAFT.head.parameters()])
    assert extra.loc["this voice"]["own / target's %"] == pytest.approx(100 * own / target.parameters)


def test_the_papers_draft_at_cosyvoices_geometry():
    """On the meta device: 24 layers of 896, bottom 2 and top 6 of them, against the arithmetic."""
    with torch.device("meta"):
        target = SpeechLM(small_qwen2(896, 4864, 24, 14, 2, vocab=151_936), 6564)
        draft = make_draft(target)
    large = cost.Geometry.named("24x896", **cost.COSYVOICE)
    assert large.parameters == sum(p.numel() for p in target.parameters())
    own = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    line = cost.memory(made_rows()).loc["CosyVoice 2, 2 + 6 layers"]
    assert line["own / target's %"] == pytest.approx(100 * own / large.parameters) and line["own / target's %"] < 12


def test_points_vary_one_setting_at_a_time():
    found = growth.points("4x128", ["2x128", "4x128"], [1, 2], [1, 3], 3)
    by_hand = [("4x128", 1, 1), ("4x128", 1, 3), ("4x128", 2, 3), ("2x128", 1, 3)]
    assert [(p.size, p.threads, p.draft_length) for p in found] == by_hand
    for wrong in (([], [3], 3), ([0], [3], 3), ([1], [65], 3), ([1], [3], 0)):
        with pytest.raises(InputError):
            growth.points("4x128", [], *wrong)
    with pytest.raises(InputError, match="seconds is empty"):
        growth.lengths(fake_voice.FakeVoice(), [], "nowhere", 3)


@pytest.mark.parametrize("size", ["24", "1x128", "24x100", "x256", "24x0", "24×256"])
def test_a_wrong_size_is_one_sentence(size, tmp_path):
    voice = fake_voice.FakeVoice()
    with pytest.raises(InputError, match="must be LAYERSxHIDDEN"):
        growth.prices(voice, growth.points("3x16", [size], [1], [3], 3), tmp_path)
    assert not (tmp_path / "rows").exists()


def test_where_the_papers_speedup_begins():
    """Every draft accepted, L_d 3: 4 tokens a round; V 1, c .2 of the small target and .6 of the large one."""
    spoken = {"study": None, "method": "speculative", "rounds": [[[3, 3]] * 5], "pieces": [20], "token_kinds": "s" * 20}
    rows = [{**spoken, "tokens": 20}]
    models = cost.facts(TARGET, DRAFT)
    for size, draft in (("2x128", 3.0), ("4x128", 1.0)):
        row = {"study": "prices", "method": "speculative", "size": size, "drafter": "one layer", "threads": 1}
        row |= {"draft_length": 3, "tokens": 10, "prompt": 10, "precision": "fp32", "models": models}
        rows.append(
            row | {"step_ms": 5.0, "draft_ms": draft, "verify_ms": 5.0, "gb_per_second": 10, "gflop_per_second": 9}
        )
    table = speed.over_sizes(pd.DataFrame(rows))
    assert list(table["predicted speed-up"]) == pytest.approx([4 / 2.8, 4 / 1.6])
    assert speed.begins(pd.DataFrame(rows)).endswith("one layer: 2x128, 4x128.")
    assert report.PRICES in report.predicted(pd.DataFrame(rows))
