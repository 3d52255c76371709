"""Caches of fixed length, and on a GPU each block of a round as one CUDA graph: all draft steps, and all judging.

As in gpt-fast keys and values are allocated once, a rollback is a smaller position, and what lies beyond the
position is masked until it is written over. A GPU's kernels for one token are shorter than it takes to ask for them:
as a graph they are asked for once in a block, sampling and random numbers among them.

A graph repeats what was recorded, at the same addresses. So whatever changes from round to round stands on the
device: where tape and caches are (``place``), the tokens, the generator's state. The host's numbers went into the
recording as distances from there, and its key says which ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen2Model

from ...decoding.drafters import Drafter, Tape
from ...decoding.result import DecodeConfig
from ...decoding.sampling import Sampler, probabilities
from ...decoding.speculative import Blocks
from ...errors import InputError, check_number
from ..batch_session import kv_shape
from ..speech_lm import Session, SpeechLM
from .fused import FusedDecoder

LONGEST = 64  # tokens of a draft
WINDOW = 1000  # of RAS, at most
PADDED = 64  # positions: a recorded prefill is of a multiple of them


class StaticLM:
    """A SpeechLM whose sessions hold at most ``max_length`` positions, prefix included.

    Takes the place of the SpeechLM wherever a language model with sessions is asked for; the
    logits are the same but for rounding. Nothing is padded: with a padded verification the
    price of a draft length would be that of another one.

    record: each block of a round as a CUDA graph, recorded when it first comes (a second or less); by default where
    the model is on a GPU. A draft that the utterance's end cuts short runs as it stands. A prefill is recorded, too,
    padded to a multiple of PADDED positions. Other samplers than a ``Sampler``, other rules than the tolerance and
    adaptive drafts run as they stand. Call ``lm.to(device)`` and ``lm.cast`` before. InputError if max_length is out
    of range.
    """

    def __init__(self, lm: SpeechLM, max_length: int, record: bool | None = None) -> None:
        check_number("max_length", max_length, 1, 1_000_000, whole=True)
        if not isinstance(lm.model, Qwen2Model):
            raise InputError(
                f"runtime graphs knows Qwen2 decoders, not {type(lm.model).__name__}: choose runtime eager"
            )
        self.lm, self.max_length, self.decoder = lm, max_length, FusedDecoder(lm.model, lm.taps)
        self.record = lm.head.weight.is_cuda if record is None else record
        self._free: list[FixedCache] = []

    def session(self) -> StaticSession:
        """A new sequence. Its cache returns to this model's store when the session is dropped.

        A CUDA graph is bound to the addresses that it was recorded with; so the caches are
        as many as sessions were ever open at once, and used again and again.
        """
        return StaticSession(self)

    def take(self) -> FixedCache:
        """A cache without any trace of an earlier sequence (a NaN would get through the mask)."""
        try:
            found = self._free.pop()  # atomic: threads may share a model
        except IndexError:
            return FixedCache(self.lm, self.max_length)
        for tensor in (*found.layers, found.at):
            tensor.zero_()
        return found

    def give_back(self, used: FixedCache) -> None:
        self._free.append(used)


class FixedCache:
    """Keys and values, per layer (cells, 2 x kv heads, head size), keys first, at addresses that stay.

    keys, values: views of them in transformers' order, (1, kv heads, cells, head size). at (1,): the position that a
    recording counts from; recordings: of blocks over this cache; prefills: recorded ones, by their padded length.
    """

    def __init__(self, lm: SpeechLM, cells: int) -> None:
        device = lm.head.weight.device
        with torch.inference_mode(False):  # of one kind, wherever a session is opened
            heads, size = kv_shape(lm)
            self.layers = [lm.head.weight.new_zeros(cells, 2 * heads, size) for _ in lm.model.layers]
            both = [layer.transpose(0, 1)[None].chunk(2, 1) for layer in self.layers]
            self.keys, self.values = ([pair[side] for pair in both] for side in (0, 1))
            self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.recordings: Recordings | None = None
        self.prefills: dict[int, Prefill] = {}

    @property
    def cells(self) -> int:
        return len(self.layers[0])

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """transformers' protocol, for the prefill: store, and attend to what was given."""
        for ours, given in ((self.keys[layer], key), (self.values[layer], value)):
            ours[:, :, : given.shape[2]] = given
        return key, value

    def crop(self, _: int) -> None:
        """Nothing to do: the session's length is the position."""


