"""Speech Speculative Decoding (Interspeech 2025), reproduced: ``load().speak("...")``."""

from importlib import import_module

from .errors import InputError

__version__ = "0.1.0"
__all__ = ["METHODS", "InputError", "Take", "Voice", "load", "load_draft", "make_draft", "speculative_generate"]
_HOMES = {
    "METHODS": "speech.voice",
    "Take": "speech.take",
    "Voice": "speech.voice",
    "load": "speech.load",
    "load_draft": "models.checkpoints",
    "make_draft": "models.draft",
    "speculative_generate": "models.generate",
}


def __getattr__(name: str):
    """What needs torch is imported when it is first asked for: usage errors then come at once."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
