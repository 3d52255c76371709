"""How many listeners the test needs: power of the equivalence test of SSD against autoregressive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

MOST = 2000  # listeners; a plan that needs more has too few utterances


@dataclass(frozen=True)
class Plan:
    """A test of ``utterances`` texts, each heard once by a listener, ``systems`` in a Latin square.

    margin: in points of MOS, what counts as no difference (two one-sided tests, each at ``level``). residual,
    by_listener, by_text: standard deviations, in points of MOS, of a single rating, and of the difference between two
    systems from listener to listener and from text to text. They are assumptions to plan with; the analysis prints
    what it finds.
    """

    utterances: int
    systems: int = 4
    margin: float = 0.25
    power: float = 0.8
    level: float = 0.05
    residual: float = 0.8
    by_listener: float = 0.2
    by_text: float = 0.2

    def error(self, listeners: int) -> float:
        """Standard error of the difference of two systems' means.

        Listeners' and texts' own means cancel: each listener hears both systems equally often, and each text is
        heard under both.
        """
        ratings = listeners * self.utterances / self.systems  # of each system
        drawn = self.by_listener**2 / listeners + self.by_text**2 / self.utterances
        return math.sqrt(drawn + 2 * self.residual**2 / ratings)

    def power_with(self, listeners: int) -> float:
        """Probability that equivalence is shown where there is no difference."""
        normal = NormalDist()
        beyond = self.margin / self.error(listeners) - normal.inv_cdf(1 - self.level)
        return max(0.0, 2 * normal.cdf(beyond) - 1)

    def listeners(self) -> int | None:
        """The fewest that give the power, a multiple of the systems: whole Latin squares; None: no number does."""
        numbers = range(self.systems, MOST + 1, self.systems)
        return next((number for number in numbers if self.power_with(number) >= self.power), None)
