"""The process that owns the models of a server: rows of all of them, collected into batches, one forward pass each.

serve_creditmix.py starts it and speaks HTTP in a process of its own, since launching a GPU's kernels and answering
HTTP both want Python's interpreter. The two exchange JSON lines, on this process's standard input

    {"rows": [[number, model, token ids], ...]}   {"drop": [number, ...]}   {"reload": model, "number": n}

and on its standard output

    {"state": ..., ...}  after each change   {"answers": [[number, answer or null], ...], ...}   {"log": event, ...}
    {"dropped": [number, ...]}   {"reloaded": number, "error": null or text}

End of input: what was asked is answered, then it ends. One thread owns the models, since two threads with different
adapters gave wrong answers without a word.
"""

import contextlib
import itertools
import json
import os
import queue
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import Calibration, LabelScorer, Task, add_adapter, answers, load_model, prompt_ids
from distill.files import ROOT, UserError, one_line
from distill.hardware import cap_memory
from distill.model.hub import DEFAULT_STUDENT, EMBEDDED, adapter_base, check_plain

MODELS = ("base", "sft", "kd", "dpo")
MAX_ROWS = 128  # of one batch; batches are also cut where the scorer would cut them
WAIT = 0.003  # seconds that a lone row waits for company


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
    base = env.get("BASE_MODEL") or DEFAULT_STUDENT
    stem = "smollm2" if base == EMBEDDED else "creditmix"
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

    def about(self):
        fit = self.calibration and ("fitted" if self.calibration.fitted else "null")
        return {"state": self.state, "detail": self.detail, "calibration": fit}


@dataclass(eq=False)
class Row:
    """One prompt on its way through the model."""

    number: int
    model: str
    ids: list[int]
    arrived: float


