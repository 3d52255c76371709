"""Several sequences at once: the rounds of ``speculative.py``, row by row ragged, by one forward for all of them.

What a row says depends on its own prefix, lengths and generator alone (beyond rounding), and has the distribution that
it has by itself: its random numbers are drawn before the first round, by its own generator. A row that has ended idles
until half of the rows have; then they leave the batch.

One thing differs from the loop of one sequence: there the last drafts are shortened to what max_tokens leaves room for,
here a row drafts on and is cut. The tokens that stay have the same distribution at tolerance 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError
from .result import Clock, DecodeConfig, DecodeResult, NumericsError, Round, until_stop
from .sampling import Sampler, invert, probabilities
from .speculative import Tolerance, settle

OWN = ("max_tokens", "min_tokens")  # what rows of one batch may differ in


class BatchSession(Protocol):
    """B sequences with their caches; ``lengths`` (B,) int64 counts the positions of each, and may be set to fewer."""

    lengths: Tensor

    def extend(self, tokens: Tensor) -> Tensor:
        """Feed speech tokens (B, n) -> logits (B, n, V), what follows each; lengths grow by n."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, (b,) int64."""


class BatchModel(Protocol):
    def batch(self, prefixes: list[Tensor], room: int) -> tuple[BatchSession, Tensor]:
        """Prefixes (1, T, hidden) and positions for ``room`` tokens after the longest -> session, logits (B, V)."""


@dataclass
class _Row:
    """What the host knows of a sequence."""

    config: DecodeConfig
    tokens: list[int]
    rounds: list[Round]
    stop: int | None = None
    calls: int = 1  # of the target, the prefill among them

    @property
    def ended(self) -> bool:
        return self.stop is not None or len(self.tokens) >= self.config.max_tokens

    def take(self, proposal: list[int], accepted: int, added: int) -> None:
        news = [*proposal[:accepted], added][: self.config.max_tokens - len(self.tokens)]
        news, self.stop = until_stop(news, self.config.stop_ids)
        self.rounds.append(Round.of(proposal, accepted, len(news)))
        self.tokens += news if self.stop is None else news[:-1]


def decode(
    target: BatchModel,
    draft: BatchModel | None,
    prefixes: list[Tensor],
    configs: list[DecodeConfig],
    generators: list[torch.Generator],
) -> list[DecodeResult]:
    """``speculative``, or ``autoregressive`` where draft is None, of B sequences at once -> a result for each.

    Configs may differ in OWN alone; they have a ``Sampler``, token verification and no confidence. ``seconds`` of each
    result are the whole batch's. InputError, before any work, for other configs; NumericsError names the row.
    """
    _check(prefixes, configs, generators)
    return _Batch(target, draft, prefixes, configs, generators).run()


def _check(prefixes: list[Tensor], configs: list[DecodeConfig], generators: list[torch.Generator]) -> None:
    if not prefixes or not len(prefixes) == len(configs) == len(generators):
        counts = f"{len(prefixes)} prefixes, {len(configs)} configs and {len(generators)} generators"
        raise InputError(f"a batch got {counts}: it needs as many of each, at least one")
    same = replace(configs[0], max_tokens=1, min_tokens=0)
    if any(replace(config, max_tokens=1, min_tokens=0) != same for config in configs):
        raise InputError(f"the configs of a batch differ: its sequences may differ in {' and '.join(OWN)} alone")
    if not isinstance(same.sampler, Sampler) or same.confidence or same.verification != "token":
        raise InputError("a batch needs a Sampler, verification 'token' and confidence 0: decode one by one")


