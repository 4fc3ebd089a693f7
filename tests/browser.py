"""A headless Chromium, driven through its debugging pipe: no other package, and no port."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1500,1000", "--remote-debugging-pipe",
]  # fmt: skip


class Page:
    """A tab. Its scripts' messages are read only while it is asked something."""

    def __init__(self, write: int, read: int):
        self._write, self._read, self._buffer, self._count, self._session = write, read, b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Network.enable")

    def call(self, method: str, **params) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                if not (part := os.read(self._read, 1 << 20)):
                    raise RuntimeError("Chromium has gone")
                self._buffer += part
            line, self._buffer = self._buffer.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def log_in(self, user: str, password: str) -> None:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {token}"})

    def evaluate(self, script: str):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, url: str, *texts: str, ready: str = "true", seconds: float = 90) -> str:
        """Goes to a page and waits until it says all `texts` and `ready`, a script, is true; returns what it says."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        return self.wait(*texts, ready=ready, seconds=seconds)

    def wait(self, *texts: str, ready: str = "true", seconds: float = 90) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            said = self.evaluate("document.body ? document.body.innerText : ''") or ""
            if all(text in said for text in texts) and self.evaluate(ready):
                return said
            time.sleep(0.3)
        raise AssertionError(f"after {seconds} s {[text for text in texts if text not in said]} or {ready} is missing in: {said[:3000]}")

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def open_browser(folder: Path) -> Iterator[Page]:
    """A tab of a fresh browser whose profile is in `folder`; the test is skipped where there is no Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium; on Debian: apt-get install chromium")
    (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
    command = [program, *FLAGS, f"--user-data-dir={folder}/profile"]
    shell = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{from_write}', "bash", *command]  # the pipe's ends must be 3 and 4
    pipes = (to_read, to_write, from_read, from_write)
    with open(folder / "chromium.txt", "w") as log:
        process = subprocess.Popen(shell, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(to_read, from_write))
    os.close(to_read)
    os.close(from_write)
    try:
        yield Page(to_write, from_read)
    finally:
        process.terminate()
        process.wait(20)
        for end in pipes[1:3]:
            os.close(end)
