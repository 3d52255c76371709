"""Speech speculative decoding behind ``generate`` of transformers, for any causal language model.

    model.generate(**inputs, custom_generate=speculative_generate, assistant_model=draft, tolerance=0.4, draft_length=3)

The loop is ``decoding.speculative``'s; here are what ``generate`` prepared, checked, and what it gives back.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..decoding.result import DecodeConfig, DecodeResult
from ..decoding.speculative import collect, stream
from ..errors import InputError, first_line
from .causal import Model, check_cache, law_of_row, new_cache
from .hidden_draft import HiddenDraft, HiddenDraftLM
from .runtimes import openvino

OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# What ``generate`` prepares for a forward and is known here.
PREPARED = ("attention_mask", "inputs_embeds", "past_key_values", "position_ids", "use_cache", "logits_to_keep")


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What ``return_dict_in_generate`` gives: sequences, and what became of the rounds.

    results          one ``DecodeResult`` a row: tokens, rounds, calls of both models, seconds
    acceptance_rate  accepted / drafted tokens, of all rows together; None if nothing was drafted
    """

    results: tuple[DecodeResult, ...] | None = None
    acceptance_rate: float | None = None


def speculative_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: list,
    stopping_criteria: list,
    generation_config: GenerationConfig,
    assistant_model: PreTrainedModel | HiddenDraft | None = None,
    streamer=None,
    tolerance: float = 0.4,
    draft_length: int = 3,
    verification: str = "token",
    runtime: str = "eager",
    **model_kwargs,
) -> Tensor | SpeculativeOutput:
    """For ``generate(custom_generate=...)``; all that is not named here means what it means to transformers.

    assistant_model  the draft: a causal model with the target's vocabulary, such as ``make_draft``'s; or the
                     hidden-state drafter that ``load_draft`` reads for this very model
    tolerance        beta, from 0 (the target's own distribution) to 1. With do_sample=False it has no effect:
                     greedy decoding is exact
    draft_length     tokens that the draft proposes in a round, from 1 to 64
    verification     token: each drafted token by itself; block: all jointly, no fewer are accepted (tolerance 0 only)
    runtime          eager: the models' own forwards. openvino: for fp32 Qwen2, Llama and Qwen3 models on a CPU, about
                     twice as fast; the weights are in memory a second time while the model lives, changed weights are
                     seen, and no past_key_values come back

    The rows of a batch are decoded ONE AFTER ANOTHER, without their left padding: a batch takes as long as
    its rows, and is padded and ordered as ``generate`` does it. Random numbers come from a
    generator seeded by torch's global one: ``torch.manual_seed`` makes a call repeatable. Greedy tokens are
    ``generate``'s, but where two logits are so close that a forward of several tokens rounds them otherwise than
    forwards of one (a matter of bf16 and fp16). InputError, before any forward, for what is not supported;
    only an encoder-decoder model's encoder has been run by transformers before it is refused here.
    """
    draft = _argument_of_generate("assistant_model") if assistant_model is None else assistant_model
    streamer = _argument_of_generate("streamer") if streamer is None else streamer
    _check_models(model, draft)
    _check_request(generation_config, model_kwargs)
    if streamer is not None and len(input_ids) > 1:
        raise InputError(f"a streamer was given with {len(input_ids)} sequences: it takes one at a time.")
    if input_ids.device != model.device:
        raise InputError(f"input_ids are on {input_ids.device}, the model is on {model.device}: move them there.")
    prefixes = _prefixes(input_ids, model_kwargs, draft)
    config = _config(input_ids, stopping_criteria, generation_config, tolerance, draft_length, verification)
    greedy = not generation_config.do_sample
    laws = [law_of_row(logits_processor, row, prompt, greedy) for row, prompt in enumerate(input_ids)]
    given = model_kwargs["past_key_values"]
    _check_caches(model, draft, given, prefixes, config.max_tokens)
    taps = draft.taps if isinstance(draft, HiddenDraft) else ()
    compiled = _compiled(runtime, model, draft, taps, given)

    generator = torch.Generator(prefixes[0].device).manual_seed(int(torch.randint(2**62, ())))
    target, assistant = compiled or (
        Model(model, lambda: given if len(prefixes) == 1 else new_cache(model, given), taps),
        HiddenDraftLM(draft, draft.lm) if taps else Model(draft, lambda: new_cache(draft, given)),
    )
    results = []
    for prefix, law in zip(prefixes, laws, strict=True):
        rounds = stream(target, assistant, prefix, replace(config, sampler=law), generator)
        results.append(_collect(rounds, streamer))
    sequences = _sequences(input_ids, results, generation_config)
    filled = len(prefixes) == 1 and not compiled
    if filled:
        _release(given)
    if not generation_config.return_dict_in_generate:
        return sequences
    drafted, accepted = (sum(getattr(result, name) for result in results) for name in ("drafted", "accepted"))
    return SpeculativeOutput(
        sequences=sequences,
        past_key_values=given if filled else None,
        results=tuple(results),
        acceptance_rate=accepted / drafted if drafted else None,
    )