class _Batch:
    """The loop's state; tensors have a row for each sequence that is still there, ``rows`` says which.

    cells (b, pad + capacity): the tapes; size (b,): tokens of each; uniform (b, R, 2 L_d + 1): random numbers by round.
    """

    def __init__(self, target, draft, prefixes, configs, generators) -> None:
        self.config, device = configs[0], prefixes[0].device
        self.length = self.config.draft_length if draft else 0
        self.rule = self.config.rule or Tolerance(self.config.tolerance)
        room = max(config.max_tokens for config in configs) + self.length + 1
        self.clock = Clock(device)
        self.session, self.logits = target.batch(prefixes, room)
        self.drafting = draft.batch(prefixes, room)[0] if draft else None
        self.starts = self.session.lengths.clone()
        sampler: Sampler = self.config.sampler
        self.pad = sampler.ras_window if sampler.ras else 1
        self.cells = torch.full((len(configs), self.pad + room), -1, dtype=torch.int64, device=device)
        self.size = self.starts.new_zeros(len(configs))
        self.least = torch.tensor([config.min_tokens for config in configs], device=device)
        self.banned = torch.zeros(self.logits.shape[-1], dtype=torch.bool, device=device)
        self.banned[list(self.config.banned)] = True
        drawn = [self._drawn(config, generator) for config, generator in zip(configs, generators, strict=True)]
        self.uniform = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True).to(device)
        self.done = [_Row(config, [], []) for config in configs]
        self.rows = list(range(len(configs)))
        self.round = 0
        self.clock.lap("prefill")

    def _drawn(self, config: DecodeConfig, generator: torch.Generator) -> Tensor:
        shape = config.max_tokens, 2 * self.length + 1
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)

    @torch.inference_mode()
    def run(self) -> list[DecodeResult]:
        while not all(row.ended for row in self.done):
            drafted, p = self._draft()
            self.clock.lap("draft")
            report = self._judge(drafted, p)
            self._read(report.tolist())
            self.clock.lap("verify")
            self.round += 1
            self._leave()
            self.clock.lap("rest")
        seconds = self.clock.seconds()
        calls = 1 + self.length * (self.round - 1) if self.drafting else 0
        return [
            DecodeResult(
                tuple(row.tokens), row.stop is not None, tuple(row.rounds), row.calls, calls, seconds, row.stop
            )
            for row in self.done
        ]

    def _tokens(self, first: int, count: int) -> Tensor:
        """Tape cells size + first .. size + first + count - 1 of each row, (b, count)."""
        places = self.size[:, None] + self.pad + first + torch.arange(count, device=self.size.device)
        return self.cells.gather(1, places)

    def _probabilities(self, logits: Tensor, first: int) -> Tensor:
        """Logits (b, n, V) for positions size + first .. -> the distribution of each."""
        places = self.size[:, None] + first + torch.arange(logits.shape[1], device=logits.device)
        window = places[..., None] + torch.arange(self.pad, device=logits.device)
        history = self.cells.gather(1, window.flatten(1)).view_as(window)
        banned = (places < self.least[:, None])[..., None] & self.banned
        return probabilities(logits, history, self.config.sampler, banned)

    def _write(self, place: Tensor, tokens: Tensor) -> None:
        """Tokens (b,) to tape positions ``place`` (b,)."""
        self.cells.scatter_(1, (place + self.pad)[:, None], tokens[:, None])

    def _draft(self) -> tuple[Tensor, Tensor]:
        """Drafted tokens (b, L_d) and what they were drawn from, (b, L_d, V); in the first round none."""
        drafted, p = self.cells[:, :0], self.logits[:, None].float()[:, :0]
        if not self.drafting or not self.round:
            return drafted, p
        # After a full acceptance the last drafted token was never fed: from the second round of drafts on every row
        # feeds two, one of them again. In the first all rows have one token.
        again = min(self.round, 2)
        self.drafting.lengths = self.starts + self.size - again
        logits, steps = self.drafting.extend(self._tokens(-again, again))[:, -1:], []
        for i in range(self.length):
            if i:
                logits = self.drafting.extend(self._tokens(i - 1, 1))
            steps.append(self._probabilities(logits, i))
            self._write(self.size + i, invert(steps[-1], self.uniform[:, self.round, i, None, None])[:, 0])
        return self._tokens(0, self.length), torch.cat(steps, 1)

    def _judge(self, drafted: Tensor, p: Tensor) -> Tensor:
        """Verify drafted (b, n), from p (b, n, V) -> int64 (b, 3 + n): NaN, accepted, the token after them, drafted."""
        logits, count = self.logits[:, None], drafted.shape[1]
        if self.round:
            self.session.lengths = self.starts + self.size - 1
            logits = self.session.extend(self._tokens(-1, count + 1))
        q, uniform = self._probabilities(logits, 0), self.uniform[:, self.round]
        own = uniform[:, self.length : self.length + count]
        accepted, rest = settle(p, q, drafted, self.rule, own)
        added = invert(rest[:, None], uniform[:, -1:, None])[:, 0]
        self._write(self.size + accepted, added)
        self.size = self.size + accepted + 1
        broken = (p.sum((1, 2)) + q.sum((1, 2))).isnan()
        return torch.cat((torch.stack((broken, accepted, added), 1), drafted), 1)

    def _read(self, report: list[list[int]]) -> None:
        """What the round brought each row that has not ended. NumericsError."""
        for place, (broken, accepted, added, *drafted) in zip(self.rows, report, strict=True):
            row = self.done[place]
            if row.ended:
                continue
            if broken:
                raise NumericsError(
                    f"the model's logits are not numbers (NaN), or leave nothing to draw, at speech token "
                    f"{len(row.tokens)} of sequence {place} of the batch; check its weights and its precision."
                )
            row.take(drafted, accepted, added)
            row.calls += bool(self.round)

    def _leave(self) -> None:
        """Rows that have ended leave when they are half of the batch; until then their tapes do not grow."""
        ended = [self.done[place].ended for place in self.rows]
        going = [i for i, over in enumerate(ended) if not over]
        if going and 2 * len(going) <= len(self.rows):
            rows = torch.tensor(going, device=self.size.device)
            for session in filter(None, (self.session, self.drafting)):
                session.keep(rows)
            for name in ("logits", "starts", "cells", "size", "least", "uniform"):
                setattr(self, name, getattr(self, name).index_select(0, rows))
            self.rows = [self.rows[i] for i in going]
        elif any(ended):  # an idle row says its second token again and again, and so does not run out of its tape
            over = torch.tensor(ended, device=self.size.device)
            self.cells.masked_fill_(over[:, None], 0)
            self.size.masked_fill_(over, 2)
