"""The server's side of the engine process: which rows are admitted, and who waits for which answer."""

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable

from fastapi import HTTPException

from common import prompt_ids
from distill.files import ROOT, one_line
from distill.model.hub import base_config
from distill.serve.limits import BATCH, PEAK, QUEUED, log
from distill.serve.models import ServedModel
from distill.serve.settings import MODELS, Settings

FAILED = "the model failed; the server's log says why"
LOADING = ServedModel("loading").report()


class EngineClient:
    """The process that owns the models (distill/serve/engine.py), and the rows that it has yet to answer.

    state: loading, ready, failed or stopped. on_failure is called when the models cannot be loaded.
    """

    def __init__(self, settings: Settings, on_failure: Callable[[], None]):
        self.settings, self.on_failure = settings, on_failure
        self.state, self.failure, self.tokenizer, self.longest = "", "", None, 0
        self.rows: dict[int, asyncio.Future] = {}  # number -> its answer
        self.reloads: dict[int, asyncio.Future] = {}
        self.numbers = itertools.count()
        self.seconds_per_row = 0.0
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
            for waiting in (self.rows, self.reloads):
                for number in list(waiting):
                    gone = HTTPException(503, "the model's process ended and is started again", {"Retry-After": "5"})
                    settle(waiting.pop(number), gone)
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
            self.seconds_per_row = message["seconds_per_row"]
            for number, answer in message["answers"]:
                settle(self.rows.pop(number), answer or HTTPException(500, FAILED))
        elif "cancelled" in message:
            for number in message["cancelled"]:
                del self.rows[number]
        elif "reloaded" in message:
            settle(self.reloads.pop(message["reloaded"]), message["error"])
        elif message["state"] == "failed":
            self.fail(message["failure"])
        else:
            self.models, self.longest = message["models"], message["longest"]
            PEAK.set(message["gpu_peak"])
            if self.tokenizer is None:
                await asyncio.to_thread(self.load_tokenizer)
            if message["state"] == "ready" and self.state == "loading":
                self.state = "ready"
                states = {name: model["state"] for name, model in self.models.items()}
                log("ready", base_model=self.settings.base, models=states)

    def load_tokenizer(self) -> None:
        self.tokenizer = base_config(self.settings.base)[2]
        prompt_ids(self.tokenizer, self.settings.task.null_prompts())  # the first call compiles the chat template

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

    def full(self, rows: int = 1) -> HTTPException | None:
        """The 503 for `rows` more, or None. They may not fit, or would pass their deadline after the waiting ones.

        Without the second check a server slower than its queue is long computes answers that nobody waits for.
        """
        waiting = len(self.rows)
        seconds = (waiting + rows) * self.seconds_per_row
        late = waiting > 0 and seconds > 0.8 * self.settings.deadline
        if late or waiting + rows > self.settings.max_queue:
            retry = {"Retry-After": str(max(1, round(waiting * self.seconds_per_row)))}
            return HTTPException(503, f"the queue is full: {waiting} rows wait, {seconds:.0f} s", retry)
        return None

    def admit(self, name: str, texts: list[str]) -> dict[int, asyncio.Future]:
        """Queue the rows of one request, all or none -> {number: future}. Errors: HTTPException 404, 422, 503."""
        self.check(name)
        if full := self.full(len(texts)):
            raise full
        ids = prompt_ids(self.tokenizer, [self.settings.task.prompt(text) for text in texts])
        longest = max(map(len, ids))
        if longest > self.longest:
            raise HTTPException(422, f"features: {longest} tokens with the prompt, expected at most {self.longest}")
        rows = {next(self.numbers): asyncio.get_running_loop().create_future() for _ in ids}
        self.rows |= rows
        self.send(rows=[[number, name, own] for number, own in zip(rows, ids, strict=True)])
        return rows

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
