import random

import pytest
import torch

from ssd_repro import training
from ssd_repro.codec import FEATURES, Codec, CodecConfig
from ssd_repro.text import SYMBOLS, TASK, VOICES
from ssd_repro.training import Schedule, Utterance

SMALL = CodecConfig(encoder_width=16, decoder_width=16, encoder_blocks=1, decoder_blocks=1, hint=8)
SIZES = dict(hidden=16, ffn=32, layers=4, heads=2, kv_heads=1)


def utterances(count=8, seed=0):
    rng = random.Random(seed)
    made = []
    for i in range(count):
        n = rng.randrange(6, 12)
        codes = [[rng.randrange(6561) for _ in range(n)]]
        phones = [rng.randrange(10, 40) for _ in range(5)]
        made.append(Utterance(str(i), VOICES[i % 6], phones, codes, [[[phones[0], -1]] * n]))
    return made


def test_viterbi_finds_the_path_that_was_put_in():
    path = [0, 0, 1, 1, 1, 2, 3, 3]
    labels = [4, 7, 7, 5]  # a repeated label needs a blank between
    frames = [4, 4, 7, 7, 9, 7, 5, 5]
    log_probs = torch.full((8, 10), -10.0)
    log_probs[range(8), frames] = 0.0
    assert training.align(log_probs, labels, blank=9) == path


def test_viterbi_puts_a_blank_between_equal_labels():
    log_probs = torch.full((4, 10), -10.0)
    log_probs[:, 7] = 0.0
    log_probs[1, 9] = -1.0  # the best place for it
    assert training.align(log_probs, [7, 7], blank=9) == [0, 0, 1, 1]


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    def train(name, steps):
        torch.manual_seed(99)  # what is drawn must depend on (seed, step) alone
        torch.rand(random.randrange(50))
        schedule = Schedule(6, batch=3, warmup=2, save_every=3)
        if steps < 6:
            stop = RuntimeError("killed")

            def log(_):
                raise stop

            with pytest.raises(RuntimeError, match="killed"):
                training.fit(*fit_parts(), schedule, tmp_path / name, log=log)
            return None
        return training.train_target(
            Codec(SMALL), utterances(), utterances(2, 1), schedule, tmp_path / name, print, **SIZES
        )[0]

    def fit_parts():
        codec = Codec(SMALL)
        torch.manual_seed(0)
        trainer = training.TargetTrainer(codec, **SIZES)

        def loss(batch, rng):
            if len(calls) == 4:
                raise RuntimeError("killed")
            calls.append(1)
            return trainer.loss(batch, rng)

        own = [trainer.embedding.own, trainer.head.own]
        rest = [p for p in trainer.parameters() if all(p is not q for q in own)]
        groups = [{"params": rest}, {"params": own, "scale": 0.3}]
        return trainer, groups, loss, utterances(), lambda u: len(u.codes[0])

    calls = []
    train("a", 4)
    assert (tmp_path / "a").exists()  # saved at step 3, killed in step 5
    resumed, whole = train("a", 6), train("b", 6)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_target_learns_and_folding_keeps_its_logits(tmp_path):
    items = utterances(4)
    torch.manual_seed(0)
    trainer = training.TargetTrainer(Codec(SMALL), dropout=0.0, flip=0.0, **SIZES)
    groups = [{"params": list(trainer.parameters())}]
    rows = training.fit(
        trainer,
        groups,
        trainer.loss,
        items,
        lambda u: 0,
        Schedule(150, batch=4, warmup=5, learning_rate=1e-2),
        tmp_path / "c",
        log=lambda _: None,
    )
    assert rows[-1]["speech"] < 0.5 * rows[0]["speech"]
    plain = trainer.folded()
    rows = training.layout(items, random.Random(0), Codec(SMALL), 0.0)
    embedded = training.embed(rows, plain.model.embed_tokens.weight, plain.speech_embedding.weight)
    loss = torch.nn.functional.cross_entropy(plain(embedded)[rows.spoken], rows.labels)
    trainer.eval()
    assert float(loss.detach()) == pytest.approx(
        float(trainer.loss(items, random.Random(0))["speech"]), rel=0.02
    )  # bf16


def test_layout_is_prompt_then_tokens_then_stop():
    one = utterances(1)
    rows = training.layout(one, random.Random(0), Codec(SMALL), 0.0)
    head = len(one[0].phones) + 3
    assert rows.text[0, head - 1] == TASK
    assert rows.speech[0, head:].tolist() == one[0].codes[0]
    assert rows.labels.tolist() == [*one[0].codes[0], 6561]
    assert rows.spoken[0].nonzero()[0] == head - 1


def features(count=4):
    torch.manual_seed(3)
    made = []
    for i in range(count):
        n = 20 + i
        phones = [random.Random(i).randrange(10, 40) for _ in range(6)]
        made.append(
            training.Features(
                str(i), VOICES[i % 6], torch.randn(8 * n, FEATURES), torch.randn(2 * n, 8).half(), phones
            )
        )
    return made


def test_codec_trains_and_tokenises_on_every_grid(tmp_path):
    items = features()
    trainer, rows = training.train_codec(
        items,
        items[:2],
        Schedule(60, batch=4, warmup=5, learning_rate=3e-3),
        tmp_path / "k",
        log=lambda _: None,
        config=SMALL,
    )
    assert rows[-1]["envelope"] < rows[0]["envelope"]
    assert 0 <= rows[-1]["dev_phone_error_rate"]
    made = training.tokenise(trainer, items[0])
    assert len(made.codes) == 4 and len(made.codes[0]) == 20 and len(made.codes[1]) == 19
    assert [len(c) for c in made.codes] == [len(a) for a in made.aligned]
    assert all(0 <= phone < len(SYMBOLS) for phone, _ in made.aligned[0])


def test_edit_distance():
    assert training.edit_distance(list("kitten"), list("sitting")) == 3
    assert training.edit_distance([], [1, 2]) == 2
