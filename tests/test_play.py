"""The page to play with: what is drawn, what is said of it, and the page itself in a browser."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import ctrl
from ctrl import play, play_page
from ctrl.errors import UserError
from ctrl.oracles import brightness, jpeg_size_kb
from tests import browser, playground
from tests.playground import BOTH, LIGHT, NUMBER, PROMPTS, SIZE
from tests.repository import ROOT

PYTHON = ROOT / ".venv" / "play" / "bin" / "python"  # with gradio: `make play` and `make test` set it up
CELLS = {"cells": [["coat", 0], ["coat", 1], ["bag", 1]]}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def stack(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="session")
def sized(tiny_sd, tmp_path_factory):
    return playground.classes(tmp_path_factory.mktemp("play"), tiny_sd)


def test_the_same_noise_with_and_without_the_label(tiny_sd, sized):
    pipe = ctrl.load(tiny_sd, sized[0])
    pretrained, controlled = play.draw(pipe, "coat", [1], 1.5, 7, 3)
    again = ctrl.load(tiny_sd, sized[0])
    assert np.array_equal(stack(controlled), stack(again(["coat"] * 3, label=[1] * 3, strength=1.5, seed=7).images))
    assert np.array_equal(stack(pretrained), stack(again(["coat"] * 3, label=None, seed=7).images))
    assert np.array_equal(stack(play.draw(pipe, "coat", [1], 0, 7, 3)[1]), stack(pretrained)), "strength 0 is the pretrained model"
    assert not np.array_equal(stack(controlled), stack(pretrained))


@pytest.mark.parametrize(("wrong", "line"), [
    ({"prompt": " "}, "prompt is empty"), ({"prompt": "a" * 1001}, "at most 1000"), ({"seed": -1}, "seed is -1"), ({"seed": 0.5}, "seed is 0.5"),
    ({"seed": None}, "seed is None"), ({"num": 0}, "number of images is 0"), ({"num": 9}, "from 1 to 8"), ({"asked": [2]}, "label is"),
    ({"strength": -1}, "strength is -1"), ({"strength": None}, "strength is None"), ({"seed": float("nan")}, "seed is nan"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_one_line(tiny_sd, sized, wrong, line):
    asked = {"prompt": "coat", "asked": [0], "strength": 1.0, "seed": 0, "num": 1}
    with pytest.raises(UserError, match=line):
        play.draw(ctrl.load(tiny_sd, sized[0]), **asked | wrong)


def test_a_reading_is_the_oracles_word_and_its_bin():
    image = picture(0)
    score = jpeg_size_kb(image)
    for edge, found in ((score - 0.1, 0), (score + 0.1, 1), (score, 0)):
        report = playground.factor("jpeg_size", "kB", edge)
        for asked in (0, 1):
            (reading,) = play.read(image, report, [asked])
            assert (reading.score, reading.met) == (f"{score:.3f} kB", asked == found)
            assert reading.verdict.startswith("≥" if found == 0 else "<")
    first, second = play.read(image, BOTH, [1, None])
    assert first.met is False and second.met is None and second.score == f"{brightness(image):.3f}"


def test_a_reading_of_a_number_says_how_far_off_it_is():
    image = picture(0)
    score = jpeg_size_kb(image)
    for off, met in ((0.009, True), (-0.009, True), (0.011, False), (-0.3, False)):
        (reading,) = play.read(image, NUMBER, [score - off])
        assert reading.met is met and reading.verdict == f"{off:+.3f} kB".replace("-", "−")
    assert play.read(image, NUMBER, [None])[0].met is None


def test_hints_name_what_was_not_trained():
    assert play.hints("a coat", [0], PROMPTS, SIZE, CELLS) == []
    assert "not trained with this prompt" in play.hints("the coat", [0], PROMPTS, SIZE, CELLS)[0], "a template of the table alone"
    assert "not trained with this prompt" in play.hints("coat, red", [0], PROMPTS, SIZE, CELLS)[0]
    (line,) = play.hints("bag", [0], PROMPTS, SIZE, CELLS)
    assert "did not ask bag for JPEG size ≥ 0.8 kB" in line
    assert play.hints("bag", [0], PROMPTS, SIZE, {}) == [], "without cells.json nothing is known"
    partial = {"cells": [["coat", 0]], "free": [["coat", 5], ["coat", 6]]}  # codes: 4 full ones, the null, 5 and 6 leave brightness free
    assert play.hints("coat", [0, None], PROMPTS, BOTH, partial) == [] == play.hints("coat", [None, None], PROMPTS, BOTH, partial)
    assert "JPEG size < 0.8 kB, brightness ≥ 0.54" in play.hints("coat", [1, 0], PROMPTS, BOTH, partial)[0]


def test_hints_name_the_range_of_the_subject():
    cells = {"ranges": {"coat": [0.75, 0.85]}}
    assert play.hints("coat", [0.8], PROMPTS, NUMBER, cells) == [] == play.hints("coat", [None], PROMPTS, NUMBER, cells)
    assert "Trained for coat: 0.750 to 0.850 kB" in play.hints("coat", [0.86], PROMPTS, NUMBER, cells)[0]
    assert "other subjects: 0.700 to 0.900 kB" in play.hints("bag", [0.8], PROMPTS, NUMBER, cells)[0]


def test_the_first_request_is_one_that_was_trained():
    assert play.first_request(PROMPTS, SIZE, CELLS) == ("coat", [1])
    assert play.first_request(PROMPTS, SIZE, {}) == ("coat", [1])
    assert play.first_request(PROMPTS, BOTH, {"cells": [["bag", 0], ["bag", 2], ["coat", 1]]}) == ("bag", [1, 0])
    prompt, (y,) = play.first_request(PROMPTS, NUMBER, {"ranges": {"coat": [0.75, 0.76], "bag": [0.75, 0.85]}})
    assert prompt == "bag" and 0.75 < y < 0.85


def test_bins_of_another_dataset_are_refused():
    described = {"label_names": SIZE["label_names"]}
    play.check_agree(described, SIZE, "report.json")
    for other in (LIGHT, BOTH, NUMBER):
        with pytest.raises(UserError, match="report.json: its labels are not those of the adapter"):
            play.check_agree(described, other | {"label_names": other.get("label_names", [])}, "report.json")


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_what_users_wrote_is_escaped():
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    reading = play.Reading(evil, evil, evil, True)
    pages = [play_page.error_html(evil), play_page.results_html(evil, evil, 1.0, 0, [evil], evil, [[(picture(0), [reading] * 2)]] * 2)]
    for html in pages:
        parsed = Tags(html)
        assert "script" not in parsed.tags and evil in parsed.text
        assert html.count("onerror") == parsed.text.count("onerror"), "in no attribute"


def test_totals_count_images_that_are_all_that_was_asked_for():
    good, bad, free = (play.Reading("size", "1 kB", "< 2 kB", met) for met in (True, False, None))
    assert ">1 of 3<" in play_page.total_html("with the label", "in every label's bin", [[good, good], [good, bad], [bad, free]])
    assert ">2 of 2<" in play_page.total_html("with the label", "in every label's bin", [[good, free], [good, free]])
    assert ">0 of 1<" in play_page.total_html("with the label", "in the label's bin", [[bad]])
    assert ">–<" in play_page.total_html("with the label", "in the label's bin", [[free]])


def environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(adapter, *arguments: str) -> tuple[subprocess.Popen, str]:
    """A server on a free port, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "scripts.play", "--adapter", adapter, "--port", str(port), "--num-threads", "1", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return process, f"http://127.0.0.1:{port}/"


