"""A small server for a built test: gives the page and its audio, takes ratings, and loses none.

A session is sent whole after every answer and kept as ratings/<listener>-<session>.json. It is on the disk before
the page hears of it, and a later copy of it replaces an earlier one at once, never by fewer answers.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from threading import Lock

from ..errors import InputError
from ..files import locked
from . import FORMAT, need

LARGEST = 256 * 1024  # bytes of a session; the longest has about 60 per answer
MOST = 10_000  # sessions
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


class Store:
    """The sessions of one build in a folder, for one process: every change under one lock."""

    def __init__(self, folder: Path, build: str) -> None:
        self.folder, self.build, self.lock = Path(folder), build, Lock()
        self.folder.mkdir(parents=True, exist_ok=True)

    def new_listener(self) -> int:
        """The next number, given to nobody else, also after a restart."""
        with self.lock:
            place = self.folder / "listeners.txt"
            given = int(place.read_text()) if place.exists() else 0
            used = [int(path.name.partition("-")[0]) for path in self.folder.glob("*-*.json")]
            number = max(given, *used, 0) + 1
            _write_safely(place, str(number).encode())
            return number

    def save(self, content: bytes) -> int:
        """Keep a session -> how many of its answers are on the disk. ValueError says what is wrong with it."""
        try:
            session = json.loads(content)
            listener, name, answers = session["listener"], session["session"], session["answers"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError("this is no session of a listening test") from None
        if session.get("format") != FORMAT or session.get("build") != self.build:
            raise ValueError("these ratings are of another test: load the page again")
        if type(listener) is not int or not 1 <= listener <= 999_999 or not isinstance(answers, list):
            raise ValueError("the listener must be a whole number from 1 to 999999, the answers a list")
        if not (isinstance(name, str) and re.fullmatch("[0-9a-f]{32}", name)):
            raise ValueError("the session's name must be 32 hexadecimal digits")
        with self.lock:
            place = self.folder / f"{listener}-{name}.json"
            if place.exists():
                there = len(json.loads(place.read_bytes())["answers"])
                if there > len(answers):
                    return there
            elif sum(1 for _ in self.folder.glob("*-*.json")) >= MOST:
                raise ValueError(f"there are {MOST} sessions already")
            _write_safely(place, content)
            return len(answers)


def _write_safely(place: Path, content: bytes) -> None:
    """Whole or not at all, and on the disk when this returns, through kill -9 and loss of power."""
    part = place.with_suffix(".part")
    with part.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, place)
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def app(folder: Path):
    """The Starlette application of a built test. InputError if ``folder`` holds none."""
    need("starlette", "uvicorn")
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse
    from starlette.routing import Route

    if not (folder / "key.json").is_file():
        raise InputError(f"{folder} is no listening test: make one with `ssd-repro listening-test build`")
    store = Store(folder / "ratings", json.loads((folder / "key.json").read_text("utf-8"))["build"])
    given = {"index.html": folder / "index.html"}  # nothing else is ever read: no path comes from a request
    given |= {f"audio/{path.name}": path for path in (folder / "audio").glob("*.flac")}

    async def page(request):
        path = given.get(request.path_params.get("path") or "index.html")
        return FileResponse(path, headers=HEADERS) if path else PlainTextResponse("not found", 404, HEADERS)

    async def numbers(request):
        if request.method == "GET":
            return JSONResponse({"gives": "numbers"}, headers=HEADERS)
        if not _is_json(request):
            return PlainTextResponse("send JSON", 415, HEADERS)
        return JSONResponse({"listener": await run_in_threadpool(store.new_listener)}, headers=HEADERS)

    async def ratings(request):
        if not _is_json(request):
            return PlainTextResponse("send JSON", 415, HEADERS)
        content = b""
        async for chunk in request.stream():
            content += chunk
            if len(content) > LARGEST:
                return PlainTextResponse(f"more than {LARGEST} bytes", 413, {**HEADERS, "Connection": "close"})
        try:
            return JSONResponse({"saved": await run_in_threadpool(store.save, content)}, headers=HEADERS)
        except ValueError as error:
            return PlainTextResponse(str(error), 400, HEADERS)
        except OSError as error:
            return PlainTextResponse(f"cannot save: {error.strerror}", 507, HEADERS)

    return Starlette(
        routes=[
            Route("/ratings", ratings, methods=["POST"]),
            Route("/listener", numbers, methods=["GET", "POST"]),
            Route("/{path:path}", page, methods=["GET"]),
        ]
    )


def _is_json(request) -> bool:
    """Other sites' pages cannot send this type without asking first, and are then refused."""
    return request.headers.get("content-type", "").partition(";")[0].strip() == "application/json"


def serve(folder: Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until interrupted; port 0: a free one. InputError if the folder or the address cannot be used."""
    made = app(folder)
    import uvicorn

    with locked(folder / "ratings" / ".server.lock"):
        try:
            listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except (OSError, OverflowError) as error:
            raise InputError(f"cannot serve at {host}, port {port}: {error}") from None
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}/"
        print(f"{address} (ratings go to {folder / 'ratings'}; Ctrl-C ends)", flush=True)
        uvicorn.Server(uvicorn.Config(made, log_level="warning")).run(sockets=[listening])
