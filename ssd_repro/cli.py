"""The command ``ssd-repro``: speak, run, report, tokenise, train-draft. Bad input is one sentence on stderr and exit code 2."""

from __future__ import annotations

import argparse
import ast
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from .errors import InputError

LAUNCHED = "SSD_REPRO_LAUNCHED"  # set in the processes of --processes
COMMITTED = "mini"  # the profile whose results README shows
FIRST_TRAINING = "10"  # notebooks numbered from here on train: they run with --only alone


def _first_process() -> bool:
    """Of those that torchrun or accelerate launched; what all of them would say, this one says.

    Of those of ``launch`` any may speak: the first that fails is the last.
    """
    return LAUNCHED in os.environ or os.environ.get("RANK", "0") == "0"


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
    speak.add_argument("--out", type=Path, metavar="FILE.wav", help="where the sound goes; without it nothing is written")
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

    report = commands.add_parser("report", help="all tables and figures of results/<profile>/ anew from its rows, and README's")
    report.add_argument("--profile", default="quick", metavar="NAME", help="default quick")
    report.add_argument("--out", type=Path, metavar="DIR", help="the results folder; default results/<profile>")
    report.add_argument("--readme", type=Path, metavar="FILE", help="put the tables between its markers <!-- name -->; "
                        f"default the checkout's README.md for the profile {COMMITTED}, else none")  # fmt: skip
    report.set_defaults(function=run_report)

    tokens = commands.add_parser("tokenise", help="LibriTTS as the rows that train-draft learns from; alone, or launched")
    tokens.add_argument("--target", type=Path, required=True, metavar="DIR", help="a released CosyVoice 2 or 3")
    tokens.add_argument("--data", required=True, metavar="DIR", help="LibriTTS, one subset or all of them")
    tokens.add_argument("--out", type=Path, required=True, metavar="DIR", help="part0.jsonl, ...; a killed one goes on")
    tokens.set_defaults(function=run_tokenise)

    train = commands.add_parser("train-draft", help="train a draft for a target; alone, or under accelerate launch or torchrun")
    train.add_argument("--target", type=Path, required=True, metavar="DIR", help="CosyVoice 2 or 3, or a voice folder")
    train.add_argument("--data", type=Path, required=True, metavar="DIR", help="rows of text and speech tokens, *.jsonl[.gz]")
    train.add_argument("--out", type=Path, required=True, metavar="DIR",
                       help="draft.json, draft.safetensors, log.jsonl; the same command goes on where a killed one was")  # fmt: skip
    train.add_argument("--recipe", default="paper", metavar="paper|on-policy", help="learn from the data's speech (default), "
                       "or from the target's own speech to the data's texts")  # fmt: skip
    train.add_argument("--loss", default="", metavar="ce|kl", help="default ce for the paper's recipe, kl for on-policy")
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


# speak


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
    from .text import check_text

    check_text(options.text)
    if options.out:
        check_output(options.out)
    with redirect_stdout(sys.stderr):  # whatever a library prints
        take = _speak(options)
        if options.out:
            try:
                take.save(options.out)
            except OSError as error:
                raise InputError(f"--out {options.out} cannot be written: {error.strerror}") from error
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
        f"{len(take.token_ids)} tokens, {take.audio_seconds:.2f} s of audio, "
        f"LM-RTF {take.lm_rtf:.3f}, RTF {take.rtf:.3f}",
    ]
    if take.acceptance_rate is not None:
        lines.append(
            f"acceptance rate {take.acceptance_rate:.3f}, {take.tokens_per_target_call:.2f} tokens a target call"
        )
    lines.append(f"written to {out}" if out else "no sound was written: add --out FILE.wav")
    return "\n".join(lines)


# tokenise, train-draft


def run_tokenise(options) -> int:
    from . import zero_shot

    if not Path(options.data).is_dir():
        raise InputError(f"--data {options.data} is not a folder: give that of LibriTTS")
    count = zero_shot.tokenise(options.target, options.data, options.out, log=_to_stderr)
    print(f"{options.out}: {count} utterances")
    return 0


def run_train_draft(options) -> int:
    from dataclasses import fields

    from . import draft_training

    names = [field.name for field in fields(draft_training.Settings)]
    settings = draft_training.Settings(**{name: getattr(options, name) for name in names})
    rest = {name: getattr(options, name) for name in ("held_out", "longest", "samples", "device")}
    draft_training.train(options.target, options.data, options.out, settings, **rest, log=_to_stderr)
    if _first_process():
        print(options.out / "draft.json")
    return 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# report


