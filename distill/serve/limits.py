"""Around every request: limits on its body, an id, metrics for Prometheus, one line in the log."""

import asyncio
import io
import ipaddress
import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime

import psutil
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from prometheus_client import Counter, Gauge, Histogram, Summary

from distill.serve.errors import problem
from distill.serve.settings import MODELS

MAX_BODY = 256 * 1024  # bytes
MAX_FEATURES = 4000  # characters of one row
MAX_LIST = 256  # rows of one list request
BODY_SECONDS = 5  # a client's time to send its body
ASKED = ("/infer/", "/v1/systemone", "/v1/decisions")  # what waits in the queue
REJECTIONS = {
    400: "malformed",
    401: "key",
    404: "no adapter",
    408: "slow body",
    413: "too large",
    422: "invalid",
    499: "client gone",
    503: "full or not ready",
    504: "deadline",
}
QUEUED = Gauge("serve_queue_rows", "Rows that are accepted and not answered")
PEAK = Gauge("serve_gpu_peak_bytes", "Most GPU memory that was reserved; 0 on a CPU")
BATCH = Histogram("serve_batch_rows", "Rows of one forward pass", buckets=[2**i for i in range(8)])
SECONDS = Histogram("serve_request_seconds", "Time of a request", ["model"], buckets=[0.005 * 2**i for i in range(14)])
REQUESTS = Counter("serve_requests_total", "Requests by status", ["model", "status"])
REJECTED = Counter("serve_rejections_total", "Requests without a prediction", ["reason"])
CLASSES = Counter("serve_predictions_total", "Predictions by class", ["model", "label"])
QUESTIONS = Counter("serve_questions_total", "Typed questions that were answered", ["model", "type", "calibration"])
MARGIN = Summary("serve_top2_margin", "Best calibrated score less the next; a mean that moves is drift", ["model"])
LOG = logging.getLogger("serve")


def log(event: str, **fields) -> None:
    """One JSON line on standard output. It holds no text of a request, which is about people."""
    LOG.info(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}))


def open_log() -> None:
    """Write the log past sys.stdout's buffer: what a full disk refuses would stay there and make a later print fail."""
    stream = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
    LOG.handlers, LOG.propagate = [logging.StreamHandler(stream)], False
    LOG.setLevel(logging.INFO)


def listening_addresses() -> set[str]:
    """The IP addresses at which this process accepts TCP connections."""
    return {s.laddr.ip for s in psutil.Process().net_connections("tcp") if s.status == psutil.CONN_LISTEN}


async def warn_if_exposed() -> None:
    """Log a warning where the server accepts connections from other machines.

    The app does not know its address: uvicorn binds it, after the app has started.
    """
    while not (addresses := listening_addresses()):
        await asyncio.sleep(0.5)
    if found := sorted(a for a in addresses if not ipaddress.ip_address(a).is_loopback):
        log("warning", detail=f"listening on {', '.join(found)} without API_KEY: anyone who reaches it may ask")


class RequestLimits:
    """ASGI middleware: limits on a body's size and time, an id, metrics and a log line for every request.

    Not Starlette's BaseHTTPMiddleware, which hides from the handlers that a client has left.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, engine = time.monotonic(), scope["app"].state.engine
        status, size, complete = 500, 0, False
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        about = scope.setdefault("state", {})

        async def limited_receive():
            nonlocal size, complete
            try:
                async with asyncio.timeout(None if complete else max(0, started + BODY_SECONDS - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"expected the whole body within {BODY_SECONDS} s") from None
            size, complete = size + len(message.get("body", b"")), not message.get("more_body")
            if size > MAX_BODY:
                raise HTTPException(413, f"expected a body of at most {MAX_BODY} bytes")
            return message

        async def send_with_id(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        scope["deadline"] = started + engine.settings.deadline
        app = self.app
        if scope["path"].startswith(ASKED) and (full := engine.full()):  # before it costs any time
            app = JSONResponse(problem(scope["path"], full.status_code, full.detail), full.status_code, full.headers)
        try:
            await app(scope, limited_receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            model = scope.get("path_params", {}).get("model") or about.get("model")
            if model in MODELS:
                REQUESTS.labels(model, status).inc()
                SECONDS.labels(model).observe(seconds)
            if status in REJECTIONS and scope["path"].startswith(ASKED):
                REJECTED.labels(REJECTIONS[status]).inc()
            fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            log("request", **fields, ms=round(1000 * seconds, 1), client=(scope.get("client") or "?")[0], **about)
