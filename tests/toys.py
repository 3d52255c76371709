"""Small models for the engine's tests, and the exact law of what they say."""

from __future__ import annotations

import math
from collections import Counter

import torch

from ssd_repro.decoding import drafters
from ssd_repro.decoding import speculative as speculative_module
from ssd_repro.decoding.sampling import probabilities
from ssd_repro.models.families import small_qwen2
from ssd_repro.models.speech_lm import SpeechLM

PREFIX = 3  # positions before the first speech token


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TableLM:
    """Logits from a table by the last two tokens; the session contract, and no network.

    table (V + 1, V + 1, V); index V stands for the prefix. ``sessions`` keeps those opened.
    """

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.sessions = table, []

    @classmethod
    def random(cls, vocab: int, seed: int, scale: float = 1.5) -> TableLM:
        shape = (vocab + 1, vocab + 1, vocab)
        return cls(scale * torch.randn(shape, generator=generator(seed)))

    def near(self, seed: int, scale: float) -> TableLM:
        """Another model, not far from this one: a draft for it."""
        noise = torch.randn(self.table.shape, generator=generator(seed))
        return TableLM(self.table + scale * noise)

    def session(self) -> TableSession:
        self.sessions = [*self.sessions[-3:], TableSession(self.table)]
        return self.sessions[-1]


class TableSession:
    """The cache is the list of tokens: a token left behind by a rollback changes the logits."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.length = table, 0

    def prefill(self, prefix: torch.Tensor) -> torch.Tensor:
        self.length = prefix.shape[1]
        self.cells = torch.full((self.length + 1,), self.table.shape[-1])
        return self.table[self.cells[-1:], self.cells[-1:]]

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        n = tokens.shape[1]
        self.cells = torch.cat((self.cells, tokens[0]))
        self.length += n
        return self.table[self.cells[-n - 1 : -1], self.cells[-n:]][None]

    def crop(self, length: int) -> None:
        assert 0 < length <= self.length
        self.cells, self.length = self.cells[: length + 1], length

    def held(self) -> list[int]:
        """The speech tokens in the cache."""
        return self.cells[PREFIX + 1 :].tolist()


PREFIX_EMBEDDINGS = torch.zeros(1, PREFIX, 1)  # for TableLM, which looks at its length alone


def exact_law(table: torch.Tensor, config) -> dict[tuple[int, ...], float]:
    """Of every sequence (its stop token included) the probability, step by step from the sampler."""
    vocab, width = table.shape[-1], config.sampler.ras_window
    law, alive = {}, {(): 1.0}
    for position in range(config.max_tokens):
        contexts = [(vocab, vocab, *past)[-2:] for past in alive]
        past = torch.tensor([[-1] * width + list(past) for past in alive])
        banned = torch.zeros(vocab, dtype=torch.bool)
        banned[list(config.stop_ids)] = position < config.min_tokens
        logits = table[tuple(torch.tensor(contexts).T)]
        step = probabilities(logits, past[:, -width:], config.sampler, banned).tolist()
        following = {}
        for (past, mass), row in zip(alive.items(), step, strict=True):
            for token, chance in enumerate(row):
                if chance > 0:
                    ended = token in config.stop_ids or position + 1 == config.max_tokens
                    (law if ended else following)[(*past, token)] = mass * chance
        alive = following
    return law


def law_of_all_branches(run, monkeypatch) -> dict:
    """The exact law of what ``run()`` returns: every draw and every verdict taken each way in turn."""
    law, script = Counter(), []
    accept, jointly = speculative_module.Tolerance.accept, speculative_module.joint_acceptance

    def choose(chances: list[float]) -> int:
        options = [i for i, chance in enumerate(chances) if chance > 0]
        pick = script[len(trace)] if len(trace) < len(script) else 0
        trace.append((pick, len(options)))
        mass[0] *= chances[options[pick]]
        return options[pick]

    def draw(probs, rng):
        return torch.tensor(choose(probs.tolist()))

    def verdict(rule, p, q, tokens):
        kept = accept(rule, p, q, tokens).tolist()
        upto = [math.prod(kept[:n]) for n in range(len(kept) + 1)]
        n = choose([*(a * (1 - k) for a, k in zip(upto, kept, strict=False)), upto[-1]])
        return (torch.arange(len(kept)) < n).float()

    def joint_verdict(p, q, tokens):
        joint, chance = jointly(p, q, tokens)
        n = choose(ends_jointly(chance).tolist())
        return joint, (torch.arange(1, len(chance) + 1) == n).float()

    for module in (speculative_module, drafters):
        monkeypatch.setattr(module, "draw", draw)
    monkeypatch.setattr(speculative_module.Tolerance, "accept", verdict)
    monkeypatch.setattr(speculative_module, "joint_acceptance", joint_verdict)
    while True:
        trace, mass = [], [1.0]
        law[run()] += mass[0]
        while trace and trace[-1][0] + 1 == trace[-1][1]:
            trace.pop()
        if not trace:
            return law
        script = [pick for pick, _ in trace[:-1]] + [trace[-1][0] + 1]


def ends_jointly(chance: torch.Tensor) -> torch.Tensor:
    """Chances (..., L) to keep each prefix, the longest first -> those that 0 .. L tokens stand, (..., L + 1)."""
    kept = torch.cat((torch.ones_like(chance[..., :1]), chance), -1)
    longer = torch.cat((1 - kept[..., 1:], torch.ones_like(kept[..., :1])), -1)
    return kept * longer.flip(-1).cumprod(-1).flip(-1)


def tiny_lm(layers: int = 4, seed: int = 0, vocab: int = 13) -> SpeechLM:
    """A random Qwen2 speech model, sharp enough that its choices differ from place to place."""
    torch.manual_seed(seed)
    lm = SpeechLM(small_qwen2(16, 32, layers, 4, 2, vocab=5, initializer_range=0.3), vocab)
    return lm.eval()


def p_value(counts: dict, law: dict) -> float:
    """Chi-square of observed counts against a law; outcomes expected less than 5 times are pooled.

    An outcome outside the law's support gives 0.
    """
    if set(counts) - set(law):
        return 0.0
    total, scale = sum(counts.values()), sum(law.values())
    seen, due, few = [], [], [0, 0.0]
    for outcome, mass in law.items():
        expected = total * mass / scale
        if expected < 5:
            few = [few[0] + counts.get(outcome, 0), few[1] + expected]
        else:
            seen.append(counts.get(outcome, 0))
            due.append(expected)
    if few[1] >= 1:
        seen.append(few[0])
        due.append(few[1])
    statistic = sum((s - d) ** 2 / d for s, d in zip(seen, due, strict=True))
    half = torch.tensor([len(seen) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*half)) if len(seen) > 1 else 1.0


def output_distribution(p: torch.Tensor, q: torch.Tensor, rule) -> torch.Tensor:
    """What one position outputs: P(x) = p(x) a(x) + (1 - sum p a) r(x); p, q (V,) -> (V,)."""
    size = p.shape[-1]
    accepted = p * rule.accept(p.expand(size, size), q.expand(size, size), torch.arange(size))
    return accepted + (1 - accepted.sum()) * rule.residual(p, q)


def total_variation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Half the sum of |a - b| over the last dimension: (..., V) -> (...)."""
    return (a - b).abs().sum(-1) / 2
