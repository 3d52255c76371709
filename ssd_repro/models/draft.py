"""Drafts on the target's own parameters: the paper's, some layers and a head of its own, and an early exit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from ..decoding.drafters import LanguageModel, Session
from ..errors import InputError
from .causal import CausalLM
from .speech_lm import SpeechLM


def own_parameters(draft: nn.Module) -> dict[str, nn.Parameter]:
    """What a draft of ``make_draft`` does not share with its target."""
    return {name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}


def split_of(draft: nn.Module) -> dict[str, int]:
    """{"bottom": own layers, "top": layers shared with the target} of a draft of ``make_draft``."""
    layers = layers_of(draft if isinstance(draft, PreTrainedModel) else draft.model)
    own = sum(next(layer.parameters()).requires_grad for layer in layers)
    return {"bottom": own, "top": len(layers) - own}


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers; InputError if the model does not have them in one list."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [m for m in model.base_model.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1 or model.config.is_encoder_decoder:
        raise InputError(
            f"{type(model).__name__} is not one stack of {count} decoder layers: no draft can be cut from it."
        )
    return found[0]


def draft_layers(
    layers: int, depth: int | None = None, bottom: int | None = None, top: int | None = None
) -> tuple[int, int]:
    """How many (bottom, top) layers of the target a draft takes: a third in all.

    24 layers -> 2 + 6, as the paper's; of shallower targets all but one are bottom layers, 12 ->
    3 + 1: top layers expect to be told the place in the text, and two small layers do not find
    it (results/README.md). ``depth`` asks for so many layers in all, ``bottom`` and ``top``
    for exact numbers. InputError if they do not fit.
    """
    third = max(2, layers // 3) if depth is None else depth
    bottom = (2 if third >= 8 else max(1, third - 1)) if bottom is None else bottom
    top = max(0, third - bottom) if top is None else top
    if bottom < 1 or top < 0 or bottom + top > layers or depth not in (None, bottom + top):
        asked = "" if depth is None else f" (depth {depth})"
        raise InputError(
            f"a draft of {bottom} bottom + {top} top layers{asked} cannot be taken from a target of "
            f"{layers} layers; it needs at least 1 bottom layer and at most {layers} in all."
        )
    return bottom, top


def make_draft(
    target: PreTrainedModel | CausalLM | SpeechLM,
    depth: int | None = None,
    bottom: int | None = None,
    top: int | None = None,
) -> PreTrainedModel | CausalLM | SpeechLM:
    """The paper's draft: the target's bottom and top layers (``draft_layers``), its own head -> of the target's type.

    target: a causal language model of transformers, or a speech model of this package. Shared with it, the same
    Parameter objects: embeddings, top layers, final norm. Own, begun as copies of the target's: bottom
    layers and head, also where the target's head is tied to its embeddings; only these require gradients. The
    shared parameters are frozen, in the target too. A PreTrainedModel's ``save_pretrained`` writes a whole small
    model, each tensor once, which any ``from_pretrained`` reads.
    """
    if isinstance(target, CausalLM):
        return CausalLM(make_draft(target.model, depth, bottom, top), target.stored)
    whole = isinstance(target, PreTrainedModel)
    source = target if whole else target.model
    bottom, top = draft_layers(len(layers_of(source)), depth, bottom, top)
    draft = model = _shortened(source, bottom, top, own=bottom)
    if whole:
        head = copy.deepcopy(target.get_output_embeddings())
        model.set_output_embeddings(head)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    else:
        draft = _around(model, target)
        draft.head = head = copy.deepcopy(target.head)
    draft.requires_grad_(False)
    for trained in (*layers_of(model)[:bottom], head):
        trained.requires_grad_(True)
    return draft.train(target.training)


class EarlyExit:
    """The target's first layers, a third, its final norm and its head as a draft: no weight is its own, none learned.

    running: puts a SpeechLM on a runtime, which takes seconds where it is compiled; asked when first a sequence is
    opened.
    """

    def __init__(self, target: SpeechLM, running: Callable[[SpeechLM], LanguageModel]) -> None:
        self.target, self.running = target, running

    @cached_property
    def lm(self) -> LanguageModel:
        third = sum(draft_layers(len(layers_of(self.target.model))))
        draft = _around(_shortened(self.target.model, third, 0, own=0), self.target)
        draft.head = self.target.head
        return self.running(draft.eval())

    def session(self) -> Session:
        return self.lm.session()


def _around(model: PreTrainedModel, target: SpeechLM) -> SpeechLM:
    """A decoder as a speech model with the target's speech embedding."""
    draft = SpeechLM(model, target.speech_embedding.num_embeddings)
    draft.speech_embedding = target.speech_embedding
    return draft


def _shortened(source: PreTrainedModel, bottom: int, top: int, own: int) -> PreTrainedModel:
    """A copy with these layers alone, whose parameters are the source's but for those of the ``own`` lowest layers."""
    layers = layers_of(source)
    count = len(layers)
    copied = {id(parameter) for parameter in layers[:own].parameters()}
    shared = {id(parameter): parameter for parameter in source.parameters() if id(parameter) not in copied}
    model = copy.deepcopy(source, shared)  # what its memo knows is not copied
    kept, config = layers_of(model), model.config
    del kept[bottom : count - top]
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # in the cache
    for name, value in vars(config).items():  # layer_types, and what else has an entry for each layer
        if "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(config, name, value[:bottom] + value[count - top :])
    config.num_hidden_layers = bottom + top
    return model
