"""Speech speculative decoding, from top to bottom: Eq. 5, Eq. 6, verify (token by token, or jointly), draft, the loop.

GLOSSARY, in the paper's symbols (Leviathan et al. and several libraries use p and q the other way round):

    p            the DRAFT's distribution, as it is really sampled from (temperature, top-k, top-p, RAS)
    q            the TARGET's, through the same sampler
    L_d          ``draft_length``: tokens that the draft proposes in a round, with a ``confidence`` at most
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
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .drafters import Drafter, LanguageModel, Session, Stepwise, Tape
from .result import Clock, DecodeConfig, DecodeResult, NumericsError, Round, until_stop
from .sampling import draw, on_host

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
    """When to keep a drafted token, and what to draw in its place.

    It may have a method ``forgive(kept, q)`` -> kept, bool (..., L) both: what stands in spite of its rejection.
    """

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

    p (L, V): what the draft sampled tokens (L,) from; q (L+1, V): the target's. n: how many drafted tokens are accepted
    before the first rejection; next: the token after them, resampled from the residual (n < L) or the bonus token from
    q_(L+1) (n = L). With L = 0 it is a plain step of the target.
    """
    if not len(tokens):
        return tokens.new_zeros(()), draw(q[0], generator)
    n, rest = settle(p, q, tokens, rule, torch.rand(tokens.shape, generator=generator, device=p.device))
    return n, draw(rest, generator)


