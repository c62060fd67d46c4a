"""The models of a server: one base model in memory, and three adapters on it that can be replaced while it serves."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import Calibration, LabelScorer, Task, add_adapter, answers, load_model, prompt_ids
from distill.files import ROOT, UserError, one_line, read_json
from distill.model.hub import adapter_base, base_mismatches, check_plain, unfinished_run
from distill.model.label_forward import MAX_ROWS
from distill.serve.decision_prompt import NULL_STATES, decision_prompt
from distill.serve.question_scorer import Branch, QuestionScorer
from distill.serve.settings import MODELS, Settings

RECORDING = 30  # seconds that recording CUDA graphs may take before the server is ready
STATE_TOKENS = 2048  # most tokens of a text about which typed questions are asked
ROW_TOKENS = 1024  # most tokens of a row where no adapter's run.json says how long its training rows were


@dataclass(frozen=True)
class ServedModel:
    """One of the four models. state: loading, ready, missing or broken.

    detail: what to do about the last two, and how the base of a ready one differs from that of its training.
    """

    state: str
    detail: str = ""
    adapter: str = "__base__"
    task: Task | None = None
    calibration: Calibration | None = None
    prior: np.ndarray | None = None
    training_tokens: int | None = None  # 99th percentile of its training rows

    def report(self) -> dict:
        """What /readyz says of it."""
        fit = self.calibration and ("fitted" if self.calibration.fitted else "null")
        return {"state": self.state, "detail": self.detail, "calibration": fit, **self.class_mix()}

    def class_mix(self) -> dict:
        """The class mix that its probabilities answer for, and that of customers as they come, where it is known."""
        if not self.calibration:
            return {"class_prior": None, "natural_prior": None}
        labels, fit = self.task.labels, self.calibration
        shares = fit.class_shares or (1 / len(labels),) * len(labels)
        natural = dict(zip(labels, fit.natural_shares, strict=True)) if fit.natural_shares else None
        return {"class_prior": dict(zip(labels, shares, strict=True)), "natural_prior": natural}


class LabelModels:
    """Base model, adapters and scorer. Not thread-safe: rows of two threads would get each other's adapters.

    log(event, **fields) takes what the server's log should hold.
    """

    def __init__(self, settings: Settings, log: Callable[..., None]):
        self.settings, self.log = settings, log
        self.served = dict.fromkeys(MODELS, ServedModel("loading"))
        self.context = 0  # tokens of the longest prompt that fits the context
        self._generation = itertools.count(1)

    def load_base(self) -> None:
        """The base model and its prior. Error: whatever keeps it from loading."""
        self.model, self.tokenizer = load_model(
            self.settings.base, self.settings.precision, max_vram_gb=self.settings.max_vram_gb
        )
        self._renew_scorer()
        context = getattr(self.model.config, "max_position_embeddings", 2**31)  # a state-space model has no limit
        self.context = context - len(self.scorer.trie.nodes)
        task = self.settings.task
        calibration = self._calibration(self.settings.base, task)
        self.served["base"] = ServedModel("ready", "", "__base__", task, calibration, self._prior(task, "__base__"))

    @property
    def max_row_tokens(self) -> int:
        """Most tokens of one row with its prompt: what training rows suggest, unless MAX_ROW_TOKENS says otherwise."""
        known = [one.training_tokens for one in self.served.values() if one.training_tokens]
        return int(min(self.context, self.settings.max_row_tokens or (4 * max(known) if known else ROW_TOKENS)))

    @property
    def max_state_tokens(self) -> int:
        """Most tokens of a text about which typed questions are asked, with the chat template around it."""
        return int(min(self.context, self.settings.max_row_tokens or STATE_TOKENS))

    @property
    def prefix(self) -> int:
        """Tokens with which every prompt begins. They are computed once, not per row."""
        return len(self.scorer.forward.prefix)

    def load_adapter(self, name: str) -> None:
        """Serve the adapter in this model's folder; the one served before stays until the new one can answer.

        Error: UserError; a model that has no earlier adapter is then missing or broken, the others are unharmed.
        """
        folder, old, adapter = self.settings.folders[name], self.served[name], f"{name}-{next(self._generation)}"
        try:
            self.served[name] = self._add(name, folder, adapter)
        except Exception as e:  # whatever a broken folder makes the libraries raise
            self._remove(adapter)
            if old.state != "ready":
                state = "broken" if (folder / "adapter_config.json").is_file() else "missing"
                self.served[name] = ServedModel(state, one_line(e))
            raise UserError(one_line(e)) from e
        if old.state == "ready":
            self._remove(old.adapter)

    def answers(self, rows: list[tuple[str, list[int]]]) -> list[dict]:
        """The answer to each row (model name, token ids), in one forward pass."""
        served = [self.served[model] for model, _ in rows]
        raw = self._score([ids for _, ids in rows], [one.adapter for one in served])
        found = [{}] * len(rows)
        for model in {model for model, _ in rows}:
            one, own = self.served[model], [i for i, row in enumerate(rows) if row[0] == model]
            of_model = answers(one.task, raw[own], one.prior, one.calibration, model)
            for i, answer in zip(own, of_model, strict=True):
                found[i] = answer
        return found

    def decide(self, rows: list[tuple[str, list[int], list[Branch]]]) -> list[list[list[float]]]:
        """Probabilities of the options of each question of each row (model name, shared token ids, questions).

        One forward pass. No fit is known for such questions, so their calibration is the null one.
        """
        from scipy.special import softmax

        adapters = self._names([self.served[model].adapter for model, _, _ in rows])
        found = self.questions.answers([(ids, branches) for _, ids, branches in rows], adapters)
        null = Calibration()
        return [[softmax(null(raw, prior)).tolist() for raw, prior in questions] for questions in found]

    def warm(self, record: bool = True) -> tuple[float, int]:
        """Compute every model's prefix cache; on a GPU also batches of all sizes, which load kernels of their own.

        record: record the CUDA graphs of the expected passes, too; else each when its shape has come a few times.
        The first request then costs what the hundredth does. -> (seconds, tokens) of the last pass.
        """
        measured = 0.0, 0
        names = [one.adapter for one in self.served.values() if one.state == "ready"]
        sizes, lengths = [2**i for i in range(MAX_ROWS.bit_length())], (1, 2)
        if self.model.device.type == "cpu":
            sizes, lengths = [len(names), 1], (2,)
        for n, times in itertools.product(sizes, lengths):  # rows with values are once to twice as long
            texts = [", ".join([text] * times) for text in self.settings.task.null_inputs]
            ids = prompt_ids(self.tokenizer, [self.settings.task.prompt(text) for text in texts])
            rows = [ids[i % len(ids)][: self.context] for i in range(n)]
            started = time.monotonic()
            try:
                self._score(rows, [names[i % len(names)] for i in range(n)])
                measured = time.monotonic() - started, sum(len(row) - self.prefix for row in rows)
            except Exception as e:  # out of memory, for one; smaller batches are served all the same
                self.log("not warmed up", rows=n, detail=one_line(e))
                break
        if record and self.scorer.forward.graphs.enabled:
            self._record(max(len(row) for row in rows), names)
        return measured

    def _record(self, tokens: int, names: list[str]) -> None:
        """Record passes of the rows that training suggests, or of rows of `tokens` tokens; and of half their length."""
        started, longest = time.monotonic(), max(one.training_tokens or 0 for one in self.served.values()) or tokens
        longest = min(longest, self.max_row_tokens)
        shortest = (longest + self.prefix) // 2  # a pass has rows of up to twice its shortest
        passes = self.scorer.forward.record(shortest, longest, self._names(names), RECORDING)
        self.log("CUDA graphs recorded", passes=passes, seconds=round(time.monotonic() - started, 1))

    def _add(self, name: str, folder: Path, adapter: str) -> ServedModel:
        """Check the folder, load it as `adapter` and compute its prior."""
        base, task, shown = self.settings.base, self.settings.task, relative(folder)
        if not (folder / "adapter_config.json").is_file():
            if unfinished := unfinished_run(folder):
                raise UserError(f"{shown}: {unfinished}")
            raise UserError(
                f"not trained, since {shown} has no adapter; train it: python {name}_train.py --student {base} "
                f"--data data/{task.name}_{name}.jsonl --save_dir {shown}"
            )
        if Path(adapter_base(folder)).resolve() != Path(base).resolve():
            raise UserError(f"{shown}: trained on {adapter_base(folder)}; expected {base}")
        if (folder / "task.json").is_file():
            task = Task.load(folder / "task.json")
            if (task.labels, task.template) != (self.settings.task.labels, self.settings.task.template):
                raise UserError(
                    f"{shown}/task.json: fields 'labels' and 'template': expected those of the server's task"
                )
        check_plain(folder)
        calibration = self._calibration(folder, task)
        self.model = add_adapter(self.model, folder, adapter)
        self._renew_scorer()
        prior = self._prior(task, adapter)
        if not np.isfinite(prior).all():
            raise UserError(f"{shown}: its scores are not numbers")
        detail = "; ".join(base_mismatches(folder, self.model.precision, self.model.base_record))
        if detail:
            self.log("another base than in training", model=name, detail=detail)
        return ServedModel("ready", detail, adapter, task, calibration, prior, training_tokens(folder))

    def _calibration(self, folder: Path | str, task: Task) -> Calibration:
        """The model's calibration for the class mix of the settings; its own mix where the natural one is not known."""
        fit, target = Calibration.load(folder, task), self.settings.class_prior
        if target == "natural" and not fit.natural_shares:
            self.log("class prior not applied", folder=str(folder), detail="no natural_shares in calibration.json")
            return fit
        return fit.for_prior(target, task)

    def _remove(self, adapter: str) -> None:
        """Take an adapter out of the model, also one whose load failed half-way and that PEFT has kept."""
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(self.model, PeftModel) and adapter in self.model.peft_config:
            self.model.delete_adapter(adapter)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(adapter)
        if isinstance(self.model, PeftModel):  # its active adapter may be the one that was removed
            if self.model.peft_config:
                self.model.set_adapter(next(iter(self.model.peft_config)))
            else:
                self.model = self.model.unload()
        self._renew_scorer()  # adapters are computed side by side: NaN in one would spread

    def _renew_scorer(self) -> None:
        """A scorer's prefix caches belong to one state of the model."""
        task = self.settings.task
        self.scorer = LabelScorer(self.model, self.tokenizer, task.labels, task.null_prompts())
        self.questions = QuestionScorer(self.scorer.forward, self._null_prompts)

    def _null_prompts(self, question: str) -> list[list[int]]:
        return prompt_ids(self.tokenizer, [decision_prompt(state, question) for state in NULL_STATES])

    def _names(self, adapters: list[str]) -> list[str] | None:
        """The adapters' names, or None for a base model on which no adapter was loaded: it takes none."""
        from peft import PeftModel

        return adapters if isinstance(self.model, PeftModel) else None

    def _score(self, ids: list[list[int]], adapters: list[str]) -> np.ndarray:
        return self.scorer.score_ids(ids, self._names(adapters))

    def _prior(self, task: Task, adapter: str) -> np.ndarray:
        ids = prompt_ids(self.tokenizer, task.null_prompts())
        return self._score(ids, [adapter] * len(ids)).mean(0)


def training_tokens(folder: Path) -> int | None:
    """99th percentile of the tokens per training row, from an adapter's run.json; the longest row in an older one."""
    path = folder / "run.json"
    tokens = read_json(path).get("tokens") if path.is_file() else None
    return (tokens.get("p99") or tokens.get("longest")) if isinstance(tokens, dict) else None


def relative(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
