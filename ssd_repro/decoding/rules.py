"""Other acceptance rules than the paper's, and what a rule costs: how far from the target its tokens come.

p is the draft's distribution, q the target's, a(x) the probability to keep a drafted x, r what is drawn after a
rejection. One position then says x with probability P(x) = p(x) a(x) + (1 - A) r(x), its acceptance A = sum p a.

THE BOUND. P >= p a, so TV(P, q) = sum max(0, P - q) >= sum max(0, p a - q) = A - sum min(p a, q) >= A - sum min(p, q):
each token of acceptance beyond sum min(p, q), that of lossless sampling, costs as much total variation. With the
matched residual r = normalize(max(0, q - p a)) P exceeds q only where p a does, so that the first inequality is met;
where a >= min(1, q/p), the second one, too. A rule can choose where to pay, not whether.

THE PAPER'S RULE PAYS NO MORE: where p > q, Eq. 5 with beta >= 0 has p a = min(p, q + beta p) >= q, elsewhere a = 1.
So max(0, q - p a) = max(0, q - p): its residual, Eq. 6, is the matched one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError, check_number
from .speculative import Rule, Tolerance, accept_probability, residual


class ByToken(Rule, Protocol):
    """A ``Rule`` that also says its a(x) of all tokens at once."""

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        """The probability to keep each token, p, q (..., V) -> (..., V)."""


def emitted(rule: ByToken, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Of one position, p, q (..., V): the acceptance A (...), and P (..., V), the law of the token that it says."""
    kept = p * rule.kept(p, q)
    acceptance = kept.sum(-1).clamp_max(1.0)  # rounding
    return acceptance, kept + (1 - acceptance)[..., None] * rule.residual(p, q)


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """Half the sum of |a - b|: (..., V) -> (...)."""
    return (a - b).abs().sum(-1) / 2


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """sum min(p, q), the acceptance of lossless sampling: (..., V) -> (...)."""
    return torch.minimum(p, q).sum(-1)


@dataclass(frozen=True)
class Paper(Tolerance):
    """The paper's: Eq. 5 and Eq. 6 with tolerance beta."""

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        tokens, square = torch.arange(p.shape[-1], device=p.device).expand(p.shape), (*p.shape, p.shape[-1])
        return accept_probability(
            p[..., None, :].expand(square), q[..., None, :].expand(square), tokens, self.beta
        )  # views: nothing of V x V is made


