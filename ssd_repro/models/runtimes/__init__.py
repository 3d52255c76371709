"""What runs a model's forwards, behind one contract: a language model with sessions (prefill, extend, crop).

eager     the SpeechLM itself, by transformers and torch: the reference
graphs    static caches, and on a GPU each block of a round as a CUDA graph (``graphs.StaticLM``)
openvino  the whole forward as one OpenVINO graph, for CPUs (``openvino.OpenVINOLM``)

Timings of different runtimes are never compared: every row says which one it had.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec

from ...decoding.drafters import LanguageModel
from ...errors import InputError
from ..speech_lm import PRECISIONS, SpeechLM
from . import openvino
from .graphs import StaticLM

RUNTIMES = ("auto", "eager", "graphs", "openvino")
# The decoders that a fast one knows, by their configurations' model_type.
FAMILIES = {"graphs": ("qwen2",), "openvino": tuple(each.config_class.model_type for each in openvino.DECODERS)}


def choose_runtime(runtime: str, device: str, precision: str = "fp32") -> str:
    """eager, graphs or openvino for one of RUNTIMES; auto: openvino on a CPU, graphs on a GPU.

    InputError for another name or precision, for openvino on a GPU, and where it is asked for and not
    installed. Where auto does not find it, a warning says so and eager takes its place.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime {runtime!r} is unknown: choose {', '.join(RUNTIMES)}")
    on_cpu, installed = device == "cpu", find_spec("openvino") is not None
    if runtime == "openvino" and not on_cpu:
        raise InputError(f"runtime openvino is for CPUs and the device is {device}: choose graphs or eager")
    if runtime == "openvino" and not installed:
        raise InputError("runtime openvino needs the package openvino (pip install openvino), or choose eager")
    if runtime == "auto":
        if on_cpu and not installed:
            warnings.warn("openvino is not installed: eager takes its place, at half the speed", stacklevel=3)
        runtime = ("openvino" if installed else "eager") if on_cpu else "graphs"
    known = openvino.PRECISIONS if runtime == "openvino" else PRECISIONS
    if precision not in ("auto", *known):
        raise InputError(
            f"precision {precision!r} is unknown to the runtime {runtime}: choose {' or '.join(known)}, or auto"
        )
    return runtime


def choose_precision(precision: str, runtime: str, device: str) -> str:
    """Of auto: bf16 on a GPU, w8a8 with openvino where the CPU multiplies int8, else fp32. Others are what they are."""
    if precision != "auto":
        return precision
    if runtime == "openvino" and openvino.multiplies_int8():
        return "w8a8"
    return "fp32" if device == "cpu" else "bf16"


def with_runtime(lm: SpeechLM, runtime: str, precision: str, threads: int, max_length: int) -> LanguageModel:
    """``lm``, on its device in fp32, as the language model that decodes. InputError if it cannot be had.

    precision  of weights and products: 'fp32' or 'bf16'; eager and graphs cast ``lm`` itself, in place
    threads    of a forward (openvino; the others take torch's)
    max_length positions of a static cache (graphs)
    """
    if runtime == "openvino":
        return openvino.OpenVINOLM(lm, threads, precision)
    lm.cast(precision)
    return StaticLM(lm, max_length) if runtime == "graphs" else lm
