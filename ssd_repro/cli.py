"""The command ``ssd-repro``: speak, run, report, tokenise, train-draft. Bad input is one sentence on stderr and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path

from .errors import InputError
from .experiment import report as report_module
from .experiment.notebooks import COMMITTED, run_notebooks
from .experiment.provenance import results_folder
from .files import locked, source_tree
from .processes import _first_process
from .speech.text import check_text
from .training import draft, loop, tokenise


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n" if _first_process() else "")


def _number(convert, what: str):
    def parse(text: str):
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None

    return parse


def parser() -> Parser:
    top = Parser(prog="ssd-repro", description="Speech speculative decoding (Interspeech 2025), reproduced.")
    commands = top.add_subparsers(dest="command", required=True, metavar="speak|run|report|tokenise|train-draft")

    speak = commands.add_parser("speak", help="speak a text with the bundled voice")
    speak.add_argument("text", help="English text, at most 5,000 characters; spoken sentence by sentence")
    speak.add_argument("--method", default="speculative", help="autoregressive, draft or speculative (default)")
    speak.add_argument("--tolerance", type=_number(float, "a number from 0 to 1"), default=0.4, metavar="BETA",
                       help="0 (lossless) to 1; default 0.4, the paper's")  # fmt: skip
    speak.add_argument("--draft-length", type=_number(int, "a whole number from 1 to 64"), default=3, metavar="N",
                       help="1 to 64; default 3, the paper's")  # fmt: skip
    speak.add_argument("--voice", default="af_heart", metavar="NAME", help="default af_heart")
    speak.add_argument("--seed", type=_number(int, "a whole number of at least 0"), default=0, metavar="N",
                       help="default 0")  # fmt: skip
    speak.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    speak.add_argument("--weights", metavar="FOLDER", help="another voice folder than the bundled one")
    speak.add_argument(
        "--out", type=Path, metavar="FILE.wav", help="where the sound goes; without it nothing is written"
    )
    speak.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    speak.set_defaults(function=run_speak)

    run = commands.add_parser("run", help="execute the numbered notebooks into results/<profile>/")
    run.add_argument("--profile", default="quick", metavar="NAME", help="a file of notebooks/profiles; default quick")
    run.add_argument("--only", nargs="+", default=[], metavar="NUMBER", help="only these notebooks, such as 01")
    run.add_argument("--out", type=Path, metavar="DIR", help="default results/<profile>")
    run.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                     help="set a parameter of the notebooks, over the profile's")  # fmt: skip
    run.add_argument("--processes", type=_number(int, "a whole number"), default=1, metavar="N",
                     help="share the utterances among so many processes of this machine; default 1")  # fmt: skip
    run.set_defaults(function=run_notebooks)

    report = commands.add_parser(
        "report", help="all tables and figures of results/<profile>/ anew from its rows, and README's"
    )
    report.add_argument("--profile", default="quick", metavar="NAME", help="default quick")
    report.add_argument("--out", type=Path, metavar="DIR", help="the results folder; default results/<profile>")
    report.add_argument("--readme", type=Path, metavar="FILE", help="put the tables between its markers <!-- name -->; "
                        f"default the checkout's README.md for the profile {COMMITTED}, else none")  # fmt: skip
    report.set_defaults(function=run_report)

    tokens = commands.add_parser(
        "tokenise", help="LibriTTS as the rows that train-draft learns from; alone, or launched"
    )
    tokens.add_argument("--target", type=Path, required=True, metavar="DIR", help="a released CosyVoice 2 or 3")
    tokens.add_argument("--data", required=True, metavar="DIR", help="LibriTTS, one subset or all of them")
    tokens.add_argument("--out", type=Path, required=True, metavar="DIR", help="00000.jsonl, ...; a killed one goes on")
    tokens.set_defaults(function=run_tokenise)

    train = commands.add_parser(
        "train-draft", help="train a draft for a target; alone, or under accelerate launch or torchrun"
    )
    train.add_argument("--target", type=Path, required=True, metavar="DIR", help="CosyVoice 2 or 3, or a voice folder")
    train.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="rows of text and speech tokens, *.jsonl[.gz]"
    )
    train.add_argument("--out", type=Path, required=True, metavar="DIR",
                       help="draft.json, draft.safetensors, log.jsonl; the same command goes on where a killed one was")  # fmt: skip
    train.add_argument("--recipe", default="paper", metavar="paper|on-policy", help="learn from the data's speech (default), "
                       "or from the target's own speech to the data's texts")  # fmt: skip
    train.add_argument(
        "--loss", default="", metavar="ce|kl", help="default ce for the paper's recipe, kl for on-policy"
    )
    train.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    train.add_argument("--precision", default="bf16", metavar="bf16|fp32", help="default bf16")
    whole, some = _number(int, "a whole number"), _number(float, "a number")
    for name, kind, default, text in (
        ("steps", whole, 20_000, "optimiser steps"),
        ("batch", whole, 64, "utterances a step, over all processes"),
        ("accumulate", whole, 1, "parts that a process's share of the batch is cut into"),
        ("learning-rate", some, 3e-4, "the highest, after the warm-up"),
        ("warmup", whole, 200, "steps until then"),
        ("weight-decay", some, 0.05, "AdamW's"),
        ("seed", whole, 0, "decides batches, samples and what is held out"),
        ("save-every", whole, 200, "steps between checkpoints"),
        ("held-out", whole, 64, "rows that are only evaluated on"),
        ("longest", whole, 1500, "speech tokens; longer rows are left out"),
    ):
        train.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text}; default {default}")
    train.add_argument("--samples", type=whole, metavar="N", help="rows that the on-policy recipe speaks; default all")
    train.set_defaults(function=run_train_draft)
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    warnings.simplefilter("ignore")  # of libraries: the user can do nothing about them
    try:
        return options.function(options)
    except InputError as error:
        if _first_process():
            print(f"ssd-repro: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ssd-repro: interrupted", file=sys.stderr)
        return 130


def check_output(path: Path) -> None:
    """InputError unless a WAV file can be put at ``path``; leaves nothing behind."""
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: give the name of a .wav file")
    if path.suffix.lower() != ".wav":
        raise InputError(f"--out {path} does not end in .wav: a WAV file is what is written")
    if path.exists() and not (stat.S_ISREG(path.stat().st_mode) and os.access(path, os.W_OK)):
        raise InputError(f"--out {path} is not a file that can be replaced: choose another name")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}, make it first")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"--out {path}: cannot write into {path.parent} ({error.strerror})") from None


def run_speak(options) -> int:

    check_text(options.text)
    if options.out:
        check_output(options.out)
    with redirect_stdout(sys.stderr):  # whatever a library prints
        take = _speak(options)
        if options.out:
            take.save(options.out)
    out = str(options.out) if options.out else None
    print(json.dumps({**take.summary(), "out": out}) if options.json else describe(take, out))
    return 0


def _speak(options):
    import ssd_repro

    voice = ssd_repro.load(options.weights, device=options.device)
    settings = {name: getattr(options, name) for name in ("method", "voice", "tolerance", "draft_length", "seed")}
    return voice.speak(options.text, **settings)


def describe(take, out: str | None) -> str:
    """A take in a few lines for a person."""
    lines = [
        f"{take.method}, voice {take.voice}, seed {take.seed}, {take.device}",
        f"{len(take.token_ids)} tokens, {take.audio_seconds:.2f} s of audio"
        + (f", LM-RTF {take.lm_rtf:.3f}, RTF {take.rtf:.3f}" if take.token_ids else ": the text came out empty"),
    ]
    if take.acceptance_rate is not None:
        lines.append(
            f"acceptance rate {take.acceptance_rate:.3f}, {take.tokens_per_target_call:.2f} tokens a target call"
        )
    lines.append(f"written to {out}" if out else "no sound was written: add --out FILE.wav")
    return "\n".join(lines)


def run_tokenise(options) -> int:

    if not Path(options.data).is_dir():
        raise InputError(f"--data {options.data} is not a folder: give that of LibriTTS")
    count = tokenise.tokenise(options.target, options.data, options.out, log=_to_stderr)
    print(f"{options.out}: {count} utterances")
    return 0


def run_train_draft(options) -> int:
    from dataclasses import fields

    names = [field.name for field in fields(loop.Settings) if field.name != "until"]
    settings = loop.Settings(**{name: getattr(options, name) for name in names})
    rest = {name: getattr(options, name) for name in ("recipe", "loss", "held_out", "longest", "samples", "device")}
    draft.train(options.target, options.data, options.out, settings, **rest, log=_to_stderr)
    if _first_process():
        print(options.out / "draft.json")
    return 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_report(options) -> int:

    folder = results_folder(str(options.out or ""), options.profile)
    readme = options.readme
    if readme is None and options.out is None and options.profile == COMMITTED and source_tree():
        readme = source_tree() / "README.md"
    if readme and not readme.is_file():
        raise InputError(f"--readme {readme} is not a file")
    if not (folder / "provenance.json").is_file():
        raise InputError(
            f"{folder} holds no provenance.json: `ssd-repro run --profile {options.profile}` makes it first"
        )
    with locked(folder / ".run.lock"):
        made = report_module.report(folder, readme)
    print(f"{folder}: {', '.join(made)}")
    return 0
