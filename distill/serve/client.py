"""The server's side of the engine process: what is admitted, and who waits for which answer."""

import asyncio
import contextlib
import itertools
import json
import os
import sys

from fastapi import HTTPException

from common import prompt_ids
from distill.files import ROOT, one_line
from distill.model.hub import base_config
from distill.serve.engine import MODELS, Lane
from distill.serve.limits import BATCH, PEAK, QUEUED, log

FAILED = "the model failed; the server's log says why"
LOADING = Lane("loading").about()


class EngineClient:
    """The process that owns the models (distill/engine.py), and what it has yet to answer."""

    def __init__(self, config, on_failure):
        self.config, self.on_failure = config, on_failure
        self.state, self.failure, self.tokenizer, self.longest = "", "", None, 0
        self.rows, self.reloads, self.numbers = {}, {}, itertools.count()  # number -> future of its answer
        self.seconds_per_row = 0.0
        QUEUED.set_function(lambda: len(self.rows))

    async def start(self):
        """Start the process; in a session of its own, so that Ctrl-C reaches it as the end of its input."""
        self.state, self.lanes = "loading", dict.fromkeys(MODELS, LOADING)
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "limit": 2**26}
        self.process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-P", "-m", "distill.serve.engine"],
            **pipes,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,
        )
        if self.state == "stopped":  # meanwhile
            self.kill()

    async def run(self):
        """Hear the process until it is stopped; one that had loaded is started again when it dies."""
        while True:
            try:
                async for line in self.process.stdout:
                    if line.endswith(b"\n"):  # else it died in the middle of it
                        await self.hear(json.loads(line))
            except Exception as e:  # a model whose tokenizer does not load here, for one
                self.fail(one_line(e))
                self.kill()
            died = self.state == "ready"
            if died:  # no row is let in for a process that is gone
                self.state = "loading"
            code = await self.process.wait()
            for waits in (self.rows, self.reloads):
                for number in list(waits):
                    gone = HTTPException(503, "the model's process ended and is started again", {"Retry-After": "5"})
                    settle(waits.pop(number), gone)
            if not died:
                break
            log("model process ended", code=code)
            await self.start()
        if self.state == "loading":
            self.fail(f"the model's process ended with code {code}")

    def kill(self):
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            self.process.kill()

    async def hear(self, told):
        """Take one message of the process (distill/engine.py lists them)."""
        if "log" in told:
            log(told.pop("log"), **told)
        elif "answers" in told:
            BATCH.observe(len(told["answers"]))
            PEAK.set(told["gpu_peak"])
            self.seconds_per_row = told["seconds_per_row"]
            for number, answer in told["answers"]:
                settle(self.rows.pop(number), answer or HTTPException(500, FAILED))
        elif "dropped" in told:
            for number in told["dropped"]:
                del self.rows[number]
        elif "reloaded" in told:
            settle(self.reloads.pop(told["reloaded"]), told["error"])
        elif told["state"] == "failed":
            self.fail(told["failure"])
        else:
            self.lanes, self.longest = told["lanes"], told["longest"]
            PEAK.set(told["gpu_peak"])
            if self.tokenizer is None:
                await asyncio.to_thread(self.load_tokenizer)
            if told["state"] == "ready" and self.state == "loading":
                self.state = "ready"
                states = {name: lane["state"] for name, lane in self.lanes.items()}
                log("ready", base_model=self.config.base, models=states)

    def load_tokenizer(self):
        self.tokenizer = base_config(self.config.base)[2]
        prompt_ids(self.tokenizer, self.config.task.null_prompts())  # its first call compiles the template

    def say(self, **message):
        self.process.stdin.write((json.dumps(message) + "\n").encode())

    def fail(self, why):
        self.state, self.failure = "failed", why
        log("load failed", detail=why)
        self.on_failure()

    async def stop(self):
        """End the process behind what it has been asked, within the deadline; at once where it is still loading."""
        patience = 0 if self.state == "loading" else self.config.deadline
        if self.state != "failed":
            self.state = "stopped"
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), patience)
        except TimeoutError:
            self.kill()

    def check(self, model):
        """HTTPException 404 or 503 unless this model can answer now."""
        if self.state != "ready":
            raise HTTPException(503, self.failure or f"the model is {self.state}", {"Retry-After": "5"})
        lane = self.lanes[model]
        if lane["state"] != "ready":
            raise HTTPException(404 if lane["state"] == "missing" else 503, f"{model}: {lane['detail']}")

    def full(self, rows=1):
        """The 503 for so many rows more, or None: they do not fit, or would pass their deadline behind the others.

        Without the second, a server slower than its queue is long computes what nobody waits for any more.
        """
        waiting = len(self.rows)
        seconds = (waiting + rows) * self.seconds_per_row
        late = waiting > 0 and seconds > 0.8 * self.config.deadline
        if late or waiting + rows > self.config.max_queue:
            retry = {"Retry-After": str(max(1, round(waiting * self.seconds_per_row)))}
            return HTTPException(503, f"the queue is full: {waiting} rows wait, {seconds:.0f} s", retry)

    def admit(self, model, texts):
        """Queue the rows of one request, all or none -> {number: future}. Errors: HTTPException 404, 422, 503."""
        self.check(model)
        if full := self.full(len(texts)):
            raise full
        ids = prompt_ids(self.tokenizer, [self.config.task.prompt(text) for text in texts])
        longest = max(map(len, ids))
        if longest > self.longest:
            raise HTTPException(422, f"features: {longest} tokens with the prompt, expected at most {self.longest}")
        rows = {next(self.numbers): asyncio.get_running_loop().create_future() for _ in ids}
        self.rows |= rows
        self.say(rows=[[number, model, own] for number, own in zip(rows, ids, strict=True)])
        return rows

    def drop(self, rows):
        """Take back rows that nobody waits for any more; one in a forward pass counts until that has ended."""
        if left := [number for number in rows if number in self.rows]:
            self.say(drop=left)

    async def reload(self, model):
        """Load this model's adapter again -> None, or why the one before stays."""
        number = next(self.numbers)
        self.reloads[number] = asyncio.get_running_loop().create_future()
        self.say(reload=model, number=number)
        return await self.reloads[number]


def settle(future, found):
    """Give a future what was found, an exception or a result, unless nobody waits for it any more."""
    if not future.done():
        (future.set_exception if isinstance(found, Exception) else future.set_result)(found)
