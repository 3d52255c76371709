"""Speech Speculative Decoding (Interspeech 2025), reproduced: ``load().speak("...")``."""

from .errors import InputError
from .voice import METHODS, Take, Voice, load

__version__ = "0.1.0"
__all__ = ["METHODS", "InputError", "Take", "Voice", "load"]
