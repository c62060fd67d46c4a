"""Serve a label task over HTTP: base, SFT, KD and DPO on one base model in memory, batched, with a page to look at.

    python serve_creditmix.py                            Qwen2.5-3B with runs/creditmix_{sft,kd,dpo}, 127.0.0.1:8000
    BASE_MODEL=smollm2-135m python serve_creditmix.py    CPU: the embedded student with runs/smollm2_{sft,kd,dpo}
    uvicorn serve_creditmix:app                          the same app under any ASGI server (one worker a base model)
    python serve_creditmix.py --replicas 2               Ray Serve (requirements-ray.txt), one base model a replica

    curl -X POST localhost:8000/infer/sft -H 'Content-Type: application/json' -d '{"features": "Age: 23.0, ..."}'

Environment: BASE_MODEL; SFT_DIR, KD_DIR, DPO_DIR; TASK (data/creditmix_task.json); HOST, PORT; API_KEY (then /infer and
/admin ask for the header X-API-Key); DEADLINE (30 seconds a request); MAX_QUEUE (512 rows); MAX_VRAM_GB (the
GPU's); OFFLOAD_FOLDER.

Requests wait in a bounded queue; one thread owns the model, since two threads with different adapters gave wrong
answers without a word, and answers the rows of all four models in one forward pass. Nothing is kept on disk.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import hmac
import io
import itertools
import json
import logging
import os
import queue
import re
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import APIKeyHeader
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, Summary, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

import common
from common import ROOT, Calibration, LabelScorer, Task, UserError
from distill.adapters import check_plain
from distill.hardware import cap_memory
from infer_creditmix import answers

MODELS = ("base", "sft", "kd", "dpo")
MAX_FEATURES = 4000  # characters; the six fields need about 200
MAX_LIST = 256  # rows of one list request
MAX_BODY = 256 * 1024
BODY_SECONDS = 5  # for a client to send its body
MAX_ROWS = 128  # of one batch; batches are also cut where the scorer would cut them
WAIT = 0.003  # seconds that a lone row waits for company
COME_BACK = 0.25  # of the last pass's time, behind it: for the clients that it answered; on a GPU, where a row is cheap
EXAMPLE = (
    "Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, "
    "Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments"
)
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

QUEUED = Gauge("serve_queue_rows", "Rows that wait for the model")
PEAK = Gauge("serve_gpu_peak_bytes", "Most GPU memory that was reserved; 0 on a CPU")
BATCH = Histogram("serve_batch_rows", "Rows of one forward pass", buckets=[2**i for i in range(8)])
SECONDS = Histogram("serve_request_seconds", "Time of a request", ["model"], buckets=[0.005 * 2**i for i in range(14)])
REQUESTS = Counter("serve_requests_total", "Requests by status", ["model", "status"])
REJECTED = Counter("serve_rejections_total", "Requests without a prediction", ["reason"])
CLASSES = Counter("serve_predictions_total", "Predictions by class", ["model", "label"])
MARGIN = Summary("serve_top2_margin", "Best calibrated score less the next; a mean that moves is drift", ["model"])
LOG = logging.getLogger("serve")


def log(event, **fields):
    """One JSON line on standard output. No text of a request goes in: it is about people."""
    LOG.info(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}))


# ---------------------------------------------------------------------------------------------------------------------
# The model and the one thread that owns it


@dataclass(frozen=True)
class Settings:
    base: str
    folders: dict
    task: Task
    api_key: str
    deadline: float
    max_queue: float
    max_vram_gb: float | None


def settings():
    """The environment, checked. Error: UserError."""
    env = os.environ
    base = env.get("BASE_MODEL") or common.DEFAULT_STUDENT
    stem = "smollm2" if base == common.EMBEDDED else "creditmix"
    folders = {name: Path(env.get(f"{name.upper()}_DIR") or ROOT / "runs" / f"{stem}_{name}") for name in MODELS[1:]}
    limits = []
    for name, default in (("DEADLINE", "30"), ("MAX_QUEUE", "512"), ("MAX_VRAM_GB", "")):
        text = env.get(name) or default
        if text == default == "":
            limits.append(None)
            continue
        if not re.fullmatch(r"\d{1,9}(\.\d+)?", text) or float(text) == 0:
            raise UserError(f"environment: {name}: expected a number above 0, got {text!r}")
        limits.append(float(text))
    task = Task.load(env.get("TASK") or ROOT / "data" / "creditmix_task.json")
    return Settings(base, folders, task, env.get("API_KEY", ""), *limits)


@dataclass(frozen=True)
class Lane:
    """One of the four models. state: loading, ready, missing or broken; detail says what to do about the last two."""

    state: str
    detail: str = ""
    adapter: str = "__base__"
    task: Task | None = None
    calibration: Calibration | None = None
    prior: np.ndarray | None = None


@dataclass(eq=False)
class Row:
    """One prompt on its way through the model; the future belongs to the event loop."""

    model: str
    ids: list[int]
    arrived: float
    future: asyncio.Future


class Engine:
    """Base model, adapters and scorer, owned by one thread that takes rows from a bounded queue."""

    def __init__(self, config, on_failure):
        self.config, self.on_failure = config, on_failure
        self.loop = asyncio.get_running_loop()
        self.lanes = dict.fromkeys(MODELS, Lane("loading"))
        self.status, self.failure = "loading", ""
        self.queue = queue.Queue()  # of rows, bounded by admit(), and of commands, which always get in
        self.computing, self.seconds_per_row = 0, 0.0  # rows in the forward pass; a running mean
        self.back, self.expected = 0.0, 0  # when answered clients should be back, and then so many rows wait
        self._taken, self._command = [], None  # from the queue, by the owner: rows, oldest first, and what runs next
        self._generation = itertools.count(1)
        QUEUED.set_function(self.waiting)
        threading.Thread(target=self._run, name="model", daemon=True).start()

    def waiting(self):
        """Rows that are in no forward pass yet."""
        return self.queue.qsize() + len(self._taken)

    # on the event loop

    def check(self, model):
        """HTTPException 404 or 503 unless this model can answer now."""
        if self.status != "ready":
            raise HTTPException(503, self.failure or f"the model is {self.status}", {"Retry-After": "5"})
        lane = self.lanes[model]
        if lane.state != "ready":
            raise HTTPException(404 if lane.state == "missing" else 503, f"{model}: {lane.detail}")

    def full(self, rows=1):
        """The 503 for so many rows more, or None: they do not fit, or would pass their deadline behind the others.

        Without the second, a server slower than its queue is long computes what nobody waits for any more. Only the
        event loop adds rows, so there is no race for the last place.
        """
        waiting = self.waiting()
        seconds = (waiting + self.computing + rows) * self.seconds_per_row
        late = waiting + self.computing > 0 and seconds > 0.8 * self.config.deadline
        if late or waiting + rows > self.config.max_queue:
            retry = {"Retry-After": str(max(1, round(waiting * self.seconds_per_row)))}
            return HTTPException(503, f"the queue is full: {waiting} rows wait, {seconds:.0f} s", retry)

    def admit(self, model, texts):
        """Queue the rows of one request, all or none -> their futures. Errors: HTTPException 404, 422, 503."""
        self.check(model)
        if full := self.full(len(texts)):
            raise full
        prompts = [self.lanes[model].task.prompt(text) for text in texts]
        ids = common.prompt_ids(self.tokenizer, prompts)
        longest = max(map(len, ids))
        if longest > self.longest:
            raise HTTPException(422, f"features: {longest} tokens with the prompt, expected at most {self.longest}")
        now = time.monotonic()
        rows = [Row(model, own, now, self.loop.create_future()) for own in ids]
        for row in rows:
            self.queue.put_nowait(row)
        return [row.future for row in rows]

    async def command(self, function, *args):
        """function(*args) run by the owner between two batches."""
        done = concurrent.futures.Future()
        self.queue.put_nowait((done, function, args))
        return await asyncio.wrap_future(done)

    # in the owner's thread

    def _run(self):
        try:
            self._load()
        except Exception as e:
            self.status, self.failure = "failed", one_line(e)
            log("load failed", detail=self.failure)
            self.loop.call_soon_threadsafe(self.on_failure)
            return
        self.status = "ready"
        log("ready", base_model=self.config.base, models={name: lane.state for name, lane in self.lanes.items()})
        while self.status == "ready":
            if batch := self._collect():
                self._answer(batch)
            if self._command:
                (done, function, args), self._command = self._command, None
                if done.set_running_or_notify_cancel():
                    try:
                        done.set_result(function(*args))
                    except Exception as e:
                        done.set_exception(e)

    def stop(self):
        self.status = "stopped"

    def _load(self):
        import torch

        if cap_memory(self.config.max_vram_gb):
            PEAK.set_function(torch.cuda.max_memory_reserved)
        self.model, self.tokenizer = common.load_model(self.config.base)
        # the scorer cuts batches at so many padded tokens; one collected here is then one forward pass
        cpu = self.model.device.type == "cpu"
        self.tokens, self.come_back, self.near = (2048, 0.0, 64) if cpu else (16384, COME_BACK, 2 * MAX_ROWS)
        self.budget = self.tokens  # of a batch; fewer for a while where the GPU had no room for so many
        self._renew_scorer()
        self.longest = self.model.config.max_position_embeddings - len(self.scorer.trie.nodes)
        task = self.config.task
        self.lanes["base"] = Lane(
            "ready", "", "__base__", task, Calibration.load(self.config.base, task), self._prior(task)
        )
        for name in MODELS[1:]:
            try:
                self.load_adapter(name)
            except UserError as e:
                log("adapter not served", model=name, state=self.lanes[name].state, detail=str(e))
        self.warm()

    def load_adapter(self, name):
        """Serve the adapter in this model's folder; the one served before stays until the new one can answer.

        Error: UserError; a model that has no earlier adapter is then missing or broken, the others are unharmed.
        """
        folder, old, adapter = self.config.folders[name], self.lanes[name], f"{name}-{next(self._generation)}"
        try:
            self.lanes[name] = self._take(name, folder, adapter)
        except Exception as e:  # whatever a broken folder makes the libraries raise
            self._forget(adapter)
            if old.state != "ready":
                state = "broken" if (folder / "adapter_config.json").is_file() else "missing"
                self.lanes[name] = Lane(state, one_line(e))
            raise UserError(one_line(e)) from e
        if old.state == "ready":
            self._forget(old.adapter)

    def _take(self, name, folder, adapter):
        base, task, shown = self.config.base, self.config.task, relative(folder)
        if not (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{shown}: no adapter; train it: python {name}_train.py --student {base} "
                f"--data data/{task.name}_{name}.jsonl --save_dir {shown}"
            )
        if Path(common.adapter_base(folder)).resolve() != Path(base).resolve():
            raise UserError(f"{shown}: trained on {common.adapter_base(folder)}; expected {base}")
        if (folder / "task.json").is_file():
            task = Task.load(folder / "task.json")
            if (task.labels, task.template) != (self.config.task.labels, self.config.task.template):
                raise UserError(
                    f"{shown}/task.json: fields 'labels' and 'template': expected those of the server's task"
                )
        check_plain(folder)
        calibration = Calibration.load(folder, task)
        self.model = common.add_adapter(self.model, folder, adapter)
        self._renew_scorer()
        prior = self._prior(task, adapter)
        if not np.isfinite(prior).all():
            raise UserError(f"{shown}: its scores are not numbers")
        return Lane("ready", "", adapter, task, calibration, prior)

    def _forget(self, adapter):
        """Take an adapter out of the model, also one whose load failed half-way and that PEFT has kept."""
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(self.model, PeftModel) and adapter in self.model.peft_config:
            self.model.delete_adapter(adapter)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(adapter)
        if isinstance(self.model, PeftModel):  # whose active adapter may be the one that went
            if self.model.peft_config:
                self.model.set_adapter(next(iter(self.model.peft_config)))
            else:
                self.model = self.model.unload()
        self._renew_scorer()  # adapters are computed side by side: NaN in one would spread

    def _renew_scorer(self):
        """A scorer's head caches belong to one state of the model."""
        task = self.config.task
        self.scorer = LabelScorer(self.model, self.tokenizer, task.labels, task.null_prompts())

    def _score(self, ids, adapters):
        from peft import PeftModel  # a base that no adapter loaded on is none, and takes no names

        return self.scorer.score_ids(ids, adapters if isinstance(self.model, PeftModel) else None)

    def _prior(self, task, adapter="__base__"):
        ids = common.prompt_ids(self.tokenizer, task.null_prompts())
        return self._score(ids, [adapter] * len(ids)).mean(0)

    def warm(self):
        """Every model's head cache; on a GPU, which loads other kernels for other sizes, batches of any size too.

        The first request then costs what the hundredth does.
        """
        names = [lane.adapter for lane in self.lanes.values() if lane.state == "ready"]
        sizes, lengths = [2**i for i in range(MAX_ROWS.bit_length())], (1, 2)
        if self.model.device.type == "cpu":
            sizes, lengths = [len(names), 1], (2,)
        for n, times in itertools.product(sizes, lengths):  # rows with values are some once to twice as long
            texts = [", ".join([text] * times) for text in self.config.task.null_inputs]
            ids = common.prompt_ids(self.tokenizer, [self.config.task.prompt(text) for text in texts])
            ids = [own[: self.longest] for own in ids]
            try:
                self._score([ids[i % len(ids)] for i in range(n)], [names[i % len(names)] for i in range(n)])
            except Exception as e:  # out of memory, for one; smaller batches are served all the same
                log("not warmed up", rows=n, detail=one_line(e))
                break

    def _collect(self):
        """Rows of the next forward pass; a command that has come runs behind them, ahead of the rows that are left.

        Clients that were just answered come back one by one: who starts without them has half of them in each pass.
        """
        while True:
            with contextlib.suppress(queue.Empty):
                while not self._command:
                    self._take_one(self.queue.get_nowait())
            batch = self._choose()
            if self._command or len(batch) < len(self._taken):
                break
            until = self.back if len(batch) < self.expected else 0.0
            timeout = max(0.0, until - time.monotonic(), batch[0].arrived + WAIT - time.monotonic()) if batch else None
            try:
                self._take_one(self.queue.get(timeout=timeout))
            except queue.Empty:
                break
        self.computing = len(batch)  # before they wait no more: admit() counts both
        chosen = set(batch)
        self._taken = [row for row in self._taken if row not in chosen]
        return batch

    def _take_one(self, item):
        if isinstance(item, Row):
            self._taken.append(item)
        else:
            self._command = item

    def _choose(self):
        """The oldest row and, as far as they fit, those nearest to it in length: what is padded is computed too."""
        self._taken = [row for row in self._taken if not row.future.done()]  # else its client left or it is too late
        batch, longest = [], 0
        oldest = self._taken[: self.near]  # which no later one overtakes
        for row in sorted(oldest, key=lambda row: abs(len(row.ids) - len(oldest[0].ids))):
            width = max(longest, len(row.ids))
            if len(batch) < MAX_ROWS and (not batch or (len(batch) + 1) * width <= self.budget):
                batch.append(row)
                longest = width
        return batch

    def _answer(self, batch):
        """Score a batch and deliver its answers; one that the GPU has no room for by halves."""
        import torch

        started, found, too_large = time.monotonic(), [None] * len(batch), False
        try:
            raw = self._score([row.ids for row in batch], [self.lanes[row.model].adapter for row in batch])
            for model in {row.model for row in batch}:
                lane, rows = self.lanes[model], [i for i, row in enumerate(batch) if row.model == model]
                of_model = answers(lane.task, raw[rows], lane.prior, lane.calibration, model)
                for i, answer in zip(rows, of_model, strict=True):
                    found[i] = answer
            self.budget = min(self.tokens, 1.01 * self.budget)
        except Exception as e:  # the next batch may do
            too_large = isinstance(e, torch.OutOfMemoryError) and len(batch) > 1
            log("batch too large" if too_large else "batch failed", rows=len(batch), detail=one_line(e))
            found = [HTTPException(500, "the model failed; the server's log says why")] * len(batch)
        if too_large:  # behind the except, which holds the tensors of the pass that failed
            torch.cuda.empty_cache()
            self.budget = len(batch) * max(len(row.ids) for row in batch) / 2
            half = len(batch) // 2
            self._answer(batch[:half])
            return self._answer(batch[half:])
        BATCH.observe(len(batch))
        now = time.monotonic()
        self.back, self.expected = now + self.come_back * (now - started), len(batch) + self.waiting()
        self.seconds_per_row += 0.2 * ((now - started) / len(batch) - self.seconds_per_row)
        self.computing -= len(batch)
        self.loop.call_soon_threadsafe(deliver, batch, found)


