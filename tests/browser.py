"""Headless Chromium by its DevTools protocol, over pipes: no library and no port."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One tab. said: what the console and the log said; requests: addresses that were asked for beside the page."""

    def __init__(self):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (theirs, self._write), (self._read, out) = os.pipe(), os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        line = f'exec "$@" 3<&{theirs} 4>&{out}'
        command = [
            "bash",
            "-c",
            line,
            "bash",
            CHROMIUM,
            *_FLAGS,
            f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(out)
        self._left, self._number, self._session = b"", 0, None
        self.said, self.requests = [], []
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, limit=60, **parameters):
        """The answer to one command. Events on the way are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + limit
        while True:
            answer = self._next(end)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, end):
        while b"\0" not in self._left:
            if not select.select([self._read], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError("Chromium did not answer")
            more = os.read(self._read, 1 << 20)
            if not more:
                raise RuntimeError("Chromium ended")
            self._left += more
        text, _, self._left = self._left.partition(b"\0")
        event = json.loads(text)
        self._note(event.get("method"), event.get("params"))
        return event

    def _note(self, method, found):
        if method == "Runtime.exceptionThrown":
            self.said.append(str(found["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning"):
            self.said.append(str(found["args"]))
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.said.append(found["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])

    def look(self, width=1440, height=900, dark=False, ratio=1):
        """Set the size of the window and the colour scheme."""
        metrics = dict(width=width, height=height, deviceScaleFactor=ratio, mobile=width < 600)
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)

    def open(self, path):
        """Load a file and wait until the page says that it is drawn."""
        self.said, self.requests = [], []
        self.send("Page.navigate", url=path.as_uri())
        self.wait("document.body && document.body.dataset.state === 'ready'")

    def evaluate(self, expression):
        """The value of an expression in the page; a promise is awaited."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def wait(self, expression, limit=15):
        """Until the expression holds."""
        end = time.monotonic() + limit
        while not self.evaluate(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}; the console: {self.said}")
            time.sleep(0.05)

    def click(self, x, y):
        """A click of the mouse."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        """A key that is pressed and let go."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self, path, whole=True):
        """A PNG of the page, or of the window."""
        options = {}
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            options = {"captureBeyondViewport": True, "clip": {"x": 0, "y": 0, "scale": 1, **_sized(size)}}
        path.write_bytes(b64decode(self.send("Page.captureScreenshot", **options)["data"]))

    def close(self):
        with contextlib.suppress(Exception):
            self.send("Browser.close", limit=5)
        self._process.terminate()
        self._process.wait(10)
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()


def _sized(size):
    return {"width": size["width"], "height": size["height"]}