class StaticSession(Session):
    """A session in a cache of fixed length. InputError if it is asked to hold more."""

    def __init__(self, model: StaticLM) -> None:
        super().__init__(model.lm, model.take())
        self.model, self.base = model, 0
        weakref.finalize(self, model.give_back, self.cache).atexit = False

    def blocks(self, config: DecodeConfig, logits: Tensor, generator: torch.Generator) -> Blocks:
        """How the loop runs its blocks: recorded, or as they stand."""
        plain = isinstance(config.sampler, Sampler) and config.rule is None and not config.confidence
        if self.model.record and plain:
            return _Recorded(self, config, logits, generator)
        return Blocks(config, logits, generator)

    def place(self) -> None:
        """What is fed from here on is recorded by its distance from here."""
        self.cache.at.fill_(self.length)
        self.base = self.length

    @torch.inference_mode()
    def feed(self, embeddings: Tensor) -> Tensor:
        return super().feed(embeddings)

    @torch.inference_mode()
    def extend(self, tokens: Tensor) -> Tensor:
        return super().extend(tokens)

    def _feed(self, embeddings: Tensor) -> Tensor:
        n, cache = embeddings.shape[1], self.cache
        if self.length + n > self.model.max_length:
            raise InputError(
                f"the sequence needs {self.length + n} positions and the static cache has "
                f"{self.model.max_length}: make max_length larger."
            )
        if not self.length:
            return self._prefilled(embeddings) if self.model.record else super()._feed(embeddings)
        positions = cache.at + torch.arange(n, device=cache.at.device) + (self.length - self.base)
        hidden, self.features = self.model.decoder(embeddings, positions, cache.layers)
        self.length += n
        return hidden

    def _prefilled(self, embeddings: Tensor) -> Tensor:
        """By a recording for this length, rounded up; what the padding leaves behind lies beyond the position."""
        n, cache = embeddings.shape[1], self.cache
        padded = min(-(-n // PADDED) * PADDED, cache.cells)
        if padded not in cache.prefills:
            cache.prefills[padded] = Prefill(self.lm, cache, padded)
        hidden, features = cache.prefills[padded].play(embeddings)
        self.length, self.features = n, features
        return hidden


# ------------------------------------------------------------------------------- recording


class Prefill:
    """A prefill of ``padded`` positions over one cache, recorded: it reads and leaves all at addresses that stay."""

    def __init__(self, lm: SpeechLM, cache: FixedCache, padded: int) -> None:
        self.given = lm.head.weight.new_zeros(1, padded, lm.model.config.hidden_size)

        def block() -> tuple[Tensor, Tensor | None]:
            session = Session(lm, cache)
            return session._feed(self.given), session.features

        self.replay, self.output = capture(block, [])

    def play(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """(1, n, hidden) -> the last layer's (1, n, hidden), and the features; the next call writes over them."""
        n = embeddings.shape[1]
        self.given.zero_()[:, :n].copy_(embeddings)
        self.replay()
        hidden, features = self.output
        return hidden[:, :n], features if features is None else features[:, :n]


class Recordings:
    """Of one target's cache: what recorded blocks need at addresses that stay, and the blocks by their keys."""

    def __init__(self, cells: int, vocab: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.tape = torch.full((WINDOW + cells,), -1, dtype=torch.int64, device=device)
            self.at, self.least = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
            self.banned = torch.zeros(vocab, dtype=torch.bool, device=device)
            self.p = torch.zeros(LONGEST, vocab, device=device)
        self.ready: dict[int, Tensor] = {}  # by width: what a drafter carries from round to round
        self.generator, self.blocks = torch.Generator(device), {}


class PlacedTape(Tape):
    """A tape whose cells are found by their distance from ``place``."""

    def of(self, kept: Recordings) -> PlacedTape:
        """On the cells of ``kept``, emptied."""
        self.kept, self.base = kept, 0
        self.cells = kept.tape.fill_(-1)
        self.ban_mask = kept.banned.copy_(self.ban_mask)
        kept.least.fill_(self.min_tokens)
        kept.at.zero_()
        return self

    def place(self) -> None:
        self.kept.at.fill_(self.size)
        self.base = self.size

    def _places(self, start: int, end: int) -> Tensor:
        return self.kept.at + torch.arange(start - self.base, end - self.base, device=self.cells.device)

    def tokens(self, start: int, end: int) -> Tensor:
        """Cells start .. end-1, (end - start,); a copy."""
        return self.cells.index_select(0, self._places(start, end) + self.pad)

    def write(self, position: int, token: Tensor) -> None:
        self.cells.index_copy_(0, self._places(position, position + 1) + self.pad, token.reshape(1))

    def probabilities(self, logits: Tensor, first: int) -> Tensor:
        places = self._places(first, first + logits.shape[0])[:, None]
        history = self.cells[places + torch.arange(self.pad, device=places.device)]
        banned = (places < self.kept.least) & self.ban_mask if self.min_tokens else None
        return probabilities(logits, history, self.sampler, banned)


class _Recorded(Blocks):
    """The blocks of a round as recordings; a draft that the utterance's end cuts short runs as it stands."""

    def __init__(
        self, session: StaticSession, config: DecodeConfig, logits: Tensor, generator: torch.Generator
    ) -> None:
        cache = session.cache
        if cache.recordings is None:
            cache.recordings = Recordings(cache.cells, logits.shape[-1], logits.device)
        self.session, self.config, self.kept, self.given = session, config, cache.recordings, generator
        self.tape = PlacedTape.empty(config, logits).of(self.kept)
        self.generator, self.short = self.kept.generator, False
        self.generator.set_state(generator.get_state())

    def propose(self, drafter: Drafter, count: int) -> tuple[Tensor, Tensor]:
        static = isinstance(getattr(drafter, "session", None), StaticSession)  # others draft at addresses of their own
        self.short = count < self.config.draft_length
        if not static or self.short:
            drafted, p = super().propose(drafter, count)
            return drafted, self.kept.p[: len(p)].copy_(p)
        if drafter.ready is not None:
            rows, width = drafter.ready.shape[1:]
            if width not in self.kept.ready:
                self.kept.ready[width] = drafter.ready.new_zeros(1, LONGEST + 1, width)
            drafter.ready = self.kept.ready[width][:, :rows].copy_(drafter.ready)
        own = drafter.session

        def block() -> tuple[Tensor, Tensor]:
            drafted, p = drafter.propose(self.tape, count, self.generator)
            return drafted, self.kept.p[: len(p)].copy_(p)

        rows = None if drafter.ready is None else drafter.ready.shape[1]
        key = (own.cache, count, self.session.length - own.length, rows)
        return self._run(key, block, [self.tape, own, drafter])

    def judge(self, session: StaticSession, drafted: Tensor, p: Tensor) -> Tensor:
        count, size = len(drafted), self.tape.size
        if self.short:
            return super().judge(session, drafted, p)

        def block() -> Tensor:
            return Blocks.judge(self, session, self.tape.tokens(size, size + count), self.kept.p[:count])

        return self._run((None, count), block, [self.tape, session])

    def close(self) -> None:
        self.given.set_state(self.generator.get_state())

    def _run(self, key: tuple, block: Callable, holders: list):
        """holders: whose numbers and tensors the block changes, tape and session first."""
        config = self.config
        key += (config.sampler, config.tolerance, config.verification, bool(config.min_tokens))
        for holder in holders[:2]:
            holder.place()
        if key not in self.kept.blocks:
            self.kept.blocks[key] = Recording(block, holders, self.generator)
        return self.kept.blocks[key].play(holders)


class Recording:
    """A block, to be played on other sequences at the same addresses."""

    def __init__(self, block: Callable, holders: list, generator: torch.Generator) -> None:
        before = [dict(vars(holder)) for holder in holders]
        self.replay, self.output = capture(block, holders, generator)
        self.moved, self.left = [], []  # how the host's numbers change, and the tensors that a block leaves
        for place, (holder, old) in enumerate(zip(holders, before, strict=True)):
            for name, value in vars(holder).items():
                if isinstance(value, int) and value != old[name]:
                    self.moved.append((place, name, value - old[name]))
                elif isinstance(value, Tensor) and value is not old[name]:
                    self.left.append((place, name, value))
            vars(holder).update(old)

    def play(self, holders: list):
        self.replay()
        for place, name, by in self.moved:
            setattr(holders[place], name, getattr(holders[place], name) + by)
        for place, name, tensor in self.left:
            setattr(holders[place], name, tensor)
        return self.output


def capture(
    block: Callable, holders: list, generator: torch.Generator | None = None
) -> tuple[Callable[[], None], object]:
    """``block`` as a CUDA graph -> its replay, and the output that a replay fills; first it is run once, to warm up."""
    before, state = [dict(vars(holder)) for holder in holders], generator and generator.get_state()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        block()
    torch.cuda.current_stream().wait_stream(aside)
    for holder, old in zip(holders, before, strict=True):
        vars(holder).update(old)
    graph = torch.cuda.CUDAGraph()
    if generator:
        generator.set_state(state)
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        output = block()
    return graph.replay, output
