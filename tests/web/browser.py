"""Headless Chromium, driven over its own debugging protocol: what these tests need of it, without a driver program."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--remote-debugging-port=0",
        "--hide-scrollbars",
    ),
)


def find() -> str | None:
    """The first browser that is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. complaints: what the page wrote to its console as an error, and exceptions that nobody caught."""

    def __init__(self, line: Any):
        self._line, self._numbers = line, itertools.count(1)
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._line.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._line.recv(60))
            self._listen(message)
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def _listen(self, message: dict[str, Any]) -> None:
        content = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(content["exceptionDetails"])[:500])
        elif message.get("method") == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.complaints.append(content["entry"]["text"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {json.dumps(found['exceptionDetails'])[:500]}")
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 20.0) -> Any:
        """Until the expression is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.ask(expression)):
            assert time.monotonic() < deadline, f"{expression} is still {value!r}; {self.complaints}"
            time.sleep(0.05)
        return value

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def dark(self, scheme: str = "dark") -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def key(self, key: str, code: str, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, **more)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: pathlib.Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(profile: pathlib.Path) -> Iterator[Page]:
    """A fresh browser with one empty tab. profile: an empty directory."""
    from websockets.sync.client import connect

    command = [find(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ready, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
        while not ready.exists() or not ready.read_text().strip():
            assert process.poll() is None and time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.05)
        port = int(ready.read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=20) as answer:
            tab = next(x for x in json.load(answer) if x["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as line:
            yield Page(line)
    finally:
        process.terminate()
        process.wait(20)


ROOT = pathlib.Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def program(module: str, *arguments: str, end: signal.Signals = signal.SIGINT) -> Iterator[str]:
    """A program of this project that serves a page: the page's address. Ended by `end`; of Ctrl-C that must be the
    end of it."""
    command = [sys.executable, "-m", module, "--port", "0", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stderr], daemon=True).start()
    try:
        while not (found := re.search(r"http://localhost:\d+/", lines.get(timeout=60))):
            pass
        yield found[0]
        process.send_signal(end)
        assert process.wait(20) == (0 if end == signal.SIGINT else -end)
    finally:
        process.kill()
