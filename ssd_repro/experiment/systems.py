"""The systems of a table: how each decodes, and in which order they take turns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

LATER = ("rule",)  # fields of System that came after rows had been published


@dataclass(frozen=True)
class System:
    """One way of decoding, and whether its sound is scored.

    tolerance, draft_length, drafter (None: the paper's), rule (of
    ``decoding.rules``, in place of the tolerance): of the speculative method alone. temperature: of draft and
    target; None is the voice's own.
    """

    method: str
    tolerance: float | None = None
    draft_length: int | None = None
    temperature: float | None = None
    drafter: str | None = None
    scored: bool = True
    rule: str | None = None

    def arguments(self) -> dict:
        """Of ``voice.speak``; what is not set is left to its defaults."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "scored"}

    def settings(self) -> dict:
        """Of a row: all fields, but for a later one that is not set, so that older rows keep their keys."""
        return {k: v for k, v in asdict(self).items() if v is not None or k not in LATER}

    @property
    def is_baseline(self) -> bool:
        """Whether it is the autoregressive target at the voice's own temperature, scored or not."""
        return self.arguments() == {"method": "autoregressive"}


AUTOREGRESSIVE = System("autoregressive")


def grid(tolerances=(), draft_lengths=(), temperatures=(), tolerance=0.4, draft_length=3, scored=True) -> list[System]:
    """SSD over one setting at a time, the others at (tolerance, draft_length, the voice's temperature)."""
    point = System("speculative", tolerance, draft_length, scored=scored)
    return [
        *(replace(point, tolerance=beta) for beta in tolerances),
        *(replace(point, draft_length=length) for length in draft_lengths),
        *(replace(point, temperature=heat) for heat in temperatures),
    ]


def distinct(systems: list[System], voice) -> list[System]:
    """Each way of decoding once, scored if any of its duplicates is; the voice's own temperature becomes None."""
    plain = []
    for system in systems:
        beta, heat = (None if x is None else float(x) for x in (system.tolerance, system.temperature))
        plain.append(replace(system, tolerance=beta, temperature=None if heat == voice.sampler.temperature else heat))
    return list(dict.fromkeys(replace(s, scored=True) if replace(s, scored=True) in plain else s for s in plain))


def turn_order(systems: list[System], missing, turn: int) -> list[System]:
    """The ``missing`` systems, if any, and the baseline; another system begins with each ``turn``."""
    everyone = systems if any(s.is_baseline for s in systems) else [AUTOREGRESSIVE, *systems]
    first = turn % len(everyone)
    return [s for s in everyone[first:] + everyone[:first] if s in missing or (missing and s.is_baseline)]