def run_report(options) -> int:
    from . import report
    from .experiment import locked, results_folder, source_tree

    folder = results_folder(str(options.out or ""), options.profile)
    readme = options.readme
    if readme is None and options.out is None and options.profile == COMMITTED and source_tree():
        readme = source_tree() / "README.md"
    if readme and not readme.is_file():
        raise InputError(f"--readme {readme} is not a file")
    if not (folder / "provenance.json").is_file():
        raise InputError(f"{folder} holds no provenance.json: `ssd-repro run --profile {options.profile}` makes it first")
    with locked(folder / ".run.lock"):
        made = report.report(folder, readme)
    print(f"{folder}: {', '.join(made)}")
    return 0


# run


def notebooks_folder() -> Path:
    """The checkout's notebooks, or the copy inside an installed package."""
    from .experiment import source_tree

    root = source_tree()
    folder = root / "notebooks" if root else Path(__file__).parent / "notebooks"
    if not folder.is_dir():
        raise InputError("no notebooks are installed: install ssd-repro from a clone of its repository")
    return folder


def choose_notebooks(folder: Path, only: list[str]) -> list[Path]:
    """The notebooks that ``only`` names by number, stem or file name; all result notebooks by default."""
    known = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not only:
        return [path for path in known if path.name[:2] < FIRST_TRAINING]
    chosen = []
    for name in only:
        fits = [path for path in known if name in (path.name[:2], path.stem, path.name)]
        if not fits:
            raise InputError(f"unknown notebook {name!r}: choose among {', '.join(p.stem for p in known)}")
        chosen += fits
    return sorted(set(chosen))


def read_profile(folder: Path, name: str) -> dict:
    import yaml

    known = {path.stem: path for path in sorted((folder / "profiles").glob("*.yaml"))}
    if name not in known:
        raise InputError(f"unknown profile {name!r}: choose one of {', '.join(known)}")
    values = yaml.safe_load(known[name].read_text("utf-8"))
    if not isinstance(values, dict):
        raise InputError(f"profile {name} must hold lines NAME: VALUE")
    return values


def declared(path: Path) -> dict[str, str]:
    """Name -> type of a notebook's parameters, from its parameters cell."""
    import papermill

    return {name: p["inferred_type_name"] for name, p in papermill.inspect_notebook(str(path)).items()}


def parse_value(name: str, text: str, kind: str):
    """The VALUE of -p as the parameters cell's type; InputError if it is not of that type."""
    import yaml

    from .experiment import fits

    try:
        value = text if kind == "str" else float(text) if kind == "float" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        value = None
    if not fits(value, kind):
        raise InputError(f"parameter {name} must be {kind}, got {text!r}")
    return value


def parameters_for(kinds: dict[Path, dict[str, str]], profile: dict, given: list) -> dict[Path, dict]:
    """Each notebook's parameters: those it declares, from the profile and then from -p."""
    from .experiment import fits

    every = {name: kind for declared in kinds.values() for name, kind in declared.items()}
    for name, _ in given:
        if name not in every:
            raise InputError(f"unknown parameter {name!r}: choose one of {', '.join(every)}")
    values = {name: value for name, value in profile.items() if name in every}
    for name, value in values.items():
        if value is not None and not fits(value, every[name]):
            raise InputError(f"the profile's {name} must be {every[name]}, got {value!r}")
    values |= {name: parse_value(name, text, every[name]) for name, text in given}
    return {path: {n: v for n, v in values.items() if n in declared} for path, declared in kinds.items()}


def check_profile(folder: Path, name: str, profile: dict) -> None:
    """A name in a profile that no notebook declares is a mistake."""
    known = {n for path in folder.glob("[0-9][0-9]_*.ipynb") for n in declared(path)}
    unknown = sorted(set(profile) - known)
    if unknown:
        raise InputError(f"profile {name} sets {unknown[0]!r}, which no notebook has")


def run_notebooks(options) -> int:
    from .experiment import locked, process, results_folder

    folder = notebooks_folder()
    chosen = choose_notebooks(folder, options.only)
    profile = read_profile(folder, options.profile)
    check_profile(folder, options.profile, profile)
    out = results_folder(str(options.out or ""), options.profile)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give the name of a folder")
    parameters = parameters_for({path: declared(path) for path in chosen}, profile, options.parameters)
    check_given(options.profile, parameters)
    fixed = {"profile": options.profile, "out": _as_typed(out)}
    rank, world = process()
    end_with_parent()
    if options.processes < 1:
        raise InputError(f"--processes must be a whole number of at least 1, got {options.processes}")
    if options.processes > 1 and world == 1:
        with locked(out / ".run.lock"):
            pass  # what can be refused is refused before there are processes
        return launch(options.processes, options.arguments)
    code = 0
    with nullcontext() if rank else locked(out / ".run.lock"):
        if world > 1:
            share_rows({path: fixed | parameters[path] for path in chosen})
            if rank:
                return 0
        for path in chosen:
            code = max(code, execute(path, out, fixed | parameters[path]))
    return code


