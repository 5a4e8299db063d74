"""Headless Chromium through its debugging pipe: no driver, no further package."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe")
_DEADLINE_S = 60.0


def find_chromium() -> str | None:
    """Path of the browser, or none."""
    given = os.environ.get("CHROMIUM")
    return given or next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab; remembers what it requested and what it complained of."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._rest, self._last = reading, writing, b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", session=None, url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", session=None, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, *, session: str | None = "", **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda got: got.get("id") == self._last)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, page: Path, *, width: int) -> None:
        """Load a file in a window of that width; earlier events are forgotten."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._wait(lambda got: got.get("method") == "Page.loadEventFired")
        self.evaluate("Promise.all(Array.from(document.images, image => image.decode().catch(() => null)))")

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    @property
    def requested(self) -> list[str]:
        return [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]

    @property
    def complaints(self) -> list[str]:
        """Console errors and warnings, exceptions, refusals of the content policy."""
        found = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
                found.append(params["entry"]["text"])
            elif event["method"] == "Runtime.exceptionThrown" or (
                event["method"] == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning", "assert"}
            ):
                found.append(json.dumps(params))
        return found

    def screenshot(self, path: Path) -> None:
        """The whole page, not only the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def _wait(self, wanted: Any) -> dict[str, Any]:
        end = time.monotonic() + _DEADLINE_S
        while True:
            while b"\0" in self._rest:
                text, self._rest = self._rest.split(b"\0", 1)
                message = json.loads(text)
                if "method" in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            assert select.select([self._reading], [], [], max(0.0, end - time.monotonic()))[0], "the browser does not answer"
            got = os.read(self._reading, 1 << 20)
            assert got, "the browser has ended"
            self._rest += got


@contextlib.contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    """Start and stop Chromium with an empty profile."""
    to_browser, from_us = os.pipe()
    from_browser, to_us = os.pipe()
    # Chromium reads descriptor 3 and writes 4; the shell moves them there, so they must lie above.
    high_in, high_out = (fcntl.fcntl(one, fcntl.F_DUPFD, 20) for one in (to_browser, to_us))
    command = ["bash", "-c", f'exec "$@" 3<&{high_in} 4>&{high_out} {high_in}<&- {high_out}>&-', "chromium", program, *_FLAGS]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}"], pass_fds=(high_in, high_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for one in (to_browser, to_us, high_in, high_out):
        os.close(one)
    try:
        yield Browser(from_browser, from_us)
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(from_browser)
        os.close(from_us)
