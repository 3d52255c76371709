"""Speech speculative decoding, from top to bottom: Eq. 5, Eq. 6, verify, draft a block, the loop.

GLOSSARY, in the paper's symbols (Leviathan et al. and several libraries use p and q the other way round):

    p            the DRAFT's distribution, as it is really sampled from (temperature, top-k, top-p, RAS)
    q            the TARGET's, through the same sampler
    L_d          ``draft_length``: tokens that the draft proposes in a round
    beta         ``tolerance``: added to the acceptance probability; 0 keeps the target's distribution
    accepted     a drafted token that the target kept
    resampled    the token drawn in place of the first rejected one, from the residual max(0, q - p)
    bonus        the target's own token after a round in which every drafted token was accepted
    sampled      a token of the target where nothing was drafted: the first one, or all of them without a draft
    round        one draft of L_d tokens and one forward of the target, which judges them all in parallel

Rollback is one number: a session is cropped to the positions that the accepted tokens fill.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError
from .drafters import Drafter, LanguageModel, Session, Tape
from .result import Clock, DecodeConfig, DecodeResult, NumericsError, Round
from .sampling import draw

# ------------------------------------------------------------------------------ acceptance


def accept_probability(p: Tensor, q: Tensor, tokens: Tensor, tolerance: float) -> Tensor:
    """Eq. 5: min(1, q(x)/p(x)) + beta, at most 1. p, q (..., V), tokens x (...) -> (...).

    Where p(x) = 0 (a token that the draft cannot have drawn) the ratio is 0 if q(x) = 0, else 1.
    """
    p_x = p.gather(-1, tokens[..., None])[..., 0]
    q_x = q.gather(-1, tokens[..., None])[..., 0]
    ratio = (q_x / p_x.clamp_min(torch.finfo(p.dtype).tiny)).clamp_max(1.0)
    return (ratio + tolerance).clamp_max(1.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Eq. 6: normalize(max(0, q - p)), (..., V); q itself where that is zero everywhere."""
    excess = (q - p).clamp_min(0.0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > 0, excess / total, q)


