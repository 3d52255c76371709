"""The price of a rule: p and q as they are decoded, rows, and what is made of the rows."""

import numpy as np
import pandas as pd
import pytest
import torch
from made_rows import row

from ssd_repro.decoding import rules
from ssd_repro.decoding.sampling import probabilities
from ssd_repro.errors import InputError
from ssd_repro.experiment import price, report, studies
from ssd_repro.experiment.rows import key, row_settings
from ssd_repro.experiment.systems import System
from ssd_repro.models.hidden_draft import HiddenDraft, HiddenDraftLM
from ssd_repro.speech.voice import Voice

PIECE, SAID = [5, 9, 7, 11], [17, 902, 17, 44, 6000, 902]
GRIDS = {"betas": [0.4], "mixtures": [0.5, 0.0], "ranks": [2], "epsilons": [0.09], "tolerance": 0.4}
GRIDS |= {"entropies": [1.0], "cosines": [0.5]}


def one_forward(voice, lm, inputs, prefix, n):
    """The laws of places 1 to n of SAID (n = 6: the stop), from logits (1, T, V) without a cache."""
    logits = lm(inputs)[0, prefix - 1 :][1 : n + 1]
    history = torch.tensor([([-1] * 10 + SAID[: i + 1])[-10:] for i in range(n)])
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool)
    banned[6561:] = True
    low = voice.config(len(PIECE), 0.0, 1).min_tokens
    rows = [probabilities(logits[i], history[i], voice.sampler, banned if i + 1 < low else None) for i in range(n)]
    return torch.stack(rows)


