"""A headless Chromium driven through its DevTools pipe, so that a page is tested by what a person does with it.

python tests/browser.py http://127.0.0.1:8000/ data/serve_page.png     the README's picture, from a running server
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Browser:
    """`with Browser(binary, profile folder, url) as page:` one tab that has loaded url."""

    def __init__(self, binary, profile, url):
        self.from_us, self.to_us = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--window-size=1150,620", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        # Chromium reads the pipe at descriptor 3 and writes at 4; "$@" is its command line
        shell = f'exec 3<&{self.from_us[0]} 4>&{self.to_us[1]} "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "browser", binary, *flags, "about:blank"],
            pass_fds=(self.from_us[0], self.to_us[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.number, self.buffer, self.url, self.session = 0, b"", url, {}
        self.loaded = set()  # loader ids of documents whose load event has fired

    def __enter__(self):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.send("Page.enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)
        self.go(self.url)
        return self

    def __exit__(self, *error):
        self.session = {}
        try:
            self.send("Browser.close")
            self.process.wait(20)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        for descriptor in (*self.from_us, *self.to_us):
            os.close(descriptor)

    def send(self, method, seconds=60, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.from_us[1], json.dumps(message).encode() + b"\0")
        end = time.monotonic() + seconds
        while (reply := self.receive(end, method)).get("id") != self.number:
            pass
        assert "error" not in reply, reply
        return reply["result"]

    def receive(self, end, what):
        """The next message of the browser, a reply or an event; `what` is waited for until `end`."""
        while b"\0" not in self.buffer:
            assert time.monotonic() < end, f"{what}: no answer in time"
            assert self.process.poll() is None, "the browser ended"
            if select.select([self.to_us[0]], [], [], 1)[0]:
                self.buffer += os.read(self.to_us[0], 1 << 20)
        raw, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(raw)
        if message.get("method") == "Page.lifecycleEvent" and message["params"]["name"] == "load":
            self.loaded.add(message["params"]["loaderId"])
        return message

    def go(self, url, seconds=60):
        """Open url and wait for its load event: what is evaluated while a page leaves is an error."""
        end = time.monotonic() + seconds
        opened = self.send("Page.navigate", seconds, url=url)
        assert "errorText" not in opened, opened
        while opened["loaderId"] not in self.loaded:
            self.receive(end, f"the load event of {url}")

    def run(self, script):
        """Value of a JavaScript expression in the page."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, script, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.run(f"!!({script})"):
                return
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s: {script}\n{self.run('document.body.innerText')}")

    def screenshot(self, path):
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as profile, Browser(shutil.which("chromium"), profile, sys.argv[1]) as page:
        page.until("document.querySelectorAll('#models section').length === 4 && document.querySelector('[name=Age]')")
        page.run("document.querySelector('#form button').click()")
        page.until("document.querySelectorAll('.answer, .problem').length === 4")
        page.screenshot(Path(sys.argv[2]))
