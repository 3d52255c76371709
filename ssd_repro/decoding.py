"""Autoregressive and speculative decoding: one loop, frozen config in, frozen result out.

SYMBOLS: p is the DRAFT, q the TARGET; L_d is ``draft_length``, beta ``tolerance``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .acceptance import verify
from .drafting import Drafter, LanguageModel, ModelDrafter, Tape
from .errors import InputError
from .sampling import Sampler, check_number

PHASES = ("prefill", "draft", "verify", "rest")


class NumericsError(InputError):
    """The model's logits are NaN, or leave no token to draw."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What to decode; checked here and nowhere else (InputError).

    max_tokens    the sequence is at most so long (the last drafts are shortened)
    stop_ids      tokens that end the sequence; they do not stand in the result
    min_tokens    banned_ids are banned, for draft and target, at positions below this
    banned_ids    None: all stop_ids
    draft_length  L_d, the paper's 3
    tolerance     beta of Eq. 5, the paper's 0.4; 0 keeps the target's law
    """

    sampler: Sampler = field(default_factory=Sampler)
    max_tokens: int
    min_tokens: int = 0
    stop_ids: tuple[int, ...]
    banned_ids: tuple[int, ...] | None = None
    draft_length: int = 3
    tolerance: float = 0.4

    def __post_init__(self):
        if not isinstance(self.sampler, Sampler):
            raise InputError(f"sampler is {self.sampler!r}; it must be a Sampler.")
        check_number("max_tokens", self.max_tokens, 1, 1_000_000, whole=True)
        check_number("min_tokens", self.min_tokens, 0, self.max_tokens, whole=True)
        for name, ids in (("stop_ids", self.stop_ids), ("banned_ids", self.banned)):
            if not isinstance(ids, tuple):
                raise InputError(f"{name} is {ids!r}; it must be a tuple of token ids.")
            for token in ids:
                check_number(f"a token of {name}", token, 0, 10_000_000, whole=True)
        check_number("draft_length", self.draft_length, 1, 64, whole=True)
        check_number("tolerance", self.tolerance, 0.0, 1.0)

    @property
    def banned(self) -> tuple[int, ...]:
        """What min_tokens bans: banned_ids, or all stop_ids."""
        return self.stop_ids if self.banned_ids is None else self.banned_ids


@dataclass(frozen=True)
class Round:
    """One round: at most one draft and one call of the target.

    drafted   tokens the draft proposed
    accepted  drafted tokens that stand in the sequence, an accepted stop token included. What
              was drafted after that stop counts as drafted and not as accepted: it was worth
              nothing.
    emitted   accepted + the token that the target added, if any (a stop token included)
    kind      that token: 'resampled' after a rejection, 'bonus' after a full acceptance,
              'sampled' where nothing was drafted; 'stopped' if an accepted stop came first
    rejected  the drafted token that 'resampled' stands in for
    """

    drafted: int
    accepted: int
    emitted: int
    kind: str
    rejected: int | None = None


@dataclass(frozen=True)
class DecodeResult:
    """tokens without the stop token; stopped: by one, rather than by max_tokens.

    target_calls and draft_calls count forward passes, the prefill among them. seconds:
    prefill, draft, verify (the target's forwards, the sampling and the judging) and rest, by
    CUDA events on a CUDA device; the time inside on_tokens (or of ``stream``'s consumer) is in none of them.
    """

    tokens: tuple[int, ...]
    stopped: bool
    rounds: tuple[Round, ...]
    target_calls: int
    draft_calls: int
    seconds: dict[str, float]

    @property
    def drafted(self) -> int:
        return sum(r.drafted for r in self.rounds)

    @property
    def accepted(self) -> int:
        return sum(r.accepted for r in self.rounds)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafted tokens / drafted tokens; resampled and bonus tokens are neither."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_target_call(self) -> float:
        """Tokens, a stop token included, for each forward of the target; 1 if autoregressive."""
        return sum(r.emitted for r in self.rounds) / self.target_calls

    @property
    def lm_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def origins(self) -> tuple[str, ...]:
        """Of each token: 'accepted', 'resampled', 'bonus' or 'sampled'."""
        every = [
            origin
            for r in self.rounds
            for origin in ["accepted"] * r.accepted + [r.kind] * (r.emitted - r.accepted)
        ]
        return tuple(every[: len(self.tokens)])


OnTokens = Callable[[list[int]], None]


def autoregressive(
    target: LanguageModel,
    prefix: Tensor,
    config: DecodeConfig,
    generator: torch.Generator,
    on_tokens: OnTokens | None = None,
) -> DecodeResult:
    """One token for each call of the target: rounds without a draft.

    prefix: embeddings (1, T, hidden); generator: on the prefix's device; on_tokens is called
    with each round's new speech tokens. NumericsError if the logits turn NaN.
    """
    return _collect(stream(target, None, prefix, config, generator), on_tokens)


def speculative(
    target: LanguageModel,
    draft: LanguageModel | Callable[[Tensor], Drafter],
    prefix: Tensor,
    config: DecodeConfig,
    generator: torch.Generator,
    on_tokens: OnTokens | None = None,
    draft_prefix: Tensor | None = None,
) -> DecodeResult:
    """Algorithm 1: the draft proposes config.draft_length tokens, one call of the target judges them.

    draft: a language model, or a function from a prefix to a Drafter; it gets draft_prefix
    where that differs from the target's. The rest as in ``autoregressive``. After each round
    the target's cache holds the prefix and all tokens but the newest, the draft's what
    ``ModelDrafter`` says.
    """
    return _collect(stream(target, draft, prefix, config, generator, draft_prefix), on_tokens)


def _collect(rounds: Generator[list[int], None, DecodeResult], on_tokens: OnTokens | None) -> DecodeResult:
    while True:
        try:
            tokens = next(rounds)
        except StopIteration as end:
            return end.value
        if on_tokens:
            on_tokens(tokens)


def stream(
    target: LanguageModel,
    draft: LanguageModel | Callable[[Tensor], Drafter] | None,
    prefix: Tensor,
    config: DecodeConfig,
    generator: torch.Generator,
    draft_prefix: Tensor | None = None,
) -> Generator[list[int], None, DecodeResult]:
    """``speculative``, or ``autoregressive`` where draft is None, as a generator.

    Yields each round's new speech tokens (one or more) as soon as they are final; returns
    the result. Time spent by the consumer is in no phase's seconds.
    """
    _check_room(target, prefix, config)
    make_drafter = None
    if draft is not None:
        own = prefix if draft_prefix is None else draft_prefix
        _check_room(draft, own, config)
        make = partial(ModelDrafter, draft) if hasattr(draft, "session") else draft
        make_drafter = partial(make, own)
    return _rounds(target, make_drafter, prefix, config, generator)


@torch.inference_mode()  # of a generator it holds while the generator runs, not for its consumer
def _rounds(
    target: LanguageModel,
    make_drafter: Callable[[], Drafter] | None,
    prefix: Tensor,
    config: DecodeConfig,
    generator: torch.Generator,
) -> Generator[list[int], None, DecodeResult]:
    """The loop. The first token comes from the prefill; one host read a round (``_judge``)."""
    clock = _Clock(prefix.device)
    session = target.session()
    logits = session.prefill(prefix)  # (1, V)
    start, target_calls = session.length, 1
    tape = _tape(config, logits)
    drafter = make_drafter() if make_drafter else None
    clock.lap("prefill")

    tokens: list[int] = []
    rounds: list[Round] = []
    stopped = False
    while not stopped and tape.size < config.max_tokens:
        room = config.max_tokens - tape.size - 1  # besides the token that the target adds
        count = min(config.draft_length, room) if drafter and rounds else 0
        drafted, p = tape.tokens(tape.size, tape.size), logits[:0].float()
        if count:
            drafted, p = drafter.propose(tape, count, generator)
        clock.lap("draft")
        if rounds:
            logits = session.extend(tape.tokens(tape.size - 1, tape.size + count)[None])[0]
            target_calls += 1
        q = tape.law(logits, tape.size)  # (count + 1, V)
        accepted, proposal, news = _judge(p, q, drafted, tape, config, generator)
        clock.lap("verify")

        stop = next((i for i, token in enumerate(news) if token in config.stop_ids), None)
        stopped = stop is not None
        if stopped:
            news = news[: stop + 1]
        rounds.append(_round(proposal, accepted, len(news)))
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
    draft_calls = drafter.calls if drafter else 0
    return DecodeResult(tuple(tokens), stopped, tuple(rounds), target_calls, draft_calls, clock.seconds())


def _check_room(model, prefix: Tensor, config: DecodeConfig) -> None:
    """InputError, before any work, if the model's caches (static.StaticLM) are too short for this."""
    limit, needed = getattr(model, "max_length", None), prefix.shape[1] + config.max_tokens
    if limit is not None and needed > limit:
        raise InputError(
            f"a prefix of {prefix.shape[1]} positions and max_tokens {config.max_tokens} need {needed} "
            f"positions; the static cache has max_length {limit}: make it larger, or max_tokens smaller."
        )


def _tape(config: DecodeConfig, logits: Tensor) -> Tape:
    """An empty tape for logits (1, V); InputError if a stop or banned token is outside the vocabulary."""
    vocab = logits.shape[-1]
    for name, ids in (("stop_ids", config.stop_ids), ("banned_ids", config.banned)):
        if max(ids, default=0) >= vocab:
            raise InputError(f"{name} has {max(ids)}; the model's token ids end at {vocab - 1}.")
    mask = torch.zeros(vocab, dtype=torch.bool)
    mask[list(config.banned)] = True
    return Tape(config.sampler, config.max_tokens, mask.to(logits.device), config.min_tokens)


def _judge(
    p: Tensor, q: Tensor, drafted: Tensor, tape: Tape, config: DecodeConfig, generator
) -> tuple[int, list[int], list[int]]:
    """Verify, and read the round's ONE report on the host.

    -> accepted count n, drafted tokens, new tokens (n accepted + 1); the tape holds the new
    ones. NumericsError if p (L, V) or q (L+1, V) holds a NaN.
    """
    accepted, added = verify(p, q, drafted, config.tolerance, generator)
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


def _round(proposal: list[int], accepted: int, emitted: int) -> Round:
    """The record of a round whose verification accepted ``accepted``, cut to ``emitted`` tokens."""
    count = len(proposal)
    if emitted <= accepted:
        return Round(count, emitted, emitted, "stopped")
    if accepted < count:
        return Round(count, accepted, emitted, "resampled", proposal[accepted])
    return Round(count, accepted, emitted, "bonus" if count else "sampled")


class _Clock:
    """Marks the phases as they go by and adds them up at the end: nothing waits in between.

    On CUDA the marks are events in the device's stream, so a phase lasts from the end of the
    work before it to the end of its own; elsewhere they are the host's time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks = [(None, self._mark())]

    def _mark(self) -> _HostMark | torch.cuda.Event:
        if self.device.type != "cuda":
            return _HostMark()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def lap(self, phase: str | None) -> None:
        """Book the time since the last lap under ``phase``; None: nowhere."""
        self.marks.append((phase, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Of each of PHASES; waits for the last mark."""
        self.marks[-1][1].synchronize()
        total = dict.fromkeys(PHASES, 0.0)
        for (_, start), (phase, end) in pairwise(self.marks):
            if phase is not None:
                total[phase] += start.elapsed_time(end) / 1000
        return total


class _HostMark:
    """Now on the host's clock, read like a torch.cuda.Event."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _HostMark) -> float:
        return 1000 * (end.at - self.at)