@pytest.mark.parametrize("stopped", [True, False])
def test_p_and_q_are_those_of_one_forward(fake, stopped):
    """Target, the paper's draft and one that reads hidden states, against passes without cache or loop."""
    target = fake.target
    hidden = HiddenDraft(target).begin_from(target).eval()
    target.taps = hidden.taps
    fake.drafters["hidden"] = HiddenDraftLM(hidden, hidden.lm)
    p, q = price.along(fake, PIECE, "af_heart", SAID, stopped)
    prefix, n = fake.prefix(PIECE, "af_heart"), len(SAID) - 1 + stopped
    with torch.inference_mode():
        inputs = torch.cat((prefix, target.speech_embedding(torch.tensor([SAID]))), 1)
        length = prefix.shape[1]
        torch.testing.assert_close(q, one_forward(fake, target, inputs, length, n), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(p["paper"], one_forward(fake, fake.draft, inputs, length, n), atol=1e-6, rtol=1e-4)
        _, features = target.with_features(inputs)
        joined = hidden.join(hidden.reduce(features[:, :-1]), inputs[:, 1:])  # one place shorter
        due = one_forward(fake, hidden.lm, joined, length - 1, n)
        torch.testing.assert_close(p["hidden"], due, atol=1e-6, rtol=1e-4)
    assert len(q) == n and not torch.allclose(p["hidden"], p["paper"])


def test_nothing_said_has_no_place(fake):
    p, q = price.along(fake, PIECE, "af_heart", [], True)
    assert len(q) == len(p["paper"]) == 0


def spoken(i=0, **other):
    text = "A sentence to hear."
    return row("autoregressive", i, 2.0, text=text, token_ids=SAID, pieces=[6], stopped=True, **other)


def test_rows_are_the_sums_over_the_places_and_made_once(fake, tmp_path, monkeypatch):
    names = price.rules_of(GRIDS)
    assert names[:3] == ["paper:0", "paper:0.4", "ensemble:0.5"] and "matched top-k:2" in names
    two = pd.DataFrame([spoken(i) | {"voice": "af_heart"} for i in range(2)])
    rows = price.prices(fake, two, names, tmp_path)
    assert len(rows) == 2 and set(rows.drafter) == {"paper"} and (rows.places == 6).all()
    piece = fake.front.pieces("A sentence to hear.", "af_heart")[0]
    p, q = price.along(fake, piece, "af_heart", SAID, True)
    acceptance, law = rules.emitted(rules.TopK(2), p["paper"], q)
    due = [acceptance.sum(), rules.total_variation(law, q).sum(), law[q == 0].sum()]
    assert rows.rules[0]["top-k:2"] == pytest.approx([float(each) for each in due])
    assert rows.overlap[0] == pytest.approx(float(torch.minimum(p["paper"], q).sum()))
    monkeypatch.setattr(price, "along", lambda *_: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(price.prices(fake, two, names, tmp_path), rows)
    with pytest.raises(InputError, match="epsilon of the rule typical is 2"):
        price.prices(fake, two, ["typical:2"], tmp_path)


def priced(drafter="paper", places=10, n=10):
    """Utterances in which all rules are known: sum min(p, q) .6, the paper's at beta .4 has .8 for .2."""
    per_place = {
        "paper:0": (0.6, 0.0, 0.0),
        "paper:0.4": (0.8, 0.2, 0.1),
        "paper:1": (1.0, 0.4, 0.2),
        "ensemble:1": (0.6, 0.0, 0.0),
        "ensemble:0": (1.0, 0.4, 0.2),
        "top-k:2": (0.5, 0.1, 0.0),
        "top-k:5": (0.9, 0.5, 0.0),
        "typical:0.1": (0.3, 0.1, 0.0),
    }
    numbers = {name: [places * each for each in values] for name, values in per_place.items()}
    one = {"study": "price", "drafter": drafter, "places": places, "overlap": 0.6 * places, "rules": numbers}
    return pd.DataFrame([one] * n)


def test_frontier_by_hand():
    rows = pd.concat([priced(), priced("hidden", places=20)], ignore_index=True)
    table = price.frontier(rows)
    line = table[(table.index == "paper") & (table.value == 0.4)]
    assert list(line.drafter) == ["paper", "hidden"]
    assert line.acceptance.tolist() == pytest.approx([0.8, 0.8]) and line.TV.tolist() == pytest.approx([0.2, 0.2])
    assert line.bound.tolist() == pytest.approx([0.2, 0.2]) and line.excess.tolist() == pytest.approx([0, 0], abs=1e-12)
    strict = table.loc["typical"].iloc[0]
    assert strict.bound == 0 and strict.excess == pytest.approx(0.1)  # no bound below nothing
    text = price.readable(table)
    assert text.parameter.iloc[0] == "beta 0" and text.excess.iloc[6] == "0.200"  # top-k 5: .5 - (.9 - .6)


def test_places_weigh_alike_and_not_utterances():
    long, short = priced(places=90, n=1), priced(places=10, n=1)
    short.at[0, "rules"] = {name: [0.0, 0.0, 0.0] for name in short.rules[0]}
    line = price.frontier(pd.concat([long, short], ignore_index=True)).iloc[2]
    assert line.acceptance == pytest.approx(0.9) and line.n == 2


def test_rules_are_compared_at_equal_acceptance():
    table = price.at_equal_acceptance(priced(), 0.4)
    assert list(table.index) == ["paper", "ensemble", "top-k"]  # by excess; typical does not come so far
    assert table.loc["ensemble"].value == pytest.approx(0.5) and table.loc["ensemble"].excess == pytest.approx(0)
    assert table.loc["top-k"].value == pytest.approx(4.25) and pytest.approx(0.4) == table.loc["top-k"].TV
    said = price.conclusion(priced(), 0.4)
    assert "Lossless, 0.600 of the drafts are accepted; at beta 0.4 0.800" in said and "of 0.200: on the bound" in said
    assert "10.0 % of what is then said" in said
    assert said.endswith("As much acceptance for as little: ensemble. For more: top-k 0.400.")
    dear = priced()
    for each in dear.rules:
        each["paper:0.4"][1] = 2.5
    assert "0.050 above the bound" in price.conclusion(dear, 0.4)


def test_the_figure_shades_what_no_rule_reaches():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2)
    price.draw(price.frontier(priced()), axes)
    floor = axes[0].collections[0].get_paths()[0].vertices
    assert any(np.allclose(corner, [0.6, 0.0]) for corner in floor)
    assert any(np.allclose(corner, [1.0, 0.4]) for corner in floor)
    assert len(figure.axes) == 1 and len(axes[0].lines) == 4  # one drafter; a line for each rule
    plt.close(figure)


def test_heard_by_hand():
    judged = {"accepted": 60, "drafted": 80, "tokens_per_target_call": 2.5, "draft_length": 3, "study": None}
    rows = [row("autoregressive", i, 2.0, study=None) for i in range(10)]
    rows += [row("speculative", i, 1.5, tolerance=0.4, rule=None, **judged) for i in range(10)]
    rows += [row("speculative", i, 1.5, rule="ensemble:0.5", **judged) | {"word_errors": 0} for i in range(10)]
    table = price.heard(pd.concat([pd.DataFrame(rows), priced()], ignore_index=True))
    assert list(table.index) == ["no draft", "paper:0.4", "ensemble:0.5"]
    assert table["more WER"].tolist()[1:] == pytest.approx([0.0, -45.0]) and np.isnan(table["more WER"].iloc[0])
    assert table.loc["ensemble:0.5", "acceptance"] == 0.75
    plain = price.heard(pd.concat([pd.DataFrame(rows[:10]), priced()], ignore_index=True))
    assert list(plain.index) == ["no draft"]


def test_systems_that_are_heard(fake):
    p = {"heard": ["paper:0.4", "matched top-k:5"], "draft_length": 3}
    base, paper, other = studies.STUDIES["09_price_of_tolerance"][1](p)
    assert base == System("autoregressive") and paper == System("speculative", 0.4, 3)  # rows of other notebooks
    assert other.arguments() == {"method": "speculative", "draft_length": 3, "rule": "matched top-k:5"}
    assert not studies.STUDIES["09_price_of_tolerance"][1](p | {"heard": []})[0].scored
    with pytest.raises(InputError, match="beta of the rule paper is 3"):
        studies.STUDIES["09_price_of_tolerance"][1](p | {"heard": ["paper:3"]})
    with pytest.raises(InputError, match="rule 'loose:1' is unknown"):
        fake.check("A sentence.", rule="loose:1")


def test_rows_without_a_rule_keep_their_keys(fake):
    said = fake.utterances(1)[0]
    settings = row_settings(System("speculative", 0.4, 3, scored=False), said, {}, {})
    assert "rule" not in settings and settings["key"] == key({k: v for k, v in settings.items() if k != "key"})
    assert row_settings(System("speculative", None, 3, rule="top-k:5", scored=False), said, {}, {})["rule"] == "top-k:5"


def test_a_voice_decodes_by_a_rule(fake):
    def tokens(tolerance=0.4, rule=None):
        generator = torch.Generator().manual_seed(0)
        settings = ("speculative", "af_heart", tolerance, 3, generator)
        return Voice.decode(fake, PIECE, *settings, **fake._decoding(None, rule, "token", 0.0)).tokens

    fake.draft.head.weight.mul_(-9)  # else so near to the random target that all is accepted
    assert tokens(0.0, rule="paper:1") == tokens(1.0) != tokens(0.0)
    assert fake.rule("groups:0.9") is fake.rule("groups:0.9")  # made once


def test_every_exhibit_of_the_notebook_is_made(fake, tmp_path):
    parameters = GRIDS | {"heard": ["paper:0.4", "ensemble:0.5"], "draft_length": 3, "repeats": 1, "profile": "quick"}
    systems = studies.STUDIES["09_price_of_tolerance"][1](parameters)
    study = studies.Study("09_price_of_tolerance", parameters, tmp_path, fake, systems, fake.utterances(2))
    rows, about = study.price(systems)
    for name in ("price", "price_equal", "price_heard"):
        assert "| rule" in report.show(name, rows, tmp_path, about).data
    assert (tmp_path / "figures" / "price.svg").exists()
