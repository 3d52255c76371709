"""Which prompt a voice goes on from: the one behind which the target says a text best.

A small target makes more slips behind some prompts than behind others. So each of several prompts
is tried: the target says the development sentences behind it, as it is deployed, and a judge, the
codec's CTC phone head, counts the phone errors of the speech tokens. No sound is made and no ASR
listens.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from . import checkpoints, experiment
from .codec import Codec
from .draft_data import Example, Target, data_sha256
from .sampling import draw, probabilities
from .text import SYMBOLS, plain_phones, prompt
from .training import PhoneHead, Utterance, edit_distance


def behind(before: Utterance, name: str, phones: list[int]) -> Example:
    """A text to be said behind the prompt ``before``, in its voice."""
    whole = np.array(prompt(phones, before.voice, before.phones), np.int32)
    edge, spoken = len(whole) - len(phones) - 1, np.array(before.codes[0], np.int32)
    return Example(name, whole[edge:], spoken[:0], whole[:edge], spoken)


def rank_prompts(
    target: Target, candidates: list[Utterance], texts: list[tuple[str, list[int]]], finalists: int, **around
) -> list[tuple[Utterance, dict[str, float]]]:
    """Prompts of one voice, the best first: ``slips`` of what the target says behind each, fewest phone errors.

    texts: (name, phones). All candidates say every third text; the ``finalists`` best of them say the rest
    too, and come before the others. around: as ``takes`` has it.
    """

    def said(candidate: Utterance, some: list) -> list[tuple[Example, int]]:
        asked = [behind(candidate, f"{name}/{candidate.id}", phones) for name, phones in some]
        return takes(target, asked, **around)

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
    judge: PhoneHead,
    codec: Codec,
    path: Path,
    seed: int = 0,
    batch: int = 64,
) -> list[tuple[Example, int]]:
    """What the target says to ``asked``, with its phone errors; ``path`` keeps the batches, none is made again.

    A batch depends on (target, texts, seed, its number) alone. In bf16, which halves the time and
    moves the law by no more than rounding.
    """
    order = sorted(asked, key=lambda one: (len(one.text), one.id))
    whole = {"target": checkpoints.weights_sha256(target.lm), "texts": data_sha256(order), "seed": seed, "batch": batch}
    key = experiment.key(whole | {"sampler": asdict(target.config(1).sampler)})
    experiment.drop_half_line(path)
    quick = replace(target, lm=copy.deepcopy(target.lm).cast("bf16"))
    known = {row["number"]: row["said"] for row in experiment.read_rows(path) if row["key"] == key}
    for number in range(-(-len(order) // batch)):
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
