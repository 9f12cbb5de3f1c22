"""A headless Chromium driven over pipes by its DevTools protocol: no driver, no package, no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no Chromium here: bash scripts/chromium.sh installs it, or says what is in the way"
DEADLINE_S = 60.0
OPTIONS = "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --disable-dev-shm-usage"


class Browser:
    """One page at a time. What it requests, logs and throws is written down."""

    def __init__(self, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        words = f"exec {shlex.quote(str(BINARY))} {OPTIONS} --user-data-dir={shlex.quote(str(profile))}"
        self._process = subprocess.Popen(
            ["bash", "-c", f"{words} --remote-debugging-pipe 3<&{to_read} 4>&{to_write}"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._left, self._count = b"", 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Performance.enable", timeDomain="threadTicks")

    def open(self, page: Path, width: int = 1280, dark: bool = False) -> None:
        """Load a page and wait until it has drawn itself."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.requests, self.complaints = [], []
        end = time.monotonic() + DEADLINE_S
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self.evaluate("document.body && document.body.dataset.ready"):
            assert time.monotonic() < end, self.complaints
            time.sleep(0.02)

    def cpu_seconds(self) -> float:
        """What the main thread has spent on the page since it was opened."""
        found = {metric["name"]: metric["value"] for metric in self.call("Performance.getMetrics")["metrics"]}
        return found["TaskDuration"]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path) -> bytes:
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(image := base64.b64decode(found["data"]))
        return image

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        os.write(
            self._write, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + DEADLINE_S
        while b"\0" not in self._left:
            assert select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0], "the browser says nothing"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, of = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(of["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(of["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(of["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(of["args"]))