def settle(p: Tensor, q: Tensor, tokens: Tensor, rule: Rule, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """p (..., L, V), q (..., L+1, V), tokens and draws of [0, 1) (..., L) -> n (...), and what next is drawn from."""
    kept = uniform < rule.accept(p, q[..., :-1, :], tokens)
    kept = rule.forgive(kept, q[..., :-1, :]) if hasattr(rule, "forgive") else kept
    n = kept.long().cumprod(-1).sum(-1)
    ended = n[..., None, None].expand(*n.shape, 1, q.shape[-1])  # an index tensor: p[n] would read n on the host
    drafted = F.pad(p, (0, 0, 0, 1))  # past the draft p = 0: the residual is q
    return n, rule.residual(drafted.gather(-2, ended), q.gather(-2, ended))[..., 0, :]


def verify_block(p: Tensor, q: Tensor, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``verify`` without tolerance, but for all drafted tokens jointly: Sun et al. 2024 (arXiv 2403.10444), Alg. 2.

    Exact, and in expectation no fewer tokens are accepted than by ``verify``: the longest prefix x_1 .. x_i that is
    kept with its chance h_i stands, also where a token inside it would have been rejected. After it comes a token of
    normalize(max(0, b_i q_(i+1) - p_(i+1))), b and h of ``joint_acceptance``. Why: from the end of the draft
    backwards, i or more tokens stand with the chance b_i, given that x_1 .. x_i were drafted. So of the probability
    b_i q_(i+1)(x), due to x after them, drafting x pays min(b_i q, p) and the residual the rest.
    """
    if tokens.shape[0] < 2:
        return verify(p, q, tokens, Tolerance(0.0), generator)  # the same for one token
    joint, chance = joint_acceptance(p, q, tokens)
    kept = torch.rand(chance.shape, generator=generator, device=p.device) < chance
    n = (kept * torch.arange(1, len(kept) + 1, device=p.device)).max()
    ended = n[None]
    drafted = torch.cat((p, torch.zeros_like(p[:1])))
    due = joint.index_select(0, ended)[:, None] * q.index_select(0, ended)
    return n, draw(residual(drafted.index_select(0, ended), due)[0], generator)


def joint_acceptance(p: Tensor, q: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """b (L+1,): b_0 = 1, b_i = min(1, b_(i-1) q_i(x_i) / p_i(x_i)); and h (L,) of i = 1 .. L, as in ``verify_block``.

    h_i = S / (S + (1 - b_i)), S the sum of max(0, b_i q_(i+1) - p_(i+1)); past the draft p = 0, so h_L = b_L.
    """
    tiny = torch.finfo(p.dtype).tiny
    p_x, q_x = (each.gather(-1, tokens[:, None])[:, 0] for each in (p, q[:-1]))
    joint = [torch.ones_like(p_x[0])]
    for ratio in q_x / p_x.clamp_min(tiny):
        joint.append((joint[-1] * ratio).clamp_max(1.0))
    b = torch.stack(joint)
    following = torch.cat((p[1:], torch.zeros_like(p[:1])))
    left = (b[1:, None] * q[1:] - following).clamp_min(0.0).sum(-1)
    return b, left / (left + (1 - b[1:])).clamp_min(tiny)


# ---------------------------------------------------------------------------------- draft


class ModelDrafter(Stepwise):
    """Drafts with a language model of its own.

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

    def step(self, tape: Tape, position: int) -> Tensor:
        missing = tape.tokens(self.session.length - self.start, position)
        self.calls += 1
        return self.session.extend(missing[None])[0, -1:]

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
    a static cache is too short, or for adaptive drafts on a GPU.
    """
    if draft is not None and config.confidence and not on_host(prefix):
        raise InputError(
            f"confidence is {config.confidence} and the device {prefix.device}: set it to 0, adaptive drafts are for "
            "CPUs, for on a GPU each drafted token would wait to be read."
        )
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
    """The loop. The first token comes from the prefill; one host read a round (``_read``)."""
    clock = Clock(prefix.device)
    session = target.session()
    logits = session.prefill(prefix)  # (1, V)
    start, target_calls = session.length, 1
    blocks = getattr(session, "blocks", Blocks)(config, logits, generator)
    tape = blocks.tape
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
            drafted, p = blocks.propose(drafter, count)  # (n,), (n, V), n <= count
        clock.lap("draft")

        if rounds:
            report = blocks.judge(session, drafted, p)
            target_calls += 1
        else:
            report = judge(logits, drafted, p, tape, config, blocks.generator)
        accepted, proposal, news = _read(report, tape)
        clock.lap("verify")

        news, stop_token = until_stop(news, config.stop_ids)
        stopped = stop_token is not None
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
    blocks.close()
    calls = target_calls, drafter.calls if drafter else 0
    return DecodeResult(tuple(tokens), stopped, tuple(rounds), *calls, clock.seconds(), stop_token)


class Blocks:
    """The two blocks of a round, on one sequence's tape; a runtime may record them and play them back.

    Nothing in a block depends on what the host has read since the block began.
    """

    def __init__(self, config: DecodeConfig, logits: Tensor, generator: torch.Generator) -> None:
        """logits (1, V): the prefill's."""
        self.config, self.generator, self.tape = config, generator, Tape.empty(config, logits)

    def propose(self, drafter: Drafter, count: int) -> tuple[Tensor, Tensor]:
        """As ``Drafter.propose``."""
        return drafter.propose(self.tape, count, self.generator)

    def judge(self, session: Session, drafted: Tensor, p: Tensor) -> Tensor:
        """The target's one forward over the newest token and the drafted ones (n,), and ``judge``: its report."""
        tape = self.tape
        logits = session.extend(tape.tokens(tape.size - 1, tape.size + len(drafted))[None])[0]
        return judge(logits, drafted, p, tape, self.config, self.generator)

    def close(self) -> None:
        """The sequence is at its end."""


def judge(
    logits: Tensor, drafted: Tensor, p: Tensor, tape: Tape, config: DecodeConfig, generator: torch.Generator
) -> Tensor:
    """Verify drafted (n,), from p (n, V), by the target's logits (n + 1, V) -> the round's ONE report for the host.

    int64 (3 + n,): whether p or q holds a NaN, how many are accepted, the token after them, and the drafted ones.
    """
    q = tape.probabilities(logits, tape.size)
    if config.verification == "block":
        accepted, added = verify_block(p, q, drafted, generator)
    else:
        accepted, added = verify(p, q, drafted, config.rule or Tolerance(config.tolerance), generator)
    broken = (p.sum() + q.sum()).isnan()  # NaN rows of logits stay NaN rows
    return torch.cat((torch.stack((broken, accepted, added)), drafted))


def _read(report: Tensor, tape: Tape) -> tuple[int, list[int], list[int]]:
    """The report on the host -> accepted count n, drafted tokens, new tokens (n accepted + 1).

    The tape then holds the new ones. NumericsError if p or q held a NaN.
    """
    broken, n, token, *proposal = report.tolist()
    if broken:
        raise NumericsError(
            f"the model's logits are not numbers (NaN), or leave nothing to draw, at speech token {tape.size}; "
            "check its weights and its precision."
        )
    tape.write(tape.size + n, report[2])
    return n, proposal, [*proposal[:n], token]


def _check_room(model, prefix: Tensor, config: DecodeConfig) -> None:
    """InputError, before any work, if the model's caches have a fixed length that is too short for this."""
    limit, needed = getattr(model, "max_length", None), prefix.shape[1] + config.max_tokens
    if limit is not None and needed > limit:
        raise InputError(
            f"a prefix of {prefix.shape[1]} positions and max_tokens {config.max_tokens} need {needed} "
            f"positions; the static cache has max_length {limit}: make it larger, or max_tokens smaller."
        )
