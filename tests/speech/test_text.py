import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ssd_repro.errors import InputError
from ssd_repro.speech import text


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("", "empty"),
        (" \n\t ", "empty"),
        ("?! ...", "only punctuation"),
        ("hello 😀", "'😀'"),
        ("Привет", "'П'"),
        ("日本", "'日'"),
        ("a" * 5001, "5001 characters"),
        (None, "NoneType"),
    ],
)
def test_bad_text_is_refused_in_one_sentence(bad, says):
    with pytest.raises(InputError, match="(?s)" + says.replace("'", ".")) as caught:
        text.check_text(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("good", ["It’s “fine” – ok… 50% & £3", "Café Zoë", "Mr. Smith, 12 o'clock.", "5^2 = 25"])
def test_ordinary_english_is_taken(good):
    assert text.check_text(good)
    assert text.phone_ids(good)


words = st.text(string.ascii_letters + ".,;:!?'", min_size=1, max_size=220)


@given(st.lists(words, min_size=1, max_size=60))
@example(["abcdefghij" * 40])
@example(["word"] * 100)
def test_no_word_is_dropped_and_no_piece_is_too_long(parts):
    whole = " ".join(parts)
    pieces = text.sentences(whole)
    letters = [c for c in whole if c.isalnum()]
    assert [c for c in "".join(pieces) if c.isalnum()] == letters
    assert all(len(piece) <= text.SENTENCE_CHARACTERS for piece in pieces)


def test_sentences_stay_together_while_they_fit_and_titles_do_not_end_one():
    assert text.sentences("One. Two! Three?") == ["One. Two! Three?"]
    long = "Mr. Brown went to see Dr. Green about the weather in the north of the county this year. " * 2
    assert [piece[:9] for piece in text.sentences(long.strip())] == ["Mr. Brown", "Mr. Brown"]


def test_phones_have_stress_as_part_of_the_vowel_and_bare_labels_have_none():
    ids = text.phone_ids("Hello, judge.")
    assert [text.SYMBOLS[i] for i in ids] == ["h", "ə", "l", "ˈoʊ", ",", " ", "dʒ", "ˈʌ", "dʒ", "."]
    assert [text.SYMBOLS[i] for i in text.plain_phones(ids)] == ["h", "ə", "l", "oʊ", "dʒ", "ʌ", "dʒ"]


def test_british_and_american_voices_read_differently():
    assert text.phone_ids("bath", "en-us") != text.phone_ids("bath", "en-gb")


def test_prompt_layout_is_cosyvoices():
    assert text.prompt_and_text([3, 4], "bf_emma") == ([text.START, len(text.SYMBOLS) + 2], [3, 4, text.TASK])
    space = text.SYMBOL_ID[" "]
    assert text.prompt_and_text([3, 4], "bf_emma", [7, 8]) == ([text.START, 7, 8, space], [3, 4, text.TASK])
    assert text.TASK < text.TEXT_VOCABULARY
