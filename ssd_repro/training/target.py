"""The bundled voice's target in training."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..models.checkpoints import weights_sha256
from ..models.codec import Codec
from ..models.draft import draft_layers
from ..models.families import UNGROUPED, final_norm, mask_for, small_decoder
from ..models.speech_lm import SpeechLM
from ..speech.text import SYMBOLS, TEXT_VOCABULARY
from .codec import flip
from .data import Example, collate
from .loop import Settings, Task, overlap, train
from .splice import PROMPT_TOKENS, behind, by_voice, find_words, splice

STOP_TOKENS = 3  # 6,561 codes + 3, as CosyVoice 2


@dataclass(frozen=True)
class TargetOptions:
    """A target's sizes, and what its training does to the utterances.

    flip          part of the digits of the speech tokens seen that are replaced by random ones
    draft_weight  weight of the loss of the draft's layers alone: the top layers learn to do
                  without the middle, as LayerSkip's do (Elhoushi et al. 2024)
    prompted      part of the utterances that stand behind a short one of their voice
    splice        part of the utterances that are cut and joined anew (``splice.splice``)
    family        of ``models.families``; what has no kv_heads of its own leaves these out
    ffn, heads    0: four times the width, and heads of 64 (at least four)
    """

    hidden: int = 384
    ffn: int = 0
    layers: int = 24
    heads: int = 0
    kv_heads: int = 2
    dropout: float = 0.1
    flip: float = 0.02
    draft_weight: float = 0.5
    prompted: float = 0.8
    splice: float = 0.4
    family: str = "qwen2"

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        heads = self.heads or max(4, self.hidden // 64)
        kv_heads = heads if self.family in UNGROUPED else self.kv_heads
        return self.hidden, self.ffn or 4 * self.hidden, self.layers, heads, kv_heads

    def untrained(self, codec: Codec) -> SpeechLM:
        model = small_decoder(self.family, *self.sizes, TEXT_VOCABULARY, max_position_embeddings=4096)
        return SpeechLM(model, codec.config.codebook_size + STOP_TOKENS)


class SharedDigits(nn.Module):
    """A parametrization of a (6564, width) matrix: digit vectors plus a part of its own for each code.

    FSQ codes that share digits share what they learn: with a few hours of speech most codes are too
    rare to be learned alone. Assigning a matrix finds what codes share by least squares.
    """

    def __init__(self, codec: Codec):
        super().__init__()
        size = codec.config.codebook_size
        values = codec.to_digits(torch.arange(size)).long() + 1
        basis = F.one_hot(values, codec.config.levels).reshape(size, -1).float()
        self.register_buffer("basis", torch.block_diag(basis, torch.eye(STOP_TOKENS)), persistent=False)

    def forward(self, shared: Tensor, own: Tensor) -> Tensor:
        return self.basis @ shared + own

    def right_inverse(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        shared = torch.linalg.lstsq(self.basis, matrix, driver="gelsd").solution
        return shared, matrix - self.basis @ shared


class TargetTask(Task):
    """A SpeechLM in training: embedding and head over shared digits, auxiliary phone heads, and the draft's layers.

    The phone heads predict, halfway through the draft's layers and from a third and two thirds of the depth,
    the phone that the next speech token belongs to and the one after it: attention finds the alignment in
    hundreds of steps, not thousands. ``pieces``: what others are put behind or spliced with, if aligned.
    """

    def __init__(self, codec: Codec, options: TargetOptions, pieces: list[Example]):
        super().__init__()
        self.options, self.stop = options, codec.config.codebook_size
        self.to_digits, self.to_code = codec.to_digits, codec.to_code
        pieces = [example for example in pieces if example.aligned is not None]
        self.pieces, self.prompts = by_voice(pieces), by_voice(pieces, PROMPT_TOKENS)
        self.words = {example.id: find_words(example) for example in pieces} if options.splice else {}
        self.lm = options.untrained(codec)
        if not torch.cuda.is_available():  # on a CPU SDPA's backward takes twice its time
            self.lm.model.set_attn_implementation("eager")
        for module, scale in ((self.lm.speech_embedding, 0.3), (self.lm.head, 0.05)):
            parametrize.register_parametrization(module, "weight", SharedDigits(codec))
            nn.init.normal_(module.parametrizations.weight.original0, std=scale / math.sqrt(codec.config.digits))
            nn.init.zeros_(module.parametrizations.weight.original1)
        nn.init.zeros_(self.lm.head.bias)
        nn.init.normal_(self.lm.model.get_input_embeddings().weight, std=0.3)
        self.bottom, self.top = draft_layers(options.layers)
        depths = {options.layers // 3, 2 * options.layers // 3}
        heads = {name: nn.Linear(options.hidden, 2 * len(SYMBOLS)) for name in ("draft", *map(str, sorted(depths)))}
        self.phone_heads = nn.ModuleDict(heads)
        for layer in self.lm.model.layers:
            layer.mlp.register_forward_hook(self._channel_dropout)

    def _channel_dropout(self, module, args, output: Tensor) -> Tensor | None:
        if module.training:  # one mask a channel: a mask per element costs a fifth of a CPU step
            return output * F.dropout(output.new_ones(len(output), 1, output.shape[2]), self.options.dropout)

    def groups(self) -> list[dict]:
        own = [module.parametrizations.weight.original1 for module in (self.lm.speech_embedding, self.lm.head)]
        rest = [p for p in self.parameters() if all(p is not q for q in own)]
        return [{"params": rest}, {"params": own, "scale": 0.3}]

    def plain(self) -> SpeechLM:
        """The plain SpeechLM that is shipped: digits multiplied out, no hooks."""
        lm = SpeechLM(type(self.lm.model)(copy.deepcopy(self.lm.model.config)), self.lm.speech_embedding.num_embeddings)
        lm.model.set_attn_implementation("sdpa")
        state = {name: value for name, value in self.lm.state_dict().items() if ".parametrizations." not in name}
        tables = {f"{name}.weight": getattr(self.lm, name).weight for name in ("speech_embedding", "head")}
        lm.load_state_dict(state | tables)
        return lm.eval()

    @torch.no_grad()
    def begin_from(self, lm: SpeechLM) -> None:
        """Take the weights of ``lm``, of the same sizes: the phone heads alone stay random."""
        self.lm.model.load_state_dict(lm.model.state_dict())
        self.lm.head.bias.copy_(lm.head.bias)
        self.lm.speech_embedding.weight = lm.speech_embedding.weight.detach()
        self.lm.head.weight = lm.head.weight.detach()

    def draw(self, items: list[Example], rng: random.Random) -> list[Example]:
        """Splice some, put some behind a prompt; held-out speech's prompt is no label, it may be known by heart.

        What is not aligned, such as the target's own speech behind its prompt, stays as it is.
        """
        drawn = []
        for example in items:
            if example.aligned is None:
                drawn.append(example)
                continue
            if self.training and rng.random() < self.options.splice:
                example = splice(example, rng.choice(self.pieces[example.voice]), self.words, rng)
            prompted = rng.random() < self.options.prompted
            drawn.append(behind(self.prompts, example, rng, self.training) if prompted else example)
        return drawn

    def forward(self, items: list[Example]) -> dict[str, Tensor]:
        """Cross-entropy of the speech tokens and the stop token, with the phone heads' beside it.

        "speech" is the whole target's, "draft" that of the draft's layers. ``overlap``, on held-out
        speech: mean of sum min(p, q) of the two softmaxes.
        """
        model = self.lm.model
        with self.autocast(), parametrize.cached():
            batch = collate(self.lm, items, self.stop, noise=self._flipped if self.training else None)
            embedded = batch.embedded
            places = torch.arange(embedded.shape[1], device=embedded.device)[None]
            causal = None  # SDPA's own case
            if model.config._attn_implementation == "eager":
                causal = embedded.new_full((1, 1, places.shape[1], places.shape[1]), -math.inf).triu(1)
            given = {"attention_mask": mask_for(model, causal), "use_cache": False, "output_hidden_states": True}
            whole = model(inputs_embeds=embedded, **given)
            short, angles = whole.hidden_states[self.bottom], model.rotary_emb(embedded, places)
            depths = {str(place): hidden for place, hidden in enumerate(whole.hidden_states)}
            for place, layer in enumerate(model.layers[len(model.layers) - self.top :]):
                depths |= {"draft": short} if place == self.top // 2 else {}
                short = layer(short, causal, position_ids=places, position_embeddings=angles)
            ends = (whole.last_hidden_state, final_norm(model)(short))
            q, p = (self.lm.head(hidden[batch.at]).float() for hidden in ends)  # (N, 6564)
            heads = [head(depths[depth][batch.at]).float() for depth, head in self.phone_heads.items()]
            phones = [x.reshape(-1, len(SYMBOLS)) for x in heads]  # (2 N, phones)
        speech, draft = (F.cross_entropy(logits, batch.labels) for logits in (q, p))
        sums = [F.cross_entropy(x, batch.phones.flatten(), ignore_index=-1, reduction="sum") for x in phones]
        phone = torch.stack(sums).mean() / (batch.phones >= 0).sum().clamp_min(1)  # none, if nothing is aligned
        total = speech + 0.5 * phone + self.options.draft_weight * draft
        terms = {"loss": total, "speech": speech, "phone": phone, "draft": draft}
        if not self.training:
            terms["overlap"] = overlap(p.softmax(-1), q.softmax(-1))
        return terms

    def _flipped(self, codes: Tensor) -> Tensor:
        return self.to_code(flip(self.to_digits(codes), self.options.flip))


def train_target(
    codec: Codec,
    learned: list[Example],
    dev: list[Example],
    settings: Settings,
    options: TargetOptions,
    out: Path,
    begin: SpeechLM | None = None,
    log=print,
) -> tuple[SpeechLM, list[dict]]:
    """``begin``: whose weights to go on from, of these sizes; None: random ones -> (SpeechLM on the CPU, log rows)."""
    torch.manual_seed(settings.seed)
    task = TargetTask(codec, options, learned)
    if begin:
        task.begin_from(begin)
    facts = asdict(options) | {"begin": weights_sha256(begin, torch.float32) if begin else ""}
    rows = train(task, learned, dev, settings, out, facts, log=log)
    return task.plain().cpu(), rows


@torch.no_grad()
def held_out_loss(lm: SpeechLM, dev: list[Example], pieces: list[Example]) -> float:
    """Cross-entropy of ``dev``'s tokens, each example behind a short one of ``pieces`` of its voice, in fp32."""
    rng, prompts, total, count = random.Random(0), by_voice(pieces, PROMPT_TOKENS), 0.0, 0
    for start in range(0, len(dev), 8):
        examples = [behind(prompts, example, rng, learned=False) for example in dev[start : start + 8]]
        batch = collate(lm, examples, lm.speech_embedding.num_embeddings - STOP_TOKENS)
        total += float(F.cross_entropy(lm(batch.embedded, batch.at), batch.labels, reduction="sum"))
        count += len(batch.labels)
    return total / count


@torch.no_grad()
def averaged(new: SpeechLM, old: SpeechLM, part: float) -> SpeechLM:
    """``new``, in place, with ``part`` of the weights of ``old``, which it began from (WiSE-FT, Wortsman 2022)."""
    known = old.state_dict()
    for name, weight in new.state_dict().items():
        weight.lerp_(known[name].to(weight), part)
    return new