def deliver(batch, found):
    for row, answer in zip(batch, found, strict=True):
        if not row.future.done():
            (row.future.set_exception if isinstance(answer, Exception) else row.future.set_result)(answer)


def relative(path):
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# HTTP


class Gate:
    """Around every request: an id, limits on its body's size and time, metrics and one log line.

    Plain ASGI: Starlette's BaseHTTPMiddleware would hide from the handlers that a client has left.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, size, whole, engine = time.monotonic(), 500, 0, False, scope["app"].state.engine
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        about = scope.setdefault("state", {})

        async def limited_receive():
            nonlocal size, whole
            try:
                async with asyncio.timeout(None if whole else max(0, started + BODY_SECONDS - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"expected the whole body within {BODY_SECONDS} s") from None
            size, whole = size + len(message.get("body", b"")), not message.get("more_body")
            if size > MAX_BODY:
                raise HTTPException(413, f"expected a body of at most {MAX_BODY} bytes")
            return message

        async def send_with_id(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        scope["deadline"] = started + engine.config.deadline
        app = self.app
        if scope["path"].startswith("/infer/") and (full := engine.full()):  # before anything costs time
            app = JSONResponse({"detail": full.detail}, full.status_code, full.headers)
        try:
            await app(scope, limited_receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            model = scope.get("path_params", {}).get("model")
            if model in MODELS:
                REQUESTS.labels(model, status).inc()
                SECONDS.labels(model).observe(seconds)
            if status in REJECTIONS and scope["path"].startswith("/infer/"):
                REJECTED.labels(REJECTIONS[status]).inc()
            fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            log("request", **fields, ms=round(1000 * seconds, 1), client=(scope.get("client") or "?")[0], **about)


@contextlib.asynccontextmanager
async def lifespan(app):
    # past sys.stdout's buffer: what a full disk refuses would stay in it, and in the end a print fails in its place
    stream = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
    LOG.handlers, LOG.propagate = [logging.StreamHandler(stream)], False
    LOG.setLevel(logging.INFO)
    sys.setswitchinterval(5e-4)  # else the loop waits 5 ms for the interpreter at each step while the model computes
    engine = app.state.engine = Engine(settings(), getattr(app.state, "on_failure", lambda: None))
    while getattr(app.state, "start_when_loaded", False) and engine.status == "loading":
        await asyncio.sleep(0.1)
    yield  # the server gets back here when what it has accepted is answered
    if engine.status == "ready":
        await engine.command(engine.stop)


app = FastAPI(
    title="CreditMix",
    description="Label models with calibrated scores. Probabilities mean something only for a fitted model (/readyz).",
    lifespan=lifespan,
    docs_url=None,  # the stock pages load scripts from elsewhere
    redoc_url=None,
)
app.add_middleware(Gate)


@app.exception_handler(RequestValidationError)
async def invalid(request, error):
    """422 without an echo of what was sent: it is personal, and JSON cannot carry all of it (NaN, lone surrogates)."""
    detail = [{"loc": e["loc"], "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    return Response(json.dumps({"detail": detail}), 422, media_type="application/json")


async def known(
    request: Request, key: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))]
):
    """The key, compared in constant time, where API_KEY asks for one."""
    wanted = request.app.state.engine.config.api_key
    if wanted and not hmac.compare_digest(common.sha256(key or ""), common.sha256(wanted)):
        raise HTTPException(401, "header X-API-Key: missing or wrong", {"WWW-Authenticate": "X-API-Key"})


async def operator(request: Request, _: Annotated[None, Depends(known)]):
    """A key that is asked for and given."""
    if not request.app.state.engine.config.api_key:
        raise HTTPException(403, "expected a server that was started with API_KEY")


Features = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_FEATURES)]
Scores = Annotated[dict[str, float], Field(examples=[{"Good": -0.25, "Standard": -1.75, "Bad": -3.5}])]


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid")
    features: Features = Field(examples=[EXAMPLE])


class Questions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    features: list[Features] = Field(min_length=1, max_length=MAX_LIST, examples=[[EXAMPLE]])


class Adapter(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: Literal[MODELS[1:]] = Field(examples=["sft"])


class Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
    model_name: str = Field(examples=["sft"])
    prediction: str = Field(examples=["Good"])
    scores: Scores = Field(description="calibrated")
    raw_scores: Scores = Field(description="length-normalised log-likelihoods")
    prior: Scores = Field(description="the model's mean raw scores of content-free inputs")
    probabilities: dict[str, float] = Field(examples=[{"Good": 0.79, "Standard": 0.18, "Bad": 0.03}])
    top2_margin: float = Field(description="best calibrated score less the next", examples=[1.5])


class Problem(BaseModel):
    detail: str | list[dict] = Field(examples=["the queue is full: 512 rows wait"])


PROBLEMS = {code: {"model": Problem, "description": reason} for code, reason in REJECTIONS.items()}


async def classify(request, model, texts):
    """Answers of one request's rows in order. Rows that nobody waits for any more are dropped."""
    engine = request.app.state.engine
    request.state.rows = len(texts)
    rows = asyncio.gather(*engine.admit(model, texts))
    gone = asyncio.ensure_future(request.receive())  # the body is read: the next message is the client's leaving
    try:
        left = max(0, request.scope["deadline"] - time.monotonic())
        done, _ = await asyncio.wait({rows, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if rows in done:
            found = rows.result()
        elif gone in done:
            raise HTTPException(499, "the client left")
        else:
            raise HTTPException(504, f"no answer within {engine.config.deadline:g} s")
    finally:
        rows.cancel()
        gone.cancel()
    for answer in found:
        CLASSES.labels(model, answer["prediction"]).inc()
        MARGIN.labels(model).observe(answer["top2_margin"])
    return found


@app.post("/infer/{model}", dependencies=[Depends(known)], responses=PROBLEMS)
async def infer(model: Literal[MODELS], question: Question, request: Request) -> Answer:
    """Classify one row."""
    return (await classify(request, model, [question.features]))[0]


@app.post("/infer/{model}/batch", dependencies=[Depends(known)], responses=PROBLEMS)
async def infer_list(model: Literal[MODELS], questions: Questions, request: Request) -> list[Answer]:
    """Classify a list of rows; the answers come in its order."""
    return await classify(request, model, questions.features)


@app.post("/admin/reload", dependencies=[Depends(operator)], responses=PROBLEMS | {403: {}, 409: {"model": Problem}})
async def reload(adapter: Adapter, request: Request) -> dict[str, str]:
    """Take a retrained adapter from its folder. Where it does not load, 409 says why and the one before stays."""
    engine = request.app.state.engine
    engine.check("base")
    try:
        await engine.command(engine.load_adapter, adapter.model)
        await engine.command(engine.warm)
    except UserError as e:
        log("reload refused", model=adapter.model, detail=str(e))
        raise HTTPException(409, str(e)) from None
    log("reloaded", model=adapter.model)
    return {"reloaded": adapter.model}


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers; whether the model does is /readyz."""
    return {"status": "alive"}


@app.get("/readyz", responses={503: {"description": "loading, stopped, or the base model did not load"}})
async def readyz(request: Request):
    """The state of the base and of each model; 200 once the base can answer, priors and fits included."""
    engine = request.app.state.engine
    models = {}
    for name, lane in engine.lanes.items():
        fit = lane.calibration and ("fitted" if lane.calibration.fitted else "null")
        models[name] = {"state": lane.state, "detail": lane.detail, "calibration": fit}
    about = {"status": engine.status, "detail": engine.failure, "base_model": engine.config.base}
    fields = re.findall(r"(?:^|, )([^,:]+): N/A", engine.config.task.null_inputs[0])  # for the page's form
    about |= {"labels": engine.config.task.labels, "fields": fields, "models": models}
    return JSONResponse(about, 200 if engine.status == "ready" else 503)


@app.get("/metrics", response_class=Response)
async def metrics():
    """For Prometheus: figures, no text of a request."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.get("/", response_class=HTMLResponse)
async def page():
    """The models side by side, in one file; the policy makes sure that nothing comes from elsewhere."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    text = (ROOT / "data" / "serve_page.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


# ---------------------------------------------------------------------------------------------------------------------
# Starting


def app_of_replica():
    """For Ray, which builds the app in each replica: it cannot be sent there, its metrics hold locks."""
    from serve_creditmix import app

    app.state.start_when_loaded = True  # Ray sends requests to a replica that has started
    return app


def serve_on_ray(args):
    """Replicas of this app behind one address, each with its own base model, thread and queue."""
    import ray
    from ray import serve

    # a cluster where RAY_ADDRESS names one, else this machine
    ray.init(include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    serve.start(http_options={"host": args.host, "port": args.port})

    @serve.deployment(
        num_replicas=args.replicas, max_ongoing_requests=128, ray_actor_options={"num_cpus": 1, "num_gpus": args.gpus}
    )
    @serve.ingress(app_of_replica)
    class LabelServer:
        pass

    serve.run(LabelServer.bind(), blocking=True)


def main(args):
    settings()
    if args.replicas:
        return serve_on_ray(args)
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, args.host, args.port, access_log=False, limit_concurrency=4096))
    app.state.on_failure = lambda: setattr(server, "should_exit", True)
    server.run()
    if app.state.engine.failure:
        raise UserError(app.state.engine.failure)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--host", default=os.environ.get("HOST", "127.0.0.1"), help="address (default: HOST or 127.0.0.1)")
    p.add_argument("--port", type=int, default=os.environ.get("PORT", "8000"), help="port (default: PORT or 8000)")
    p.add_argument("--replicas", type=int, help="run so many under Ray Serve (requirements-ray.txt); default: no Ray")
    p.add_argument(
        "--gpus", type=float, default=0, help="a replica's share of GPUs under Ray, such as 0.5 (default: 0)"
    )
    common.cli(main, p)
