"""The target in training."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.codec import (
    Codec,
)
from ..models.draft import draft_layers
from ..models.speech_lm import SpeechLM, small_qwen2
from ..speech.text import SYMBOLS, TEXT_VOCABULARY, prompt
from .loop import Schedule, fit
from .splice import Utterance, by_voice, splice, words

STOP_TOKENS = 3  # 6,561 codes + 3, as CosyVoice 2


class Factored(nn.Module):
    """A (6564, width) matrix as digit vectors plus a part of its own for each code.

    FSQ codes that share digits share what they learn: with two hours of speech
    most codes are too rare to be learned alone. Folded into one plain matrix
    when training is over.
    """

    def __init__(self, codec: Codec, width: int, scale: float):
        super().__init__()
        size, digits = codec.config.codebook_size, codec.config.digits
        values = codec.to_digits(torch.arange(size)).long() + 1
        basis = F.one_hot(values, codec.config.levels).reshape(size, -1).float()
        self.register_buffer("basis", torch.block_diag(basis, torch.eye(STOP_TOKENS)), persistent=False)
        self.common = nn.Parameter(torch.randn(self.basis.shape[1], width) * scale / math.sqrt(digits))
        self.own = nn.Parameter(torch.zeros(len(self.basis), width))

    def weight(self) -> Tensor:
        return self.basis @ self.common + self.own


class TargetTrainer(nn.Module):
    """A SpeechLM in training: factored embedding and head, auxiliary phone heads, and the draft's layers beside it.

    The phone heads predict, above the draft's bottom layers and from a third and two thirds of
    the depth, the phone that the next speech token belongs to and the one after it: attention
    finds the alignment in hundreds of steps instead of many thousands. The layers of the paper's
    draft have a loss of their own, of ``draft_weight``, so that the top layers learn to do without
    the middle, as LayerSkip's do (Elhoushi et al. 2024). With probability ``prompt_rate`` an
    utterance follows one of ``short`` of its voice, the prompts of zero-shot speech; with
    ``splice_rate`` it is spliced with another of ``pieces`` of its voice.
    """

    def __init__(
        self,
        codec: Codec,
        hidden: int = 256,
        ffn: int = 1024,
        layers: int = 12,
        heads: int = 4,
        kv_heads: int = 2,
        dropout: float = 0.1,
        flip: float = 0.02,
        draft_weight: float = 0.3,
        short: dict[str, list[Utterance]] | None = None,
        prompt_rate: float = 0.5,
        splice_rate: float = 0.0,
        pieces: list[Utterance] | None = None,
    ):
        super().__init__()
        self.codec, self.flip = [codec], flip  # in a list: not a part of this module
        self.splice_rate, self.pieces = splice_rate, by_voice(pieces or [])
        self.words = {u.id: words(u) for u in pieces or []} if splice_rate else {}
        self.model = small_qwen2(hidden, ffn, layers, heads, kv_heads, TEXT_VOCABULARY, max_position_embeddings=4096)
        self.model.set_attn_implementation("eager")  # on a CPU SDPA's backward takes twice its time
        self.embedding = Factored(codec, hidden, 0.3)
        self.head = Factored(codec, hidden, 0.05)
        self.bias = nn.Parameter(torch.zeros(len(self.head.basis)))
        self.bottom, self.top = draft_layers(layers)
        self.draft_weight, self.prompt_rate, self.short = draft_weight, prompt_rate, short or {}
        self.watched = sorted({self.bottom, layers // 3, 2 * layers // 3})
        self.phone_heads = nn.ModuleDict({str(place): nn.Linear(hidden, 2 * len(SYMBOLS)) for place in self.watched})
        self._seen: dict[int, Tensor] = {}
        for place in self.watched:
            self.model.layers[place - 1].register_forward_hook(self._watch(place))
        nn.init.normal_(self.model.embed_tokens.weight, std=0.3)
        for layer in self.model.layers:
            layer.mlp.register_forward_hook(_channel_dropout(dropout))

    def _watch(self, place: int):
        def hook(module, args, output):
            self._seen[place] = output[0] if isinstance(output, tuple) else output

        return hook

    def folded(self) -> SpeechLM:
        """The plain SpeechLM that is shipped: factors multiplied out."""
        lm = SpeechLM(type(self.model)(copy.deepcopy(self.model.config)), len(self.head.basis))
        lm.model.set_attn_implementation("sdpa")
        lm.model.load_state_dict(self.model.state_dict())  # a copy: without the training hooks
        with torch.no_grad():
            lm.speech_embedding.weight.copy_(self.embedding.weight())
            lm.head.weight.copy_(self.head.weight())
            lm.head.bias.copy_(self.bias)
        return lm.eval()

    @torch.no_grad()
    def unfold(self, lm: SpeechLM) -> None:
        """Begin with the weights of ``lm``, which ``folded`` once made: the phone heads alone stay random.

        What codes share in the digits is found by least squares, the rest is their own.
        """
        self.model.load_state_dict(lm.model.state_dict())
        self.bias.copy_(lm.head.bias)
        for factored, matrix in ((self.embedding, lm.speech_embedding.weight), (self.head, lm.head.weight)):
            factored.common.copy_(torch.linalg.lstsq(factored.basis, matrix, driver="gelsd").solution)
            factored.own.copy_(matrix - factored.basis @ factored.common)

    def loss(self, batch: list[Utterance], rng: random.Random) -> dict[str, Tensor]:
        """Cross-entropy of the speech tokens and the stop token, with the phone heads' beside it.

        "speech" is the whole target's, "draft" that of the draft's layers. ``overlap``, on held-out
        speech: mean of sum min(p, q) of the two softmaxes.
        """
        if self.training and self.splice_rate:
            batch = [self._spliced(u, rng) for u in batch]
        flip = self.flip if self.training else 0.0
        before = followed(batch, rng, self.short, self.prompt_rate)
        rows = layout(batch, rng, self.codec[0], flip, before, prompted_only=not self.training)
        q, p, phones = self._pass(rows)
        speech, draft = (F.cross_entropy(logits, rows.labels) for logits in (q, p))
        wanted = rows.phones.reshape(-1)
        heard = [F.cross_entropy(x.reshape(-1, len(SYMBOLS)), wanted, ignore_index=-1) for x in phones]
        phone = sum(heard) / len(heard)
        terms = {
            "total": speech + 0.5 * phone + self.draft_weight * draft,
            "speech": speech,
            "phone": phone,
            "draft": draft,
        }
        if not self.training:
            terms["overlap"] = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).mean()
        return terms

    def _spliced(self, u: Utterance, rng: random.Random) -> Utterance:
        if rng.random() >= self.splice_rate:
            return u
        return splice(u, rng.choice(self.pieces[u.voice]), self.words, rng)

    def _pass(self, rows: Rows) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits of the whole target and of the draft's layers, (n, 6564) both, and the phone heads'."""
        layers, long = self.model.layers, rows.text.shape[1]
        place, causal = torch.arange(long)[None], torch.full((1, 1, long, long), -math.inf).triu(1)
        with torch.autocast("cpu", torch.bfloat16):
            embedded = embed(rows, self.model.embed_tokens.weight, self.embedding.weight())
            whole = self.model(
                inputs_embeds=embedded, attention_mask={"full_attention": causal}, use_cache=False
            ).last_hidden_state
            brief, angles = self._seen[self.bottom], self.model.rotary_emb(embedded, place)
            for layer in layers[len(layers) - self.top :]:
                brief = layer(brief, causal, position_ids=place, position_embeddings=angles)
            matrix = self.head.weight()
            q, p = (
                F.linear(hidden[rows.spoken], matrix, self.bias).float() for hidden in (whole, self.model.norm(brief))
            )
            heads = [self.phone_heads[str(k)](self._seen[k][rows.spoken]).float() for k in self.watched]
        return q, p, heads


