import random
from dataclasses import replace

import numpy as np
import torch
from tiny_corpus import CODEC, PLAIN, sentence, utterances

from ssd_repro.speech.text import START, SYMBOL_ID, SYMBOLS, TASK, VOICES, plain_phones
from ssd_repro.training import splice
from ssd_repro.training.data import collate

STOP = 6561
LM = PLAIN.untrained(CODEC)


def test_an_utterance_alone_is_prompt_then_tokens_then_stop():
    one = utterances(1)[0]
    batch = collate(LM, [one], STOP)
    head = len(one.prompt_text) + len(one.text)
    words = LM.model.embed_tokens(torch.from_numpy(np.concatenate((one.prompt_text, one.text))))
    assert one.prompt_text.tolist() == [START, len(SYMBOLS)] and one.text[-1] == TASK
    torch.testing.assert_close(batch.embedded[0, :head], words)
    torch.testing.assert_close(batch.embedded[0, head:], LM.speech_embedding(torch.from_numpy(one.speech)))
    assert batch.labels.tolist() == [*one.speech, STOP]
    assert batch.at[0].nonzero()[0] == head - 1
    assert batch.phones.tolist() == [*one.aligned.tolist(), [-1, -1]]


def test_a_prompt_stands_in_front_with_its_phones_and_its_speech():
    front, one = sentence(["bat", "at"], "0"), sentence(["zip"], "1")
    made = splice.behind({one.voice: [front]}, one, random.Random(0), learned=True)
    assert made.prompt_text.tolist() == [START, *front.text[:-1], SYMBOL_ID[" "]]
    assert made.text.tolist() == one.text.tolist()
    batch = collate(LM, [made], STOP)
    assert batch.labels.tolist() == [*front.speech, *one.speech, STOP]
    assert batch.phones[len(front.speech), 0] == one.text[0]  # alignments one behind the other too


def test_a_prompt_in_front_is_no_label_on_held_out_speech():
    front, one = sentence(["bat", "at"], "0"), sentence(["zip"], "1")
    made, learned = (splice.behind({one.voice: [front]}, one, random.Random(0), x) for x in (False, True))
    batch, whole = collate(LM, [made], STOP), collate(LM, [learned], STOP)
    torch.testing.assert_close(batch.embedded, whole.embedded)  # the same is seen
    assert batch.labels.tolist() == [*one.speech, STOP]


def test_prompts_are_short_and_of_the_same_voice():
    items = utterances(60)
    prompts = splice.by_voice(items, splice.PROMPT_TOKENS)
    for one in items:
        front = splice.behind(prompts, one, random.Random(0), learned=False)
        owner = next(u for u in items if u.speech is front.prompt_speech)
        assert owner.voice == one.voice
    assert splice.by_voice(items, longest=5) == {}
    assert splice.behind({}, items[0], random.Random(0), learned=False) is items[0]


def test_words_are_found_in_text_and_speech():
    found = splice.find_words(sentence(["bat", "at", "tab"]))
    assert (found.text, found.plain) == ([0, 4, 7], [0, 3, 5])
    assert found.place == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]


def test_a_spliced_utterance_says_its_text_and_no_other():
    one, other = sentence(["bat", "at", "tab", "fad", "fa"], "0", 3), sentence(["zip", "i", "piz"], "1", 2)
    known = {u.id: splice.find_words(u) for u in (one, other)}
    texts, rng = set(), random.Random(0)
    for _ in range(200):
        made = splice.splice(one, other, known, rng)
        codes, aligned, phones = made.speech.tolist(), made.aligned.tolist(), made.text[:-1].tolist()
        assert [now for now, _ in aligned] == codes and made.text[-1] == TASK
        said = [code for k, code in enumerate(codes) if k % 2 == 0][: len(plain_phones(phones))]
        text = "".join(SYMBOLS[p] for p in phones)
        texts.add(text)
        assert text.startswith("bat ") and text.endswith("fa") and "  " not in text
        if "piz" not in text.split():  # its end is a token longer
            assert said == plain_phones(phones)
            assert [after for _, after in aligned][-1] == -1
        assert 1 <= len(made.cuts) <= 2 and all(0 < cut < len(codes) for cut in made.cuts)
    assert "bat at tab fad at tab fad fa" in texts, "a phrase said twice"
    assert "bat fa" in texts, "a phrase left out"
    assert any("zip i" in text for text in texts), "another utterance's words"


def test_two_words_are_not_spliced():
    one = sentence(["bat", "at"])
    assert splice.splice(one, one, {one.id: splice.find_words(one)}, random.Random(0)) is one


def test_the_token_after_a_cut_is_no_label():
    one = sentence(["bat", "at", "tab"])
    cut = replace(one, cuts=(4, 10))
    for prompts in ({}, {VOICES[0]: [one]}):
        made, whole = (splice.behind(prompts, u, random.Random(0), learned=True) for u in (cut, one))
        behind = len(made.speech) - len(one.speech)
        assert made.labels == whole.labels - 2
        made, whole = (collate(LM, [u], STOP) for u in (made, whole))
        kept = [k for k in range(behind + 17) if k not in (behind + 4, behind + 10)]
        for name in ("labels", "phones", "history"):
            assert torch.equal(getattr(made, name), getattr(whole, name)[kept])
        assert torch.equal(made.embedded, whole.embedded)
