"""A real browser for tests: the system's Chromium without a window, driven over its DevTools protocol.

`Browser()` starts it; `browser.tab(url)` is a page with its own storage, in which a test clicks, types and reads.
"""

import base64
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, suppress

from websockets.sync.client import connect

LONGEST = 240  # seconds without a message of the browser: a busy core lays out a large page for over a minute
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {  # name: code, the number of its virtual key, the text that it types
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Tab": ("Tab", 9, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    " ": ("Space", 32, " "),
}


def program():
    """The browser's program, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """Started once for many tests; `close` ends it."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [
            program(),
            "--headless=new",
            "--no-sandbox",  # a container runs tests as root
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-extensions",
            "--no-first-run",
            "--no-proxy-server",
            "--hide-scrollbars",
            "--mute-audio",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._folder.name}",
            "about:blank",
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        lines = iter(self._process.stderr.readline, b"")
        found = next(filter(None, (re.search(rb"listening on (ws://\S+)", line) for line in lines)))
        threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()  # else its pipe would fill
        self._ends = ExitStack()
        self._socket = self._ends.enter_context(connect(found[1].decode(), max_size=None, compression=None, proxy=None))
        self._numbers, self.events = itertools.count(1), []

    def call(self, method, session=None, **parameters):
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        self._socket.send(json.dumps(message))
        while True:
            found = json.loads(self._socket.recv(timeout=LONGEST))
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self.events.append(found)

    def tab(self, url, **look):
        """A new page at `url`; `look` as for Tab.look."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, context, session)
        tab.look(**look)
        tab.go(url)
        return tab

    def close(self):
        with suppress(Exception):
            self.call("Browser.close")
        self._ends.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(300)
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


class Tab:
    """A page with a simulated user."""

    def __init__(self, browser, context, session):
        self._browser, self._context, self._session = browser, context, session
        for domain in ("Page", "Runtime", "DOM", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        return self._browser.call(method, self._session, **parameters)

    def look(self, width=1200, height=800, dark=False, phone=False, scale=1):
        """Set the size of the window, the colour scheme, and touch or mouse."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": ("light", "dark")[dark]}])

    def go(self, url):
        """Open an address, or load the page again."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self):
        self.js("window.old = true")
        self.call("Page.reload")
        self.wait("!window.old && document.readyState === 'complete'")

    def js(self, expression):
        """The value of an expression in the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition, seconds=300):
        """Wait until an expression is true, and return it."""
        until = time.monotonic() + seconds
        while not (found := self._now(condition)):
            assert time.monotonic() < until, f"waited in vain for {condition}; the page says:\n{self.text()}"
            time.sleep(0.02)
        return found

    def appears(self, selector):
        """Wait until an element exists."""
        self.wait(f"document.querySelector({json.dumps(selector)}) !== null")

    def _now(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return None if "exceptionDetails" in found else found["result"].get("value")  # while a page loads, elements are missing

    def text(self, selector="body"):
        """The visible text of an element."""
        return self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def count(self, selector):
        return self.js(f"document.querySelectorAll({json.dumps(selector)}).length")

    def point(self, selector, text=None):
        """The middle of a visible element; `text`: of the one with this text."""
        find = f"""(() => {{
            const wanted = {json.dumps(text)};
            const all = [...document.querySelectorAll({json.dumps(selector)})].filter((e) => e.checkVisibility()
                && (wanted === null || e.textContent.trim() === wanted));
            if (!all.length) return null;
            const last = all[all.length - 1];
            last.scrollIntoView({{block: "nearest"}});
            const box = last.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
            const hit = document.elementFromPoint(x, y);
            return hit && (last.contains(hit) || hit.contains(last)) ? [x, y] : null;
        }})()"""
        return self.wait(find)

    def click(self, selector, text=None):
        """Click an element with the mouse."""
        x, y = self.point(selector, text)
        for kind, buttons in (("mouseMoved", 0), ("mousePressed", 1), ("mouseReleased", 0)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1)

    def tap(self, selector, text=None):
        """Tap an element."""
        x, y = self.point(selector, text)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def wheel(self, selector, down):
        x, y = self.point(selector)
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=down)

    def type(self, text):
        """Type text into the focused element, as a keyboard does."""
        self.call("Input.insertText", text=text)

    def press(self, key, shift=False, ctrl=False, **more):
        code, number, text = KEYS[key] if key in KEYS else (f"Key{key.upper()}", ord(key.upper()), key)
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 * shift + 2 * ctrl}
        down = {"text": text} if text and not ctrl else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if down else "rawKeyDown", **common, **down, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def focus(self):
        """The accessible name of the focused element."""
        object_id = self.call("Runtime.evaluate", expression="document.activeElement")["result"]["objectId"]
        nodes = self.call("Accessibility.getPartialAXTree", objectId=object_id, fetchRelatives=False)["nodes"]
        return nodes[0].get("name", {}).get("value", "")

    def files(self, selector, *paths):
        """Choose files, as in the dialog that a file input opens."""
        object_id = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")["result"]
        self.call("DOM.setFileInputFiles", objectId=object_id["objectId"], files=[str(path) for path in paths])

    def drop(self, selector, *paths):
        """Drop files on an element."""
        x, y = self.point(selector)
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def download_to(self, folder):
        """Let the page save files in this folder."""
        where = {"behavior": "allow", "browserContextId": self._context, "downloadPath": str(folder)}
        self._browser.call("Browser.setDownloadBehavior", **where)

    def picture(self):
        """A screenshot of the window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def events(self, method):
        """The browser's events of this page so far, by name."""
        self.js("1")
        found = (event for event in self._browser.events if event.get("sessionId") == self._session)
        return [event["params"] for event in found if event["method"] == method]

    def troubles(self):
        """Errors and warnings on the page's console."""
        logged = [entry["entry"]["text"] for entry in self.events("Log.entryAdded") if entry["entry"]["level"] == "error"]
        thrown = [event["exceptionDetails"]["exception"]["description"] for event in self.events("Runtime.exceptionThrown")]
        said = [
            str(event["args"]) for event in self.events("Runtime.consoleAPICalled") if event["type"] in ("error", "warning")
        ]
        return logged + thrown + said

    def close(self):
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)
