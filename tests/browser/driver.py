"""A headless Chromium by the W3C WebDriver protocol, which is plain JSON over HTTP: no library is needed for it."""

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
ENTER, SHIFT, NULL = "\ue007", "\ue008", "\ue000"


def is_installed() -> bool:
    return all(map(shutil.which, ("chromium", "chromedriver")))


class Browser:
    """One window."""

    def __init__(self, width: int, height: int, scale: float = 1.0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        options = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS, f"--user-data-dir={self.profile.name}"],
            "mobileEmulation": {"deviceMetrics": {"width": width, "height": height, "pixelRatio": scale}},
        }
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        for _ in range(100):
            try:
                self.session = self.send("POST", "/session", {"capabilities": capabilities})["sessionId"]
                break
            except urllib.error.URLError:
                time.sleep(0.1)

    def send(self, method: str, path: str, body: Any = None) -> Any:
        address = f"http://127.0.0.1:{self.port}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def command(self, method: str, path: str, body: Any = None) -> Any:
        return self.send(method, f"/session/{self.session}/{path}".rstrip("/"), body)

    def go(self, address: str) -> None:
        self.command("POST", "url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script's `return`."""
        return self.command("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def element(self, selector: str) -> str:
        found = self.command("POST", "element", {"using": "css selector", "value": selector})
        return found[ELEMENT]

    def click(self, selector: str) -> None:
        """As a person would, again if the page was drawn anew just then."""
        for attempt in range(3):
            try:
                return self.command("POST", f"element/{self.element(selector)}/click", {})
            except RuntimeError as error:
                if attempt == 2 or "stale element" not in str(error):
                    raise

    def press(self, text: str) -> None:
        """Clicks the last button with this text."""
        self.run(
            "[...document.querySelectorAll('button')].filter((b) => b.textContent === arguments[0]).pop().click()", text
        )

    def type(self, selector: str, text: str) -> None:
        self.command("POST", f"element/{self.element(selector)}/value", {"text": text})

    def wait(self, condition: str, *arguments: Any, seconds: float = 60) -> Any:
        """Until a script's `return` is true; `AssertionError` after some time."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(condition, *arguments)):
            assert time.monotonic() < deadline, f"still not: {condition}\n{self.run('return document.body.innerText')}"
            time.sleep(0.05)
        return value

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.command("GET", "screenshot")))

    def messages(self) -> list[str]:
        """What the console says: errors of scripts, refused requests."""
        return [entry["message"] for entry in self.command("POST", "se/log", {"type": "browser"})]

    def close(self) -> None:
        self.command("DELETE", "")
        self.process.terminate()
        self.process.wait()
        self.profile.cleanup()