def decode_config(model: PreTrainedModel, prompt: Tensor, **asked) -> DecodeConfig:
    """How ``generate(prompt, **asked)`` decodes ids (1, T), for the loop; by no forward. InputError as above."""

    def take(_, input_ids, logits_processor, stopping_criteria, generation_config, **prepared):
        _check_request(generation_config, prepared)
        config = _config(input_ids, stopping_criteria, generation_config, 0.0, 1)
        law = law_of_row(logits_processor, 0, input_ids[0], not generation_config.do_sample)
        return replace(config, sampler=law)

    try:
        return model.generate(prompt, custom_generate=take, attention_mask=torch.ones_like(prompt), **asked)
    except ValueError as error:  # transformers' own refusals; InputError is one, too
        raise InputError(f"the model's generation config cannot be followed: {first_line(error)}") from None


def _argument_of_generate(name: str):
    """An argument of the ``generate`` that called us; None if there is none.

    transformers (5.23) hands a callable only what it finds in **kwargs: ``assistant_model`` and ``streamer`` are
    parameters of ``generate`` by name and get lost on the way (``_extract_generation_mode_kwargs``).
    """
    frame, code = inspect.currentframe(), inspect.unwrap(GenerationMixin.generate).__code__
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame and frame.f_locals[name]


def _check_models(model: PreTrainedModel, draft: PreTrainedModel | HiddenDraft | None) -> None:
    if not isinstance(draft, (PreTrainedModel, HiddenDraft)):
        found = type(draft).__name__
        raise InputError(f"assistant_model is {found}; it must be a model of transformers, or what load_draft reads.")
    hidden = isinstance(draft, HiddenDraft)
    for name, one in {"the model": model, **({} if hidden else {"assistant_model": draft})}.items():
        if one.config.is_encoder_decoder or one._is_stateful or not one.can_generate():
            raise InputError(
                f"{name} is {type(one).__name__}; it must be a decoder-only model that can be rolled back."
            )
    (_check_hidden if hidden else _check_causal)(model, draft)
    if draft.device != model.device:
        raise InputError(f"assistant_model is on {draft.device}, the model on {model.device}: move one of them.")


def _check_hidden(model: PreTrainedModel, draft: HiddenDraft) -> None:
    """A hidden-state drafter has the model's own embeddings, and reads what it thinks."""
    ours, theirs = (one.get_output_embeddings().weight.shape[0] for one in (draft, model))
    widths = [one.get_input_embeddings().weight.shape[1] for one in (draft, model)]
    for name, mine, wanted in (("width", *widths), ("a vocabulary of", ours, theirs)):
        if mine != wanted:
            raise InputError(f"assistant_model, a hidden-state drafter, has {name} {mine}, the model {wanted}.")
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    if draft.get_input_embeddings() is not model.get_input_embeddings() or max(draft.taps) > depth:
        raise InputError("assistant_model reads another model's hidden states: make it by load_draft(folder, model).")
    if draft.dtype != model.dtype:
        raise InputError(f"assistant_model is {draft.dtype}, the model {model.dtype}: make it by load_draft anew.")


def _check_causal(model: PreTrainedModel, draft: PreTrainedModel) -> None:
    ours, theirs = (one.config.get_text_config(decoder=True) for one in (draft, model))
    for name, of in (("vocab_size", "vocabulary"), ("bos_token_id", "tokenizer")):
        mine, wanted = getattr(ours, name, None), getattr(theirs, name, None)
        if mine != wanted and None not in (mine, wanted):
            raise InputError(f"assistant_model has {name} {mine}, the model {wanted}: a draft must have its {of}.")


def _check_request(generation_config: GenerationConfig, model_kwargs: dict) -> None:
    mode = generation_config.get_generation_mode(None)
    known = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
    if mode not in known:
        beams = f" (num_beams {generation_config.num_beams})" if (generation_config.num_beams or 1) > 1 else ""
        raise InputError(f"the generation mode is {mode.value}{beams}; it must be sampling or greedy search.")
    asked = [name for name in OUTPUTS if getattr(generation_config, name)]
    if generation_config.return_dict_in_generate and asked:
        raise InputError(f"{asked[0]} is not given by speculative decoding: leave it out.")
    if other := [name for name, value in model_kwargs.items() if name not in PREPARED and value is not None]:
        raise InputError(f"{other[0]} is not known to speculative decoding: it feeds input_ids or inputs_embeds alone.")
    given = model_kwargs.get("past_key_values")
    if given is None:
        raise InputError("use_cache is False, or the model has a cache of its own kind; a DynamicCache is needed.")
    if held := int(given.get_seq_length()):
        raise InputError(f"past_key_values holds {held} positions; it must be empty.")


