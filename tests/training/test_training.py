import random

import numpy as np
import pytest
import torch

from ssd_repro.errors import InputError
from ssd_repro.models.codec import FEATURES, Codec, CodecConfig, analyse, long_term_spectrum
from ssd_repro.models.draft import make_draft
from ssd_repro.speech.text import START, SYMBOL_ID, SYMBOLS, TASK, VOICES, plain_phones
from ssd_repro.training import codec as codec_module
from ssd_repro.training import loop, splice, target
from ssd_repro.training.loop import Schedule
from ssd_repro.training.splice import Utterance

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
    assert codec_module.align(log_probs, labels, blank=9) == path


def test_viterbi_puts_a_blank_between_equal_labels():
    log_probs = torch.full((4, 10), -10.0)
    log_probs[:, 7] = 0.0
    log_probs[1, 9] = -1.0  # the best place for it
    assert codec_module.align(log_probs, [7, 7], blank=9) == [0, 0, 1, 1]


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
                loop.fit(*fit_parts(), schedule, tmp_path / name, log=log)
            return None
        return target.train_target(
            Codec(SMALL), utterances(), utterances(2, 1), schedule, tmp_path / name, print, **SIZES
        )[0]

    def fit_parts():
        codec = Codec(SMALL)
        torch.manual_seed(0)
        trainer = target.TargetTrainer(codec, **SIZES)

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
    trainer = target.TargetTrainer(Codec(SMALL), dropout=0.0, flip=0.0, **SIZES)
    groups = [{"params": list(trainer.parameters())}]
    rows = loop.fit(
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
    rows = target.layout(items, random.Random(0), Codec(SMALL), 0.0)
    embedded = target.embed(rows, plain.model.embed_tokens.weight, plain.speech_embedding.weight)
    loss = torch.nn.functional.cross_entropy(plain(embedded)[rows.spoken], rows.labels)
    trainer.eval()
    assert float(loss.detach()) == pytest.approx(
        float(trainer.loss(items, random.Random(0))["speech"]), rel=0.02
    )  # bf16


def test_a_target_can_be_unfolded_to_go_on_from_and_loses_nothing(tmp_path):
    torch.manual_seed(0)
    first = target.TargetTrainer(Codec(SMALL), **SIZES)
    with torch.no_grad():
        for factored in (first.embedding, first.head):
            factored.own.normal_(std=0.01)  # as training leaves it
        first.bias.normal_()
    plain, again = first.folded(), target.TargetTrainer(Codec(SMALL), **SIZES)
    again.unfold(plain)
    for name, value in again.folded().state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], atol=1e-5, rtol=1e-4)
    for new, old in ((again.embedding, first.embedding), (again.head, first.head)):
        assert new.own.std() < 1.1 * old.own.std()  # what codes share is shared, not their own
    schedule = Schedule(1, batch=2, warmup=1, learning_rate=1e-9)
    made, _ = target.train_target(
        Codec(SMALL), utterances(4), utterances(2, 1), schedule, tmp_path / "c", lambda _: None, begin=plain, **SIZES
    )
    torch.testing.assert_close(made.head.weight, plain.head.weight, atol=1e-4, rtol=1e-3)


def test_stopped_early_and_averaged_with_what_it_began_from(tmp_path):
    torch.manual_seed(0)
    old = target.TargetTrainer(Codec(SMALL), **SIZES).folded()
    schedule = Schedule(10, batch=2, warmup=1, learning_rate=1e-2, until=3)
    new, rows = target.train_target(
        Codec(SMALL), utterances(4), utterances(2, 1), schedule, tmp_path / "c", lambda _: None, begin=old, **SIZES
    )
    assert rows[-1]["step"] == 3 and "dev_speech" in rows[-1]
    with pytest.raises(InputError, match="until .* is 11"):
        Schedule(10, until=11)
    moved, before = new.head.weight.clone(), old.head.weight.clone()
    mean = target.averaged(new, old, 0.25)
    torch.testing.assert_close(mean.head.weight, 0.75 * moved + 0.25 * before)
    assert torch.equal(old.head.weight, before) and not torch.equal(moved, before)


def test_layout_is_prompt_then_tokens_then_stop():
    one = utterances(1)
    rows = target.layout(one, random.Random(0), Codec(SMALL), 0.0)
    head = len(one[0].phones) + 3
    assert rows.text[0, head - 1] == TASK
    assert rows.speech[0, head:].tolist() == one[0].codes[0]
    assert rows.labels.tolist() == [*one[0].codes[0], 6561]
    assert rows.spoken[0].nonzero()[0] == head - 1


def test_a_prompt_stands_in_front_with_its_phones_and_its_speech():
    prompt, one = utterances(2)
    rows = target.layout([one], random.Random(0), Codec(SMALL), 0.0, [prompt])
    head = len(prompt.phones) + 1 + len(one.phones) + 2  # start, space, task
    assert rows.text[0, :head].tolist() == [START, *prompt.phones, SYMBOL_ID[" "], *one.phones, TASK]
    assert rows.speech[0, head:].tolist() == prompt.codes[0] + one.codes[0]
    assert rows.labels.tolist() == [*prompt.codes[0], *one.codes[0], 6561]
    assert rows.phones[len(prompt.codes[0]), 0] == one.phones[0]  # alignments one behind the other too


