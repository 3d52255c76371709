"""Any causal language model of transformers behind the loop's contract: a session over its cache, and its law."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, StaticLayer
from transformers.generation import logits_process as hf

from ..errors import InputError, first_line
from .speech_lm import SpeechLM, features_at

# Cache layers that can be put back: what was fed after a place leaves no trace. A static layer with a sliding
# window overwrites what it would need, a recurrent state adds up.
KINDS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, LinearAttentionLayer)

# Logits processors of transformers that are functions of (tokens so far, scores) and of nothing else.
FREE = (  # they do not look at the tokens: all rows of a block at once
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TopHLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
)
EXACT = (
    *FREE,
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.SuppressTokensAtBeginLogitsProcessor,
)


class CausalSession:
    """One sequence of a causal model in a cache of its own (batch 1, empty); ``decoding.drafters.Session``.

    taps: as of a ``SpeechLM``, for drafters that read its ``features``.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, taps: tuple[int, ...] = ()) -> None:
        self.model, self.cache, self.taps = model, cache, taps
        self.length, self.features = 0, None

    def prefill(self, prefix: Tensor) -> Tensor:
        """Token ids (1, T), or embeddings (1, T, hidden) -> logits (1, V) of the last position."""
        last = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        embedded = prefix.is_floating_point()
        fed = {"inputs_embeds": prefix.to(self.model.dtype)} if embedded else {"input_ids": prefix}
        logits = self._feed(prefix.shape[1], **fed, **last)[:, -1]
        self.cache.activate_past_recording()  # of layers that keep a window alone; from here on it is put back
        return logits

    def extend(self, tokens: Tensor) -> Tensor:
        return self._feed(tokens.shape[1], input_ids=tokens)

    def crop(self, length: int) -> None:
        """Also where nothing is to be forgotten: a layer with a window then drops what fell out of it."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} positions to {length}")
        for layer in self.cache.layers:
            if isinstance(layer, StaticLayer):  # what stands beyond is never looked at, and overwritten
                layer.cumulative_length.fill_(length)
            else:
                layer.crop(length - self.length)
        self.length = length

    def _feed(self, count: int, **fed) -> Tensor:
        states = {"output_hidden_states": True} if self.taps else {}
        made = self.model(**fed, **states, past_key_values=self.cache, use_cache=True)
        self.features = features_at(self.taps, made.hidden_states)
        self.length += count
        return made.logits


class Model:
    """A causal model as the loop's ``LanguageModel``; ``cache`` makes an empty one for each session."""

    def __init__(self, model: PreTrainedModel, cache: Callable[[], Cache], taps: tuple[int, ...] = ()) -> None:
        self.model, self.cache, self.taps = model, cache, taps

    def session(self) -> CausalSession:
        return CausalSession(self.model, self.cache(), self.taps)


def new_cache(model: PreTrainedModel, like: Cache | None = None) -> Cache:
    """An empty cache for one sequence: dynamic, or static and as long as ``like``."""
    config = model.config.get_text_config(decoder=True)
    if isinstance(like, StaticCache):
        return StaticCache(config=config, max_cache_len=like.layers[0].max_cache_len)
    return DynamicCache(config=config)


def check_cache(cache: Cache, whose: str) -> None:
    """InputError unless the cache can be rolled back exactly."""
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        raise InputError(
            f"{whose} cache is {type(cache).__name__}; it must be DynamicCache or StaticCache on the device."
        )
    for layer in cache.layers:
        if type(layer) not in KINDS:
            raise InputError(
                f"{whose} cache has a {type(layer).__name__}, which cannot be rolled back exactly: "
                "use a DynamicCache, or a model whose attention is full or has a sliding window."
            )


