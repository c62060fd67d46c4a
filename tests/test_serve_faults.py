"""What goes wrong around a server: killed in mid-load, full disk, slow clients, malformed bodies, a clock that jumps.

Each time: an honest status code, the process alive, nothing corrupted. The server keeps nothing on disk (priors are
computed at start-up, about one row each), so a full disk can only meet its log. Truncated adapters: test_serve.py.

10,000 malformed bodies instead of 300, and schemathesis on the app's own schema against a server with API_KEY=k:

    MALFORMED=10000 python -m pytest tests/test_serve_faults.py -k malformed
    schemathesis run http://127.0.0.1:8000/openapi.json -H "X-API-Key: k" --max-examples 1500 --mode all
"""

import concurrent.futures
import glob
import json
import os
import random
import signal
import socket
import string
import time

import psutil
import pytest
from serving import LONG, Server, rows

FAKETIME = next(iter(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")), None)  # Debian's libfaketime


@pytest.fixture(scope="module")
def server(tiny, tiny_adapter, tmp_path_factory):
    """Killed in mid-load and started again; its log goes to a full disk; its wall clock is in a file of its own."""
    home = tmp_path_factory.mktemp("faults")
    env = {"BASE_MODEL": tiny, "SFT_DIR": tiny_adapter("sft"), "KD_DIR": tiny_adapter("kd"), "DPO_DIR": home / "none"}
    with Server(home, ready=False, **env) as first:
        first.wait("/healthz")
        status, report, _ = first.request("GET", "/readyz")
        assert (status, report["status"]) == (503, "loading")
        assert first.infer("sft", "x")[0] == 503
        first.process.send_signal(signal.SIGKILL)
        assert first.process.wait(30) == -signal.SIGKILL
    clock = home / "clock"
    clock.write_text("+0")
    if FAKETIME:
        env |= {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": clock, "FAKETIME_CACHE_DURATION": 1}
        env |= {"FAKETIME_DONT_FAKE_MONOTONIC": 1}
    with open("/dev/full", "w") as full, Server(home, stdout=full, ready=False, DEADLINE=20, **env) as running:
        running.wait("/healthz")
        for _ in range(60):  # more lines than a buffer holds before the model has loaded
            running.request("GET", "/healthz")
        running.wait()
        running.clock = clock
        yield running
        assert running.process.poll() is None


def test_killed_in_mid_load_and_started_again(server, tiny_adapter):
    """The fixture has done both; the files are as they were and every model answers."""
    states = {name: model["state"] for name, model in server.request("GET", "/readyz")[1]["models"].items()}
    assert states == {"base": "ready", "sft": "ready", "kd": "ready", "dpo": "missing"}
    assert server.infer("kd", "x")[0] == 200


def test_the_process_that_owns_the_models_is_started_again(server):
    """Killed in mid-load, it costs the requests that it had an error, and its server nothing."""
    (engine,) = psutil.Process(server.process.pid).children()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.infer, "sft", [LONG] * 32) for _ in range(8)]
        end = time.monotonic() + 30
        while not server.metric("serve_queue_rows") and time.monotonic() < end:
            time.sleep(0.002)
        engine.kill()
        assert {one.result()[0] for one in asked} <= {200, 503}
    end = time.monotonic() + 30
    while server.request("GET", "/readyz")[0] == 200 and time.monotonic() < end:  # until it has heard of it
        time.sleep(0.01)
    server.wait()
    assert not server.metric("serve_queue_rows")
    assert server.infer("sft", "x")[0] == 200
    assert not engine.is_running()


def test_a_log_on_a_full_disk_stops_nobody(server):
    assert all(server.infer("sft", text)[0] == 200 for text in rows(5))
    assert server.metric('serve_requests_total{model="sft",status="200"}') >= 5


def test_slow_clients_get_408_and_hold_nobody_up(server):
    head = b"POST /infer/sft HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(20)]
    for s in slow[:10]:
        s.sendall(head)
    for s in slow[10:]:
        s.sendall(head[:30])  # not even its headers
    for text in rows(10):
        assert server.infer("sft", text)[0] == 200
        slow[0].sendall(b" ")  # a byte at a time does not keep it alive
    for s in slow[:10]:
        assert s.recv(100).startswith(b"HTTP/1.1 408 ")
    for s in slow:
        s.close()
    assert server.infer("sft", "x")[0] == 200


def malformed(rng):
    """A request body that is no question: broken JSON, another shape, wrong types, or text cut and stirred."""
    good = json.dumps({"features": "Age: 23.0, Occupation: Scientist"}).encode()
    scraps = [None, True, 0, -1e308, [], {}, "", [[]], {"features": {}}, "\x00", float("nan"), 10**400]
    kind = rng.randrange(6)
    if kind == 0:
        return good[: rng.randrange(len(good))]
    if kind == 1:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(80)))
    if kind == 2:
        return json.dumps({"features": rng.choice(scraps)}).encode()
    if kind == 3:
        name = "".join(rng.choices(string.printable, k=rng.randrange(12))) + "\ud800" * rng.randrange(2)
        return json.dumps({name: rng.choice(scraps), "features": "x"}).encode()
    if kind == 4:
        return json.dumps(rng.choice(scraps)).encode()
    stirred = bytearray(good)
    for _ in range(rng.randrange(1, 8)):
        stirred[rng.randrange(12)] = rng.randrange(256)
    return bytes(stirred) + b"}" * rng.randrange(2)


def test_malformed_bodies(server):
    rng, seen = random.Random(0), set()
    connection = server.connect()
    for i in range(int(os.environ.get("MALFORMED", "300"))):
        path = rng.choice(["/infer/sft", "/infer/base/batch", "/infer/kd"])
        body = malformed(rng)
        status, got, _ = server.request("POST", path, body, connection=connection)
        if status == 200:  # stirring may leave it well-formed
            assert isinstance(json.loads(body)["features"], str)
        else:
            assert status in (400, 422) and got["detail"], (i, body, status, got)
        seen.add(status)
    connection.close()
    assert {400, 422} <= seen
    assert server.infer("sft", "x")[0] == 200


def years_ahead(server):
    return int(server.request("GET", "/healthz")[2]["Date"].split()[3]) - time.gmtime().tm_year


@pytest.mark.skipif(FAKETIME is None, reason="Debian's libfaketime is not installed")
def test_a_clock_that_jumps_changes_nothing(server):
    """Deadlines, waiting and latencies are on the monotonic clock."""
    before = server.metric('serve_request_seconds_sum{model="sft"}')
    started = time.monotonic()
    for jump in ("+3650d", "-3650d", "+0"):
        server.clock.write_text(jump)
        assert server.infer("sft", "x")[0] == 200
        end = time.monotonic() + 10  # the server renews its Date header once a second
        while abs(years_ahead(server) * 365 - int(jump.rstrip("d"))) > 400 and time.monotonic() < end:
            time.sleep(0.1)
        assert abs(years_ahead(server) * 365 - int(jump.rstrip("d"))) < 400
        assert server.infer("sft", "x")[0] == 200
    passed = server.metric('serve_request_seconds_sum{model="sft"}') - before
    assert 0 < passed < time.monotonic() - started