class Rule(Protocol):
    """An acceptance rule: when to keep a drafted token, and what to draw in its place."""

    def accept(self, p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
        """Probability to keep tokens (...), given p, q (..., V) -> (...)."""

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        """The distribution after a rejection, (..., V); it must be q where p is zero everywhere."""


@dataclass(frozen=True)
class Tolerance:
    """The paper's rule with tolerance factor beta in [0, 1]; 0 is lossless speculative sampling."""

    beta: float

    def accept(self, p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
        return accept_probability(p, q, tokens, self.beta)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return residual(p, q)


def verify(p: Tensor, q: Tensor, tokens: Tensor, rule: Rule, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Judge one round (Algorithm 1) -> (n, next), 0-dim int64 on the device, no host synchronisation.

    p (L, V): what the draft sampled tokens (L,) from; q (L+1, V): the target's. n: how many
    drafted tokens are accepted before the first rejection; next: the token after them,
    resampled from the residual (n < L) or the bonus token from q_(L+1) (n = L). With L = 0
    it is a plain step of the target.
    """
    length = tokens.shape[0]
    if length == 0:
        return tokens.new_zeros(()), draw(q[0], generator)
    uniform = torch.rand(length, generator=generator, device=p.device)  # [0, 1)
    kept = uniform < rule.accept(p, q[:-1], tokens)
    n = kept.long().cumprod(0).sum()
    ended = n[None]  # an index tensor: p[n] would read n on the host
    drafted = torch.cat((p, torch.zeros_like(p[:1])))  # past the draft p = 0: the residual is q
    rest = rule.residual(drafted.index_select(0, ended), q.index_select(0, ended))
    return n, draw(rest[0], generator)


# ---------------------------------------------------------------------------------- draft


class ModelDrafter:
    """Drafts a block with a language model, one token after another, through the target's sampler.

    INVARIANT, between rounds, with T prefix positions and ``size`` tokens on the tape: the
    cache holds the prefix and tokens 0 .. size-2; after a full acceptance 0 .. size-3,
    because the last drafted token was never fed. The next round's first forward feeds what
    is missing, one token or two: cheaper than a forward of its own.
    """

    def __init__(self, model: LanguageModel, prefix: Tensor, target: Session | None = None) -> None:
        """Prefills the model with prefix (1, T, hidden); ``target`` is not looked at."""
        self.session = model.session()
        self.session.prefill(prefix)
        self.start = self.session.length
        self.calls = 1

    def propose(self, tape: Tape, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        first, p = tape.size, []
        for position in range(first, first + count):
            missing = tape.tokens(self.session.length - self.start, position)
            logits = self.session.extend(missing[None])[0, -1:]
            p.append(tape.probabilities(logits, position))
            tape.write(position, draw(p[-1][0], generator))
        self.calls += count
        return tape.tokens(first, first + count), torch.cat(p)

    def rollback(self, size: int) -> None:
        self.session.crop(min(self.session.length, self.start + size - 1))


# ----------------------------------------------------------------------------------- loop

MakeDrafter = Callable[[Tensor, Session], Drafter]
OnTokens = Callable[[list[int]], None]


def autoregressive(
    target: LanguageModel,
    prefix: Tensor,
    config: DecodeConfig,
    generator: torch.Generator,
    on_tokens: OnTokens | None = None,
) -> DecodeResult:
    """One token for each forward of the target: rounds without a draft. Arguments as in ``speculative``."""
    return collect(stream(target, None, prefix, config, generator), on_tokens)


def speculative(
    target: LanguageModel,
    draft: LanguageModel | MakeDrafter,
    prefix: Tensor,
    config: DecodeConfig,
    generator: torch.Generator,
    on_tokens: OnTokens | None = None,
) -> DecodeResult:
    """Algorithm 1: the draft proposes config.draft_length tokens, one forward of the target judges them.

    draft      a language model, or a function from prefix and prefilled target session to a Drafter
    prefix     embeddings (1, T, hidden), for target and draft alike
    generator  on the prefix's device; the same state gives the same tokens
    on_tokens  called with each round's new speech tokens

    After each round the target's cache holds the prefix and all tokens but the newest, the
    draft's what ``ModelDrafter`` says. NumericsError if the logits turn NaN.
    """
    return collect(stream(target, draft, prefix, config, generator), on_tokens)


def collect(rounds: Generator[list[int], None, DecodeResult], on_tokens: OnTokens | None = None) -> DecodeResult:
    """Run ``stream`` to its end."""
    while True:
        try:
            tokens = next(rounds)
        except StopIteration as end:
            return end.value
        if on_tokens:
            on_tokens(tokens)


def stream(
    target: LanguageModel,
    draft: LanguageModel | MakeDrafter | None,
    prefix: Tensor,
    config: DecodeConfig,
    generator: torch.Generator,
) -> Generator[list[int], None, DecodeResult]:
    """``speculative``, or ``autoregressive`` where draft is None, as a generator.

    Yields each round's new speech tokens (one or more) as soon as they are final; returns
    the result. Time spent by the consumer is in no phase's seconds. InputError, before any work, if
    a static cache is too short.
    """
    _check_room(target, prefix, config)
    make_drafter = None
    if draft is not None:
        _check_room(draft, prefix, config)
        make_drafter = partial(ModelDrafter, draft) if hasattr(draft, "session") else draft
    return _rounds(target, make_drafter, prefix, config, generator)


@torch.inference_mode()  # of a generator it holds while the generator runs, not for its consumer
def _rounds(
    target: LanguageModel,
    make_drafter: MakeDrafter | None,
    prefix: Tensor,
    config: DecodeConfig,
    generator: torch.Generator,
) -> Generator[list[int], None, DecodeResult]:
    """The loop. The first token comes from the prefill; one host read a round (``_judge``)."""
    clock = Clock(prefix.device)
    session = target.session()
    logits = session.prefill(prefix)  # (1, V)
    start, target_calls = session.length, 1
    tape = Tape.empty(config, logits)
    drafter = make_drafter(prefix, session) if make_drafter else None
    clock.lap("prefill")

    tokens: list[int] = []
    rounds: list[Round] = []
    stopped, stop_token = False, None
    while not stopped and tape.size < config.max_tokens:
        room = config.max_tokens - tape.size - 1  # besides the token that the target adds
        count = min(config.draft_length, room) if drafter and rounds else 0
        drafted, p = tape.tokens(tape.size, tape.size), logits[:0].float()
        if count:
            drafted, p = drafter.propose(tape, count, generator)  # (count,), (count, V)
        clock.lap("draft")

        if rounds:
            logits = session.extend(tape.tokens(tape.size - 1, tape.size + count)[None])[0]
            target_calls += 1
        q = tape.probabilities(logits, tape.size)  # (count + 1, V)
        accepted, proposal, news = _judge(p, q, drafted, tape, config, generator)
        clock.lap("verify")

        stop = next((i for i, token in enumerate(news) if token in config.stop_ids), None)
        stopped = stop is not None
        if stopped:
            news, stop_token = news[: stop + 1], news[stop]
        rounds.append(Round.of(proposal, accepted, len(news)))
        tape.size += len(news)
        session.crop(start + tape.size - 1)
        if drafter:
            drafter.rollback(tape.size)
        speech = news[:-1] if stopped else news
        tokens += speech
        clock.lap("rest")
        if speech:
            yield speech
            clock.lap(None)
    calls = target_calls, drafter.calls if drafter else 0
    return DecodeResult(tuple(tokens), stopped, tuple(rounds), *calls, clock.seconds(), stop_token)


def _judge(
    p: Tensor, q: Tensor, drafted: Tensor, tape: Tape, config: DecodeConfig, generator: torch.Generator
) -> tuple[int, list[int], list[int]]:
    """Verify, and read the round's ONE report on the host.

    -> accepted count n, drafted tokens, new tokens (n accepted + 1); the tape holds the new
    ones. NumericsError if p (L, V) or q (L+1, V) holds a NaN.
    """
    accepted, added = verify(p, q, drafted, config.rule or Tolerance(config.tolerance), generator)
    broken = (p.sum() + q.sum()).isnan()  # NaN rows of logits stay NaN rows
    report = torch.cat((torch.stack((broken, accepted, added)), drafted))
    broken, n, token, *proposal = report.tolist()
    if broken:
        raise NumericsError(
            f"the model's logits are not numbers (NaN), or leave nothing to draw, at speech token {tape.size}; "
            "check its weights and its precision."
        )
    tape.write(tape.size + n, added)
    return n, proposal, [*proposal[:n], token]


def _check_room(model, prefix: Tensor, config: DecodeConfig) -> None:
    """InputError, before any work, if the model's caches have a fixed length that is too short for this."""
    limit, needed = getattr(model, "max_length", None), prefix.shape[1] + config.max_tokens
    if limit is not None and needed > limit:
        raise InputError(
            f"a prefix of {prefix.shape[1]} positions and max_tokens {config.max_tokens} need {needed} "
            f"positions; the static cache has max_length {limit}: make it larger, or max_tokens smaller."
        )