class GenerationLaw:
    """What a step of ``generate`` samples from; ``decoding.sampling.Law``.

    transformers' processors in their order, applied as its assisted generation does: to float32 logits,
    for each position with the tokens before it, the prompt (T,) among them; then the softmax or, greedy, the
    most likely token. InputError, by name, for a processor that is not known to be a function of tokens and scores;
    one of your own that is may say so: ``stateless = True``, and ``memoryless = True`` if it does not look at the
    tokens: all rows of a block then go through it at once.
    """

    def __init__(self, processors: list, prompt: Tensor, greedy: bool) -> None:
        for one in processors:
            if type(one) not in EXACT and not getattr(one, "stateless", False):
                raise InputError(
                    f"logits processor {type(one).__name__} is not known to be the same function of tokens and scores "
                    "for draft and target: leave it out, or give a class of your own the attribute stateless = True."
                )
        self.processors, self.prompt, self.greedy = processors, prompt, greedy

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        scores, n = logits.to(torch.float32, copy=True), logits.shape[0]  # a copy: some write in place
        past = None
        for process in self.processors:
            if type(process) in FREE or getattr(process, "memoryless", False):
                scores = process(None, scores)
                continue
            if _is_over(process, len(self.prompt) + len(tokens) - n + 1):
                continue
            past = torch.cat((self.prompt, tokens))[None] if past is None else past
            ends = range(past.shape[1] - n + 1, past.shape[1] + 1)
            scores = torch.cat([process(past[:, :end], scores[i : i + 1]) for i, end in enumerate(ends)])
        if not self.greedy:
            return scores.softmax(-1)
        best = scores.argmax(-1, keepdim=True)  # of equal ones the same as ``generate``'s
        peak = scores.gather(-1, best)
        return torch.zeros_like(scores).scatter_(-1, best, peak - peak + 1)  # 1, or NaN


def _is_over(process, length: int) -> bool:
    """Whether it leaves the scores of every sequence of ``length`` tokens or more as they are."""
    if type(process) is hf.MinLengthLogitsProcessor:
        return length >= process.min_length
    if type(process) is hf.MinNewTokensLengthLogitsProcessor:
        return length - process.prompt_length_to_skip >= process.min_new_tokens
    return False


def law_of_row(processors: list, row: int, prompt: Tensor, greedy: bool) -> GenerationLaw:
    """Of one row of a batch; prompt (T,) with its padding, as the processors count it."""
    own = []
    for process in processors:
        padding = getattr(process, "prompt_ignore_length", None)
        if isinstance(padding, Tensor):  # the repetition penalty has one for each row
            process = hf.RepetitionPenaltyLogitsProcessor(process.penalty, padding[row : row + 1])
        own.append(process)
    return GenerationLaw(own, prompt, greedy)


class CausalLM(nn.Module):
    """A causal model as the trainer knows a ``SpeechLM``: text and speech are ids of its one vocabulary.

    stored: the dtype that its folder has, and that a draft for it is saved in.
    """

    cast, taps = SpeechLM.cast, SpeechLM.taps

    def __init__(self, model: PreTrainedModel, stored: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.stored = model, stored or model.dtype

    @property
    def name(self) -> str:
        """That of the folder it came from."""
        return Path(self.model.config.name_or_path).name or type(self.model).__name__

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def speech_embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def prefix(self, text: Tensor, prompt_text: Tensor, prompt_speech: Tensor) -> Tensor:
        """As ``SpeechLM.prefix``."""
        return self.speech_embedding(torch.cat((prompt_text, text, prompt_speech)))[None]

    def forward(self, inputs_embeds: Tensor, at: Tensor | None = None) -> Tensor:
        """As ``SpeechLM.forward``; logits are computed at places where any row wants them."""
        return self._made(inputs_embeds, at, ())[0]

    def with_features(self, inputs_embeds: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As ``SpeechLM.with_features``."""
        return self._made(inputs_embeds, at, self.taps)

    def _made(self, inputs_embeds: Tensor, at: Tensor | None, taps: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        asked = {"output_hidden_states": True} if taps else {}
        if at is not None and self.model._supports_logits_to_keep():
            asked["logits_to_keep"] = places = at.any(0).nonzero()[:, 0]
            at = at[:, places]
        made = self.model(inputs_embeds=inputs_embeds, use_cache=False, **asked)
        return made.logits if at is None else made.logits[at], features_at(taps, made.hidden_states)

    def session(self) -> CausalSession:
        return CausalSession(self.model, new_cache(self.model), self.taps)


def load_causal(folder: Path) -> CausalLM:
    """The causal model in a folder that ``from_pretrained`` reads, fp32 on the CPU. InputError if it cannot be read."""
    try:
        stored = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} is not a causal language model of transformers: {first_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{folder} lacks {len(missing)} of the model's tensors, {missing[0]} the first: copy it again")
    return CausalLM(model.eval(), stored or torch.float32)
