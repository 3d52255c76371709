"""What the loop asks for: a language model with sessions, and a drafter with two methods.

What a drafter (and the loop) knows of the sequence is a ``Tape``. The paper's drafter stands in
``speculative.py``, beside the loop that it serves; others follow the same contract.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError
from .result import DecodeConfig
from .sampling import Law, Sampler, draw, probabilities


class LanguageModel(Protocol):
    """A model that can open a sequence; one model may serve several at once."""

    def session(self) -> Session: ...


class Session(Protocol):
    """One sequence with its cache; ``length`` counts the positions that the cache holds.

    features: of a model that hands them out, what ``HiddenDrafter`` reads: (1, n, F) of the n positions fed last.
    """

    length: int
    features: Tensor | None

    def prefill(self, prefix: Tensor) -> Tensor:
        """Feed embeddings (1, T, hidden), once -> logits (1, V) of the last position."""

    def feed(self, embeddings: Tensor) -> Tensor:
        """Feed embeddings (1, n, hidden) -> logits (1, V) of the last position; the cache grows by n."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Feed speech tokens (1, n) -> logits (1, n, V); the cache grows by n."""

    def crop(self, length: int) -> None:
        """The one rollback: forget all positions from ``length`` on."""


class Tape:
    """The speech tokens of one sequence on the device, and the distribution of the next ones.

    Positions 0 .. size-1 are accepted; the cells after them hold the round's draft while
    it is judged. ``probabilities`` is the one place where logits become what is sampled from, for
    draft and target alike.
    """

    def __init__(
        self, sampler: Sampler | Law, capacity: int, ban_mask: Tensor, min_tokens: int = 0, confidence: float = 0.0
    ) -> None:
        """capacity: cells, in tokens; ban_mask: bool (V,), banned at positions < min_tokens; confidence: of drafts."""
        self.sampler, self.ban_mask, self.min_tokens, self.confidence = sampler, ban_mask, min_tokens, confidence
        self.pad = sampler.ras_window if isinstance(sampler, Sampler) and sampler.ras else 1
        self.cells = ban_mask.new_full((self.pad + capacity,), -1, dtype=torch.int64)
        self.size = 0

    @classmethod
    def empty(cls, config: DecodeConfig, logits: Tensor) -> Tape:
        """For logits (1, V); InputError if a stop or banned token is outside the vocabulary."""
        vocab = logits.shape[-1]
        for name, ids in (("stop_ids", config.stop_ids), ("banned_ids", config.banned)):
            if max(ids, default=0) >= vocab:
                raise InputError(f"{name} has {max(ids)}; the model's token ids end at {vocab - 1}.")
        mask = torch.zeros(vocab, dtype=torch.bool)
        mask[list(config.banned)] = True
        return cls(config.sampler, config.max_tokens, mask.to(logits.device), config.min_tokens, config.confidence)

    def tokens(self, start: int, end: int) -> Tensor:
        """Cells start .. end-1, (end - start,); a view."""
        return self.cells[self.pad + start : self.pad + end]

    def write(self, position: int, token: Tensor) -> None:
        self.cells[self.pad + position] = token

    def probabilities(self, logits: Tensor, first: int) -> Tensor:
        """Logits (n, V) for positions first .. first+n-1 -> the distribution of each, (n, V).

        Position i sees the cells before it, the draft's own among them.
        """
        n = logits.shape[0]
        if not isinstance(self.sampler, Sampler):
            return self.sampler(logits, self.tokens(0, first + n - 1))
        history = self.cells[first : first + self.pad + n - 1].unfold(0, self.pad, 1)
        banned = None
        if first + n <= self.min_tokens:
            banned = self.ban_mask
        elif first < self.min_tokens:
            position = torch.arange(first, first + n, device=logits.device)
            banned = (position < self.min_tokens)[:, None] & self.ban_mask
        return probabilities(logits, history, self.sampler, banned)


