"""Who hears what: a Latin square over texts and systems, ABX pairs, attention checks.

Listener n belongs to group (n - 1) mod (number of systems). A clip is named here by what it is: (system, utterance),
("reference", utterance) of its voice, or that reference played ("backwards", utterance).
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from ..errors import InputError

Clip = tuple[str, int]
PARTS = ("NAT", "SIM", "ABX")
RATINGS = (1, 2, 3, 4, 5)
SIDES = ("A", "B")
CHECKS = 2  # of each part, the same for all listeners


@dataclass(frozen=True)
class Trial:
    """clips: what is played, of SIM (reference, sample), of ABX (A, B, X). groups: who hears it.

    right: the answers that pass, of an attention check and of ABX; system: what is judged, of NAT and SIM.
    """

    part: str
    clips: tuple[Clip, ...]
    utterance: int
    groups: tuple[int, ...]
    system: str = ""
    right: tuple = ()
    check: bool = False

    @property
    def allowed(self) -> tuple:
        return SIDES if self.part == "ABX" else RATINGS


def choose(voices: list[str], count: int, systems: int) -> list[int]:
    """Indices of ``count`` utterances: as many of each voice as can be, at least two, a voice's together.

    voices: that of each utterance to choose from. InputError if they do not suffice.
    """
    if count < 4 or count % systems:
        raise InputError(f"--utterances must be a multiple of {systems} (the systems) and at least 4, got {count}")
    by_voice = {name: [i for i, voice in enumerate(voices) if voice == name] for name in dict.fromkeys(voices)}
    several = [indices for indices in by_voice.values() if len(indices) > 1][: count // 2]
    rounds = [(turn, v) for turn in range(len(voices)) for v, own in enumerate(several) if turn < len(own)]
    chosen = Counter(v for _, v in rounds[:count])
    if sum(chosen.values()) < count:
        most = len(rounds) // systems * systems
        raise InputError(f"--utterances {count} are more than these rows give: at most {most}")
    return [i for v, own in enumerate(several) for i in own[: chosen[v]]]


def trials(voices: list[str], systems: list[str], pair: tuple[str, str], seed: int = 0) -> list[Trial]:
    """All trials, in random order. voices: of each utterance, as ``choose`` sorts them; pair: the systems of ABX.

    NAT and SIM: utterance u is heard under system (u + group) mod systems, in SIM one on. So every listener hears
    every text once and every system equally often, of each voice, too; a listener of each group, every pair of both.
    """
    dice, n = random.Random(seed), len(systems)
    made = []
    for u in range(len(voices)):
        for s, system in enumerate(systems):
            made.append(Trial("NAT", ((system, u),), u, ((s - u) % n,), system))
            made.append(Trial("SIM", (("reference", u), (system, u)), u, ((s - u - 1) % n,), system))
    for u in range(0, len(voices), 2):
        same = [w for w, voice in enumerate(voices) if voice == voices[u]]
        other = same[(same.index(u) + 1) % len(same)]  # X is of another text: it can be told by its sound alone
        for x, system in enumerate(pair):
            heard = tuple(group for group in range(n) if (u // 2 + group) % 2 == x)
            made.append(_abx(dice, pair, u, (system, other), heard))
    return dice.sample(made + _checks(dice, voices, pair, n), len(made) + 3 * CHECKS)


def _abx(dice, pair, u: int, x: Clip, groups: tuple[int, ...], check=False) -> Trial:
    a, b = dice.sample(pair, 2)
    return Trial("ABX", ((a, u), (b, u), x), u, groups, right=(SIDES[(a, b).index(x[0])],), check=check)


def _checks(dice, voices: list[str], pair, groups: int) -> list[Trial]:
    """What nobody who listens gets wrong: speech backwards, the reference itself, X the very clip of A or B."""
    everyone, made = tuple(range(groups)), []
    for u in dice.sample(range(len(voices)), CHECKS):
        made.append(Trial("NAT", (("backwards", u),), u, everyone, right=(1, 2), check=True))
        made.append(Trial("SIM", (("reference", u), ("reference", u)), u, everyone, right=(4, 5), check=True))
        made.append(_abx(dice, pair, u, (dice.choice(pair), u), everyone, check=True))
    return made
