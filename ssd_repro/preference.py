"""The last step of the target's training: it learns which of its own utterances say the text.

What a small target does wrong when it samples (a word left out, a phrase said twice), cross-entropy
on the teacher's speech never shows it. So the target says texts of the corpus in other voices, each
several times, as it is deployed; a judge, the codec's CTC phone head, counts the phone errors of the
speech tokens; the best and the worst of a text become a pair for direct preference optimisation
(Rafailov et al. 2023). No sound is made and no ASR listens.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from . import checkpoints, experiment
from .codec import Codec
from .draft_data import Example, Target, collate, data_sha256
from .sampling import draw, probabilities
from .speech_lm import SpeechLM
from .text import SYMBOLS, VOICES, language, plain_phones, prompt
from .training import PhoneHead, Schedule, Utterance, edit_distance, fit


def requests(
    utterances: list[Utterance], shown: dict[str, list[Utterance]], count: int, seed: int = 0
) -> list[Example]:
    """``count`` texts of ``utterances``, each for another voice of its accent, behind one of that voice's prompts.

    shown: voice -> the prompts to choose from; a voice without has its voice token instead. The
    examples have no speech yet.
    """
    rng, found = random.Random(seed), []
    for u in rng.sample(utterances, min(count, len(utterances))):
        voice = rng.choice([v for v in VOICES if v != u.voice and language(v) == language(u.voice)])
        before = rng.choice(shown[voice]) if shown.get(voice) else None
        found.append(behind(before, f"{u.id}/{voice}", u.phones, voice))
    return found


def behind(before: Utterance | None, name: str, phones: list[int], voice: str) -> Example:
    """A text to be said by ``voice`` behind the prompt ``before``, or behind the voice's token."""
    whole = np.array(prompt(phones, voice, before.phones if before else ()), np.int32)
    edge = len(whole) - len(phones) - 1
    spoken = np.array(before.codes[0] if before else [], np.int32)
    return Example(name, whole[edge:], spoken[:0], whole[:edge], spoken)


def rank_prompts(
    target: Target, candidates: list[Utterance], texts: list[tuple[str, list[int]]], finalists: int, **around
) -> list[tuple[Utterance, dict[str, float]]]:
    """Prompts of one voice, the best first: ``slips`` of what the target says behind each, fewest phone errors.

    texts: (name, phones). All candidates say every third text; the ``finalists`` best of them say the rest
    too, and come before the others. around: as ``takes`` has it.
    """

    def said(candidate: Utterance, some: list) -> list[tuple[Example, int]]:
        asked = [behind(candidate, f"{name}/{candidate.id}", phones, candidate.voice) for name, phones in some]
        return takes(target, asked, 1, **around)

    def best_first(found: list) -> list:
        return sorted(found, key=lambda pair: slips(pair[1])["phone errors %"])

    first = best_first([(candidate, said(candidate, texts[::3])) for candidate in candidates])
    rest = [one for i, one in enumerate(texts) if i % 3]
    final = best_first([(candidate, heard + said(candidate, rest)) for candidate, heard in first[:finalists]])
    return [(candidate, slips(heard)) for candidate, heard in final + first[finalists:]]


