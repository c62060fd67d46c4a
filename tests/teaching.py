"""An endpoint on loopback whose answers a test chooses, and short names for what kd_train.py reads and writes."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def endpoint(reply):
    """A server on loopback; reply(prompt, how often it was asked) -> text, a dict (JSON), bytes, or (status, headers,
    bytes). asked: {prompt: times}; seen: [(path, Authorization, body)].
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body.get("state") or body.get("input") or body["messages"][-1]["content"]
            with lock:
                server.asked[prompt] += 1
                server.seen.append((self.path, self.headers.get("Authorization"), body))
            found = reply(prompt, server.asked[prompt])
            if isinstance(found, str):
                choice = {"index": 0, "message": {"role": "assistant", "content": found}, "finish_reason": "stop"}
                if found.endswith("<cut>"):
                    choice["finish_reason"] = "length"
                found = {"object": "chat.completion", "choices": [choice]}
            if isinstance(found, dict):
                found = json.dumps(found).encode()
            status, headers, data = found if isinstance(found, tuple) else (200, {}, found)
            try:
                self.send_response(status)
                for name, value in {"Content-Length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has gone
                self.close_connection = True

        def log_message(self, *args):
            pass

    lock, server = threading.Lock(), ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.asked, server.seen = True, Counter(), []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def flags(student, data, save_dir, **more):
    more = {"max_steps": 2, "batch_size": 4, "micro_batch": 2, "dev_rows": 4, "eval_steps": 2, **more}
    more = {"student": student, "data": data, "save_dir": save_dir, **more}
    return [str(x) for k, v in more.items() for x in (f"--{k}", v)]


def cached(data, kind):
    return sorted(data.with_name(f"{data.stem}.teacher").glob(f"{kind}-*"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