def followed(
    batch: list[Utterance], rng: random.Random, short: dict[str, list[Utterance]], rate: float
) -> list[Utterance | None]:
    """With probability ``rate`` a short utterance of its voice to stand in front of each; None: nothing."""
    return [rng.choice(short[u.voice]) if short.get(u.voice) and rng.random() < rate else None for u in batch]


def _channel_dropout(rate: float):
    def hook(module, args, output):
        if module.training:  # one mask a channel: a mask per element costs a fifth of a CPU step
            return output * F.dropout(output.new_ones(output.shape[0], 1, output.shape[2]), rate)

    return hook


@dataclass
class Rows:
    """A padded batch: ``text`` and ``speech`` ids (B, T) with -1 where the other one stands."""

    text: Tensor
    speech: Tensor
    spoken: Tensor  # bool (B, T): positions that predict a speech token
    labels: Tensor  # (number of such positions,)
    phones: Tensor  # (number of such positions, 2): phone of the next token and the one after


def layout(
    batch: list[Utterance],
    rng: random.Random,
    codec: Codec,
    flip: float,
    before: list[Utterance | None] | None = None,
    prompted_only: bool = False,
) -> Rows:
    """A padded batch with its labels, in one of the two layouts of text.prompt.

    Alone: [start][voice][phones...][task][speech tokens...]. With an utterance of the same voice
    ``before`` it: [start][its phones][phones][task][its speech][speech], and no voice token. Both
    are labels, with ``prompted_only`` not the one before: it may have been learned by heart.
    """
    stop = codec.config.codebook_size
    heads, spoken, told, fronts = [], [], [], []  # text ids, codes, their phones; tokens before the utterance
    for w, u in zip(before or [None] * len(batch), batch):
        heads.append(prompt(u.phones, None if w else u.voice, w.phones if w else ()))
        shifts = [(v, rng.randrange(len(v.codes))) for v in (w, u) if v]
        spoken.append([code for v, k in shifts for code in v.codes[k]])
        told.append([phone for v, k in shifts for phone in v.aligned[k]])
        fronts.append(len(spoken[-1]) - len(u.codes[shifts[-1][1]]))
    length = max(len(h) + len(c) for h, c in zip(heads, spoken))
    text = torch.full((len(batch), length), -1)
    speech, labels = text.clone(), text.clone()
    phones = torch.full((len(batch), length, 2), -1)
    for i, (head, said, aligned) in enumerate(zip(heads, spoken, told)):
        codes, t = torch.tensor(said), len(head)
        text[i, :t] = torch.tensor(head)
        speech[i, t : t + len(codes)] = codes
        labels[i, t - 1 : t + len(codes)] = torch.cat([codes, torch.tensor([stop])])
        phones[i, t - 1 : t - 1 + len(codes)] = torch.tensor(aligned)
        begin = t - 1 + fronts[i]
        labels[i, [begin + cut for cut in batch[i].cuts]] = -1
        if prompted_only:
            labels[i, :begin] = -1
    if flip:
        digits = codec.to_digits(speech.clamp(min=0))
        wrong = torch.rand(digits.shape) < flip
        noisy = codec.to_code(torch.where(wrong, torch.randint(-1, 2, digits.shape).float(), digits))
        speech = torch.where(speech >= 0, noisy, speech)
    spoken = labels >= 0
    return Rows(text, speech, spoken, labels[spoken], phones[spoken])


