"""Speech Speculative Decoding (Interspeech 2025), reproduced: ``load().speak("...")``."""

from .errors import InputError

__version__ = "0.1.0"
__all__ = ["METHODS", "InputError", "Take", "Voice", "load"]


def __getattr__(name: str):
    """What needs torch is imported when it is first asked for: usage errors then come at once."""
    if name in __all__:
        from . import voice

        return getattr(voice, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
