"""Headless Chromium for tests, spoken to over its debugging pipe: no driver and no further package."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
]


class Browser:
    """One page. `requests` has every address that it asked for, `problems` what its console called an error."""

    def __init__(self, profile: Path):
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()
        pipes = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'  # the two file descriptors that Chromium speaks on
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}", *QUIET]
        self.process = subprocess.Popen(
            ["bash", "-c", pipes, "bash", CHROMIUM, *options, "about:blank"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.session, self.rest, self.requests, self.problems = 0, {}, b"", [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime"):
            self.send(f"{domain}.enable")

    def receive(self) -> dict:
        while b"\0" not in self.rest:
            data = os.read(self.read_end, 2**20)
            assert data, "Chromium ended"
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(message)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Network.webSocketCreated":
            self.requests.append(message["params"]["url"])
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(message["params"]["exceptionDetails"]["text"])
        return message

    def send(self, method: str, **params) -> dict:
        """The result of one command of the Chrome DevTools Protocol."""
        self.number += 1
        os.write(self.write_end, json.dumps({"id": self.number, "method": method, "params": params, **self.session}).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def run(self, script: str):
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 90):
        """The value of an expression, as soon as it is true."""
        end = time.monotonic() + seconds
        value = None
        while not value:
            assert time.monotonic() < end, f"never true: {script}; the page says: {self.run('document.body.innerText')[:2000]}"
            time.sleep(0.05)
            with suppress(AssertionError):  # between two pages there is none to ask
                value = self.run(script)
        return value

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def log_in(self, user: str, password: str) -> None:
        """Sends the password of HTTP's basic authentication with every request."""
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.send("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {token}"})

    def read(self, *texts: str, ready: str = "true", seconds: float = 90) -> str:
        """What the page says, as soon as it says all `texts` and the expression `ready` is true."""
        missing = f"{json.dumps(texts)}.filter(text => !document.body.innerText.includes(text))"
        self.wait(f"document.body && {missing}.length == 0 && ({ready})", seconds)
        return self.run("document.body.innerText")

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)

    def click(self, selector: str) -> None:
        """A real click of the mouse on the middle of the first element that matches."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"!!{found}")
        self.run(f"{found}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({found}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Replaces what an input holds by typing `text`."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def close(self) -> None:
        try:
            self.send("Browser.close")
            self.process.wait(10)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
        finally:
            os.close(self.write_end)
            os.close(self.read_end)


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A page of 1500 x 1000 pixels in a fresh browser; the test is skipped where there is no Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium; on Debian: apt-get install chromium")
    browser = Browser(profile)
    try:
        browser.resize(1500, 1000)
        yield browser
    finally:
        browser.close()
