"""What to decode, what came of it, and where the time went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from ..errors import InputError, check_number
from .sampling import Law, Sampler

PHASES = ("prefill", "draft", "verify", "rest")
VERIFICATIONS = ("token", "block")


class NumericsError(InputError):
    """The model's logits are NaN, or leave no token to draw."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What to decode; checked here and nowhere else (InputError).

    sampler       how a step samples; a ``Law`` in its place bans what it bans itself (min_tokens is 0 then)
    max_tokens    the sequence is at most so long (the last drafts are shortened)
    stop_ids      tokens that end the sequence; they do not stand in the result
    min_tokens    banned_ids are banned, for draft and target, at positions below this
    banned_ids    None: all stop_ids
    draft_length  L_d, the paper's 3
    tolerance     beta of Eq. 5, the paper's 0.4; 0 keeps the target's distribution
    rule          a ``Rule`` that judges in place of Tolerance(tolerance), such as those of ``rules.py``
    verification  token: each drafted token by itself, as in the paper; block: all jointly (tolerance 0 only)
    confidence    0: always L_d tokens are drafted; above: fewer where the draft trusts them less (``Stepwise``)
    """

    sampler: Sampler | Law = field(default_factory=Sampler)
    max_tokens: int
    min_tokens: int = 0
    stop_ids: tuple[int, ...]
    banned_ids: tuple[int, ...] | None = None
    draft_length: int = 3
    tolerance: float = 0.4
    rule: object | None = None
    verification: str = "token"
    confidence: float = 0.0

    def __post_init__(self):
        if not (isinstance(self.sampler, Sampler) or callable(self.sampler)):
            raise InputError(f"sampler is {self.sampler!r}; it must be a Sampler.")
        check_number("max_tokens", self.max_tokens, 1, 1_000_000, whole=True)
        longest = self.max_tokens if isinstance(self.sampler, Sampler) else 0
        check_number("min_tokens", self.min_tokens, 0, longest, whole=True)
        for name, ids in (("stop_ids", self.stop_ids), ("banned_ids", self.banned)):
            if not isinstance(ids, tuple):
                raise InputError(f"{name} is {ids!r}; it must be a tuple of token ids.")
            for token in ids:
                check_number(f"a token of {name}", token, 0, 10_000_000, whole=True)
        check_number("draft_length", self.draft_length, 1, 64, whole=True)
        check_number("tolerance", self.tolerance, 0.0, 1.0)
        if self.rule is not None and not (hasattr(self.rule, "accept") and hasattr(self.rule, "residual")):
            raise InputError(f"rule is {self.rule!r}; it must have the methods accept and residual of a Rule.")
        check_number("confidence", self.confidence, 0.0, 1.0)
        if self.verification not in VERIFICATIONS:
            raise InputError(f"verification is {self.verification!r}; it must be {' or '.join(VERIFICATIONS)}.")
        if self.verification == "block" and self.rule is not None:
            raise InputError(f"rule is {self.rule!r}; block verification has a rule of its own: leave rule out.")
        if self.verification == "block" and self.tolerance:
            raise InputError(f"tolerance is {self.tolerance}; with block verification, which is exact, it must be 0.")

    @property
    def banned(self) -> tuple[int, ...]:
        """What min_tokens bans: banned_ids, or all stop_ids."""
        return self.stop_ids if self.banned_ids is None else self.banned_ids


def until_stop(tokens: list[int], stop_ids: tuple[int, ...]) -> tuple[list[int], int | None]:
    """Tokens up to the first that stops, that one included -> them, and the stop token, if there is one."""
    at = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
    return (tokens, None) if at is None else (tokens[: at + 1], tokens[at])


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
    rejected  the drafted token that 'resampled' stands in for (block verification may draw that very token again)
    """

    drafted: int
    accepted: int
    emitted: int
    kind: str
    rejected: int | None = None

    @classmethod
    def of(cls, proposal: list[int], accepted: int, emitted: int) -> Round:
        """The round that proposed these tokens and whose verification accepted ``accepted``, cut to ``emitted``."""
        count = len(proposal)
        if emitted <= accepted:
            return cls(count, emitted, emitted, "stopped")
        if accepted < count:
            return cls(count, accepted, emitted, "resampled", proposal[accepted])
        return cls(count, accepted, emitted, "bonus" if count else "sampled")


@dataclass(frozen=True)
class DecodeResult:
    """tokens without the stop token; stopped: by one, rather than by max_tokens; stop: that token.

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
    stop: int | None = None

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
            origin for r in self.rounds for origin in ["accepted"] * r.accepted + [r.kind] * (r.emitted - r.accepted)
        ]
        return tuple(every[: len(self.tokens)])


class Clock:
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