def _config(
    input_ids, stopping_criteria, generation_config, tolerance: float, draft_length: int, verification: str = "token"
) -> DecodeConfig:
    """The loop's configuration, without a law; InputError for stopping criteria that look at more than one token."""
    stops, longest = set(), generation_config.max_length
    for one in stopping_criteria:
        if type(one) is EosTokenCriteria:
            stops.update(one.eos_token_id.tolist())
        elif type(one) is MaxLengthCriteria:
            longest = min(longest, one.max_length)
        else:
            raise InputError(
                f"stopping criterion {type(one).__name__} (stop strings, time, your own) is not supported: "
                "give eos_token_id and max_new_tokens."
            )
    room = longest - input_ids.shape[1]
    how = {"draft_length": draft_length, "tolerance": tolerance, "verification": verification}
    config = DecodeConfig(max_tokens=room, stop_ids=tuple(sorted(stops)), **how)
    return config if generation_config.do_sample else replace(config, tolerance=0.0)


def _prefixes(input_ids: Tensor, model_kwargs: dict, draft: PreTrainedModel | HiddenDraft) -> list[Tensor]:
    """Of each row its ids (1, T) or embeddings (1, T, hidden), without left padding."""
    embedded = model_kwargs.get("inputs_embeds")
    whole = input_ids if embedded is None else embedded
    if embedded is not None and embedded.shape[-1] != draft.get_input_embeddings().weight.shape[-1]:
        width = draft.get_input_embeddings().weight.shape[-1]
        raise InputError(
            f"inputs_embeds has width {embedded.shape[-1]}, the draft's embeddings {width}: give input_ids."
        )
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones(whole.shape[:2], dtype=torch.bool, device=whole.device) if mask is None else mask.bool()
    if mask.shape != whole.shape[:2] or not mask[:, -1].all() or (mask[:, 1:] < mask[:, :-1]).any():
        raise InputError("attention_mask must be zeros for left padding, then ones: pad prompts on the left.")
    places = model_kwargs.get("position_ids")
    counted = mask.cumsum(-1) - 1
    if places is not None and (places.shape != mask.shape or not torch.equal(places[mask], counted[mask])):
        raise InputError("position_ids must count from 0 at the first token that is not padding: leave them out.")
    return [row[keep][None] for row, keep in zip(whole, mask, strict=True)]


def _check_caches(model, draft, given: Cache, prefixes: list[Tensor], new: int) -> None:
    check_cache(given, "the model's")
    if isinstance(draft, PreTrainedModel):
        check_cache(new_cache(draft, given), "the draft's")
    if getattr(given, "_is_user_defined", False) and len(prefixes) > 1:
        raise InputError(f"past_key_values was given with {len(prefixes)} sequences: it serves one.")
    longest = max(prefix.shape[1] for prefix in prefixes)
    if isinstance(given, StaticCache) and longest + new - 1 > (limit := given.layers[0].max_cache_len):
        raise InputError(
            f"a prompt of {longest} positions and {new} new tokens need {longest + new - 1} positions; "
            f"the static cache has {limit}."
        )


def _compiled(runtime: str, model: PreTrainedModel, draft, taps: tuple[int, ...], given: Cache) -> tuple | None:
    """The models on OpenVINO; None: on eager. InputError for another runtime, or where it cannot be had."""
    if runtime not in ("eager", "openvino"):
        raise InputError(f"runtime is {runtime!r}; choose eager or openvino.")
    if runtime == "eager":
        return None
    if getattr(given, "_is_user_defined", False):
        raise InputError("past_key_values was given, and runtime openvino keeps caches of its own: leave one out.")
    if not taps:
        return openvino.causal(model), openvino.causal(draft)
    return openvino.causal(model, taps), HiddenDraftLM(draft, openvino.causal(draft, draft.lm.taps))


def _collect(rounds, streamer) -> DecodeResult:
    """Run the loop; the streamer gets what ``generate`` would give it, the stop token too."""
    result = collect(rounds, None if streamer is None else lambda tokens: streamer.put(torch.tensor([tokens])))
    if streamer is not None:
        if result.stopped:
            streamer.put(torch.tensor([[result.stop]]))
        streamer.end()
    return result


def _sequences(input_ids: Tensor, results: list[DecodeResult], generation_config: GenerationConfig) -> Tensor:
    """Prompts and new tokens, stop tokens among them, padded on the right."""
    new = [torch.tensor([*result.tokens, *([result.stop] if result.stopped else [])]) for result in results]
    longest, padding = max(map(len, new)), generation_config._pad_token_tensor
    fill = 0 if padding is None else int(padding)  # without it no row ends before the others
    rows = torch.stack([F.pad(row, (0, longest - len(row)), value=fill) for row in new])
    return torch.cat((input_ids, rows.to(input_ids)), dim=1)


def _release(cache: Cache) -> None:
    """Tensors of the loop's inference mode become ordinary ones: the cache is the caller's."""
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                setattr(layer, name, value.clone())
