"""The page in a real Chromium: whole sessions by mouse and by keyboard, a reload, a phone's screen, accessibility."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import fake_voice
import numpy as np
import pytest
from conftest import ROOT
from made_ratings import asked, make_test

from ssd_repro.listening import ratings

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra test is not installed: no playwright")
pytest.importorskip("pyloudnorm", reason="the extra listen is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install your system's, such as chromium")

FASTER = """const play = HTMLMediaElement.prototype.play;
HTMLMediaElement.prototype.play = function () { this.playbackRate = 16; return play.call(this); };"""
PHONE, DESKTOP = {"width": 360, "height": 640}, {"width": 1280, "height": 800}
SCREENSHOTS = os.environ.get("SSD_REPRO_SCREENSHOTS")  # a folder: to look at what the tests see


@pytest.fixture(scope="module")
def test_folder(tmp_path_factory):
    """A test of four texts, 16 trials a listener, with speech-like noise in place of the fake voice's one tone."""
    folder = tmp_path_factory.mktemp("listening")
    voice = fake_voice.FakeVoice()
    noise = np.random.default_rng(0).normal(0, 0.1, 240_000).astype(np.float32)
    voice.vocode = lambda tokens, name: noise[sum(tokens) % 1000 :][: 960 * min(len(tokens), 20)]
    make_test(voice, folder, 4, rows=12)
    return folder / "test"


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        options = ["--autoplay-policy=user-gesture-required", *["--no-sandbox"] * (os.geteuid() == 0)]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@contextmanager
def served(folder):
    """Yield the address of a server of its own process."""
    command = [sys.executable, "-m", "ssd_repro", "listening-test", "serve", str(folder), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            yield server.stdout.readline().split()[0]
        finally:
            server.terminate()


@contextmanager
def opened(chromium, address, screen=DESKTOP, **options):
    """Yield a page that fails the test on any error in it, or if it asks for anything elsewhere."""
    context = chromium.new_context(viewport=screen, **options)
    context.add_init_script(FASTER)
    page, wrong = context.new_page(), []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked_for: wrong.append(asked_for.url) if foreign(asked_for.url, address) else None)
    page.goto(address)
    yield page
    context.close()
    assert wrong == []


def foreign(url, address):
    return not url.startswith((address.rpartition("/")[0] + "/", "blob:", "data:"))


def look(page, name):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} scrolls sideways"
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png", full_page=True)


def part_of(page):
    return page.text_content("#place").rpartition(": ")[2]


def hear_all(page, play):
    """Play every sample of a trial to its end; the answers open with the last."""
    buttons = page.locator("#clips button")
    for i in range(buttons.count()):
        assert page.evaluate("$('scale').disabled && $('next').disabled")
        play(i)
        page.wait_for_function("i => players[i].heard", arg=i)
        sound = page.evaluate("i => [players[i].audio.duration, players[i].audio.played.end(0)]", i)
        assert sound[0] > 0.5 and sound[1] == pytest.approx(sound[0], abs=0.1)  # loaded, decoded, played to its end
    assert not page.evaluate("$('scale').disabled")


def answer(page, choice=0):
    """A trial by mouse."""
    place = page.text_content("#place")
    hear_all(page, lambda i: page.locator("#clips button").nth(i).click())
    page.locator("#choices label").nth(choice).click()
    page.click("#next")
    page.wait_for_function("place => $('trial').hidden || $('place').textContent !== place", arg=place)


def test_a_session_by_mouse_with_a_reload_and_a_server(chromium, test_folder, tmp_path):
    folder = shutil.copytree(test_folder, tmp_path / "test")
    key = ratings.read_key(folder / "key.json")
    with served(folder) as address, opened(chromium, address) as page:
        page.wait_for_selector("#numbered", state="hidden")  # the server gives the number
        page.click("text=Begin")
        page.wait_for_selector("#trial:visible")
        order = page.evaluate("order.map((trial) => trial.id)")
        assert set(order) == set(asked(key, 1)) and len(order) == 16
        for _ in range(5):
            answer(page)
        page.reload()
        assert page.text_content("#place").startswith("Question 6 of 16")
        assert "Welcome back: 5 of 16" in page.text_content("#status")
        assert page.evaluate("order.map((trial) => trial.id)") == order
        while page.is_visible("#trial"):
            answer(page, choice=1)
        page.wait_for_selector("text=Your ratings are saved")
        with page.expect_download() as download:
            page.click("#download")
        downloaded = json.loads(download.value.path().read_text())
        page.reload()
        assert page.is_visible("#end")
    (saved,) = (folder / "ratings").glob("1-*.json")
    assert json.loads(saved.read_text()) == downloaded and downloaded["finished"] is True
    assert download.value.suggested_filename == f"ratings-{key['build']}-1.json"
    values = {entry["trial"]: entry["value"] for entry in downloaded["answers"]}
    assert [values[name] for name in order] == [5] * 5 + [4] * 7 + ["B"] * 4  # 6 NAT, 6 SIM, 4 ABX
    assert all(min(entry["plays"]) >= 1 and entry["seconds"] > 0 for entry in downloaded["answers"])


