"""The server: only its own files, nothing lost on kill -9, listeners at the same time, limits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from conftest import ROOT

from ssd_repro import cli
from ssd_repro.listening import FORMAT, serve

pytest.importorskip("starlette", reason="the extra listen is not installed")
BUILD = "0123456789ab"


def session(listener=1, answers=1, name="a", **other):
    about = {"format": FORMAT, "build": BUILD, "listener": listener, "session": (name * 32)[:32]}
    return {**about, "answers": [{"trial": f"t{i}", "value": 3} for i in range(answers)], **other}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As ``build`` leaves it, without sense."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "audio").mkdir()
    (folder / "audio" / "a.flac").write_bytes(bytes(range(100)))
    (folder / "index.html").write_text("<p>the page</p>")
    (folder / "key.json").write_text(json.dumps({"format": FORMAT, "build": BUILD}))
    return folder


class Server:
    def __init__(self, folder):
        command = [sys.executable, "-m", "ssd_repro", "listening-test", "serve", str(folder), "--port", "0"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.address = self.process.stdout.readline().split()[0]

    def ask(self, path, body=None, kind="application/json", method=None):
        """-> status, content."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = Request(self.address + path, data, {"Content-Type": kind, "Range": "bytes=0-"}, method=method)
        try:
            with urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder)
    yield server
    server.end()


def test_page_and_audio_and_no_other_file(server):
    assert server.address.startswith("http://127.0.0.1:")
    assert server.ask("")[1] == b"<p>the page</p>" == server.ask("index.html")[1]
    assert server.ask("audio/a.flac") == (206, bytes(range(100)))
    for path in ("key.json", "ratings/", "audio/", "audio/../key.json", "..%2Fkey.json", "audio/%2e%2e/key.json"):
        assert server.ask(path)[0] == 404, path
    assert server.ask("/etc/passwd")[0] == 404 and server.ask("%2Fetc%2Fpasswd")[0] == 404
    assert server.ask("index.html", {})[0] == 405


def test_what_is_no_session_is_refused_with_a_sentence(server, folder):
    before = sorted((folder / "ratings").iterdir())
    for body, says in (
        (b"not json", "no session"),
        (b"[" * 100_000, "no session"),
        ([1], "no session"),
        (session() | {"build": "other"}, "another test"),
        (session(0), "from 1 to 999999"),
        (session(True), "from 1 to 999999"),
        (session() | {"answers": {}}, "a list"),
        (session() | {"session": "../../key"}, "32 hexadecimal"),
        (session() | {"session": "A" * 32}, "32 hexadecimal"),
    ):
        status, content = server.ask("ratings", body)
        assert status == 400 and says in content.decode(), body
    assert server.ask("ratings", session(), kind="text/plain")[0] == 415  # another site's form
    assert server.ask("listener", b"{}", kind="text/plain")[0] == 415
    with suppress(OSError):  # it hung up before all was sent
        assert server.ask("ratings", session(note="x" * serve.LARGEST))[0] == 413
    assert sorted((folder / "ratings").iterdir()) == before


def test_a_later_copy_replaces_an_earlier_one_and_never_by_fewer_answers(server, folder):
    for sent, kept in ((1, 1), (3, 3), (2, 3), (4, 4)):
        assert json.loads(server.ask("ratings", session(7, sent))[1]) == {"saved": kept}
        assert len(json.loads((folder / "ratings" / f"7-{'a' * 32}.json").read_text())["answers"]) == kept


def test_listeners_at_the_same_time(server, folder):
    """No number twice, no session lost or mixed, also where copies of one session overtake each other."""
    with ThreadPoolExecutor(16) as pool:
        numbers = list(pool.map(lambda _: json.loads(server.ask("listener", b"{}")[1])["listener"], range(40)))
        assert len(set(numbers)) == 40
        posts = [(number, count) for count in (2, 1, 3) for number in numbers]
        sent = pool.map(lambda post: server.ask("ratings", session(post[0], post[1], "b"))[0], posts)
        assert set(sent) == {200}
    for number in numbers:
        found = json.loads((folder / "ratings" / f"{number}-{'b' * 32}.json").read_text())
        assert (found["listener"], len(found["answers"])) == (number, 3)


def test_nothing_that_was_acknowledged_is_lost_on_kill_9(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own", ignore=shutil.ignore_patterns("ratings"))
    for life in range(2):
        server = Server(own)
        number = json.loads(server.ask("listener", b"{}")[1])["listener"]
        assert number == life + 1
        with ThreadPoolExecutor(4) as pool:
            early = [pool.submit(server.ask, "ratings", session(number, n)) for n in range(20)]
            saved = max(json.loads(post.result()[1])["saved"] for post in early)
            late = [pool.submit(server.ask, "ratings", session(number, 20 + n)) for n in range(8)]
            server.end(signal.SIGKILL)  # while these are under way
        saved = max([saved, *(json.loads(post.result()[1])["saved"] for post in late if not post.exception())])
        for path in (own / "ratings").glob("*.json"):
            json.loads(path.read_text())  # whole
        (path,) = (own / "ratings").glob(f"{number}-*.json")
        assert len(json.loads(path.read_text())["answers"]) >= saved


def test_a_full_house_and_a_full_disk(tmp_path, monkeypatch):
    store = serve.Store(tmp_path, BUILD)
    monkeypatch.setattr(serve, "MOST", 1)
    assert store.save(json.dumps(session()).encode()) == 1
    with pytest.raises(ValueError, match="1 sessions already"):
        store.save(json.dumps(session(2)).encode())
    monkeypatch.setattr(serve.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        store.save(json.dumps(session(answers=5)).encode())
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text())["answers"]) == 1


def test_bad_addresses_and_folders_are_one_sentence(folder, server, tmp_path, capsys):
    def refused(*arguments) -> str:
        assert cli.main(["listening-test", "serve", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "is no listening test: make one with" in refused(tmp_path)
    assert "another run is writing into" in refused(folder, "--port", 0)
    other = tmp_path / "other"
    (other / "audio").mkdir(parents=True)
    (other / "key.json").write_text(json.dumps({"build": BUILD}))
    taken = server.address.rstrip("/").rpartition(":")[2]
    assert f"cannot serve at 127.0.0.1, port {taken}" in refused(other, "--port", taken)
    assert "cannot serve at 127.0.0.1, port 70000" in refused(other, "--port", 70000)
