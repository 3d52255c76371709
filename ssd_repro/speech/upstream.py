"""Speculative decoding inside upstream's own CosyVoice2 or CosyVoice3 object.

The front end, the flow model and the vocoder stay upstream's (FunAudioLLM/CosyVoice, any
commit since 6dd68b9, 2025-05-30); only the token generator of its language model is replaced.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ..decoding.result import DecodeResult
from ..decoding.sampling import Sampler
from ..decoding.speculative import stream
from ..errors import InputError, check_number
from ..models.checkpoints import load_draft
from ..models.cosyvoice import LAYOUTS, SPEECH_TOKENS, CosyVoiceLM
from ..models.speech_lm import SpeechLM

CLASSES = {"Qwen2LM": 2, "CosyVoice3LM": 3}  # upstream's name -> version


@dataclass(frozen=True)
class Accelerated:
    """What ``accelerate`` did to the model of a CosyVoice object."""

    model: object
    tokens: Callable  # in place of its language model's inference_wrapper

    def undo(self) -> None:
        """Back to upstream's own generator; for the second time InputError."""
        if vars(self.model.llm).get("inference_wrapper") is not self.tokens:
            raise InputError("this acceleration is undone already.")
        del self.model.llm.inference_wrapper, self.model.tts


def accelerate(
    cosyvoice,
    draft: str | Path | SpeechLM | None,
    tolerance: float = 0.4,
    draft_length: int = 3,
    seed: int = 0,
    on_result: Callable[[str, DecodeResult], None] | None = None,
) -> Accelerated:
    """Make an upstream CosyVoice2 or CosyVoice3 object decode speculatively, until ``undo()``.

    cosyvoice    the object: its inference_zero_shot and the like then work as before, streaming
                 (stream=True), several threads and fp16=True included
    draft        a folder from ``ssd-repro train-draft``, or a draft made from this very target
                 (``make_draft(target_of(cosyvoice))``); None decodes autoregressively: the
                 baseline, by the same loop
    seed         text n (from 0, in the order in which decoding begins; upstream splits long
                 ones) draws from its own generator of seed + n; upstream's global seed then
                 plays no part
    on_result    called in the decoding thread with upstream's uuid and the DecodeResult

    The sampling is that of the checkout that made the object (``upstream_sampling``); with
    tolerance 0 the tokens follow its distribution exactly. Upstream pins transformers 4.51.3; with
    transformers 5, which this package needs, its own generator computes wrong logits from the
    second token on (it gives the cache a mask of one position). The replaced one does not:
    draft=None is the baseline there.

    InputError: another object, one loaded with load_vllm=True, one already accelerated, a
    draft that does not fit, settings out of range; and later, in the caller's thread, text
    given as a generator (streaming text is not accelerated: give a string, or undo() first).
    """
    target, model, llm = target_of(cosyvoice), cosyvoice.model, cosyvoice.model.llm
    if "inference_wrapper" in vars(llm):
        raise InputError("this CosyVoice object is accelerated already: call undo() on the first result.")
    check_number("seed", seed, 0, 2**62, whole=True)
    sampler, banned = upstream_sampling(llm)
    draft = load_draft(Path(draft), target) if isinstance(draft, (str, Path)) else draft
    if draft is not None:
        _check_draft(draft, target)
    fields = {"sampler": sampler, "banned_ids": banned, "draft_length": draft_length, "tolerance": tolerance}
    settings = target.layout.config(1, **fields)
    seeds = itertools.count(seed)  # next() on a count is atomic

    def tokens(lm_input: Tensor, sampling: int, min_len: int, max_len: int, uuid: str) -> Iterator[int]:
        """In place of Qwen2LM.inference_wrapper: speech tokens one by one, as soon as they are final.

        lm_input: the prompt's embeddings (1, T, hidden). sampling: unused by upstream's RAS, too.
        """
        generator = torch.Generator(lm_input.device).manual_seed(next(seeds))
        if max_len < 1:
            return iter(())
        config = replace(settings, min_tokens=min(min_len, max_len), max_tokens=max_len)

        def rounds() -> Iterator[list[int]]:
            result = yield from stream(target, draft, lm_input, config, generator)
            if on_result:
                on_result(uuid, result)

        return itertools.chain.from_iterable(rounds())

    llm.inference_wrapper, model.tts = tokens, _refuse_streaming_text(model.tts)
    return Accelerated(model, tokens)


def _refuse_streaming_text(tts: Callable) -> Callable:
    """Upstream decodes in a thread of its own, where an error would leave the caller waiting."""

    @wraps(tts)
    def checked(text=None, *args, **kwargs):
        if isinstance(text, Generator):
            raise InputError("streaming text (a generator) is not accelerated: give one string, or call undo() first.")
        return tts(*args, **kwargs) if text is None else tts(text, *args, **kwargs)

    return checked


