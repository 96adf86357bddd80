"""A headless Chromium, driven over a socket by the DevTools protocol: what a page looks like, and what it asks for.

A page's own policy forbids it scripts. `evaluate` works all the same: DevTools stands outside that policy.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARY = "chromium-headless-shell"
_ANSWER_TIMEOUT_S = 20.0
_END_TIMEOUT_S = 10.0

# content/browser/devtools/devtools_pipe_handler.cc: commands are read from descriptor 3, answers written to 4.
_ON_3_AND_4 = 'exec "$@" 3<&0 4>&0 </dev/null'


class Page:
    """The one page of a browser. `events` are what it reported so far: a method and its parameters each."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_ANSWER_TIMEOUT_S)
        self._connection = connection
        self._received = b""
        self._last_id = 0
        self._session: dict[str, str] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def open(self, path: Path) -> None:
        """Open a file, and wait until it is loaded; `events` begin anew."""
        self.events.clear()
        answer = self.call("Page.navigate", url=path.as_uri())
        assert "errorText" not in answer, answer
        while "Page.loadEventFired" not in (method for method, _ in self.events):
            self._receive(f"{path.name} is loaded")

    def show(self, width: int, scheme: str) -> None:
        """Make the window `width` CSS pixels wide, for someone who prefers a "light" or a "dark" page."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        size = {"width": width, "height": 800, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **size, mobile=False)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """Return a PNG of the whole page, beyond what the window shows of it."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result."""
        self._send(method, parameters)
        while True:
            answer = self._receive(f"Chromium answers {method}")
            if answer.get("id") == self._last_id:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def close(self) -> None:
        """Tell the browser to end; it may do so before it has answered."""
        self._send("Browser.close", {})

    def _send(self, method: str, parameters: dict[str, Any]) -> None:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters, **self._session}
        self._connection.sendall(json.dumps(message).encode() + b"\0")

    def _receive(self, awaited: str) -> dict[str, Any]:
        while b"\0" not in self._received:
            try:
                chunk = self._connection.recv(1 << 20)
            except TimeoutError:
                raise AssertionError(f"waited {_ANSWER_TIMEOUT_S:g} s in vain until {awaited}") from None
            assert chunk, f"Chromium ended before {awaited}"
            self._received += chunk
        line, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message


@contextmanager
def browser(log_file: Path, *wrapper: str) -> Iterator[Page]:
    """Start Chromium, by the command `wrapper` if there is one; end it on exit."""
    with tempfile.TemporaryDirectory(prefix="vmmback-chromium-") as home:
        yield from _browser(Path(home), log_file, wrapper)


def _browser(home: Path, log_file: Path, wrapper: Sequence[str]) -> Iterator[Page]:
    ours, theirs = socket.socketpair()
    argv = [
        *wrapper,
        BINARY,
        "--remote-debugging-pipe",
        f"--user-data-dir={home / 'profile'}",
        "--no-sandbox",  # it refuses to run as root with one (content/browser/zygote_host); our own pages need none
        "--disable-gpu",
        "--disable-dev-shm-usage",  # a container's /dev/shm may be too small
        "--hide-scrollbars",
        "--force-color-profile=srgb",
    ]
    environment = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home), "DBUS_SESSION_BUS_ADDRESS": ""}
    with ours, log_file.open("wb") as log:
        with theirs:
            process = subprocess.Popen(
                ["sh", "-c", _ON_3_AND_4, "sh", *argv], stdin=theirs.fileno(), stdout=log, stderr=log, env=environment
            )
        try:
            page = Page(ours)
            yield page
            page.close()
            process.wait(_END_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
