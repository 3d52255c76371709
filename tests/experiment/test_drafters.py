"""Notebook 18: what each drafter earns, on rows with known answers."""

import pandas as pd
import pytest
from made_rows import geometric

from ssd_repro.experiment import drafters, studies
from ssd_repro.experiment.systems import AUTOREGRESSIVE
from ssd_repro.files import write_text


def made(drafter, beta=0.0, alpha=0.6, draft=0.008, verify=0.022, length=3):
    rows = geometric(alpha, length, draft=draft, verify=verify, target=0.02, tolerance=beta)
    return rows.assign(base_tokens=rows.tokens, base_prefill_seconds=0.0, drafter=drafter)


ROWS = pd.concat(
    [
        made(None),
        made(None, length=2),
        made("hidden", alpha=0.55, draft=0.002, length=2),
        made("hidden", alpha=0.55, draft=0.002),
        made("n-gram", alpha=0.05, draft=0.0001),
        made(None, 0.4, alpha=0.8),
        made("on-policy", 0.4, alpha=0.9),
    ],
    ignore_index=True,
)


def test_table_by_hand():
    table = drafters.table(ROWS)
    assert list(zip(table.index, table.beta, table.L_d, strict=True)) == [
        ("hidden-state", 0.0, 2),
        ("hidden-state", 0.0, 3),
        ("n-gram", 0.0, 3),
        ("on-policy", 0.4, 3),
        ("paper's", 0.0, 2),
        ("paper's", 0.0, 3),
        ("paper's", 0.4, 3),
    ]
    paper = table[(table.index == "paper's") & (table.beta == 0)].iloc[-1]
    assert paper["c"] == pytest.approx(0.4) and paper["V"] == pytest.approx(1.1)
    assert paper["predicted"] == pytest.approx(paper["tokens a round"] / (3 * 0.4 + 1.1))
    assert paper["speed-up_low"] < paper["speed-up"] < paper["speed-up_high"]
    assert table.loc["n-gram"].acceptance < 0.1 and table.loc["n-gram"]["speed-up"] < 1
    shown = drafters.best(table)
    assert len(shown) == 5 and "[" in shown["speed-up"].iloc[0]  # of two draft lengths one


def test_the_conclusion_says_who_and_why():
    lossless, tolerant = drafters.conclusion(drafters.table(ROWS)).split("\n\n")
    assert "beta 0**: the hidden-state drafter" in lossless and "its step is cheaper, though it agrees less" in lossless
    assert (
        "beta 0.4**: the on-policy drafter" in tolerant
        and "but it agrees more" in tolerant
        or "cheaper, and it agrees more" in tolerant
    )
    alone = drafters.conclusion(drafters.table(made(None)))
    assert "the paper's drafter with L_d 3 is the fastest" in alone and ";" not in alone


def test_the_systems_of_a_voice(fake):
    fake.drafters, fake.untrained = fake.drafters | {"hidden": None}, {"early-exit": None} | fake.untrained
    base = studies.STUDIES[drafters.NOTEBOOK][1]({})
    found = studies.BY_VOICE[drafters.NOTEBOOK](fake, {"tolerance": 0.4, "lengths": [1, 2]})
    assert [system.method for system in base] == [AUTOREGRESSIVE.method] and not base[0].scored
    asked = {(system.drafter, system.tolerance, system.draft_length) for system in found}
    betas = {None: (0.0, 0.4), "hidden": (0.0, 0.4), "early-exit": (0.0,), "n-gram": (0.0,)}
    assert asked == {(name, beta, n) for name, some in betas.items() for beta in some for n in (1, 2)}


def test_table_1_has_the_other_drafters_as_chosen_and_not_the_slower_one(fake):
    """Of the hidden-state drafter three settings, of each other one two; of the block drafter none."""
    fake.drafters = fake.drafters | dict.fromkeys(("hidden", "block", "on-policy"))
    found = studies.BY_VOICE["01_table1"](fake, {"tolerance": 0.4})
    asked = [(system.drafter, system.tolerance, system.draft_length, system.verification) for system in found]
    hidden = [("hidden", 0.0, 2, "block"), ("hidden", 0.4, 2, None), ("hidden", 0.4, 3, None)]
    assert asked == [*hidden, ("on-policy", 0.0, 3, None), ("on-policy", 0.4, 3, None)]
    assert all(system.scored for system in found)


def test_logs_go_on_where_a_run_of_the_same_log_ended(tmp_path):
    assert drafters.logs(tmp_path).empty
    path = tmp_path / "voice" / "tables" / "on_policy_log.csv"
    text = "run,step,labels,dev_acceptance\n1,5,100,0.5\n1,9,200,\n2,4,50,0.6\n"
    write_text(path, text)
    assert drafters.logs(tmp_path).values.tolist() == [["on-policy draft", 1e-4, 0.5], ["on-policy draft", 2.5e-4, 0.6]]


def test_the_curve_over_the_data_is_empty_without_its_log_and_has_the_evaluations_of_one(tmp_path):
    assert drafters.by_size(tmp_path).empty
    log = "utterances,labels,dev_acceptance_1\n500,1000000,0.5\n500,1500000,\n2000,1000000,0.6\n"
    (tmp_path / "voice" / "tables").mkdir(parents=True)
    (tmp_path / "voice" / "tables" / "hidden_log_by_size.csv").write_text(log)
    assert drafters.by_size(tmp_path).values.tolist() == [[500, 1.0, 0.5], [2000, 1.0, 0.6]]