needs_gradio = pytest.mark.skipif(not PYTHON.exists(), reason="gradio is not installed: `make play` and `make test` install it")
needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def pages(tiny_sd, sized, tmp_path_factory):
    """Addresses of three pages, by kind of label: all start at once."""
    folder = tmp_path_factory.mktemp("pages")
    cells = {"cells": [["coat", y] for y in range(4)], "free": []}
    adapters = {
        "size": sized[0],
        "both": playground.build(folder / "both", tiny_sd, BOTH, cells),
        "number": playground.build(folder / "number", tiny_sd, NUMBER, {"ranges": {"coat": [0.75, 0.85]}}),
    }
    started = {kind: start(adapter) for kind, adapter in adapters.items()}
    try:
        for process, url in started.values():
            assert url in process.stdout.readline(), "the address is the first line"
        yield {kind: url for kind, (_, url) in started.items()}
    finally:
        for process, _ in started.values():
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    page = browser.Browser(tmp_path_factory.mktemp("profile"))
    page.resize(1280, 860)
    yield page
    page.close()


def shown(page) -> list[tuple[str, np.ndarray, list[tuple[str, str, str]]]]:
    """Of each image on the page: its name, its pixels, and score, verdict and colour of what is said of it."""
    script = """[...document.querySelectorAll('#results .play-side')].map(side => [
        side.querySelector('.play-name').innerText, side.querySelector('img').src,
        [...side.querySelectorAll('.play-reading')].map(r => [r.querySelector('b').innerText, r.querySelector('.play-verdict')?.innerText ?? '',
            r.querySelector('.play-verdict')?.className.replace('play-verdict', '').trim() ?? ''])])"""
    decode = lambda src: np.asarray(Image.open(io.BytesIO(base64.b64decode(src.removeprefix("data:image/png;base64,")))))  # noqa: E731
    return [(name, decode(src), [tuple(r) for r in readings]) for name, src, readings in page.run(script)]


def draw(page) -> list:
    """Presses the button and returns what is shown then."""
    page.run("document.querySelector('#results .prose, #results > div').firstElementChild?.setAttribute('data-old', '')")
    page.click("button.primary")
    page.wait(
        "!document.querySelector('#results [data-old]') && document.querySelectorAll('#results .play-line, #results .play-error').length"
    )
    return shown(page)


def option(page, text: str) -> None:
    """Clicks the radio button with that text."""
    page.wait(f"[...document.querySelectorAll('label')].some(l => l.innerText.trim() === {json.dumps(text)})")
    page.run(f"[...document.querySelectorAll('label')].find(l => l.innerText.trim() === {json.dumps(text)}).id = 'chosen'")
    page.click("#chosen")
    page.run("document.querySelector('#chosen').id = ''")


def field(label: str) -> str:
    return f"input[aria-label^={json.dumps(label)}], textarea[aria-label^={json.dumps(label)}]"


@pytest.mark.slow
@needs_gradio
@needs_chromium
def test_the_page_in_a_browser(pages, chromium, tiny_sd, sized):
    page, (adapter, seed) = chromium, sized
    page.open(pages["size"])
    page.wait("document.querySelectorAll('#results img').length === 8")  # it draws when it is opened
    print(page.run("document.body.innerHTML"))
