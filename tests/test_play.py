"""The page to play with: what is drawn, what is said of it, and the page itself in a browser."""

import argparse
import base64
import io
import json
import os
import socket
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import ctrl
from ctrl import play, play_page
from ctrl.errors import UserError
from ctrl.oracles import brightness, jpeg_size_kb
from scripts import play as script
from tests import browser, playground
from tests.playground import BOTH, LIGHT, NUMBER, PROMPTS, SIZE
from tests.repository import ROOT

PYTHON = ROOT / ".venv" / "play" / "bin" / "python"  # with gradio: `make play` and `make test` set it up
CELLS = {"cells": [["coat", 0], ["coat", 1], ["bag", 1]]}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def stack(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="module")
def sized(tiny_sd, tmp_path_factory):
    return playground.classes(tmp_path_factory.mktemp("play"), tiny_sd)


@pytest.fixture(scope="module")
def pipe(tiny_sd, sized):
    return ctrl.load(tiny_sd, sized[0])


def test_the_same_noise_with_and_without_the_label(tiny_sd, sized, pipe):
    pretrained, controlled = play.draw(pipe, "coat", [1], 1.5, 7, 3)
    again = ctrl.load(tiny_sd, sized[0])
    assert np.array_equal(stack(controlled), stack(again(["coat"] * 3, label=[1] * 3, strength=1.5, seed=7).images))
    assert np.array_equal(stack(pretrained), stack(again(["coat"] * 3, label=None, seed=7).images))
    assert np.array_equal(stack(play.draw(pipe, "coat", [1], 0, 7, 3)[1]), stack(pretrained)), "strength 0 is the pretrained model"
    assert not np.array_equal(stack(controlled), stack(pretrained))