def test_by_keyboard_alone_on_a_phone_from_a_file(chromium, test_folder):
    key = ratings.read_key(test_folder / "key.json")
    with opened(chromium, (test_folder / "index.html").as_uri(), PHONE) as page:
        press = page.keyboard.press
        look(page, "phone-start")
        for _ in range(2):  # the test sound, then the number
            press("Tab")
        assert page.evaluate("document.activeElement.id") == "number"
        for typed, says in (("x", "Give a whole number"), ("2", "")):
            press("Control+A")
            page.keyboard.type(typed)
            press("Enter")
            assert says in page.text_content("#number-error")
        seen = set()
        while page.is_visible("#trial"):
            place, kind = page.text_content("#place"), part_of(page)
            keys = {"naturalness": "p", "similarity": "rp", "comparison": "abx"}[kind]
            if kind not in seen:
                look(page, f"phone-{kind}")
            if kind in seen or kind == "naturalness":  # by the keys of the page
                hear_all(page, lambda i, keys=keys: press(keys[i]))
                press("1" if kind == "comparison" else "4")
            else:  # by Tab, space and arrows alone
                page.evaluate("document.querySelector('#trial h1').focus()")

                def tab_and_play(_):
                    press("Tab")
                    press(" ")

                hear_all(page, tab_and_play)
                press("Tab")
                press(" ")
                press("ArrowDown")
                press("ArrowUp")
            press("Enter")
            page.wait_for_function("place => $('trial').hidden || $('place').textContent !== place", arg=place)
            seen.add(kind)
        look(page, "phone-end")
        assert page.text_content("#sent").startswith("Please download the ratings")
        with page.expect_download() as download:
            press("Tab")
            press("Enter")
        made = json.loads(download.value.path().read_text())
    assert {entry["trial"] for entry in made["answers"]} == set(asked(key, 2)) and made["listener"] == 2
    assert "download the ratings" in "Please download the ratings" and seen == {
        "naturalness",
        "similarity",
        "comparison",
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_accessibility_fault(chromium, test_folder, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra test is not installed").Axe()
    with opened(chromium, (test_folder / "index.html").as_uri(), color_scheme=scheme) as page:

        def check(name):
            look(page, f"{scheme}-{name}")
            faults = axe.run(page).response["violations"]
            assert [(f["id"], f["nodes"][0]["html"]) for f in faults if f["impact"] in ("serious", "critical")] == []

        check("start")
        page.fill("#number", "0")
        page.click("text=Begin")
        check("error")
        page.fill("#number", "3")
        page.click("text=Begin")
        seen = set()
        while page.is_visible("#trial"):
            if part_of(page) not in seen:
                seen.add(part_of(page))
                check(part_of(page))
                hear_all(page, lambda i: page.locator("#clips button").nth(i).click())
                page.locator("#choices label").nth(0).click()
                check(f"{part_of(page)}-answered")
            answer_the_rest(page)
        check("end")


def answer_the_rest(page):
    """The trial that is shown, at once: what was heard is not what this test is about."""
    page.evaluate("""() => { $("scale").disabled = false; document.querySelector("input[name=value]").checked = true;
        $("answer").requestSubmit(); }""")


def test_a_sample_that_cannot_be_loaded_is_said(chromium, test_folder, tmp_path):
    folder = shutil.copytree(test_folder, tmp_path / "test")
    hidden = folder / "hidden"
    (folder / "audio").rename(hidden)
    context = chromium.new_context()
    page = context.new_page()
    page.goto((folder / "index.html").as_uri())
    page.fill("#number", "1")
    page.click("text=Begin")
    page.wait_for_function("() => $('status').textContent.startsWith('A sample could not be loaded')")
    assert page.evaluate("$('scale').disabled")
    hidden.rename(folder / "audio")
    page.locator("#clips button").first.click()
    page.wait_for_function("() => players[0].heard")
    context.close()