def embed(rows: Rows, text: Tensor, speech: Tensor) -> Tensor:
    """Embeddings (B, T, hidden) of a padded batch from the two tables."""
    mixed = F.embedding(rows.text.clamp(min=0), text) * (rows.text >= 0)[..., None]
    return mixed + F.embedding(rows.speech.clamp(min=0), speech) * (rows.speech >= 0)[..., None]


def train_target(
    codec: Codec,
    train: list[Utterance],
    dev: list[Utterance],
    schedule: Schedule,
    checkpoint: Path,
    log=print,
    begin: Path | SpeechLM | None = None,
    **settings,
) -> tuple[SpeechLM, list[dict]]:
    """Train the target -> (SpeechLM, log rows).

    begin: another run's checkpoint, for its weights alone, or a target of the same sizes.
    """
    torch.manual_seed(schedule.seed)
    trainer = TargetTrainer(codec, **settings)
    if begin and not checkpoint.exists():
        if isinstance(begin, SpeechLM):
            trainer.unfold(begin)
        else:
            trainer.load_state_dict(torch.load(begin, weights_only=True)["model"])
    own = [trainer.embedding.own, trainer.head.own]
    rest = [p for p in trainer.parameters() if all(p is not q for q in own)]
    groups = [{"params": rest}, {"params": own, "scale": 0.3}]
    rows = fit(
        trainer,
        groups,
        trainer.loss,
        train,
        lambda u: len(u.codes[0]),
        schedule,
        checkpoint,
        dev,
        log,
    )
    return trainer.folded(), rows


@torch.no_grad()
def held_out_loss(lm: SpeechLM, codec: Codec, dev: list[Utterance], short: dict[str, list[Utterance]]) -> float:
    """Cross-entropy of ``dev``'s tokens, each utterance behind one of ``short`` of its voice, in fp32."""
    total = count = 0
    for start in range(0, len(dev), 8):
        batch, rng = dev[start : start + 8], random.Random(start)
        rows = layout(batch, rng, codec, 0.0, followed(batch, rng, short, 1.0), prompted_only=True)
        logits = lm(embed(rows, lm.model.embed_tokens.weight, lm.speech_embedding.weight), rows.spoken)
        total += float(F.cross_entropy(logits, rows.labels, reduction="sum"))
        count += len(rows.labels)
    return total / count


def averaged(new: SpeechLM, old: SpeechLM, part: float) -> SpeechLM:
    """``new``, in place, with ``part`` of the weights of ``old``, which it went on from (Wortsman et al. 2022, WiSE-FT)."""
    known = old.state_dict()
    with torch.no_grad():
        for name, weight in new.state_dict().items():
            weight.lerp_(known[name].to(weight), part)
    return new
