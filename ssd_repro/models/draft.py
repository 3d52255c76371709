"""The paper's draft: the target's bottom and top layers on the target's own parameters, and a head of its own."""

from __future__ import annotations

import copy

from torch import nn

from ..errors import InputError
from .speech_lm import SpeechLM


def own_parameters(draft: nn.Module) -> dict[str, nn.Parameter]:
    """What a draft of ``make_draft`` does not share with its target."""
    return {name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}


def split_of(draft: nn.Module) -> dict[str, int]:
    """{"bottom": own layers, "top": layers shared with the target} of a draft of ``make_draft``."""
    own = {name.split(".")[2] for name in own_parameters(draft) if name.startswith("model.layers.")}
    return {"bottom": len(own), "top": len(draft.model.layers) - len(own)}


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
    target: SpeechLM, depth: int | None = None, bottom: int | None = None, top: int | None = None
) -> SpeechLM:
    """The paper's draft: the target's bottom and top layers (``draft_layers``), its own head.

    Shared with the target, the same Parameter objects: embeddings, top layers, final norm.
    Own, begun as copies of the target's: bottom layers and head; only these require
    gradients. The shared parameters are frozen, in the target too.
    """
    layers = len(target.model.layers)
    bottom, top = draft_layers(layers, depth, bottom, top)
    own = {id(parameter) for parameter in target.model.layers[:bottom].parameters()}
    shared = {id(parameter): parameter for parameter in target.model.parameters() if id(parameter) not in own}
    model = copy.deepcopy(target.model, shared)  # what its memo knows is not copied
    model.layers = model.layers[:bottom] + model.layers[layers - top :]
    for place, layer in enumerate(model.layers):
        layer.self_attn.layer_idx = place  # in the cache
    model.config.num_hidden_layers, types = bottom + top, model.config.layer_types
    model.config.layer_types = types[:bottom] + types[layers - top :]
    draft = SpeechLM(model, target.speech_embedding.num_embeddings)
    draft.speech_embedding = target.speech_embedding
    draft.head = copy.deepcopy(target.head)
    draft.requires_grad_(False)
    for trained in (*model.layers[:bottom], draft.head):
        trained.requires_grad_(True)
    return draft.train(target.training)