@pytest.mark.parametrize(("wrong", "line"), [
    ({"prompt": " "}, "prompt is empty"), ({"prompt": "a" * 1001}, "at most 1000"), ({"seed": -1}, "seed is -1"),
    ({"seed": 0.5}, "seed is 0.5"), ({"seed": None}, "seed is None"), ({"seed": float("nan")}, "seed is nan"),
    ({"num": 0}, "number of images is 0"), ({"num": 9}, "from 1 to 8"), ({"asked": [2]}, "label is"),
    ({"strength": -1}, "strength is -1"), ({"strength": None}, "strength is None"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_one_line(pipe, wrong, line):
    asked = {"prompt": "coat", "asked": [0], "strength": 1.0, "seed": 0, "num": 1}
    with pytest.raises(UserError, match=line):
        play.draw(pipe, **asked | wrong)


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


def start(adapter, port: int) -> subprocess.Popen:
    command = [PYTHON, "-m", "scripts.play", "--adapter", adapter, "--port", str(port), "--num-threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pages(tiny_sd, sized, tmp_path_factory):
    """Addresses of three pages, by kind of label, and what one said whose port was taken: all start at once."""
    if not PYTHON.exists():
        pytest.skip("gradio is not installed: `make play` and `make test` install it")
    if browser.CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    folder = tmp_path_factory.mktemp("pages")
    adapters = {
        "size": sized[0],
        "both": playground.build(folder / "both", tiny_sd, BOTH, {"cells": [["coat", y] for y in range(4)], "free": [["coat", 5]]}),
        "number": playground.build(folder / "number", tiny_sd, NUMBER, {"ranges": {"coat": [0.75, 0.85]}}),
    }
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {kind: free_port() for kind in adapters} | {"taken": taken.getsockname()[1]}
        servers = {kind: start(adapters.get(kind, sized[0]), port) for kind, port in ports.items()}
        said = servers.pop("taken").communicate()[1]
    try:
        for kind, server in servers.items():
            line = server.stdout.readline()
            assert line.startswith(f"http://127.0.0.1:{ports[kind]}/"), server.communicate()[1]
        yield {kind: f"http://127.0.0.1:{ports[kind]}/" for kind in adapters} | {"taken": said}
    finally:
        for server in servers.values():
            server.terminate()
            server.communicate(timeout=60)


@pytest.fixture(scope="module")
def chromium(pages, tmp_path_factory):
    page = browser.Browser(tmp_path_factory.mktemp("profile"))
    page.resize(1280, 860)
    yield page
    page.close()


READINGS = """[...document.querySelectorAll('#results .play-side')].map(side => [
    side.querySelector('img').src, [...side.querySelectorAll('.play-reading')].map(reading => [
        reading.querySelector('b').innerText, reading.querySelector('.play-verdict')?.className.replace('play-verdict', '').trim()])])"""
LINES = "#results .play-line, #results .play-error"


def shown(page) -> tuple[list, list]:
    """Images of the pretrained model, and with the label: each a picture and the (score, colour) of each factor."""
    sides = [
        (Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))), [tuple(reading) for reading in readings])
        for source, readings in page.run(READINGS)
    ]
    return sides[::2], sides[1::2]


def draw(page) -> tuple[list, list]:
    """Presses the button and returns what is shown as soon as it is something else."""
    page.run(f"document.querySelectorAll('{LINES}').forEach(line => line.dataset.old = 1)")
    page.click("#draw")
    page.wait(f"[...document.querySelectorAll('{LINES}')].some(line => !line.dataset.old)")
    return shown(page)


def open_page(page, url: str) -> tuple[list, list]:
    """It draws as soon as it is open."""
    page.requests.clear()
    page.open(url)
    page.wait(f"location.href === '{url}' && document.querySelectorAll('#results .play-side img').length")
    return shown(page)


def choose(page, text: str, number: int = 0) -> None:
    """Clicks the radio button of that text, the `number`-th if there are several."""
    buttons = f"[...document.querySelectorAll('label:has(input[type=radio])')].filter(l => l.innerText.trim() === {json.dumps(text)})"
    page.wait(f"{buttons}.length > {number}")
    page.run(f"{buttons}[{number}].id = 'chosen'")
    page.click("#chosen")
    page.run("document.querySelector('#chosen').removeAttribute('id')")


def near(pictures, images) -> bool:
    """The same to one grey level: this process computes with other threads than the server."""
    return np.abs(stack([picture for picture, _ in pictures]).astype(int) - stack(images)).max() <= 1


def check_sizes(sides, edge: float, asked: int) -> None:
    """What the page says is what the oracle says of the image that it shows."""
    for picture, ((score, colour),) in [*sides[0], *sides[1]]:
        size = jpeg_size_kb(picture)
        assert score == f"{size:.3f} kB" and colour == ("met" if (size >= edge) == (asked == 0) else "missed")


@pytest.mark.slow
def test_the_label_is_set_and_measured(pages, chromium, sized, pipe):
    adapter, seed = sized
    edge = json.loads((adapter.parent.parent / "dataset" / "report.json").read_text())["edges"][0]
    pretrained, controlled = open_page(chromium, pages["size"])
    check_sizes((pretrained, controlled), edge, 1)
    assert near(pretrained, pipe(["coat"] * 4, label=None, seed=0).images)
    assert near(controlled, pipe(["coat"] * 4, label=[1] * 4, seed=0).images)
    chromium.type("#seed input", str(seed))
    chromium.type("#num input", "1")
    for asked, name in ((0, f"≥ {edge:.4g} kB"), (1, f"< {edge:.4g} kB")):
        choose(chromium, name)
        sides = draw(chromium)
        check_sizes(sides, edge, asked)
        assert [colour for _, ((_, colour),) in sides[1]] == ["met"], "the size is in the label's bin"
    chromium.type("#strength input[type=number]", "0")
    (pretrained,), (controlled,) = draw(chromium)
    assert pretrained == controlled


@pytest.mark.slow
def test_the_page_takes_any_prompt(pages, chromium):
    open_page(chromium, pages["size"])
    evil = "<img src=x onerror='window.ran = 1'> ${1 + 1} {{value}} <script>window.ran = 1</script>"
    chromium.type("#prompt textarea", evil)
    draw(chromium)
    text = chromium.run("document.querySelector('#results').innerText")
    assert f"“{evil}”" in text and "not trained with this prompt" in text
    assert chromium.run("document.querySelectorAll('#results img').length") == 8 and chromium.run("window.ran") is None
    for field, value, line in (
        ("#prompt textarea", " ", "the prompt is empty: write what to draw"),
        ("#prompt textarea", "coat", None),
        ("#num input", "99", "the number of images is 99: give a whole number from 1 to 8"),
        ("#seed input", "-1", "the seed is -1: give a whole number from 0"),
    ):
        chromium.type(field, value)
        draw(chromium)
        errors = chromium.run("[...document.querySelectorAll('#results .play-error')].map(e => e.innerText)")
        assert (len(errors) == 1 and errors[0].startswith(line)) if line else not errors


@pytest.mark.slow
def test_the_page_asks_for_nothing_elsewhere_and_fits_a_phone(pages, chromium):
    open_page(chromium, pages["size"])
    assert chromium.run("document.documentElement.scrollWidth") <= 1280
    chromium.resize(390, 844)
    assert chromium.run("document.documentElement.scrollWidth") <= 390
    left, right = chromium.run("[...document.querySelectorAll('#results img')].slice(0, 2).map(i => i.getBoundingClientRect().toJSON())")
    assert left["right"] <= right["left"] and right["right"] <= 390 and left["top"] == right["top"], "side by side"
    chromium.resize(1280, 860)
    assert len(chromium.requests) > 10 and not [url for url in chromium.requests if not url.startswith((pages["size"], "data:"))]
    assert chromium.problems == []


@pytest.mark.slow
def test_each_factor_has_a_control_of_its_own(pages, chromium):
    open_page(chromium, pages["both"])
    choose(chromium, "any", 0)
    choose(chromium, "< 0.54")
    for picture, ((size, free), (light, colour)) in draw(chromium)[1]:
        assert size == f"{jpeg_size_kb(picture):.3f} kB" and free == ""
        assert light == f"{brightness(picture):.3f}" and colour == ("met" if brightness(picture) < 0.54 else "missed")
    assert "asked for brightness < 0.54 at" in chromium.run("document.querySelector('#results').innerText")


@pytest.mark.slow
def test_a_number_is_typed(pages, chromium):
    open_page(chromium, pages["number"])
    chromium.wait("document.body.innerText.includes('Trained for coat: 0.750 to 0.850 kB')")
    chromium.type("#label input", "0.83")
    for picture, ((size, colour),) in draw(chromium)[1]:
        score = jpeg_size_kb(picture)
        assert size == f"{score:.3f} kB" and colour == ("met" if abs(score - 0.83) <= 0.01 else "missed")
    chromium.type("#label input", "7")
    draw(chromium)
    assert "numbers from 0.68 to 0.92 kB" in chromium.run("document.querySelector('#results .play-error').innerText")
    chromium.type("#prompt textarea", "bag")
    chromium.wait("document.body.innerText.includes('Trained for other subjects: 0.700 to 0.900 kB')")


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(pages):
    (line,) = [line for line in pages["taken"].splitlines() if line.startswith("error: ")]
    assert "cannot listen on 127.0.0.1:" in line and "--port" in line and "Traceback" not in pages["taken"]


def test_a_missing_adapter_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="`make demo` trains"):
        script.load(argparse.Namespace(adapter=tmp_path / "nothing"))