@torch.inference_mode()
def say_together(target: Target, examples: list[Example], generator: torch.Generator) -> list[Example]:
    """``examples`` with what the target says to them as it is deployed, all of them in one batch.

    The law of each token is that of ``decoding.autoregressive``; the random numbers are shared, so an
    utterance depends on its batch.
    """
    lm, prefixes = target.lm, [target.embed(one)[0] for one in examples]
    configs = [target.config(len(one.text)) for one in examples]
    sampler, most = configs[0].sampler, max(c.max_tokens for c in configs)
    stops, width = list(configs[0].banned), max(len(p) for p in prefixes)
    embedded = torch.stack([F.pad(p, (0, 0, width - len(p), 0)) for p in prefixes])
    seen = torch.stack([F.pad(torch.ones(len(p), dtype=torch.long), (width - len(p), 0)) for p in prefixes])
    least, limit = (torch.tensor([getattr(c, k) for c in configs]) for k in ("min_tokens", "max_tokens"))
    place, cache = (seen.cumsum(1) - 1).clamp_min(0), DynamicCache(config=lm.model.config)
    said = torch.full((len(examples), sampler.ras_window + most), -1)  # behind a window of nothing
    alive, stopped = torch.arange(len(examples)), torch.zeros(len(examples), dtype=torch.bool)
    for step in range(most):
        hidden = lm.model(
            inputs_embeds=embedded, attention_mask=seen, position_ids=place, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = lm.head(hidden)
        banned = torch.zeros(logits.shape, dtype=torch.bool)
        banned[:, stops] = (step < least[alive])[:, None]
        history = said[alive, step : step + sampler.ras_window]
        token = draw(probabilities(logits, history, sampler, banned), generator)
        ends = torch.isin(token, torch.tensor(stops))
        stopped[alive[ends]] = True
        said[alive[~ends], sampler.ras_window + step] = token[~ends]
        goes_on = ~ends & (step + 1 < limit[alive])
        if not goes_on.any():
            break
        if not goes_on.all():
            alive, token, seen, place = alive[goes_on], token[goes_on], seen[goes_on], place[goes_on]
            cache.batch_select_indices(goes_on.nonzero()[:, 0])
        embedded = lm.speech_embedding(token)[:, None]
        seen, place = F.pad(seen, (0, 1), value=1), place[:, -1:] + 1
    speech = [row[row >= 0].int().numpy() for row in said]
    return [replace(one, speech=s, stopped=bool(e)) for one, s, e in zip(examples, speech, stopped, strict=True)]


@torch.inference_mode()
def phone_errors(judge: PhoneHead, codec: Codec, one: Example) -> int:
    """Edit distance of the phones that ``judge`` finds in the speech tokens and those of the text."""
    wanted = plain_phones(one.text[:-1].tolist())  # the last is the task mark
    if not len(one.speech):
        return len(wanted)
    best = judge(codec.to_digits(torch.from_numpy(one.speech).long()[None]))[0].argmax(-1).tolist()
    return edit_distance([p for p, _ in groupby(best) if p != len(SYMBOLS)], wanted)


def takes(
    target: Target,
    asked: list[Example],
    count: int,
    judge: PhoneHead,
    codec: Codec,
    path: Path,
    seed: int = 0,
    batch: int = 64,
    progress=lambda it: it,
) -> list[tuple[Example, int]]:
    """Each of ``asked`` said ``count`` times, with its phone errors; ``path`` keeps the batches, none is made again.

    A batch depends on (target, texts, seed, its number) alone. In bf16, which halves the time and
    moves the law by no more than rounding.
    """
    order = sorted((one for one in asked for _ in range(count)), key=lambda one: (len(one.text), one.id))
    whole = {"target": checkpoints.weights_sha256(target.lm), "texts": data_sha256(order), "seed": seed, "batch": batch}
    key = hashlib.sha256(json.dumps(whole | {"sampler": asdict(target.config(1).sampler)}).encode()).hexdigest()[:16]
    experiment.drop_half_line(path)
    quick = replace(target, lm=copy.deepcopy(target.lm).cast("bf16"))
    known = {row["number"]: row["said"] for row in experiment.read_rows(path) if row["key"] == key}
    for number in progress(range(-(-len(order) // batch))):
        if number not in known:
            generator = torch.Generator().manual_seed(1_000_003 * seed + number)
            said = say_together(quick, order[number * batch :][:batch], generator)
            known[number] = [one.row() | {"errors": phone_errors(judge, codec, one)} for one in said]
            experiment.append_row(path, {"key": key, "number": number, "said": known[number]})
    return [(Example.from_row(row), row["errors"]) for number in sorted(known) for row in known[number]]


def slips(said: list[tuple[Example, int]]) -> dict[str, float]:
    """Phone errors a hundred phones, and of how many utterances in a hundred more than a quarter of the phones is wrong."""
    wanted = [len(plain_phones(one.text[:-1].tolist())) for one, _ in said]
    bad = sum(wrong > n / 4 for (_, wrong), n in zip(said, wanted, strict=True))
    return {
        "phone errors %": 100 * sum(wrong for _, wrong in said) / sum(wanted),
        "more than a quarter wrong %": 100 * bad / len(said),
        "stopped %": 100 * sum(one.stopped for one, _ in said) / len(said),
        "utterances": len(said),
    }


@dataclass(frozen=True)
class Pair:
    """One text said well and badly; log probabilities (natural, summed) of both under the target as it began."""

    better: Example
    worse: Example
    errors: tuple[int, int]
    before: tuple[float, float] = (0.0, 0.0)


def choose_pairs(said: list[tuple[Example, int]], least: int) -> list[Pair]:
    """Of each text the take with the fewest and with the most phone errors, if they lie ``least`` apart."""
    by_text = defaultdict(list)
    for one, wrong in said:
        by_text[one.id].append((wrong + (0 if one.stopped else 10), one))  # a run-away is hardly the better one
    found = []
    for mine in by_text.values():
        (good, better), (bad, worse) = (f(mine, key=lambda take: take[0]) for f in (min, max))
        if bad - good >= least:
            found.append(Pair(better, worse, (good, bad)))
    return found


class PreferenceTrainer(nn.Module):
    """DPO on pairs, beside the cross-entropy of the better one; the embeddings stay as they are."""

    def __init__(self, target: Target, beta: float = 0.1, keep: float = 0.2):
        super().__init__()
        self.target, self.lm, self.beta, self.keep = [target], target.lm, beta, keep

    def log_probabilities(self, examples: list[Example]) -> Tensor:
        """Of each example's speech and stop, summed: (B,)."""
        batch = collate(self.target[0], examples)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.lm(batch.embedded, batch.at).float()
        each = -F.cross_entropy(logits, batch.labels, reduction="none")
        return torch.stack([part.sum() for part in each.split(batch.at.sum(1).tolist())])

    @torch.no_grad()
    def with_reference(self, pairs: list[Pair]) -> list[Pair]:
        """``pairs`` with the log probabilities that the target gives them now."""
        found = []
        for pair in pairs:
            found.append(replace(pair, before=tuple(self.log_probabilities([pair.better, pair.worse]).tolist())))
        return found

    def loss(self, batch: list[Pair], rng: random.Random) -> dict[str, Tensor]:
        """dpo: -log sigmoid(beta ((log q/q0)(better) - (log q/q0)(worse))), q0 the target as it began."""
        now = self.log_probabilities([p.better for p in batch] + [p.worse for p in batch])
        gain = now - torch.tensor([p.before[0] for p in batch] + [p.before[1] for p in batch])
        better, worse = gain.chunk(2)
        dpo = -F.logsigmoid(self.beta * (better - worse)).mean()
        ce = -now[: len(batch)].sum() / sum(p.better.labels for p in batch)
        return {"total": dpo + self.keep * ce, "dpo": dpo, "ce": ce, "right": (better > worse).float().mean(),
                "better": better.mean(), "worse": worse.mean()}  # fmt: skip


def prefer(
    target: Target,
    train: list[Pair],
    dev: list[Pair],
    schedule: Schedule,
    checkpoint: Path,
    strength: float = 1.0,
    log=print,
    **settings,
) -> tuple[SpeechLM, list[dict]]:
    """Train ``target``'s layers, norm and head on pairs, in place -> (its SpeechLM, log rows).

    strength: how far the weights go from where they began to where training ends; between the two
    lies more than at either end (Wortsman et al. 2022).
    """
    trainer, lm = PreferenceTrainer(target, **settings), target.lm
    train, dev = trainer.with_reference(train), trainer.with_reference(dev)
    lm.requires_grad_(False)
    parts = [p.requires_grad_() for part in (lm.model.layers, lm.model.norm, lm.head) for p in part.parameters()]
    begun = [p.detach().clone() for p in parts]
    rows = fit(trainer, [{"params": parts}], trainer.loss, train, lambda p: len(p.worse), schedule, checkpoint, dev, log)
    with torch.no_grad():
        for now, was in zip(parts, begun, strict=True):
            now.copy_(was + strength * (now - was))
    return lm.eval(), rows