def target_of(cosyvoice) -> CosyVoiceLM:
    """The language model inside an upstream CosyVoice2 or CosyVoice3 object, on the same parameters.

    InputError if it is another object, too old, or its layers have gone to vLLM.
    """
    llm = getattr(getattr(cosyvoice, "model", None), "llm", None)
    version = CLASSES.get(type(llm).__name__)
    if version is None or not hasattr(llm, "inference_wrapper"):
        raise InputError(
            f"{type(cosyvoice).__name__} with a language model of class {type(llm).__name__} cannot be accelerated: "
            "give an upstream CosyVoice2 or CosyVoice3 object (a commit since May 2025)."
        )
    if hasattr(llm, "vllm"):
        raise InputError("this CosyVoice object decodes with vLLM: load it with load_vllm=False.")
    layout = LAYOUTS[version]
    stops = getattr(llm, "stop_token_ids", ())
    if llm.speech_token_size != SPEECH_TOKENS or set(stops) != set(layout.stop_ids):
        raise InputError(
            f"this {type(llm).__name__} has {llm.speech_token_size} speech tokens and {len(stops)} stop "
            f"tokens; CosyVoice {version} has {SPEECH_TOKENS} and {len(layout.stop_ids)} (CosyVoice 3: a commit since "
            "2025-12-09)."
        )
    backbone = llm.llm.model.model
    with torch.device("meta"):
        target = CosyVoiceLM(type(backbone)(backbone.config), layout)
    target.model, target.speech_embedding, target.head = backbone, llm.speech_embedding, llm.llm_decoder
    if version == 2:
        target.llm_embedding = llm.llm_embedding
    return target.eval()


def upstream_sampling(llm) -> tuple[Sampler, tuple[int, ...]]:
    """(sampler, ids banned before the minimum length) of an upstream language model, by trying its code.

    Two things have changed in upstream: whether RAS masks the token that repeats (f2ddcbe,
    2026-02-04), and whether ignore_eos masks 6561 (0e62489, 2026-02-11) or draws again:
    until another id than 6561 comes, since 56d9876 (2025-12-09) until one below 6561 comes.
    Until dc96e4c (2025-08-21) ids above 6561 were skipped; here they end the sequence.
    InputError if its sampling is not ras_sampling.
    """
    sampling = llm.sampling
    base = sampling.func if isinstance(sampling, partial) else sampling
    if getattr(base, "__name__", "") != "ras_sampling":
        raise InputError(f"the language model samples with {sampling!r}; only upstream's ras_sampling is known.")
    given = {name: value.default for name, value in signature(sampling).parameters.items()}
    scores = torch.zeros(llm.llm_decoder.out_features)
    sure = torch.full_like(scores, -1e4)  # all the mass on token 0, which repeats
    sure[0] = 0.0
    with torch.random.fork_rng(devices=[]):
        masks_repeat = int(sampling(sure, [0] * given["win_size"], 25)) != 0
    # Before the minimum length sampling_ids is offered 6561, an id above it, then speech: it keeps the first allowed.
    offered = iter(torch.tensor([[SPEECH_TOKENS], [SPEECH_TOKENS + 1], [0]]))
    stand_in = SimpleNamespace(speech_token_size=llm.speech_token_size, sampling=lambda *_: next(offered))
    kept = int(type(llm).sampling_ids(stand_in, scores, [], 25, ignore_eos=True))
    redrawn = {SPEECH_TOKENS: (), SPEECH_TOKENS + 1: (SPEECH_TOKENS,), 0: tuple(llm.stop_token_ids)}[kept]
    masked = tuple(scores.isneginf().nonzero().flatten().tolist())
    if bool(masked) == bool(redrawn):
        raise InputError("this commit of CosyVoice treats ignore_eos in an unknown way; pass another checkout.")
    names = {"top_k": "top_k", "top_p": "top_p", "win_size": "ras_window", "tau_r": "ras_tau"}  # upstream's -> ours
    settings = {ours: given[theirs] for theirs, ours in names.items()}
    return Sampler(**settings, ras_masks_repeat=masks_repeat, bans_by_mask=bool(masked)), masked or redrawn


def _check_draft(draft: SpeechLM, target: SpeechLM) -> None:
    if not isinstance(draft, SpeechLM):
        raise InputError(f"draft is {draft!r}; it must be a draft's folder, a SpeechLM or None.")
    found, wanted = (f"{tuple(w.shape)} {w.dtype} on {w.device}" for w in (draft.head.weight, target.head.weight))
    if found != wanted:
        raise InputError(
            f"the draft's head (speech vocabulary, hidden size) is {found}, the target's {wanted}: they must agree."
        )