class Engine:
    """Base model, adapters and scorer; `tell` takes what goes to the other process, as a dict."""

    def __init__(self, config, tell):
        self.config, self.tell = config, tell
        self.lanes = dict.fromkeys(MODELS, Lane("loading"))
        self.queue = queue.Queue()  # of rows and of what else is asked, None at the end; the other process bounds it
        self.longest, self.seconds_per_row = 0, 0.0  # tokens that fit the context; a running mean
        self.busy_since = None  # when the last pass ended, if rows were waiting then
        self._taken, self._command, self._ended = [], None, False  # from the queue: rows, oldest first; what runs next
        self._generation = itertools.count(1)

    def log(self, event, **fields):
        self.tell({"log": event, **fields})

    # the models

    def load(self):
        """Everything that answering needs. Error: whatever keeps the base model from loading."""
        cap_memory(self.config.max_vram_gb)
        self.model, self.tokenizer = load_model(self.config.base)
        # the scorer cuts batches at so many padded tokens; one collected here is then one forward pass
        cpu = self.model.device.type == "cpu"
        self.tokens, self.near = (2048, 64) if cpu else (16384, 2 * MAX_ROWS)
        self.budget = self.tokens  # of a batch; fewer for a while where the GPU had no room for so many
        self._renew_scorer()
        self.longest = self.model.config.max_position_embeddings - len(self.scorer.trie.nodes)
        task = self.config.task
        self.lanes["base"] = Lane(
            "ready", "", "__base__", task, Calibration.load(self.config.base, task), self._prior(task)
        )
        self.tell_state("loading")
        for name in MODELS[1:]:
            try:
                self.load_adapter(name)
            except UserError as e:
                self.log("adapter not served", model=name, state=self.lanes[name].state, detail=str(e))
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
        if Path(adapter_base(folder)).resolve() != Path(base).resolve():
            raise UserError(f"{shown}: trained on {adapter_base(folder)}; expected {base}")
        if (folder / "task.json").is_file():
            task = Task.load(folder / "task.json")
            if (task.labels, task.template) != (self.config.task.labels, self.config.task.template):
                raise UserError(
                    f"{shown}/task.json: fields 'labels' and 'template': expected those of the server's task"
                )
        check_plain(folder)
        calibration = Calibration.load(folder, task)
        self.model = add_adapter(self.model, folder, adapter)
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
        ids = prompt_ids(self.tokenizer, task.null_prompts())
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
            ids = prompt_ids(self.tokenizer, [self.config.task.prompt(text) for text in texts])
            ids = [own[: self.longest] for own in ids]
            try:
                self._score([ids[i % len(ids)] for i in range(n)], [names[i % len(names)] for i in range(n)])
            except Exception as e:  # out of memory, for one; smaller batches are served all the same
                self.log("not warmed up", rows=n, detail=one_line(e))
                break

    # rows

    def waiting(self):
        """Rows that are in no forward pass yet, about: the queue holds a few other things too."""
        return self.queue.qsize() + len(self._taken)

    def listen(self, lines):
        """Queue what the other process asks, one JSON line each, until its end."""
        try:
            for line in lines:
                asked = json.loads(line)
                for number, model, ids in asked.pop("rows", ()):
                    self.queue.put(Row(number, model, ids, time.monotonic()))
                if asked:
                    self.queue.put(asked)
        finally:  # also where the other process died in the middle of a line
            self.queue.put(None)

    def serve(self):
        """Answer until the end of the queue."""
        while not (self._ended and not self._taken):
            if batch := self._collect():
                self._answer(batch)
            if self._command:
                asked, self._command, error = self._command, None, None
                try:
                    self.load_adapter(asked["reload"])
                    self.warm()
                except UserError as e:
                    error = str(e)
                self.tell_state("ready")
                self.tell({"reloaded": asked["number"], "error": error})
                self.busy_since = None

    def tell_state(self, state, failure=""):
        lanes = {name: lane.about() for name, lane in self.lanes.items()}
        told = {"state": state, "failure": failure, "lanes": lanes, "longest": self.longest}
        self.tell({**told, "gpu_peak": gpu_peak()})

    def _collect(self):
        """Rows of the next forward pass; a reload that has come runs behind them, ahead of the rows that are left."""
        while True:
            with contextlib.suppress(queue.Empty):
                while not self._command:
                    self._take_one(self.queue.get_nowait())
            batch = self._choose()
            if self._command or self._ended or len(batch) < len(self._taken):
                break
            if not batch:
                self.busy_since = None
            timeout = max(0.0, batch[0].arrived + WAIT - time.monotonic()) if batch else None
            try:
                self._take_one(self.queue.get(timeout=timeout))
            except queue.Empty:
                break
        chosen = set(batch)
        self._taken = [row for row in self._taken if row not in chosen]
        return batch

    def _take_one(self, item):
        if isinstance(item, Row):
            self._taken.append(item)
        elif item is None:
            self._ended = True
        elif "drop" in item:  # rows that nobody waits for any more, as far as they are in no pass yet
            gone = [row for row in self._taken if row.number in item["drop"]]
            self._taken = [row for row in self._taken if row not in gone]
            self.tell({"dropped": [row.number for row in gone]})
        else:
            self._command = item

    def _choose(self):
        """The oldest row and, as far as they fit, those nearest to it in length: what is padded is computed too."""
        batch, longest = [], 0
        oldest = self._taken[: self.near]  # which no later one overtakes
        for row in sorted(oldest, key=lambda row: abs(len(row.ids) - len(oldest[0].ids))):
            width = max(longest, len(row.ids))
            if len(batch) < MAX_ROWS and (not batch or (len(batch) + 1) * width <= self.budget):
                batch.append(row)
                longest = width
        return batch

    def _answer(self, batch):
        """Score a batch and tell its answers, null where the model failed; one without room on the GPU by halves."""
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
            self.log("batch too large" if too_large else "batch failed", rows=len(batch), detail=one_line(e))
            if isinstance(e, torch.AcceleratorError):  # the GPU answers no more in this process; the next one may do
                raise
        if too_large:  # behind the except, which holds the tensors of the pass that failed
            torch.cuda.empty_cache()
            self.budget = len(batch) * max(len(row.ids) for row in batch) / 2
            half = len(batch) // 2
            self._answer(batch[:half])
            return self._answer(batch[half:])
        now = time.monotonic()
        took = now - (self.busy_since or started)  # under load, what lies between passes costs the rows time too
        self.seconds_per_row += 0.2 * (took / len(batch) - self.seconds_per_row)
        self.busy_since = now if self.waiting() else None
        told = [[row.number, answer] for row, answer in zip(batch, found, strict=True)]
        self.tell({"answers": told, "seconds_per_row": self.seconds_per_row, "gpu_peak": gpu_peak()})


def gpu_peak():
    """Most bytes that torch has reserved on the GPU; 0 without one."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def relative(path):
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def main():
    for number in (signal.SIGINT, signal.SIGTERM):  # a supervisor's go to both; the end of the input is what counts
        signal.signal(number, signal.SIG_IGN)
    # Segments that grow: under a cap a batch of a new size would else make torch give back all it holds, which took the
    # first request from 69 to 719 ms (3B in NF4 under 4 GiB). Before torch starts; what the user has set stays.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the lines

    def tell(message):
        out.write(json.dumps(message) + "\n")

    engine = Engine(settings(), tell)
    loaded = threading.Event()

    def listen():
        engine.listen(sys.stdin)
        if not loaded.is_set():  # nobody is left to load for
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    try:
        engine.load()
    except Exception as e:
        engine.tell_state("failed", one_line(e))
        sys.exit(2)
    loaded.set()
    engine.tell_state("ready")
    engine.serve()


if __name__ == "__main__":
    main()