def test_about_half_the_utterances_follow_a_short_one_of_their_voice():
    items = utterances(60)
    before = target.followed(items, random.Random(0), splice.prompts(items), 0.5)
    assert 15 < sum(w is not None for w in before) < 45  # P < 1e-4 for a fair coin
    assert all(w is None or w.voice == u.voice for u, w in zip(items, before))
    assert target.followed(items, random.Random(0), {}, 0.5) == [None] * 60
    assert splice.prompts(items, longest=5) == {}


def sentence(words, name="0", extra=0):
    """An utterance of one-letter phones whose code says the phone: two tokens each, the last one longer."""
    phones = [SYMBOL_ID[symbol] for symbol in " ".join(words)]
    said = [SYMBOL_ID[symbol] for symbol in "".join(words)]
    tokens = [(i, k) for i in range(len(said)) for k in range(2 + (i == len(said) - 1) * extra)]
    aligned = [[said[i], said[i + 1] if i + 1 < len(said) else -1] for i, _ in tokens]
    return Utterance(name, VOICES[0], phones, [[said[i] for i, _ in tokens]], [aligned])


def test_words_are_found_in_text_and_speech():
    found = splice.words(sentence(["bat", "at", "tab"]))
    assert (found.text, found.plain) == ([0, 4, 7], [0, 3, 5])
    assert found.place == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]]


def test_a_spliced_utterance_says_its_text_and_no_other():
    one, other = sentence(["bat", "at", "tab", "fad", "fa"], "0", 3), sentence(["zip", "i", "piz"], "1", 2)
    known = {u.id: splice.words(u) for u in (one, other)}
    texts, rng = set(), random.Random(0)
    for _ in range(200):
        made = splice.splice(one, other, known, rng)
        codes, (aligned,) = made.codes[0], made.aligned
        assert [now for now, _ in aligned] == codes
        said = [code for k, code in enumerate(codes) if k % 2 == 0][: len(plain_phones(made.phones))]
        text = "".join(SYMBOLS[p] for p in made.phones)
        texts.add(text)
        assert text.startswith("bat ") and text.endswith("fa") and "  " not in text
        if "piz" not in text.split():  # its end is a token longer
            assert said == plain_phones(made.phones)
            assert [after for _, after in aligned][-1] == -1
        assert 1 <= len(made.cuts) <= 2 and all(0 < cut < len(codes) for cut in made.cuts)
    assert "bat at tab fad at tab fad fa" in texts, "a phrase said twice"
    assert "bat fa" in texts, "a phrase left out"
    assert any("zip i" in text for text in texts), "another utterance's words"


def test_two_words_are_not_spliced():
    one = sentence(["bat", "at"])
    assert splice.splice(one, one, {"0": splice.words(one)}, random.Random(0)) is one


def test_the_token_after_a_cut_is_no_label():
    one = sentence(["bat", "at", "tab"])
    cut = Utterance("1", one.voice, one.phones, one.codes, one.aligned, cuts=(4, 10))
    for before in (None, [one]):
        rows = target.layout([cut], random.Random(0), Codec(SMALL), 0.0, before)
        whole = target.layout([one], random.Random(0), Codec(SMALL), 0.0, before)
        behind = len(one.codes[0]) if before else 0
        kept = [k for k in range(behind + 17) if k not in (behind + 4, behind + 10)]
        assert rows.labels.tolist() == whole.labels[kept].tolist()
        assert rows.phones.tolist() == whole.phones[kept].tolist()
        assert torch.equal(rows.speech, whole.speech)


def test_a_prompt_in_front_is_no_label_on_held_out_speech():
    front, one = sentence(["bat", "at", "tab"], "0"), sentence(["zip", "i", "piz"], "1")
    rows = target.layout([one], random.Random(0), Codec(SMALL), 0.0, [front], prompted_only=True)
    assert rows.labels.tolist() == [*one.codes[0], 6561]
    plain = target.TargetTrainer(Codec(SMALL), **SIZES).folded()
    found = target.held_out_loss(plain, Codec(SMALL), [one], {one.voice: [front]})
    embedded = target.embed(rows, plain.model.embed_tokens.weight, plain.speech_embedding.weight)
    wanted = torch.nn.functional.cross_entropy(plain(embedded)[rows.spoken], rows.labels)
    assert found == pytest.approx(float(wanted.detach()), rel=1e-4)


def test_spliced_utterances_train_the_target(tmp_path):
    told = [sentence(["bat", "at", "tab"], "0"), sentence(["zip", "i", "piz"], "1")]
    settings = SIZES | {"splice_rate": 1.0, "pieces": told, "draft_weight": 0.0}
    schedule = Schedule(60, batch=2, learning_rate=5e-3, warmup=5, save_every=60)
    _, rows = target.train_target(Codec(SMALL), told, told, schedule, tmp_path / "c", print, **settings)
    assert rows[-1]["dev_speech"] < 0.5 * 8.8, "8.8: nothing is known of 6,564 tokens"