class Drafter(Protocol):
    """Proposes tokens for one sequence, for which it was made; ``calls`` counts its forwards."""

    calls: int

    def propose(self, tape: Tape, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draft positions tape.size .. tape.size+count-1, or fewer but one, and write them on the tape.

        Returns tokens (n,) and p (n, V): exactly what each token was drawn from, given the tape before
        it. Whether there is one token more may depend on the tape before it and on p, never on that token.
        """

    def rollback(self, size: int) -> None:
        """The round is judged: the sequence now has ``size`` tokens, forget all others."""


class Stepwise:
    """Drafts one token after another, through the target's sampler; a drafter says how it comes by the logits.

    ADAPTIVE LENGTH, where tape.confidence > 0: after each token x_i the draft is expected to stand up to there with
    the chance p_1(x_1) .. p_i(x_i): a sampled token that the draft itself finds unlikely is seldom one of the target's.
    The draft ends where this falls below the confidence. Each token is then read on the host.
    It stays exact: whether x_(i+1) is drafted is settled by the past, x_1 .. x_i and p, before x_(i+1) is drawn.
    So given x_1 .. x_i that stand, the next token follows q on either branch: judged if it is drafted, the
    target's own if not. (Jointly verified, a prefix stands with a chance that is found from the draft's end
    backwards, ``verify_block``; there, too, x_1 .. x_i alone say whether they are that end.)
    """

    calls: int
    session: Session  # its own
    ready: Tensor | None = None  # (1, n, hidden), of a drafter that carries something from round to round

    def step(self, tape: Tape, position: int) -> Tensor:
        """Logits (1, V) for ``position``, that of the next token; from tape.size on, in turn."""
        raise NotImplementedError

    def propose(self, tape: Tape, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        first, p, trust = tape.size, [], 1.0
        while len(p) < count and trust >= tape.confidence:
            position = first + len(p)
            p.append(tape.probabilities(self.step(tape, position), position))
            token = draw(p[-1][0], generator)
            tape.write(position, token)
            if tape.confidence:
                trust *= float(p[-1][0, token])
        return tape.tokens(first, first + len(p)), torch.cat(p)


class HiddenModel(Protocol):
    """A small model that drafts from the target's hidden states (``models.hidden_draft``).

    It has no method ``session``: by that the loop knows a language model, which drafts from tokens alone.
    """

    def open(self) -> Session:
        """A new sequence."""

    def reduce(self, features: Tensor) -> Tensor:
        """The target's (1, n, F) -> (1, n, hidden)."""

    def join(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Of a position and of the token after it, (1, n, hidden) both -> what the model is fed with."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Speech tokens (1, n) -> (1, n, hidden)."""


class HiddenDrafter(Stepwise):
    """Drafts with one small layer on what the target thought (EAGLE: Li et al. 2024; three depths: EAGLE-3, 2025).

    Its input at a position is the target's hidden state there, joined with the token that follows; it
    foresees the token after that. Where the target has not been yet, its own output takes the
    place of the hidden state. INVARIANT, between rounds: the cache holds all positions whose hidden states were
    known before the last round, and ``ready`` the hidden states that the last round added.
    """

    def __init__(self, model: HiddenModel, prefix: Tensor, target: Session) -> None:
        """Prefills with prefix (1, T, hidden), which ``target`` has just been prefilled with; T = 1 leaves nothing."""
        self.model, self.target = model, target
        features = model.reduce(target.features)
        self.session, self.calls = model.open(), int(prefix.shape[1] > 1)
        if self.calls:
            self.session.feed(model.join(features[:, :-1], prefix[:, 1:]))
        self.ready, self.known, self.size = features[:, -1:], self.session.length, 0

    def step(self, tape: Tape, position: int) -> Tensor:
        first = position == tape.size
        features = self.ready if first else self.session.features[:, -1:]
        logits = self.session.feed(self._joined(features, tape, position))
        self.calls += 1
        if first:
            self.known, self.ready = self.session.length, features[:, :0]
        return logits

    def _joined(self, features: Tensor, tape: Tape, position: int) -> Tensor:
        """Hidden states, each with the token after it; the last of these stands before ``position``."""
        tokens = tape.tokens(position - features.shape[1], position)
        return self.model.join(features, self.model.embed(tokens[None]))

    def rollback(self, size: int) -> None:
        self.session.crop(self.known)
        if self.size:  # the first token came from the prefill, whose hidden states are known
            news = self.target.features[:, : size - self.size]
            self.ready = torch.cat((self.ready, self.model.reduce(news)), 1)
        self.size = size


class BlockModel(HiddenModel, Protocol):
    """A small model that drafts several tokens from one forward (``models.block_draft``)."""

    masks: Tensor  # (B - 1, hidden): what it is fed with for each slot of a block of B but the first
    up: Callable[[Tensor], Tensor]  # (n, rank) -> logits (n, V)

    def follow(self, hidden: Tensor, embeddings: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slots' hidden states and the tokens before them, (n, hidden) both, and the state that the slots before left.

        -> (n, rank) for ``up``, and the new state, (n, rank); None: of a first slot.
        """


class BlockDrafter(HiddenDrafter):
    """Drafts a block from one forward (DFlash: Chen et al. 2026), each of its tokens knowing those before (DSpark).

    Behind the hidden states that it has come to know it is fed with a mask for each further slot. The forward sees no
    token of the block; a head that is small enough to run once a slot reads the slot's hidden state and the token drawn
    in the slot before. The masks are forgotten after the round, so ``HiddenDrafter``'s INVARIANT holds.
    """

    def __init__(self, model: BlockModel, prefix: Tensor, target: Session) -> None:
        super().__init__(model, prefix, target)
        self.block = self.state = None  # of the round: the slots' hidden states (1, n, hidden), what the head keeps

    def propose(self, tape: Tape, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = min(count, len(self.model.masks) + 1)
        given = self._joined(self.ready, tape, tape.size)
        self.session.feed(torch.cat((given, self.model.masks[None, : count - 1]), 1))
        self.calls += 1
        self.known, self.ready = self.session.length - (count - 1), self.ready[:, :0]
        self.block, self.state = self.session.features[:, -count:], None
        return super().propose(tape, count, generator)

    def step(self, tape: Tape, position: int) -> Tensor:
        token = self.model.embed(tape.tokens(position - 1, position))
        made, self.state = self.model.follow(self.block[:, position - tape.size], token, self.state)
        return self.model.up(made)


class NGramDrafter:
    """No model at all: what came, the last time, after the last tokens said (prompt lookup: Saxena 2023).

    Looks for the longest ending of at most LONGEST tokens that was said before, and proposes what followed it then;
    where none was, the newest token again. p is 1 for a proposed token: it is a function of the tokens before it.
    Speech seldom repeats itself token by token: results/README.md says how seldom.
    """

    LONGEST = 3

    def __init__(self, prefix: Tensor, target: Session) -> None:
        self.calls = 0

    def propose(self, tape: Tape, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        said = tape.tokens(0, tape.size).tolist()
        for _ in range(count):
            said.append(self._next(said))
        drafted = torch.tensor(said[tape.size :], device=tape.cells.device)
        for position, token in enumerate(drafted, tape.size):
            tape.write(position, token)
        p = torch.zeros(count, tape.ban_mask.shape[-1], device=drafted.device)
        return drafted, p.scatter_(1, drafted[:, None], 1.0)

    def _next(self, said: list[int]) -> int:
        for n in range(min(self.LONGEST, len(said) - 1), 0, -1):
            for begin in range(len(said) - n - 1, -1, -1):
                if said[begin : begin + n] == said[-n:]:
                    return said[begin + n]
        return said[-1]

    def rollback(self, size: int) -> None:
        """It keeps nothing."""


UNTRAINED = {"n-gram": NGramDrafter}  # drafters that every voice has
