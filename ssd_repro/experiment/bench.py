"""Our decoding beside transformers' on the same weights, prompts, sampler, lengths, seeds and threads: bench.jsonl.

A row is of one utterance and one system. All systems of an utterance are timed together, in turns: the key of a row
names them all, and where one row is missing all of them are made again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import metadata

import pandas as pd
import torch
from torch import Tensor

from ..decoding.result import DecodeConfig
from ..decoding.speculative import autoregressive, speculative
from ..errors import InputError, check_number
from ..speech.sentences import Utterance
from . import cost
from .baselines import Transformers, no_compiler
from .provenance import LoadMeter, row_context
from .rows import locked_rows, rows_of_folder, rows_together, to_frame

THEIRS = ("transformers", "transformers, compiled", "transformers, openvino")
CUSTOM = "hf_custom"  # assisted by the same draft, with ``models.generate.speculative_generate``


@dataclass(frozen=True)
class Contender:
    """One way to decode. runtime: one of THEIRS, or ours. tolerance: of SSD; None is autoregressive."""

    system: str
    runtime: str
    tolerance: float | None = None
    drafter: str = "paper"
    verification: str = "token"


def contenders(runtime: str, tolerance: float, compile: bool, drafters=()) -> list[Contender]:
    """transformers' three; ours, and our loop in transformers, on ``runtime`` and on eager; other ``drafters``.

    The hidden-state drafter is in transformers on eager forwards alone, and without loss, as assisted generation is;
    its drafts are verified jointly.
    """
    theirs = {"": THEIRS[0]} | ({"_compiled": THEIRS[1]} if compile else {})
    ours = {"": runtime} | ({"_eager": "eager"} if runtime != "eager" else {})
    custom = {"": THEIRS[2], "_eager": THEIRS[0]} if runtime == "openvino" else {"": THEIRS[0]}
    kinds = [("hf_generate", None, theirs), ("hf_assisted", 0.0, theirs), (CUSTOM, 0.0, custom)]
    kinds += [("ar", None, ours), ("ssd0", 0.0, ours), ("ssd", tolerance, ours)]
    found = [Contender(name + end, run, beta) for name, beta, runs in kinds for end, run in runs.items()]
    others = [(name, beta, drafter) for drafter in drafters for name, beta in (("ssd0", 0.0), ("ssd", tolerance))]
    if "hidden" in drafters:
        found.append(Contender(f"{CUSTOM}_hidden", THEIRS[0], 0.0, "hidden", "block"))
    return found + [Contender(f"{name}_{drafter}", runtime, beta, drafter) for name, beta, drafter in others]


class Timed:
    """A language model whose sessions add up the seconds inside their forwards of speech tokens."""

    def __init__(self, model, device: torch.device) -> None:
        self.model, self.device, self.seconds = model, device, 0.0

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def session(self) -> TimedSession:
        return TimedSession(self, self.model.session())


class TimedSession:
    def __init__(self, timed: Timed, session) -> None:
        self.timed, self.inner = timed, session

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def extend(self, *given, **named) -> Tensor:
        began = _now(self.timed.device)
        logits = self.inner.extend(*given, **named)
        self.timed.seconds += _now(self.timed.device) - began
        return logits


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Bench:
    """The contenders for a voice, what they share, and how each of them decodes."""

    def __init__(
        self, voice, tolerance: float, draft_length: int, longest: int, compile: bool, drafter: str = "all"
    ) -> None:
        self.voice, self.device, self.longest, self.warm = voice, voice.device, longest, False
        others = [name for name in voice.others if drafter in ("all", name)]
        hidden = voice.drafters["hidden"].draft if "hidden" in others else None
        self.systems = contenders(voice.runtime, tolerance, compile, others)
        self.theirs = cache(partial(Transformers, voice.target, voice.draft, hidden))  # made when first asked for
        # transformers bans by a mask, all stop tokens or none; RAS is left out, for nobody else has it.
        sampler = replace(voice.sampler, ras=False, bans_by_mask=True)
        self.common = {"sampler": sampler, "draft_length": draft_length, "banned_ids": None}

    def settings(self, contender: Contender) -> dict:
        lent = self.voice.runtime == "openvino" and contender.runtime != "openvino"  # the SpeechLMs stay in fp32
        return {
            **{"method": "autoregressive" if contender.tolerance is None else "speculative"},
            **{"precision": "fp32" if lent else self.voice.precision, "transformers": metadata.version("transformers")},
            **{"weights": self.voice.weights_id, "front_end": self.voice.front_end, "longest": self.longest},
            **{"sampler": asdict(self.common["sampler"]), "draft_length": self.common["draft_length"]},
            **{**asdict(contender), "company": [[each.system, each.tolerance] for each in self.systems]},
        }

    def pieces(self, said: Utterance) -> list[tuple[Tensor, DecodeConfig]]:
        """Of each piece of the text the prefix, and the voice's lengths, at most ``longest`` tokens."""
        found = []
        for piece in self.voice.front.pieces(said.text, said.voice):
            config = self.voice.config(len(piece), tolerance=0.0, **self.common)
            most = min(config.max_tokens, self.longest or config.max_tokens)
            config = replace(config, max_tokens=most, min_tokens=min(config.min_tokens, most))
            found.append((self.voice.prefix(piece, said.voice), config))
        return found

    def take(self, contender: Contender, pieces: list, seed: int, models: tuple | None = None) -> dict:
        """Decode all pieces -> their tokens (a stop token is one), seconds, joules, and our results."""
        own = contender.runtime == self.voice.runtime
        ours = (self.voice.models[0], self.voice.drafters[contender.drafter])
        models = models or (ours if own else (self.voice.target, self.voice.draft))
        tokens, seconds, results, joules = 0, 0.0, [], cost.joules(self.device)
        for prefix, config in pieces:
            config = replace(config, tolerance=contender.tolerance or 0.0, verification=contender.verification)
            assisted, generator = contender.tolerance is not None, torch.Generator(self.device).manual_seed(seed)
            if contender.runtime in THEIRS:
                theirs = self.theirs(contender.runtime == THEIRS[1])
                ids = theirs.prompt(prefix)
                began = _now(self.device)
                custom = contender.system.startswith(CUSTOM)
                runtime = "openvino" if contender.runtime == THEIRS[2] else "eager"
                how = (runtime, contender.drafter) if custom else ()
                tokens += len(theirs.decode(ids, config, seed, assisted, *how))
            else:
                began = _now(self.device)
                decode = partial(speculative, *models) if assisted else partial(autoregressive, models[0])
                results.append(decode(prefix, config, generator))
                tokens += sum(each.emitted for each in results[-1].rounds)
            seconds += _now(self.device) - began
        after = cost.joules(self.device)
        used = None if joules is None or after is None or after < joules else after - joules  # RAPL begins anew
        return {"tokens": tokens, "lm_seconds": seconds, "joules": used, "results": results}

    def forwards(self, contender: Contender, pieces: list, seed: int) -> dict:
        """A pass of its own, as its clocks disturb the decoding: seconds in forwards, and in rounds as a whole."""
        recorded = contender.runtime == "graphs"  # the host sees no forward inside a CUDA graph
        if recorded or contender.runtime != self.voice.runtime or contender.drafter != "paper":
            return {}
        models = tuple(Timed(model, self.device) for model in self.voice.models)
        results = self.take(contender, pieces, seed, models)["results"]
        rounds = sum(r.lm_seconds - r.seconds["prefill"] for r in results)
        return {"forward_seconds": sum(model.seconds for model in models), "round_seconds": rounds}


