"""How utterances are decoded: the systems of a table, and who takes turns with whom."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class System:
    """One line of a table: how to decode, and whether the sound is measured.

    tolerance, draft_length: of the speculative method alone. temperature: the sampler's, for
    draft and target; None: the voice's own. heard: with WER, DNSMOS and speaker similarity.
    """

    method: str
    tolerance: float | None = None
    draft_length: int | None = None
    temperature: float | None = None
    heard: bool = True

    def arguments(self) -> dict:
        """What ``voice.speak`` gets: its own defaults where nothing is set."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "heard"}


AUTOREGRESSIVE = System("autoregressive")


def grid(
    tolerances=(), draft_lengths=(), temperatures=(), tolerance: float = 0.4, draft_length: int = 3,
    heard: bool = True,
) -> list[System]:  # fmt: skip
    """SSD over one setting at a time, the others at (tolerance, draft_length, the voice's temperature)."""
    beta, length = float(tolerance), draft_length
    return [
        *(System("speculative", float(b), length, heard=heard) for b in tolerances),
        *(System("speculative", beta, n, heard=heard) for n in draft_lengths),
        *(System("speculative", beta, length, float(t), heard=heard) for t in temperatures),
    ]


def _plain(systems, voice) -> list[System]:
    """Each once: the voice's own temperature is no other one, beta 1 is 1.0, and heard is more than unheard."""
    own = voice.sampler.temperature
    plain = [replace(s, temperature=None) if s.temperature == own else s for s in systems]
    plain = [s if s.tolerance is None else replace(s, tolerance=float(s.tolerance)) for s in plain]
    return list(dict.fromkeys(replace(s, heard=True) if replace(s, heard=True) in plain else s for s in plain))


def _is_base(system: System) -> bool:
    """Whether it decodes as the baseline does, heard or not."""
    return system.arguments() == AUTOREGRESSIVE.arguments()


def lineup(systems: list[System], missing: list[System], turn: int) -> list[System]:
    """Who decodes, in which order: what is missing and the baseline, begun one further with each ``turn``."""
    if not missing:
        return []
    order = systems if any(_is_base(s) for s in systems) else [AUTOREGRESSIVE, *systems]
    first = turn % len(order)
    return [s for s in order[first:] + order[:first] if s in missing or _is_base(s)]
