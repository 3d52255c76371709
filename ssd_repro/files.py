"""Files that a kill, a full disk or another process cannot spoil: locks, atomic writes, rows; digests; the checkout."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError


@contextmanager
def locked(path: Path):
    """Only one process at a time; the system frees the lock of a killed one."""
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path).acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"another run is writing into {path.parent}: wait, or choose another folder") from None
    except OSError as error:
        raise InputError(f"cannot write into {path.parent}: {error.strerror}") from error
    with lock:
        yield


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(content)


@contextmanager
def replacing(path: Path):
    """Yield a new path beside ``path`` to write to, which takes its place at the end (its name ends in .part).

    A reader never sees a half-written file. InputError on a full disk or in a read-only folder.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; what was there is kept") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def append_row(path: Path, *rows: dict) -> None:
    """Add a line for each and wait until they are on the disk; on a full disk leave the file as it was."""
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    left = "".join(lines).encode()
    try:
        with path.open("ab", buffering=0) as handle:  # a buffer would write what is left of it when it closes
            size = handle.tell()
            try:
                while left:
                    left = left[handle.write(left) :]
                os.fsync(handle.fileno())
            except OSError:
                os.truncate(path, size)
                raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; the rows before are kept") from error


def drop_half_line(path: Path) -> None:
    """Cut off what a killed run left after the last whole line."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def read_rows(path: Path) -> list[dict]:
    """All whole lines of a rows file; none if there is no file yet."""
    if not Path(path).exists():
        return []
    whole, _, _ = Path(path).read_bytes().rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise InputError(f"{path}, line {number} is not JSON: remove that line and run again") from None
    return rows


def source_tree() -> Path | None:
    """The checkout that this package is imported from; None where it was copied on installing."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").exists() and (root / "notebooks").is_dir() else None


def git_state() -> dict:
    """Commit, and whether the checkout differs from it; both None outside a checkout.

    Neither results/ nor what running and saving a notebook changes counts as a difference.
    """
    root, unknown = source_tree(), {"commit": None, "dirty": None}
    if root is None:
        return unknown

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout

    def differs(name: str) -> bool:
        try:
            now, committed = Path(top, name).read_text("utf-8"), git("show", f"HEAD:{name}")
            return notebook_source(now) != notebook_source(committed)
        except (OSError, ValueError, KeyError, TypeError, subprocess.CalledProcessError):
            return True  # new, deleted or no notebook

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        changes = git("status", "--porcelain", "-z", "--no-renames", "-unormal", "--", ".", ":(exclude)results")
    except (OSError, subprocess.CalledProcessError):
        return unknown
    names = [change[3:] for change in changes.split("\0") if change]  # after two letters and a space
    return {"commit": commit, "dirty": any(not name.endswith(".ipynb") or differs(name) for name in names)}


def notebook_source(text: str) -> list:
    """Of each cell what a run of the notebook does not change."""
    cells = json.loads(text)["cells"]
    return [[cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags")] for cell in cells]


def cache_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("ssd-repro"))


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """First 12 digits of a file's SHA-256."""
    return sha256(path)[:12]