def measure(
    voice,
    utterances: list[Utterance],
    folder,
    tolerance: float = 0.4,
    draft_length: int = 3,
    repeats: int = 1,
    longest: int = 0,
    compile: bool = False,
    drafter: str = "all",
    progress=lambda it: it,
) -> pd.DataFrame:
    """Decode what ``folder`` holds no rows of -> one row per utterance and contender.

    Of ``repeats`` the one of median time counts. Before the first utterance is timed each decodes it once. longest:
    tokens of a piece; 0: the voice's own limit. compile: transformers under torch.compile, too; where there is no
    compiler it is left out, and stderr says so. drafter: beside the paper's, one of ``voice.others`` or all of them;
    'paper': none. InputError, before any work, for a bad setting or utterance.
    """
    known = ["all", "paper", *voice.others]
    if drafter not in known:
        raise InputError(f"drafter {drafter!r} is unknown to this voice: choose {' or '.join(known)}")
    check_number("repeats", repeats, 1, 1000, whole=True)
    check_number("longest (0 is no limit of its own)", longest, 0, 1_000_000, whole=True)
    if compile and (reason := no_compiler()):
        print(f"{reason}: the compiled transformers are left out", file=sys.stderr)
        compile = False
    for said in utterances:
        voice.check(said.text, "speculative", said.voice, tolerance, draft_length, said.seed)
    bench, found = Bench(voice, tolerance, draft_length, longest, compile, drafter), []
    with locked_rows(folder, "bench") as path:
        known = rows_of_folder(folder)
        for turn, said in enumerate(progress(utterances)):
            shared = {**row_context(voice.device), **asdict(said), "repeats": repeats}
            settings = {c: shared | bench.settings(c) for c in bench.systems}
            found += rows_together(path, known, settings, partial(_timed, bench, said, turn, repeats))
    return to_frame(found)


def _timed(bench: Bench, said: Utterance, turn: int, repeats: int) -> dict[Contender, dict]:
    """One utterance by all contenders, in turns, another of which begins with each ``turn`` -> their rows' numbers."""
    first, pieces = turn % len(bench.systems), bench.pieces(said)
    order = [*bench.systems[first:], *bench.systems[:first]]
    if not bench.warm:
        bench.warm = bool([bench.take(c, pieces, said.seed) for c in order])
    load = LoadMeter()
    takes = [{c: bench.take(c, pieces, said.seed) for c in order} for _ in range(repeats)]
    about = {"processes": 1, "other_load": load.other_load(), "prefix": pieces[0][0].shape[1], "pieces": len(pieces)}
    about["geometry"] = cost.facts(bench.voice.target, bench.voice.draft)
    return {c: _fields([t[c] for t in takes]) | bench.forwards(c, pieces, said.seed) | about for c in order}


def _fields(takes: list[dict]) -> dict:
    """A row's numbers: those of the take of median time."""
    take = sorted(takes, key=lambda each: each["lm_seconds"])[len(takes) // 2]
    results = take.pop("results")
    each = {"lm_seconds_each": [round(other["lm_seconds"], 6) for other in takes]}
    if not results:
        return take | each
    return {
        **take,
        **each,
        "seconds": {phase: sum(r.seconds[phase] for r in results) for phase in results[0].seconds},
        "calls": sum(r.target_calls - 1 for r in results),  # without the prefill
        "drafted": sum(r.drafted for r in results),
        "accepted": sum(r.accepted for r in results),
    }