def test_the_drafts_layers_learn_beside_the_whole_target():
    torch.manual_seed(0)
    trainer = target.TargetTrainer(Codec(SMALL), dropout=0.0, flip=0.0, **SIZES)
    terms = trainer.train().loss(utterances(4), random.Random(0))
    assert set(terms) == {"total", "speech", "phone", "draft"}
    terms["draft"].backward()
    moved = [layer.mlp.up_proj.weight.grad is not None for layer in trainer.model.layers]
    assert moved == [True, False, False, True]
    plain = trainer.eval().folded()
    draft = make_draft(plain, bottom=1, top=1)
    rows = target.layout(utterances(4), random.Random(0), Codec(SMALL), 0.0)
    embedded = target.embed(rows, plain.model.embed_tokens.weight, plain.speech_embedding.weight)
    wanted = torch.nn.functional.cross_entropy(draft(embedded)[rows.spoken], rows.labels)
    found = trainer.loss(utterances(4), random.Random(0))
    assert float(found["draft"]) == pytest.approx(float(wanted), rel=0.02)  # bf16
    assert 0 < float(found["overlap"]) <= 1 and float(found["speech"]) != float(found["draft"])


def test_calibration_gives_the_decoded_envelope_the_teachers_mean_and_spread(tmp_path):
    torch.manual_seed(0)
    codec = Codec(SMALL).eval()
    rng = np.random.default_rng(0)
    items = []
    for k in range(3):
        audio = (0.1 * rng.standard_normal(24_000)).astype(np.float32)
        world = torch.from_numpy(analyse(audio)[:200])
        items.append((codec_module.Features(str(k), VOICES[0], world, torch.zeros(50, 8).half(), []), audio))
    codec_module.calibrate(codec, items)
    codes = [codec.encode(f.world[None], f.hint[None].float())[0] for f, _ in items]
    made = torch.stack([codec.features(c, 0)[:, :40].std(0) for c in codes]).mean(0)
    wanted = torch.stack([f.world[:, :40].std(0) for f, _ in items]).mean(0)
    assert torch.allclose(made, wanted, rtol=1e-3)
    found = long_term_spectrum([codec.decode(c, 0) for c in codes])
    ratio = 10 * np.log10(long_term_spectrum([a for _, a in items]) / found)[20:460]
    assert abs(np.convolve(ratio, np.ones(40) / 40, "valid")).max() < 1.5  # dB, in any 0.9 kHz
    assert torch.equal(codec.scale[1], torch.ones(40))  # of a voice without speech nothing is known


def features(count=4):
    torch.manual_seed(3)
    made = []
    for i in range(count):
        n = 20 + i
        phones = [random.Random(i).randrange(10, 40) for _ in range(6)]
        made.append(
            codec_module.Features(
                str(i), VOICES[i % 6], torch.randn(8 * n, FEATURES), torch.randn(2 * n, 8).half(), phones
            )
        )
    return made


def test_codec_trains_and_tokenises_on_every_grid(tmp_path):
    items = features()
    trainer, rows = codec_module.train_codec(
        items,
        items[:2],
        Schedule(60, batch=4, warmup=5, learning_rate=3e-3),
        tmp_path / "k",
        log=lambda _: None,
        config=SMALL,
    )
    assert rows[-1]["envelope"] < rows[0]["envelope"]
    assert 0 <= rows[-1]["dev_phone_error_rate"]
    made = codec_module.tokenise(trainer, items[0])
    assert len(made.codes) == 4 and len(made.codes[0]) == 20 and len(made.codes[1]) == 19
    assert [len(c) for c in made.codes] == [len(a) for a in made.aligned]
    assert all(0 <= phone < len(SYMBOLS) for phone, _ in made.aligned[0])


def test_a_kept_codec_stays_as_it_is_and_its_phone_head_learns(tmp_path):
    torch.manual_seed(1)
    items, kept = features(), Codec(SMALL)
    kept.mean.fill_(0.25)
    before = {name: value.clone() for name, value in kept.state_dict().items()}
    schedule = Schedule(60, batch=4, warmup=5, learning_rate=1e-2, weight_decay=0.1)
    trainer, rows = codec_module.train_codec(
        items, items, schedule, tmp_path / "k", log=lambda _: None, keep=kept, config=SMALL
    )
    assert all(torch.equal(value, before[name]) for name, value in trainer.codec.state_dict().items())
    assert rows[-1]["ctc"] < rows[0]["ctc"]
    assert (
        codec_module.codes_of(trainer.codec, items[0]).tolist() == codec_module.codes_of(kept.eval(), items[0]).tolist()
    )


def test_edit_distance():
    assert codec_module.edit_distance(list("kitten"), list("sitting")) == 3
    assert codec_module.edit_distance([], [1, 2]) == 2
