"""Pages in a headless Chromium. The fixtures `chromium` and `browser` are in conftest.py."""

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import axe_core_python
import pytest

WHICH = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, WHICH), None)
# the rules of axe-core, as a command that returns a number
AXE = Path(axe_core_python.__file__).with_name("axe.min.js").read_text() + ";0"
TIMEOUT = 60  # seconds to wait before a test fails
# also of the security policy
ERRORS = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
# runs a command whose pipe of DevTools, 3 to read and 4 to write, is its input
WITH_PIPE = ["bash", "-c", 'exec "$@" 3<&0 4>&0', ""]
FLAGS = "--headless --no-sandbox --disable-gpu --mute-audio --remote-debugging-pipe"


class Browser:
    """A page in a headless Chromium, controlled by its DevTools protocol over a pipe: JSON that
    ends with a 0 byte.
    """

    def __init__(self, profile):
        self.pipe, theirs = socket.socketpair()
        self.pipe.settimeout(TIMEOUT)
        command = [*WITH_PIPE, CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}"]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, stdin=theirs, **silent)
        theirs.close()
        self.rest = b""
        self.count = 0
        self.session = {}
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of a command; events that arrive before it are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | self.session
        self.pipe.sendall(json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self):
        while b"\0" not in self.rest:
            self.rest += self.pipe.recv(1 << 20) or pytest.fail("the browser has ended")
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, ready="true", width=1000, height=800, query="", **media):
        """Show a file and wait until it is ready."""
        self.screen(width, height, **media)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri() + query)
        self.wait(f"document.readyState === 'complete' && location.protocol === 'file:' && {ready}")

    def screen(self, width=1000, height=800, **media):
        """Set the size in px and features of CSS. A narrow screen is that of a phone."""
        is_phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def ask(self, expression):
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition):
        deadline = time.monotonic() + TIMEOUT
        while not self.ask(condition):
            assert time.monotonic() < deadline, f"not {condition}: {self.seen(*ERRORS)}"
            time.sleep(0.02)

    def seen(self, *methods):
        """The parameters of the events of these kinds since the page was opened."""
        self.ask("0")  # receives pending events
        return [event["params"] for event in self.events if event["method"] in methods]


def press(browser, key, **details):
    text = key if len(key) == 1 else ""
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, text=text, **details)


def drag(browser, selector, *places):
    """Press the mouse at the first place of a part of the page, and move it to the others."""
    box = browser.ask(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
    mouse = {"button": "left", "clickCount": 1, "buttons": 1, "type": "mousePressed"}
    for x, y in places:
        mouse["x"] = box["x"] + box["width"] * x
        mouse["y"] = box["y"] + box["height"] * y
        browser.call("Input.dispatchMouseEvent", **mouse)
        mouse["type"] = "mouseMoved"
    browser.call("Input.dispatchMouseEvent", **mouse | {"type": "mouseReleased", "buttons": 0})
