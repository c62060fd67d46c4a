"""The server's side of the engine process: which rows are admitted, and who waits for which answer."""

import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fastapi import HTTPException, Request

from common import prompt_ids
from distill.files import ROOT, one_line
from distill.model.hub import base_config
from distill.serve.limits import BATCH, PEAK, QUEUED, log
from distill.serve.models import ServedModel
from distill.serve.question_scorer import Branch
from distill.serve.settings import MODELS, Settings

FAILED = "the model failed; the server's log says why"
LOADING = ServedModel("loading").report()


@dataclass
class Prompt:
    """One row of a request: token ids, and how many have to be computed. questions: typed ones about its text."""

    ids: list[int]
    tokens: int
    questions: list[Branch] = field(default_factory=list)


@dataclass
class Waiting:
    """A row that was admitted: who waits for its answer, its request, its tokens without the shared prefix."""

    future: asyncio.Future
    request: int
    tokens: int


class EngineClient:
    """The process that owns the models (distill/serve/engine.py), and the rows that it has yet to answer.

    state: loading, ready, failed or stopped. on_failure is called when the models cannot be loaded.
    """

    def __init__(self, settings: Settings, on_failure: Callable[[], None]):
        self.settings, self.on_failure = settings, on_failure
        self.state, self.failure, self.tokenizer = "", "", None
        self.rows: dict[int, Waiting] = {}  # by number
        self.tokens = Counter()  # request -> tokens of its rows that wait
        self.reloads: dict[int, asyncio.Future] = {}
        self.numbers = itertools.count()
        # limits of the process, once it has loaded
        self.max_row_tokens = self.max_state_tokens = self.context = self.prefix = self.pass_tokens = 0
        self.seconds_per_token = 0.0
        self.short_row = 1  # tokens of the longest content-free input, without the prefix
        QUEUED.set_function(lambda: len(self.rows))

    async def start(self) -> None:
        """Start the process, in a session of its own: Ctrl-C reaches it as the end of its input."""
        self.state, self.models = "loading", dict.fromkeys(MODELS, LOADING)
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "limit": 2**26}
        self.process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-P", "-m", "distill.serve.engine"],
            **pipes,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,
        )
        if self.state == "stopped":  # while the process was being created
            self.kill()

    async def run(self) -> None:
        """Receive the process's messages until it is stopped. One that had loaded is started again when it dies."""
        while True:
            try:
                async for line in self.process.stdout:
                    if line.endswith(b"\n"):  # else it died in the middle of the line
                        await self.receive(json.loads(line))
            except Exception as e:  # for example a tokenizer that does not load in this process
                self.fail(one_line(e))
                self.kill()
            died = self.state == "ready"
            if died:  # admit no row for a process that has gone
                self.state = "loading"
            code = await self.process.wait()
            for future in [*map(self.remove, list(self.rows)), *self.reloads.values()]:
                gone = HTTPException(503, "the model's process ended and is started again", {"Retry-After": "5"})
                settle(future, gone)
            self.reloads.clear()
            if not died:
                break
            log("model process ended", code=code)
            await self.start()
        if self.state == "loading":
            self.fail(f"the model's process ended with code {code}")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            self.process.kill()

    async def receive(self, message: dict) -> None:
        """Act on one message of the process (distill/serve/engine.py lists them)."""
        if "log" in message:
            log(message.pop("log"), **message)
        elif "answers" in message:
            BATCH.observe(len(message["answers"]))
            PEAK.set(message["gpu_peak"])
            self.seconds_per_token = message["seconds_per_token"]
            for number, answer in message["answers"]:
                settle(self.remove(number), answer or HTTPException(500, FAILED))
        elif "cancelled" in message:
            for number in message["cancelled"]:
                self.remove(number)
        elif "reloaded" in message:
            settle(self.reloads.pop(message["reloaded"]), message["error"])
        elif message["state"] == "failed":
            self.fail(message["failure"])
        else:
            self.models, self.max_row_tokens = message["models"], message["max_row_tokens"]
            self.max_state_tokens, self.context = message["max_state_tokens"], message["context"]
            self.prefix, self.pass_tokens = message["prefix"], message["pass_tokens"]
            self.seconds_per_token = message["seconds_per_token"]
            PEAK.set(message["gpu_peak"])
            if self.tokenizer is None:
                await asyncio.to_thread(self.load_tokenizer)
            if message["state"] == "ready" and self.state == "loading":
                self.state = "ready"
                states = {name: model["state"] for name, model in self.models.items()}
                log("ready", base_model=self.settings.base, models=states)

    def load_tokenizer(self) -> None:
        self.tokenizer = base_config(self.settings.base)[2]
        ids = prompt_ids(self.tokenizer, self.settings.task.null_prompts())  # the first call compiles the template
        self.short_row = max(map(len, ids)) - self.prefix

    def send(self, **message) -> None:
        self.process.stdin.write((json.dumps(message) + "\n").encode())

    def fail(self, reason: str) -> None:
        self.state, self.failure = "failed", reason
        log("load failed", detail=reason)
        self.on_failure()

    async def stop(self) -> None:
        """End the process once it has answered what it accepted, within the deadline; at once while it is loading."""
        patience = 0 if self.state == "loading" else self.settings.deadline
        if self.state != "failed":
            self.state = "stopped"
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), patience)
        except TimeoutError:
            self.kill()

    def check(self, name: str) -> None:
        """HTTPException 404 or 503 unless this model can answer now."""
        if self.state != "ready":
            raise HTTPException(503, self.failure or f"the model is {self.state}", {"Retry-After": "5"})
        model = self.models[name]
        if model["state"] != "ready":
            raise HTTPException(404 if model["state"] == "missing" else 503, f"{name}: {model['detail']}")

    def full(self, rows: int = 1, tokens: int | None = None) -> HTTPException | None:
        """The 503 for a request of `rows` more rows, or None. They may not fit, or would pass their deadline.

        Without the second check a server slower than its queue is long computes answers that nobody waits for.
        tokens: of all its rows without the prefix; by default those of one short row.
        """
        seconds = self.seconds_until(tokens or self.short_row)
        late = self.rows and seconds > 0.8 * self.settings.deadline
        if late or len(self.rows) + rows > self.settings.max_queue:
            reason = f"the queue is full: {len(self.rows)} rows wait, {seconds:.0f} s"
            return HTTPException(503, reason, {"Retry-After": str(max(1, round(seconds)))})
        return None

    def seconds_until(self, tokens: int) -> float:
        """Expected time to the answer of a request of so many tokens.

        Requests share the model by tokens, so each other one takes at most as many before it. A pass that has begun is
        finished first.
        """
        ahead = sum(min(tokens, waiting) for waiting in self.tokens.values())
        current = min(self.tokens.total(), self.pass_tokens)
        return (max(ahead, current) + tokens) * self.seconds_per_token

    def prompts(self, texts: list[str]) -> list[Prompt]:
        """The task's prompts about these texts. Error: HTTPException 413 for one that is too long."""
        ids = prompt_ids(self.tokenizer, [self.settings.task.prompt(text) for text in texts])
        for i, row in enumerate(ids, 1):
            if len(row) > self.max_row_tokens:
                most = f"expected at most {self.max_row_tokens} (MAX_ROW_TOKENS)"
                raise HTTPException(413, f"features: row {i} has {len(row)} tokens with the prompt; {most}")
        return [Prompt(row, max(1, len(row) - self.prefix)) for row in ids]

    def admit(self, name: str, prompts: list[Prompt]) -> dict[int, asyncio.Future]:
        """Queue the rows of one request, all or none -> {number: future}. Errors: HTTPException 404, 503."""
        self.check(name)
        tokens = sum(prompt.tokens for prompt in prompts)
        if full := self.full(len(prompts), tokens):
            raise full
        request, loop = next(self.numbers), asyncio.get_running_loop()
        rows = {next(self.numbers): Waiting(loop.create_future(), request, prompt.tokens) for prompt in prompts}
        self.rows |= rows
        self.tokens[request] = tokens
        self.send(rows=[[n, name, one.ids, *one.questions] for n, one in zip(rows, prompts, strict=True)])
        return {number: row.future for number, row in rows.items()}

    async def answers(self, request: Request, name: str, prompts: list[Prompt]) -> list:
        """The answers to one request's rows, in order. Rows that no client waits for any more are cancelled.

        Errors: HTTPException of `admit`, 499 where the client left, 504 after the deadline.
        """
        request.state.rows = len(prompts)
        admitted = self.admit(name, prompts)
        rows = asyncio.gather(*admitted.values())
        left = asyncio.ensure_future(request.receive())  # the body has been read, so the next message is the disconnect
        try:
            seconds = max(0, request.scope["deadline"] - time.monotonic())
            done, _ = await asyncio.wait({rows, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if rows in done:
                return rows.result()
            if left in done:
                raise HTTPException(499, "the client left")
            raise HTTPException(504, f"no answer within {self.settings.deadline:g} s")
        finally:
            rows.cancel()
            left.cancel()
            self.cancel(admitted)

    def remove(self, number: int) -> asyncio.Future:
        """Take a row off the books -> its future."""
        row = self.rows.pop(number)
        self.tokens[row.request] -= row.tokens
        if self.tokens[row.request] <= 0:
            del self.tokens[row.request]
        return row.future

    def cancel(self, rows: Iterable[int]) -> None:
        """Take back rows that nobody waits for any more. One in a forward pass counts until that has ended."""
        if left := [number for number in rows if number in self.rows]:
            self.send(cancel=left)

    async def reload(self, name: str) -> str | None:
        """Load this model's adapter again -> None, or why the one before stays."""
        number = next(self.numbers)
        self.reloads[number] = asyncio.get_running_loop().create_future()
        self.send(reload=name, number=number)
        return await self.reloads[number]


def settle(future: asyncio.Future, result) -> None:
    """Give a future its result or exception, unless nobody waits for it any more."""
    if not future.done():
        (future.set_exception if isinstance(result, Exception) else future.set_result)(result)
