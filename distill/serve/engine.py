"""The process that owns the models of a server: it collects rows of all of them into batches, one forward pass each.

serve_creditmix.py starts it and speaks HTTP in a process of its own, because launching GPU kernels and answering HTTP
compete for Python's interpreter lock. The two exchange JSON lines, on this process's standard input

    {"rows": [[number, model, token ids, question, ...], ...]}, those of one request; questions as Branch
    {"cancel": [number, ...]}   {"reload": model, "number": n}

and on its standard output

    {"state": ..., ...}  after each change   {"answers": [[number, answer or null], ...], ...}   {"log": event, ...}
    {"cancelled": [number, ...]}   {"reloaded": number, "error": null or text}

At the end of its input it answers what it has accepted, then ends.

Requests share the model by tokens, as in self-clocked fair queueing (Golestani 1994): a row's turn is the turn now
served plus the tokens of its request up to its own end, and the smallest turn comes first. A single row therefore
overtakes the rest of a long list, and no request starves.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from distill.files import UserError, one_line
from distill.model.label_forward import MAX_ROWS, token_budget
from distill.serve.models import LabelModels
from distill.serve.question_scorer import Branch, width
from distill.serve.settings import MODELS, Settings

WAIT = 0.003  # seconds that a lone row waits for others to share its pass


@dataclass(eq=False)
class Row:
    """One prompt that waits for its answer, or one text with typed questions about it.

    width: its tokens, its questions' included. tokens: to be computed, without the shared prefix. turn: in the queue.
    """

    number: int
    model: str
    ids: list[int]
    arrived: float
    questions: list[Branch] = field(default_factory=list)
    tokens: int = 0
    turn: int = 0

    def __post_init__(self):
        self.width = len(self.ids) + sum(map(width, self.questions))


class Engine:
    """Rows in, answers out: a queue, and one thread that computes. `send` takes each message to the server, a dict."""

    def __init__(self, settings: Settings, send: Callable[[dict], None]):
        self.send = send
        self.models = LabelModels(settings, self.log)
        self.queue = queue.Queue()  # of lists of rows and commands, None at the end; the server bounds it
        self.seconds, self.tokens = 0.0, 0.0  # of recent passes, decaying; their quotient is the pace
        self.busy_since = None  # end of the last pass, where rows were waiting then
        self.turn = 0  # of the row that led the last pass
        self._waiting: list[Row] = []  # taken from the queue, in the order of their turns
        self._reload: dict | None = None  # runs before the next pass
        self._ended = False

    def log(self, event: str, **fields) -> None:
        self.send({"log": event, **fields})

    def load(self) -> None:
        """Load the base model and the adapters. Error: whatever keeps the base model from loading."""
        self.models.load_base()
        self.max_tokens = token_budget(self.models.model.device)
        self.window = 64 if self.models.model.device.type == "cpu" else 2 * MAX_ROWS
        self.budget = self.max_tokens  # less for a while after a batch found no room on the GPU
        self.send_state("loading")
        for name in MODELS[1:]:
            try:
                self.models.load_adapter(name)
            except UserError as e:
                self.log("adapter not served", model=name, state=self.models.served[name].state, detail=str(e))
        self._measure(*self.models.warm())

    def receive(self, lines: Iterable[str]) -> None:
        """Queue the messages of the server, one JSON line each, until the end of its input."""
        try:
            for line in lines:
                message = json.loads(line)
                if "rows" in message:
                    now = time.monotonic()
                    self.queue.put([Row(*row[:3], now, [Branch(*one) for one in row[3:]]) for row in message["rows"]])
                else:
                    self.queue.put(message)
        finally:  # also where the server died in the middle of a line
            self.queue.put(None)

    def run(self) -> None:
        """Answer until the end of the queue."""
        while not (self._ended and not self._waiting):
            if batch := self._collect():
                self._answer(batch)
            if self._reload:
                message, self._reload, error = self._reload, None, None
                try:
                    self.models.load_adapter(message["reload"])
                    self.models.warm(record=False)  # requests are waiting
                except UserError as e:
                    error = str(e)
                self.send_state("ready")
                self.send({"reloaded": message["number"], "error": error})
                self.busy_since = None

    def send_state(self, state: str, failure: str = "") -> None:
        message = {"state": state, "failure": failure, "gpu_peak": gpu_peak()}
        message["models"] = {name: one.report() for name, one in self.models.served.items()}
        if state != "failed":
            message |= {"max_row_tokens": self.models.max_row_tokens, "prefix": self.models.prefix}
            message |= {"max_state_tokens": self.models.max_state_tokens, "context": self.models.context}
            message |= {"pass_tokens": self.max_tokens, "seconds_per_token": self.seconds_per_token}
        self.send(message)

    def _collect(self) -> list[Row]:
        """Rows of the next forward pass. A reload that arrived runs after it, before the rows that are left."""
        while True:
            with contextlib.suppress(queue.Empty):
                while not self._reload:
                    self._take(self.queue.get_nowait())
            batch = self._choose()
            if self._reload or self._ended or len(batch) < len(self._waiting):
                break
            if not batch:
                self.busy_since = None
            timeout = max(0.0, batch[0].arrived + WAIT - time.monotonic()) if batch else None
            try:
                self._take(self.queue.get(timeout=timeout))
            except queue.Empty:
                break
        if batch:
            self.turn = batch[0].turn
        chosen = set(batch)
        self._waiting = [row for row in self._waiting if row not in chosen]
        return batch

    def _take(self, item: list[Row] | dict | None) -> None:
        """Take one item of the queue: the rows of a request, a command, or the end."""
        if isinstance(item, list):
            turn = self.turn
            for row in item:
                row.tokens = row.width if row.questions else max(1, row.width - self.models.prefix)
                turn += row.tokens
                row.turn = turn
            self._waiting = sorted(self._waiting + item, key=lambda row: row.turn)
        elif item is None:
            self._ended = True
        elif "cancel" in item:  # rows already in a pass are answered all the same
            cancelled = [row for row in self._waiting if row.number in item["cancel"]]
            self._waiting = [row for row in self._waiting if row not in cancelled]
            self.send({"cancelled": [row.number for row in cancelled]})
        else:
            self._reload = item

    def _choose(self) -> list[Row]:
        """The first row and, while they fit, those nearest to it in length, since padding is computed too.

        A row of more than twice its length waits: a short row's pass is a short one. Typed questions have a pass of
        their own.
        """
        batch, longest = [], 0
        first = self._waiting[: self.window]  # later rows do not overtake these
        kind = [row for row in first if bool(row.questions) == bool(first[0].questions)]
        for row in sorted(kind, key=lambda row: abs(row.width - first[0].width)):
            widest = max(longest, row.width)
            fits = (len(batch) + 1) * widest <= self.budget and row.width <= 2 * first[0].width
            if len(batch) < MAX_ROWS and (not batch or fits):
                batch.append(row)
                longest = widest
        return batch

    def _answer(self, batch: list[Row]) -> None:
        """Score a batch and send its answers, null where the model failed. One without room on the GPU is halved."""
        import torch

        started, found, too_large = time.monotonic(), [None] * len(batch), False
        try:
            if batch[0].questions:
                found = self.models.decide([(row.model, row.ids, row.questions) for row in batch])
            else:
                found = self.models.answers([(row.model, row.ids) for row in batch])
            self.budget = min(self.max_tokens, 1.01 * self.budget)
        except Exception as e:  # the next batch may succeed
            too_large = isinstance(e, torch.OutOfMemoryError) and len(batch) > 1
            self.log("batch too large" if too_large else "batch failed", rows=len(batch), detail=one_line(e))
            if isinstance(e, torch.AcceleratorError):  # the GPU is lost to this process; a new one may reach it
                raise
        if too_large:  # outside the except block, which keeps the tensors of the failed pass alive
            torch.cuda.empty_cache()
            self.budget = len(batch) * max(row.width for row in batch) / 2
            half = len(batch) // 2
            self._answer(batch[:half])
            return self._answer(batch[half:])
        now = time.monotonic()
        # under load the time between passes counts too
        self._measure(now - (self.busy_since or started), sum(row.tokens for row in batch))
        self.busy_since = now if self.queue.qsize() or self._waiting else None
        sent = [[row.number, answer] for row, answer in zip(batch, found, strict=True)]
        self.send({"answers": sent, "seconds_per_token": self.seconds_per_token, "gpu_peak": gpu_peak()})

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / max(1.0, self.tokens)

    def _measure(self, seconds: float, tokens: int) -> None:
        """Count a pass. Large passes weigh more: a lone row on a GPU says little about the pace under load."""
        self.seconds, self.tokens = 0.8 * self.seconds + seconds, 0.8 * self.tokens + tokens


def gpu_peak() -> int:
    """Most bytes that torch has reserved on the GPU; 0 without one."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a supervisor sends them to both processes; only the input's end
        signal.signal(number, signal.SIG_IGN)  # stops this one
    # Under a memory cap a batch of a new size would otherwise make torch release its whole cache: the first request
    # took 719 instead of 69 ms (3B in NF4 under 4 GiB). Read when torch starts; the user's own setting wins.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the messages

    def send(message: dict) -> None:
        out.write(json.dumps(message) + "\n")

    engine = Engine(Settings.from_environment(), send)
    loaded = threading.Event()

    def receive() -> None:
        engine.receive(sys.stdin)
        if not loaded.is_set():  # the server has gone
            os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    try:
        engine.load()
    except Exception as e:
        engine.send_state("failed", one_line(e))
        sys.exit(2)
    loaded.set()
    engine.send_state("ready")
    engine.run()


if __name__ == "__main__":
    main()
