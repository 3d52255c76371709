"""Text -> sentences -> phone ids: the language model's text tokens.

Phones come from espeak-ng, as the teacher's do; a stressed vowel is a token of
its own, so the text stays short beside 25 speech tokens a second.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from ..errors import InputError

PUNCTUATION = ' ,.;:!?"'
CONSONANTS = "b d f h j k l m n p r s t v w x z ð ŋ ɡ ɹ ɾ ʃ ʒ ʔ θ tʃ dʒ"
VOWELS = "a e i o u æ ɐ ɑ ɒ ɔ ə ɚ ɛ ɜ ɪ ʊ ʌ ᵻ iː uː ɑː ɔː ɜː ɛː oː aɪ aʊ eɪ oʊ əʊ ɔɪ"
STRESS = "ˈ"
SYMBOLS = (*PUNCTUATION, *CONSONANTS.split(), *VOWELS.split(), *(STRESS + vowel for vowel in VOWELS.split()))
SYMBOL_ID = {symbol: i for i, symbol in enumerate(SYMBOLS)}
_UNIT = re.compile("|".join(sorted(map(re.escape, SYMBOLS), key=len, reverse=True)))

VOICES = ("af_heart", "am_michael", "bf_emma", "bm_george", "af_bella", "am_fenrir")
# The text vocabulary: symbols, one token a voice, then CosyVoice's two marks.
START, TASK = len(SYMBOLS) + len(VOICES), len(SYMBOLS) + len(VOICES) + 1
TEXT_VOCABULARY = TASK + 1

MAX_CHARACTERS = 5_000
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+")
SENTENCE_CHARACTERS = 150  # the longest line the bundled voice was trained on


def check_text(text: str) -> str:
    """Return ``text`` with white space folded, or raise InputError saying what is wrong with it."""
    if not isinstance(text, str):
        raise InputError(f"text must be a string, got {type(text).__name__}")
    folded = " ".join(unicodedata.normalize("NFKC", text).split())
    if not folded:
        raise InputError("text is empty: give at least one word")
    if len(folded) > MAX_CHARACTERS:
        raise InputError(f"text has {len(folded)} characters: at most {MAX_CHARACTERS} are spoken at once")
    for char in folded:
        kind = unicodedata.category(char)
        foreign = kind[0] == "L" and not unicodedata.name(char, "").startswith("LATIN")
        if foreign or kind in ("So", "Sk", "Cs", "Co", "Cn", "Cf", "Cc", "Mn") and char not in "^`\u00ad":
            raise InputError(
                f"text holds {char!r} (U+{ord(char):04X}): the bundled voice reads English in Latin letters"
            )
    if not any(char.isalnum() for char in folded):
        raise InputError(f"text {folded[:40]!r} has only punctuation: give at least one word")
    return folded


def sentences(text: str, limit: int = SENTENCE_CHARACTERS) -> list[str]:
    """Split checked text into pieces of at most ``limit`` characters, dropping no word.

    Sentences stay together while they fit; one that does not is cut at its
    commas, then at spaces, then anywhere.
    """
    pieces: list[str] = []
    for sentence in _SENTENCE_END.split(text):
        if pieces and len(pieces[-1]) + 1 + len(sentence) <= limit:
            pieces[-1] += " " + sentence
            continue
        while len(sentence) > limit:
            head = sentence[: limit + 1]
            cut = max(head.rfind(mark) + 1 for mark in (", ", "; ", ": "))
            cut = cut if cut > limit // 3 else head.rfind(" ")
            cut = cut if cut > 0 else limit
            pieces.append(sentence[:cut].strip())
            sentence = sentence[cut:].strip()
        pieces.append(sentence)
    return [piece for piece in pieces if any(char.isalnum() for char in piece)]


@lru_cache(maxsize=2)
def _backend(language: str):
    import espeakng_loader
    from phonemizer.backend import EspeakBackend
    from phonemizer.backend.espeak.wrapper import EspeakWrapper

    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    quiet = logging.getLogger("ssd_repro.phonemizer")  # it warns of every "of the" that becomes one word
    quiet.setLevel(logging.ERROR)
    return EspeakBackend(language, preserve_punctuation=True, with_stress=True, logger=quiet)


def phone_ids(text: str, language: str = "en-us") -> list[int]:
    """Text -> ids into ``SYMBOLS``, as espeak-ng reads it in ``language`` (en-us or en-gb).

    Marks outside of ``SYMBOLS`` are left out. InputError if nothing in the text can be spoken.
    """
    ipa = _backend(language).phonemize([text])[0].strip()
    ipa = ipa.replace("ˌ", "").replace("“", '"').replace("”", '"')
    ids = [SYMBOL_ID[symbol] for symbol in _UNIT.findall(ipa)]
    if all(SYMBOLS[i] in PUNCTUATION for i in ids):
        raise InputError(f"text {text[:40]!r} has nothing that can be spoken: give English words")
    return ids


def plain_phones(ids: list[int]) -> list[int]:
    """Phone ids without stress and punctuation: the codec's CTC labels."""
    bare = (SYMBOLS[i].removeprefix(STRESS) for i in ids)
    return [SYMBOL_ID[s] for s in bare if s not in PUNCTUATION]


def prompt_and_text(
    phones: Sequence[int], voice: str | None, prompt_phones: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Phones -> (prompt text, text), text ids in CosyVoice's layout (``SpeechLM.prefix``).

    With a voice: [start][voice] and [phones...][task]. Zero-shot, as CosyVoice's: [start][prompt
    phones...][space] and [phones...][task], to be followed by the prompt's speech tokens; no voice token.
    """
    before = [*prompt_phones, SYMBOL_ID[" "]] if len(prompt_phones) else [len(SYMBOLS) + VOICES.index(voice)]
    return [START, *before], [*phones, TASK]


def language(voice: str) -> str:
    """espeak-ng's language for a voice: Kokoro's names begin with a (American) or b (British)."""
    return "en-us" if voice.startswith("a") else "en-gb"