def check_given(name: str, parameters: dict[Path, dict]) -> None:
    """InputError if a parameter that the profile leaves open (null) was not set with -p."""
    import papermill

    missing = {n: path for path, values in parameters.items() for n, value in values.items() if value is None}
    if missing:
        asked = " ".join(f"-p {n} VALUE" for n in missing)
        about = "; ".join(f"{n}: {papermill.inspect_notebook(str(path))[n]['help']}" for n, path in missing.items())
        raise InputError(f"profile {name} needs {asked} ({about})")


# Several processes: --processes, torchrun, accelerate launch


def launch(processes: int, arguments: list[str]) -> int:
    """The same command in several processes of this machine, each with its share of the cores -> exit code.

    Not by torchrun: its processes outlive a killed parent, and hold the lock. These end with it
    (``end_with_parent``), and the first that fails ends the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} | os.environ
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), LAUNCHED: "1"}
    command, workers = [sys.executable, "-m", "ssd_repro", *arguments], []
    try:
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(subprocess.Popen(command, env=share | meet | own, stdin=subprocess.PIPE))
        while True:
            codes = [worker.poll() for worker in workers]
            if any(codes) or None not in codes:
                return max(abs(code) for code in codes if code is not None)
            time.sleep(0.2)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def end_with_parent() -> None:
    """In a process of ``launch``: end when its parent has, that is, when the pipe on stdin does."""
    if LAUNCHED in os.environ:
        pipe = os.dup(0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        threading.Thread(target=lambda: os.read(pipe, 1) or os._exit(1), daemon=True).start()


def share_rows(parameters: dict[Path, dict]) -> None:
    """Each process makes the rows of its share of utterances; returns when all have.

    A process runs a notebook's own statements up to its last ``experiment.run``, which knows
    the process's rank. What follows (tables, figures) is left to rank 0, which afterwards
    executes the notebooks alone and finds all rows made.
    """
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=30))  # a share may take hours longer than another
    for path, values in parameters.items():
        if code := code_of_rows(path):
            space = {"__name__": "__main__"}
            injected = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
            first, *rest = code
            for source in (first, injected, *rest):
                exec(compile(source, path.name, "exec", dont_inherit=True), space)
    dist.barrier()
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # the notebooks run in one process
        os.environ.pop(name, None)


def code_of_rows(path: Path) -> list[str]:
    """The parameters cell of a notebook and its statements up to the last ``experiment.run``; [] without."""
    import nbformat

    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    statements = [(i > 0, ast.unparse(s)) for i, cell in enumerate(cells) for s in ast.parse(cell).body]
    last = max((i for i, (_, code) in enumerate(statements) if "experiment.run(" in code), default=None)
    if last is None:
        return []
    return [cells[0], *(code for body, code in statements[: last + 1] if body)]


def _as_typed(path: Path) -> str:
    """Relative to the working directory where it lies below it: results name no machine's folders."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


def execute(source: Path, out: Path, parameters: dict) -> int:
    """Run one notebook into ``out``; only a finished one gets its own name. -> exit code."""
    import papermill

    running, failed, done = (out / f"{source.stem}.{end}" for end in ("running.ipynb", "failed.ipynb", "ipynb"))
    print(f"{source.stem} -> {done}", file=sys.stderr)
    os.environ.setdefault("PYTHONWARNINGS", "ignore:pkg_resources is deprecated:UserWarning")  # pyworld's
    try:
        papermill.execute_notebook(str(source), str(running), parameters, kernel_name="python3",
                                   language="python", stderr_file=sys.stderr,
                                   extra_arguments=["--IPKernelApp.log_level=ERROR"])  # fmt: skip
    except papermill.PapermillExecutionError as error:
        os.replace(running, failed)
        print(
            f"ssd-repro: notebook {source.name} failed in cell {error.cell_index}: {error.ename}: {error.evalue} "
            f"(kept as {failed})",
            file=sys.stderr,
        )
        return 2 if error.ename == "InputError" else 1
    except OSError as error:  # papermill saves after each cell
        raise InputError(f"cannot write {running}: {error.strerror or error}; rows and {done.name} are kept") from error
    tidy(running, source)
    os.replace(running, done)
    failed.unlink(missing_ok=True)
    return 0


def tidy(path: Path, source: Path) -> None:
    """Keep a progress bar's last state alone, and of papermill's notes no folder of this machine."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    about = notebook.metadata.get("papermill", {})
    about.update({key: Path(about[key]).name for key in ("input_path", "output_path") if about.get(key)})
    about.update({"input_path": source.name, "output_path": source.name})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined_streams(cell.outputs)
    nbformat.write(notebook, path)


def joined_streams(outputs: list) -> list:
    """Neighbouring pieces of stdout or stderr as one, each line as a terminal shows it at the end."""
    joined: list = []
    for output in outputs:
        if joined and "name" in output and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n"))
    return joined