class _Kept:
    """A rule by ``kept`` alone; after a rejection the target's own draw."""

    def accept(self, p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
        return self.kept(p, q).gather(-1, tokens[..., None])[..., 0]

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return q


@dataclass(frozen=True)
class Matched(_Kept):
    """Another rule's acceptance, and after a rejection what it still owes the target: normalize(max(0, q - p a))."""

    rule: ByToken

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        return self.rule.kept(p, q)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return residual(p * self.kept(p, q), q)


@dataclass(frozen=True)
class Ensemble(_Kept):
    """Static ensemble (transformers #45979): lossless towards v = w q + (1 - w) p; w in [0, 1], 1 is lossless.

    min(1, v/p), and after a rejection normalize(max(0, v - p)), which is that of q. It says v, at the bound.
    """

    weight: float

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        ratio = q / p.clamp_min(torch.finfo(p.dtype).tiny)
        return (self.weight * ratio + 1 - self.weight).clamp_max(1.0)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return residual(p, q)


@dataclass(frozen=True)
class TopK(_Kept):
    """Membership (Llasa+, arXiv 2508.06262): keep what is among the target's k most likely tokens, and possible."""

    k: int

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        least = q.topk(min(self.k, q.shape[-1])).values[..., -1:]
        return ((q >= least) & (q > 0)).to(p.dtype)


@dataclass(frozen=True)
class Typical(_Kept):
    """Typical acceptance (Medusa, arXiv 2401.10774): keep x if q(x) > min(epsilon, sqrt(epsilon) exp(-H(q)))."""

    epsilon: float

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        entropy = torch.special.entr(q).sum(-1, keepdim=True)
        return (q > (self.epsilon**0.5 * (-entropy).exp()).clamp_max(self.epsilon)).to(p.dtype)


@dataclass(frozen=True)
class FLy:
    """FLy (arXiv 2511.22972): lossless sampling, but a lone rejection is forgiven where the target is unsure.

    A rejected token stands if the entropy of q there is at least ``entropy`` (nats) and the ``window`` - 1 drafted
    tokens after it are all accepted, as if it had been right. No window reaches past the draft.
    ON THE BOUND, at one place: where p > q, p min(1, q/p) = q, so that forgiving only adds to q, and after a rejection
    Eq. 6 gives such tokens nothing; elsewhere nothing is rejected. So P exceeds q where p does, by what is forgiven.
    THE WINDOW COSTS ONCE MORE, beyond that place: after a forgiven token stands what both models liked, which follows
    normalize(min(p, q)) and not q.
    """

    entropy: float
    window: int = 2  # of a draft of L_d: from 2 to L_d

    def __post_init__(self):
        check_number("window of the rule fly", self.window, 2, 64, whole=True)

    def accept(self, p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
        return accept_probability(p, q, tokens, 0.0)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return residual(p, q)

    def forgive(self, kept: Tensor, q: Tensor) -> Tensor:
        return kept | (_followed(kept, self.window) & self._unsure(q))

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        """As ``ByToken``, of successive places (..., n, V): an estimate of the chance that the window is accepted.

        It takes sum min(p, q) of the next places, as if the token that is to be forgiven had been theirs.
        """
        ratio = (q / p.clamp_min(torch.finfo(p.dtype).tiny)).clamp_max(1.0)
        forgiven = _followed(overlap(p, q), self.window) * self._unsure(q)
        return ratio + (1 - ratio) * forgiven[..., None]

    def _unsure(self, q: Tensor) -> Tensor:
        return torch.special.entr(q).sum(-1) >= self.entropy


def _followed(kept: Tensor, window: int) -> Tensor:
    """Of each of n places the product of the window - 1 after it, 0 where these are not all there: (..., n)."""
    after = torch.nn.functional.pad(kept, (0, window))[..., 1:]
    return after.unfold(-1, window - 1, 1)[..., : kept.shape[-1], :].prod(-1).to(kept.dtype)


@dataclass(frozen=True, eq=False)
class Groups(_Kept):
    """Groups of tokens alike (PCG, arXiv 2511.13732): a draft is judged by the mass of a group, not its own.

    Each token seeds the group of those whose embeddings have a cosine above theta with its own, and its mass is shared
    equally among the groups that it is in. Of these one, drawn at random, judges it by min(1, Q_g / P_g); the draw
    is averaged out here. After a rejection a group from normalize(max(0, Q - P)), and of it a token by the target.

    members (V, V): sparse, symmetric, 1 where a token is in the group that another seeds; counts (V,): its sums.
    """

    members: Tensor
    counts: Tensor

    @classmethod
    def of(cls, theta: float, embedding: Tensor) -> Groups:
        """embedding (V, hidden): of the target's speech tokens."""
        unit = torch.nn.functional.normalize(embedding.detach().float(), dim=-1)
        size, pairs = len(unit), []
        for first in range(0, size, 512):
            near = (unit[first : first + 512] @ unit.T > theta).triu(first + 1)  # each pair once: rounding is no matter
            pairs.append(near.nonzero().T + near.new_tensor([[first], [0]], dtype=torch.int64))
        pairs = torch.cat(pairs, 1)
        own = torch.arange(size, device=unit.device).expand(2, -1)
        where = torch.cat((pairs, pairs.flip(0), own), 1)
        members = torch.sparse_coo_tensor(where, unit.new_ones(where.shape[1]), (size, size), check_invariants=False)
        return cls(members.coalesce(), torch.bincount(where[0], minlength=size).float())

    def _over_groups(self, mass: Tensor) -> Tensor:
        """Of each token the sum over its groups, or of each group the sum over its tokens: (..., V) -> (..., V)."""
        return torch.sparse.mm(self.members, mass.reshape(-1, mass.shape[-1]).T).T.reshape(mass.shape)

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        of_draft, of_target = self._over_groups(p / self.counts), self._over_groups(q / self.counts)
        ratio = of_target / of_draft.clamp_min(torch.finfo(p.dtype).tiny)
        return self._over_groups(ratio.clamp_max(1.0)) / self.counts

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        of_draft, of_target = self._over_groups(p / self.counts), self._over_groups(q / self.counts)
        share = residual(of_draft, of_target) / of_target.clamp_min(torch.finfo(p.dtype).tiny)
        return q / self.counts * self._over_groups(share)


@dataclass(frozen=True)
class Kind:
    """A family of rules: ``make`` of its one parameter (and of the target's embedding), a number from low to high."""

    make: Callable[..., ByToken]
    parameter: str
    low: float
    high: float
    whole: bool = False
    embedded: bool = False


MATCHED = "matched "
KINDS = {
    "paper": Kind(Paper, "beta", 0.0, 1.0),
    "ensemble": Kind(Ensemble, "w", 0.0, 1.0),
    "top-k": Kind(TopK, "k", 1, 1_000_000, whole=True),
    "typical": Kind(Typical, "epsilon", 0.0, 1.0),
    "fly": Kind(FLy, "h", 0.0, 20.0),
    "groups": Kind(Groups.of, "theta", -1.0, 1.0, embedded=True),
}


def named(text: str, embedding: Tensor) -> ByToken:
    """ "paper:0.4", a kind and its parameter, as the rule of a target with this embedding (V, hidden). InputError.

    "matched top-k:5" is ``Matched(TopK(5))``; so before any kind.
    """
    plain = str(text).removeprefix(MATCHED)
    if plain != text:
        rule = named(plain, embedding)
        if isinstance(rule, FLy):  # Matched would take its estimate for a rule
            raise InputError(f"rule {text!r} has no use: fly's own residual is the matched one, choose {plain}")
        return Matched(rule)
    name, _, number = plain.partition(":")
    if name not in KINDS:
        raise InputError(f"rule {text!r} is unknown: choose KIND:NUMBER with one of {', '.join(KINDS)}")
    kind = KINDS[name]
    try:
        value = int(number) if kind.whole else float(number)
    except ValueError:
        raise InputError(f"rule {text!r} needs a number behind its kind, such as paper:0.4 or top-k:5") from None
    check_number(f"{kind.parameter} of the rule {name}", value, kind.low, kind.high, whole=kind.whole)
    return kind.make(value, embedding) if kind.embedded else kind.make(value)
