"""What people would use instead: our models in transformers' own classes, and ways to decode with them.

Assisted generation cannot begin from ``inputs_embeds``: transformers 5.23 hands them to the draft at every round, which
then reads the prompt's last embeddings in place of the new tokens. So the exported models take ids alone.
"""

from __future__ import annotations

import copy
import shutil

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.utils import logging

from ..decoding.result import DecodeConfig
from ..decoding.sampling import Sampler, probabilities
from ..errors import InputError
from ..models.generate import speculative_generate
from ..models.hidden_draft import HiddenDraft
from ..models.speech_lm import SpeechLM

ROOM = 2048  # positions of the longest prompt


def export(lm: SpeechLM) -> Qwen2ForCausalLM:
    """A SpeechLM as a Qwen2ForCausalLM on the same parameters; only its table of embeddings is its own.

    Ids below the speech vocabulary V are speech tokens; id V + i is position i of the prompt that ``prompt`` has put
    there. Logits are of the V speech tokens alone. InputError if the decoder is not a Qwen2Model.
    """
    if not isinstance(lm.model, Qwen2Model):
        raise InputError(f"transformers is compared with Qwen2 decoders, not with a {type(lm.model).__name__}")
    vocab, hidden = lm.speech_embedding.weight.shape
    fields = lm.model.config.to_dict() | {"vocab_size": vocab + ROOM, "tie_word_embeddings": False}
    with torch.device("meta"):
        made = Qwen2ForCausalLM(Qwen2Config(**fields, attn_implementation="sdpa"))
    made.model = copy.deepcopy(lm.model, {id(parameter): parameter for parameter in lm.model.parameters()})
    table = torch.cat((lm.speech_embedding.weight.detach(), lm.head.weight.new_zeros(ROOM, hidden)))
    made.model.embed_tokens, made.lm_head = nn.Embedding.from_pretrained(table), lm.head
    return made.eval()


def export_hidden(draft: HiddenDraft, target: Qwen2ForCausalLM) -> HiddenDraft:
    """A hidden-state drafter for its target's ``export``, on the same parameters but for that table of embeddings."""
    made = copy.deepcopy(draft, {id(parameter): parameter for parameter in draft.parameters()})
    made.lm.speech_embedding = target.get_input_embeddings()
    return made.eval()


@torch.no_grad()
def prompt(model: Qwen2ForCausalLM, prefix: Tensor) -> Tensor:
    """Put a prefix (1, T, hidden) into an exported model's table -> the ids that stand for it, (1, T)."""
    vocab, length = model.lm_head.out_features, prefix.shape[1]
    if length > ROOM:
        raise InputError(f"a prompt of {length} positions is longer than the {ROOM} that the comparison has room for")
    model.model.embed_tokens.weight[vocab : vocab + length] = prefix[0]
    return torch.arange(vocab, vocab + length, device=prefix.device)[None]


class Law(LogitsProcessor):
    """Our sampler as transformers' only processor: both then draw from one distribution.

    Its own warpers would not do. Its top_p is of the mass of the top_k tokens, CosyVoice's of the mass of all; and in
    assisted generation it hands the target's warpers to the draft, which adds its own: temperature .8 becomes .64.
    """

    stateless = True  # the same function for draft and target

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.memoryless = sampler, not sampler.ras

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return probabilities(scores, input_ids, self.sampler).log()


class Transformers:
    """``generate`` with an exported target: alone, assisted by an exported draft, or by our loop with a draft.

    hidden: a hidden-state drafter, for our loop alone. compile: forwards by torch.compile with dynamic shapes; the
    caches grow, as in transformers' own loop.
    """

    def __init__(
        self, target: SpeechLM, draft: SpeechLM, hidden: HiddenDraft | None = None, compile: bool = False
    ) -> None:
        logging.set_verbosity_error()  # it warns of every setting that is not its default
        self.target, self.draft = export(target), export(draft)
        self.hidden = hidden and export_hidden(hidden, self.target)
        for model in (self.target, self.draft) if compile else ():
            model.forward = torch.compile(model.forward, dynamic=True, isolate_recompiles=True)

    def prompt(self, prefix: Tensor) -> Tensor:
        """The ids of a prefix (1, T, hidden), for ``decode``."""
        prompt(self.draft, prefix)
        return prompt(self.target, prefix)

    @torch.inference_mode()
    def decode(
        self, ids: Tensor, config: DecodeConfig, seed: int, assisted: bool, custom: str = "", drafter: str = "paper"
    ) -> list[int]:
        """The new tokens, a stop token at their end included.

        config: as ours, its sampler without RAS. assisted: by the draft, draft_length tokens in each round; what
        transformers adapts by default (their number, a threshold of the draft's confidence) stays put. custom: the
        same through ``speculative_generate``, on this runtime of its. drafter: "hidden" is for ``custom`` alone.
        """
        settings = GenerationConfig(
            max_new_tokens=config.max_tokens,
            min_new_tokens=config.min_tokens,
            eos_token_id=list(config.stop_ids),
            pad_token_id=config.stop_ids[0],
            do_sample=config.sampler.temperature > 0,
            top_k=0,
        )
        self.draft.generation_config = GenerationConfig(
            num_assistant_tokens=config.draft_length,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        assistant = {"assistant_model": self.hidden if drafter == "hidden" else self.draft} if assisted else {}
        if custom:
            assistant |= {"custom_generate": speculative_generate, "tolerance": config.tolerance}
            assistant |= {"draft_length": config.draft_length, "verification": config.verification, "runtime": custom}
        torch.manual_seed(seed)  # transformers draws from torch's own generator
        given = {"attention_mask": torch.ones_like(ids), "logits_processor": [Law(config.sampler)], **assistant}
        made = self.target.generate(ids, settings, **given)
        return made[0, ids.shape[1] :].tolist()


def no_compiler() -> str:
    """Why torch.compile cannot be compared here; '' if it can."""
    found = any(map(shutil.which, ("c++", "g++", "clang++")))
    return "" if found or torch.cuda.is_available() else "torch.compile needs a C++ compiler, and none is on the path"
