"""The command ``ssd-repro``. Bad input is one sentence on stderr and exit code 2.

A command imports what it needs when it runs: ``--help`` and usage errors come at once, without torch.
"""

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
from .files import locked, source_tree
from .processes import is_first

REQUIRED = object()


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n" if is_first() else "")

    def add(self, name: str, default, text: str, kind=None) -> None:
        """An option of the default's type, or ``kind``; its help ends with its default."""
        kind, required = kind or type(default), default is REQUIRED
        text = text if required or default in (None, "") else f"{text}; default {default}"
        metavar = {int: "N", float: "X", str: "NAME", Path: "PATH"}[kind]
        default = None if required else default
        self.add_argument(name, type=_parse[kind], default=default, required=required, metavar=metavar, help=text)


def _number(kind, wanted: str):
    def parse(text: str):
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None

    return parse


_parse = {int: _number(int, "a whole number"), float: _number(float, "a number"), str: str, Path: Path}


def parser() -> Parser:
    top = Parser(prog="ssd-repro", description="Speech speculative decoding (Interspeech 2025), reproduced.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    speak = commands.add_parser("speak", help="speak a text with the bundled voice")
    speak.add_argument("text", help="English text, at most 5,000 characters; spoken sentence by sentence")
    speak.add("--method", "speculative", "autoregressive, draft or speculative")
    speak.add("--tolerance", 0.4, "beta, from 0 (lossless) to 1")
    speak.add("--draft-length", 3, "drafted tokens per round, from 1 to 64")
    speak.add("--drafter", "", "paper, hidden, block, on-policy, early-exit or n-gram; default paper, at beta 0 hidden")
    speak.add("--rule", None, "another acceptance rule than the tolerance, such as top-k:5 or ensemble:0.4", str)
    speak.add("--verification", "token", "token, or block: drafted tokens are judged jointly, for tolerance 0")
    speak.add("--confidence", 0.0, "from 0 to 1: the draft ends early where it trusts itself less; 0: never")
    speak.add("--voice", "af_heart", "who speaks")
    speak.add("--seed", 0, "of the sampling, at least 0")
    speak.add("--device", "auto", "auto, cpu or cuda")
    speak.add("--runtime", "auto", "auto, eager, graphs or openvino")
    speak.add("--precision", "fp32", "fp32, bf16 or, with openvino, int8, w8a8; auto: w8a8 or bf16 where it can")
    speak.add("--threads", None, "of the CPU; without it what is best for the voice", int)
    speak.add("--weights", None, "another voice folder than the bundled one", Path)
    speak.add("--out", None, "the WAV file to write; without it nothing is written", Path)
    speak.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    speak.set_defaults(function=run_speak)

    run = commands.add_parser("run", help="execute the notebooks into results/<profile>/")
    run.add("--profile", "quick", "a file of notebooks/profiles, without .yaml")
    run.add_argument("--only", nargs="+", default=[], metavar="NUMBER", help="only these notebooks, such as 01")
    run.add("--out", "", "results folder; default results/<profile>")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    run.add("--processes", 1, "share the utterances among so many processes of this machine")
    run.set_defaults(function=run_run)
    run.format_help = lambda: _help_of_run(run)

    report = commands.add_parser("report", help="tables, figures and index.html of results/<profile>/ from its rows")
    report.add("--profile", "quick", "names the results folder")
    report.add("--out", "", "results folder; default results/<profile>")
    report.add("--readme", None, "page to put the numbers into; default those that show this profile", Path)
    report.set_defaults(function=run_report)

    samples = commands.add_parser("samples", help="make the sound samples of the results page from the rows' tokens")
    samples.add("--profile", "quick", "names the results folder")
    samples.add("--out", "", "results folder; default results/<profile>")
    samples.add("--sentences", 8, "how many, from 1 to 100; chosen by a rule, not by hand")
    samples.set_defaults(function=run_from_tokens)

    score = commands.add_parser("score", help="WER and other metrics of rows decoded without them, from their tokens")
    score.add("--profile", REQUIRED, "names the results folder", str)
    score.add("--out", "", "results folder; default results/<profile>")
    score.add("--notebook", "01_table1", "whose rows")
    score.set_defaults(function=run_from_tokens)

    bench = commands.add_parser("bench", help="time our decoding beside transformers' on the same weights")
    bench.add("--utterances", 30, "how many; the same command goes on where a killed one was")
    bench.add("--tolerance", 0.4, "beta of our SSD, beside 0")
    bench.add("--draft-length", 3, "drafted tokens per round, from 1 to 64")
    bench.add("--drafter", "all", "beside the paper's: all, paper for none, or hidden, block or on-policy")
    bench.add("--repeats", 1, "timed decodes of each; the median counts")
    bench.add("--longest", 0, "tokens of a piece of text at most; 0: as the voice")
    bench.add("--seed", 0, "of the first utterance; the next ones count on from it")
    bench.add("--device", "auto", "auto, cpu or cuda")
    bench.add("--runtime", "auto", "ours: auto, eager, graphs or openvino; eager is measured beside it")
    bench.add("--precision", "fp32", "fp32, bf16 or, with openvino, int8, w8a8; auto: w8a8 or bf16 where it can")
    bench.add("--threads", None, "of the CPU; without it what is best for the voice", int)
    bench.add("--weights", None, "another voice folder than the bundled one", Path)
    bench.add("--out", "", "results folder; default results/bench")
    bench.add_argument("--compile", action="store_true", help="transformers under torch.compile, too: minutes more")
    bench.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    bench.set_defaults(function=run_bench)

    _add_listening_test(commands)

    tokens = commands.add_parser("tokenise", help="LibriTTS as rows for train-draft to learn from; alone or launched")
    tokens.add("--target", REQUIRED, "a released CosyVoice 2 or 3", Path)
    tokens.add("--data", REQUIRED, "LibriTTS, one subset or all of them", Path)
    tokens.add("--out", REQUIRED, "folder for 00000.jsonl, ...; the same command goes on where a killed one was", Path)
    tokens.set_defaults(function=run_tokenise)

    train = commands.add_parser("train-draft", help="train a draft for a target; alone or launched")
    train.add("--target", REQUIRED, "CosyVoice 2 or 3, a voice folder, or a causal model of transformers", Path)
    train.add("--data", REQUIRED, "folder of rows of text and speech tokens, *.jsonl[.gz]", Path)
    train.add("--out", REQUIRED, "folder for the draft; the same command goes on where a killed one was", Path)
    train.add("--recipe", "paper", "paper: learn from the data's speech; on-policy: from the target's own")
    train.add("--drafter", "paper", "paper: bottom and top layers; hidden, block: layers on its hidden states")
    train.add("--loss", "", "of the paper's drafter: ce (default for the paper's recipe), kl (for on-policy) or tv")
    train.add("--device", "auto", "auto, cpu or cuda")
    train.add("--precision", "bf16", "bf16 or fp32")
    train.add("--steps", 20_000, "optimiser steps")
    train.add("--batch", 64, "utterances per step, over all processes")
    train.add("--accumulate", 1, "parts that a process's share of the batch is cut into")
    train.add("--learning-rate", 3e-4, "the highest, after the warm-up")
    train.add("--warmup", 200, "steps until then")
    train.add("--weight-decay", 0.05, "AdamW's")
    train.add("--seed", 0, "decides batches, samples and what is held out")
    train.add("--save-every", 200, "steps between checkpoints")
    train.add("--held-out", 64, "rows that are only evaluated on")
    train.add("--longest", 1500, "speech tokens; longer rows are left out")
    train.add("--samples", None, "rows that the on-policy recipe speaks; default all", int)
    train.add("--sample-batch", 1, "of them at once; on a GPU hundreds")
    train.set_defaults(function=run_train_draft)
    return top


def _add_listening_test(commands) -> None:
    parts = commands.add_parser("listening-test", help="Table 2: build, serve and analyse a test with listeners")
    parts = parts.add_subparsers(dest="part", required=True, metavar="build|serve|analyse")
    build = parts.add_parser("build", help="make the test's folder from the rows of notebooks 01 and 02")
    build.add("--profile", "quick", "names the results folder with the rows")
    build.add("--results", "", "results folder; default results/<profile>")
    build.add("--out", REQUIRED, "folder for index.html, audio/ and key.json", Path)
    build.add("--utterances", 24, "texts, each heard once by a listener; a multiple of the four systems")
    build.add("--seed", 0, "of orders, pairs and checks")
    build.set_defaults(function=run_listening_build)
    serve = parts.add_parser("serve", help="serve a built test and save its ratings in DIR/ratings")
    serve.add_argument("folder", type=Path, metavar="DIR", help="what build made")
    serve.add("--host", "127.0.0.1", "address to listen at")
    serve.add("--port", 8000, "0: a free one")
    serve.set_defaults(function=run_listening_serve)
    analyse = parts.add_parser("analyse", help="MOS, equivalence and ABX from ratings files, or a folder of them")
    analyse.add_argument("ratings", nargs="+", type=Path, metavar="RATINGS", help="files that the test saved")
    analyse.add("--key", None, "key.json of the test; default the one beside or above the ratings", Path)
    analyse.add("--results", None, "results folder whose Table 2 shall have the means", Path)
    analyse.set_defaults(function=run_listening_analyse)


def _help_of_run(run: Parser) -> str:
    from .experiment import notebooks

    listed = [*notebooks.all_notebooks(), *notebooks.all_profiles()]
    lines = [f"  {path.stem:<20} {notebooks.first_line(path)}\n" for path in listed]
    return Parser.format_help(run) + "\nnotebooks (from 10 on with --only alone), then profiles:\n" + "".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    warnings.simplefilter("ignore")  # of libraries: the user can do nothing about them
    try:
        return options.function(options)
    except InputError as error:
        if is_first():
            print(f"ssd-repro: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "" if options.command in ("speak", "report", "samples") else "; the same command goes on where it was"
        print(f"\nssd-repro: interrupted{goes_on}", file=sys.stderr)  # below a progress bar
        return 130


def check_output(path: Path) -> None:
    """InputError unless a WAV file can be put at ``path``; leaves nothing behind."""
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: give the name of a .wav file")
    if path.suffix.lower() != ".wav":
        raise InputError(f"--out {path} does not end in .wav: a WAV file is what is written")
    if path.exists() and not (stat.S_ISREG(path.stat().st_mode) and os.access(path, os.W_OK)):
        raise InputError(f"--out {path} is not a file that can be replaced: choose another name")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"--out {path}: cannot write into {path.parent} ({error.strerror})") from None


def run_speak(options) -> int:
    from . import load
    from .speech.text import check_text

    check_text(options.text)
    if options.out:
        check_output(options.out)
    machine = {name: getattr(options, name) for name in ("device", "runtime", "precision", "threads")}
    names = ("method", "voice", "tolerance", "draft_length", "rule", "verification", "confidence", "seed")
    settings = {name: getattr(options, name) for name in names}
    with redirect_stdout(sys.stderr):  # whatever a library prints
        voice = load(options.weights, **machine)
        take = voice.speak(options.text, drafter=options.drafter or voice.drafter_at(options.tolerance), **settings)
        written = options.out and str(take.save(options.out))
    print(json.dumps({**take.summary(), "out": written}) if options.json else _described(take, written))
    return 0


def _described(take, written: str | None) -> str:
    rates = f", LM-RTF {take.lm_rtf:.3f}, RTF {take.rtf:.3f}" if take.token_ids else ": the text came out empty"
    rate, per_call = take.acceptance_rate, take.tokens_per_target_call
    accepted = "" if rate is None else f"acceptance rate {rate:.3f}, {per_call:.2f} tokens per target call\n"
    return (
        f"{take.method}, voice {take.voice}, seed {take.seed}, {take.device}\n"
        f"{len(take.token_ids)} tokens, {take.audio_seconds:.2f} s of audio{rates}\n{accepted}"
        + (f"written to {written}" if written else "no sound was written: add --out FILE.wav")
    )


def run_run(options) -> int:
    from .experiment.notebooks import run_notebooks

    return run_notebooks(options.profile, options.only, options.out, options.p, options.processes, _make_rows)


def _make_rows(parameters: dict[str, dict]) -> None:
    from .experiment.studies import make_rows  # in the processes that decode: the first one needs no torch

    make_rows(parameters)


def _with_provenance(options) -> Path:
    """The results folder that --out or --profile names; InputError if nothing has run into it."""
    from .experiment.provenance import results_folder

    folder = results_folder(options.out, options.profile)
    if not (folder / "provenance.json").is_file():
        raise InputError(f"{folder} holds no provenance.json: run `ssd-repro run --profile {options.profile}` first")
    return folder


def run_report(options) -> int:
    from .experiment import notebook_html, page, report
    from .experiment.notebooks import COMMITTED

    folder, pages = _with_provenance(options), [options.readme] if options.readme else []
    if not pages and not options.out and options.profile == COMMITTED and source_tree():
        pages = [source_tree() / "README.md", source_tree() / "results" / "README.md"]
    if missing := [page for page in pages if not page.is_file()]:
        raise InputError(f"--readme {missing[0]} is not a file")
    with locked(folder / ".run.lock"):
        made = report.report(folder, pages)
        notebook_html.write_all(folder)
        page.write(folder)
    print(f"{folder}: {', '.join([*made, page.NAME])}")
    return 0


def run_from_tokens(options) -> int:
    """Commands ``samples`` and ``score``: from the rows' tokens, by the voice that made them."""
    from .experiment import samples, scoring

    folder = _with_provenance(options)
    with redirect_stdout(sys.stderr), locked(folder / ".run.lock"):
        if options.command == "samples":
            made = f"{folder / 'samples'}: {len(samples.make(folder, options.sentences)['samples'])} sounds"
        else:
            made = f"{folder}: {len(scoring.score(folder, options.notebook))} rows of {options.notebook} are scored"
    print(f"{made}; `ssd-repro report` shows them")
    return 0


def run_bench(options) -> int:
    from .experiment import provenance, report, speed, studies

    names = ("utterances", "tolerance", "draft_length", "repeats", "longest", "seed", "compile", "device", "runtime")
    parameters = {name: getattr(options, name) for name in (*names, "precision", "threads", "drafter")}
    parameters |= {"weights": str(options.weights or ""), "profile": "bench", "out": options.out}
    folder = provenance.results_folder(options.out, "bench")
    with redirect_stdout(sys.stderr), locked(folder / ".run.lock"):
        rows, about = studies.begin("07_bench", parameters).compare()
        shown = [report.show(name, rows, folder, about).data for name in ("bench", "bench_ratios", "cost")]
    print(json.dumps(speed.summary(rows)) if options.json else "\n".join(shown))
    return 0


def run_listening_build(options) -> int:
    from .experiment.provenance import results_folder
    from .listening import build

    folder = results_folder(options.results, options.profile)
    key = build.build(folder, options.out, options.profile, options.utterances, options.seed)
    needed = f"{key['listeners']} listeners needed" if key["listeners"] else "too few utterances to show equivalence"
    print(f"{options.out / 'index.html'}: build {key['build']}, {needed}; keep key.json back")
    return 0


def run_listening_serve(options) -> int:
    from .listening.serve import serve

    serve(options.folder, options.host, options.port)
    return 0


def run_listening_analyse(options) -> int:
    from .listening.analyse import analyse

    analyse(options.ratings, options.key, options.results)
    return 0


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_tokenise(options) -> int:
    from .training import tokenise

    if not options.data.is_dir():
        raise InputError(f"--data {options.data} is not a folder: give that of LibriTTS")
    count = tokenise.tokenise(options.target, options.data, options.out, log=_log)
    if is_first():
        print(f"{options.out}: {count} utterances")
    return 0


def run_train_draft(options) -> int:
    from dataclasses import fields

    from .training import draft
    from .training.loop import Settings

    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings) if f.name != "until"})
    more = ("recipe", "loss", "drafter", "held_out", "longest", "samples", "sample_batch", "device")
    rest = {name: getattr(options, name) for name in more}
    draft.train(options.target, options.data, options.out, settings, **rest, log=_log)
    if is_first():
        print(options.out / "draft.json")
    return 0
