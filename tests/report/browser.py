"""A headless Chromium driven over its debugging pipe: what a page does in a real browser, without further packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One open page: what was evaluated, logged and requested."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._write, self._read = to_browser, from_browser
        self._buffer = b""
        self._number = 0
        self.troubles: list[str] = []
        """Errors, warnings and exceptions of the page, and requests that are no file of its own."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._read, 2**16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the page's debugging interface."""
        return self._call(method, self._session, **parameters)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method", ""), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.troubles.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.troubles.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.troubles.append(json.dumps(parameters["args"]))
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.troubles.append(f"request of {url}")

    def open(self, path: Path, *, width: int) -> None:
        """Load a file at a window width in pixels, and wait until all of it is there."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=path.absolute().as_uri())
        wait = "new Promise(done => document.readyState === 'complete' ? done(location.href) : "
        wait += "addEventListener('load', () => done(location.href)))"
        for _ in range(50):
            if self.run(wait).startswith("file:"):
                return
        raise RuntimeError(f"{path} does not load")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")


@contextmanager
def opened(browser: str, profile: Path) -> Iterator[Page]:
    """A page of a browser that is started for it, with a profile of its own."""
    to_browser, from_us = os.pipe()[::-1]
    from_browser, to_us = os.pipe()

    def descriptors() -> None:  # Chromium reads commands from 3 and writes answers to 4
        read, write = os.dup(from_us), os.dup(to_us)
        os.dup2(read, 3, inheritable=True)
        os.dup2(write, 4, inheritable=True)

    arguments = [browser, "--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run",
                 f"--user-data-dir={profile}"]  # fmt: skip
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    process = subprocess.Popen(
        arguments, close_fds=False, preexec_fn=descriptors, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(from_us)
    os.close(to_us)
    try:
        yield Page(to_browser, from_browser)
    finally:
        process.terminate()
        process.wait(timeout=20)
        os.close(to_browser)
        os.close(from_browser)
