"""Small utterances of the bundled voice's kind, and a codec small enough to train in a test."""

import random

import torch

from ssd_repro.models.codec import FEATURES, Codec, CodecConfig
from ssd_repro.speech.text import SYMBOL_ID, VOICES
from ssd_repro.training.codec import Features
from ssd_repro.training.data import Example, renderings
from ssd_repro.training.target import TargetOptions

SMALL = CodecConfig(encoder_width=16, decoder_width=16, encoder_blocks=1, decoder_blocks=1, hint=8)
CODEC = Codec(SMALL)
SIZES = {"hidden": 16, "ffn": 32, "layers": 4, "heads": 2, "kv_heads": 1}
PLAIN = TargetOptions(**SIZES, dropout=0.0, flip=0.0, prompted=0.0, splice=0.0)


def example(name, phones, codes, aligned, voice=VOICES[0]) -> Example:
    (one,) = renderings({"id": name, "voice": voice, "phones": phones, "codes": [codes], "aligned": [aligned]}, {})
    return one


def utterances(count=8, seed=0) -> list[Example]:
    rng, made = random.Random(seed), []
    for i in range(count):
        codes = [rng.randrange(6561) for _ in range(rng.randrange(6, 12))]
        phones = [rng.randrange(10, 40) for _ in range(5)]
        made.append(example(f"{seed}.{i}", phones, codes, [[phones[0], phones[1]]] * len(codes), VOICES[i % 6]))
    return made


def sentence(words, name="0", extra=0) -> Example:
    """An utterance of one-letter phones whose code says the phone: two tokens each, the last one longer."""
    phones = [SYMBOL_ID[symbol] for symbol in " ".join(words)]
    said = [SYMBOL_ID[symbol] for symbol in "".join(words)]
    tokens = [i for i in range(len(said)) for _ in range(2 + (i == len(said) - 1) * extra)]
    aligned = [[said[i], said[i + 1] if i + 1 < len(said) else -1] for i in tokens]
    return example(name, phones, [said[i] for i in tokens], aligned)


def features(count=4) -> list[Features]:
    torch.manual_seed(3)
    made = []
    for i in range(count):
        n, phones = 20 + i, [random.Random(i).randrange(10, 40) for _ in range(6)]
        world, hint = torch.randn(8 * n, FEATURES), torch.randn(2 * n, 8).half()
        made.append(Features(str(i), VOICES[i % 6], world, hint, phones))
    return made
