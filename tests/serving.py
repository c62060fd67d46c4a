"""A real server process on loopback and a plain client for it, for the tests, the bench and the soak of serving."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEATURES = "Age: {}.0, Occupation: Scientist, Annual Income: {}.12, Outstanding Debt: {}.98, Payment Behaviour: Low"
LONG = " ".join("7" * 10 for _ in range(80))  # one token a digit: about 900 with the prompt


def rows(n, start=0):
    """n different features texts of different lengths."""
    return [FEATURES.format(i % 60 + 18, i**3, i) + ", Note: none" * (i % 7) for i in range(start, start + n)]


class Server:
    """`with Server(folder, BASE_MODEL=..., ...) as server:` runs serve_creditmix.py until the block ends.

    command: what to run instead; {port} in it becomes the port.
    """

    def __init__(self, folder, stdout=None, ready=True, command=None, **env):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        own = ("BASE_MODEL", "SFT_DIR", "KD_DIR", "DPO_DIR", "TASK", "API_KEY", "DEADLINE", "MAX_QUEUE", "HOST")
        own += ("MAX_ROW_TOKENS", "MAX_VRAM_GB", "PRECISION")
        environment = {k: v for k, v in os.environ.items() if k not in own}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {k: str(v) for k, v in env.items()} | {"PORT": str(self.port)}
        self.log, self.ready = Path(folder) / f"server-{self.port}.log", ready
        self.headers = {"X-API-Key": environment["API_KEY"]} if "API_KEY" in environment else {}
        with open(self.log, "w") as err:
            command = [part.format(port=self.port) for part in command or [sys.executable, "serve_creditmix.py"]]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout or err, stderr=err)

    def __enter__(self):
        try:
            if self.ready:
                self.wait()
        except BaseException:  # `with` does not leave a block that it did not enter
            self.process.kill()
            raise
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def wait(self, path="/readyz", seconds=300):
        """Until `path` answers 200; AssertionError with the log when the process ends or the time does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.request("GET", path, timeout=5)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.3)  # each question costs a server that is loading time too
        raise AssertionError(f"{path}: no 200 within {seconds} s\n{self.log.read_text()[-4000:]}")

    def connect(self, timeout=60):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(self, method, path, body=None, headers=None, timeout=60, connection=None):
        """-> (status, JSON or text, headers); body: what JSON takes, or bytes as they are."""
        used = connection or self.connect(timeout)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            used.request(method, path, data, {"Content-Type": "application/json", **self.headers, **(headers or {})})
            answer = used.getresponse()
            text = answer.read().decode()
            kind = answer.getheader("Content-Type", "")
            return answer.status, json.loads(text) if kind.startswith("application/json") else text, answer.headers
        finally:
            if connection is None:
                used.close()

    def infer(self, model, features, **options):
        """(status, JSON, headers) for one text or a list of them."""
        path = f"/infer/{model}" if isinstance(features, str) else f"/infer/{model}/batch"
        return self.request("POST", path, {"features": features}, **options)

    def metric(self, name):
        """The value of one line of /metrics, 0 where it has not been counted yet."""
        for line in self.request("GET", "/metrics")[1].splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        return 0.0
